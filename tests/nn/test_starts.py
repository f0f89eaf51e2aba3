import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.rotary import time_angles
from dreamer4.nn.starts import aligned_start, look_back
from dreamer4.nn.transformer import Attention
from tiny_transformer import CONFIG, STILL, TIME_LAYER, build, jit, tokens


def test_aligned_start_attends_by_likeness():
    params = aligned_start(build()[1])
    for name in ("space_0", "time"):
        maps = params["blocks"][name]["attention"]
        np.testing.assert_array_equal(maps["query"]["kernel"], maps["key"]["kernel"])
        value, out = maps["value"]["kernel"], maps["out"]["kernel"]
        np.testing.assert_array_equal(2 * out, jnp.swapaxes(value, 1, 2))
    grouped = build(dataclasses.replace(CONFIG, kv_heads=1))[1]
    jax.tree.map(np.testing.assert_array_equal, aligned_start(grouped), grouped)


def test_aligned_start_leaves_what_is_told_alone():
    before = build(dataclasses.replace(STILL, condition="cross"))[1]["blocks"]["space_0"]
    after = aligned_start({"space_0": before})["space_0"]
    jax.tree.map(np.testing.assert_array_equal, after["cross"], before["cross"])
    assert np.abs(after["attention"]["key"]["kernel"] - before["attention"]["key"]["kernel"]).max() > 0.1


def test_looking_back_starts_at_the_step_before():
    time, config = 6, dataclasses.replace(TIME_LAYER, context=6)
    params = look_back(config, build(config)[1])["blocks"]["time"]["attention"]
    attention = Attention(config)
    x = np.repeat(tokens(3, 1)[:, :, 0], time, axis=1)  # tokens that stay as they are, and their place alone

    @jit
    def project(params):
        angles = time_angles(jnp.arange(time), config.head_width)
        return attention.apply({"params": params}, x, angles, method=Attention.project)

    query, key, _ = project(jax.tree.map(lambda p: np.asarray(p)[0], params))
    logits = np.where(np.tri(time, dtype=bool), np.einsum("bqhk,blhk->bhql", query, key), -np.inf)
    assert (logits.argmax(-1)[:, :, 1:] == np.arange(time - 1)).all()


@pytest.mark.parametrize("fields", [{"kv_heads": 1}, {"positions": "alibi"}, {"time_every": 0}])
def test_what_cannot_look_back_stays_as_it_is(fields):
    config = dataclasses.replace(CONFIG, **fields)
    params = build(config)[1]
    jax.tree.map(np.testing.assert_array_equal, look_back(config, params), params)
