import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.train.sharding import make_mesh

# Losses of a few steps: of the bare step on one device, and of the program on meshes of eight.
PROGRAM = r"""
import dataclasses, functools, json, re, unittest.mock
import jax, numpy as np
from dreamer4.batch import BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.models.tokenizer import Tokenizer, TokenizerConfig
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives.masked_autoencoding import MaskedAutoencoding
from dreamer4.train.fit import START, TrainConfig, make_program
from dreamer4.train.optimizer import OptimizerConfig, make_optimizer
from dreamer4.train.sharding import make_mesh, place_batch, state_shardings
from dreamer4.train.state import init_state, make_step

STEPS, SHAPE, KEY = 3, (8, 2), jax.random.key(0)
transformer = TransformerConfig(d_model=16, depth=1, heads=2, time_every=1)
model = Tokenizer(TokenizerConfig(patch=8, latents=4, bottleneck=8, transformer=transformer), 16, 16, 3)
objective = MaskedAutoencoding(model, steps=STEPS)
optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
batch = fake_batch(BatchSpec(*SHAPE, 16, 16))


class Fixed:
    shapes = (SHAPE,)

    def make(self, sent, key, shape):
        return sent


class Twelve(Fixed):
    shapes = ((12, 2),)


def losses(step, state):
    found = []
    for _ in range(STEPS):
        state, metrics = step(state)
        found.append([float(metrics[name]) for name in ("loss", "mse", "masked")])
    return found, state


def on_one_device():
    tx = make_optimizer(optimizer, STEPS)
    train_step = make_step(objective, tx)
    start = jax.jit(functools.partial(init_state, objective, tx, ema=False))
    step = jax.jit(lambda s: train_step(s, None, batch, KEY))
    return losses(step, start(jax.random.fold_in(KEY, START)))[0]


def on_a_mesh(fsdp):
    program = make_program(objective, Fixed(), TrainConfig(steps=STEPS, batch_size=8, fsdp=fsdp), optimizer)
    found, state = losses(lambda s: program.step(s, None, place_batch(batch, program.mesh), KEY, SHAPE), program.init())
    whole, mine = 0, 0
    for array in jax.tree.leaves((state.params, state.opt_state)):
        whole += array.nbytes
        mine += array.addressable_shards[0].data.nbytes
    return {"losses": found, "share": mine / whole, "compiled": program.step._cache_size()}


# Draws its batch inside the step, where nothing but the step says how it is laid out.
class Drawn(Fixed):
    def make(self, sent, key, shape):
        return dataclasses.replace(batch, video=jax.random.bits(key, (*shape, 16, 16, 3), np.uint8))


class Brightness:
    def init(self, key):
        return {"x": jax.numpy.zeros((8, 8))}, {}

    def loss(self, params, carry, frozen, batch, key, step):
        return jax.numpy.square(params["x"].mean() - batch.video / 255).mean(), (carry, {})


# How many clips the frames of a batch have on one device, wherever they occur in the compiled program of the step.
def clips_on_a_device(fsdp):
    program = make_program(Brightness(), Drawn(), TrainConfig(steps=STEPS, batch_size=8, fsdp=fsdp), optimizer)
    compiled = program.step.lower(program.shapes, None, None, KEY, SHAPE).compile()
    return sorted(set(re.findall(r"\[(\d+),2,16,16,3\]", compiled.as_text())))


# What each device holds of a batch where there are two processes, of which this one has all devices.
def on_two_hosts():
    with unittest.mock.patch.object(jax, "process_count", lambda: 2):
        return sorted(shard.data.tolist() for shard in place_batch(halves, mesh)["x"].addressable_shards)


def refusal(call):
    try:
        call()
    except UserError as error:
        return str(error)


halves = {"x": np.arange(16.0).reshape(8, 2)}
mesh = make_mesh(fsdp=4)
placed = place_batch(halves, mesh)["x"]
shapes = {str(s): jax.ShapeDtypeStruct(s, np.float32) for s in ((8, 4), (4, 8), (8, 8), (3, 4), (6, 3), (8,), ())}
print(json.dumps({
    "one": on_one_device(),
    "8x1": on_a_mesh(1),
    "2x4": on_a_mesh(4),
    "small batch": refusal(lambda: make_program(objective, Twelve(), TrainConfig(), optimizer)),
    "small host batch": refusal(lambda: place_batch({"x": np.zeros((12, 2))}, mesh)),
    "fsdp": refusal(lambda: make_program(objective, Fixed(), TrainConfig(fsdp=3), optimizer)),
    "specs": {shape: list(s.spec) for shape, s in state_shardings(mesh, shapes).items()},
    "rows": sorted(shard.data.tolist() for shard in placed.addressable_shards),
    "rows of two hosts": on_two_hosts(),
    "clips": {"8x1": clips_on_a_device(1), "2x4": clips_on_a_device(4)},
}))
"""


@pytest.fixture(scope="module")
def eight():
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("mesh", ["8x1", "2x4"])
def test_eight_devices_train_as_one_does(eight, mesh):
    assert eight["one"][0][1] > eight["one"][2][1] + 1e-3  # it does train: equal losses of one step say little
    np.testing.assert_allclose(eight[mesh]["losses"], eight["one"], atol=1e-5, rtol=0)


def test_fsdp_cuts_what_is_large(eight):
    assert eight["8x1"]["share"] == 1
    assert eight["2x4"]["share"] < 0.3  # a quarter, and the few small arrays that stay whole


def test_the_largest_axis_that_divides_is_cut(eight):
    assert eight["specs"] == {
        "(8, 4)": ["fsdp", None],
        "(4, 8)": [None, "fsdp"],
        "(8, 8)": [None, "fsdp"],
        "(3, 4)": [None, "fsdp"],
        "(6, 3)": [None, None],
        "(8,)": [None],
        "()": [],
    }


def test_the_step_compiles_once_on_a_mesh(eight):
    assert eight["8x1"]["compiled"] == eight["2x4"]["compiled"] == 1


@pytest.mark.parametrize("hosts", ["rows", "rows of two hosts"])
def test_each_device_gets_its_own_clips(eight, hosts):
    assert eight[hosts] == [[[2.0 * i, 2.0 * i + 1]] for i in range(8)]


@pytest.mark.parametrize("mesh", ["8x1", "2x4"])
def test_a_batch_that_is_made_inside_the_step_is_split_over_all_devices(eight, mesh):
    assert eight["clips"][mesh] == ["1"]


def test_what_does_not_split_is_refused(eight):
    sentence = "train.batch_size: 12 clips cannot be split evenly over 8 devices"
    assert eight["small batch"] == eight["small host batch"] == sentence
    assert eight["fsdp"] == "train.fsdp: 3 must divide the number of devices, 8"


def test_one_device_is_a_mesh_of_one():
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.size == jax.device_count()
    assert mesh.shape["fsdp"] == 1


@pytest.mark.parametrize("fsdp", [0, -1])
def test_fsdp_must_count_devices(fsdp):
    with pytest.raises(UserError, match=f"train.fsdp: {fsdp} must divide"):
        make_mesh(fsdp)
