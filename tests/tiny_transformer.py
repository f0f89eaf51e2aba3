"""Transformers small enough to compile in seconds, for the tests of nn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dreamer4.nn.layout import Layout, Modality
from dreamer4.nn.sight import make_sight
from dreamer4.nn.transformer import SuperBlock, Transformer, TransformerConfig

WIDTH = 16
CONFIG = TransformerConfig(d_model=WIDTH, depth=4, heads=2, mlp_ratio=2.0, time_every=2, context=3)
ONE_BLOCK = dataclasses.replace(CONFIG, depth=2)  # one layer over space, then one over time
TIME_LAYER = dataclasses.replace(CONFIG, depth=1, time_every=1)
STILL = dataclasses.replace(CONFIG, depth=2, time_every=0)  # no layer over time
# All options at once, each in one of the two.
LEARNED = dataclasses.replace(CONFIG, positions="learned", condition="film", experts=3)
ALIBI = dataclasses.replace(CONFIG, positions="alibi", condition="adaln_zero", kv_heads=1)
LAYOUT = Layout(
    (Modality("latent", reads=("latent", "patch"), size=3), Modality("patch", reads=("patch",), grid=(2, 2))),
    temporal=3,
)
# These programs take much longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tokens(batch=2, time=7, layout=LAYOUT):
    values = np.random.default_rng(0).normal(size=(batch, time, layout.tokens, WIDTH))
    return jnp.asarray(values.astype(np.float32))


def condition_of(config, x):
    """Something to tell each time step of ``x``, where the config says that there is: a vector, or two tokens."""
    kind = (2, WIDTH) if config.condition == "cross" else (WIDTH,)
    told = np.random.default_rng(4).normal(size=(x.shape[0], 9, *kind))[:, : x.shape[1]]
    return None if config.condition == "none" else jnp.asarray(told.astype(np.float32))


@functools.cache
def build(config=CONFIG, layout=LAYOUT):
    """A transformer and parameters for it, none of them at a constant under which a mistake might not show."""
    model, rng = Transformer(config, layout), np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        matrix = path[-1].key in ("kernel", "weight")
        value = noise * leaf.shape[-2] ** -0.5 if matrix else 1 + 0.2 * noise
        return jnp.asarray(value.astype(leaf.dtype))

    one = tokens(1, 1, layout)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one, condition=condition_of(config, one))["params"]
    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def apply(model, params, x, cache=None, starts=None, condition=None):
    return model.apply({"params": params}, x, cache, starts, condition)


def cubed(model, params, x, condition=None):
    return jnp.sum(apply(model, params, x, condition=condition)[0] ** 3)


def block(config, params, x, condition):
    sight = make_sight(x.shape[1], config.context, config.rotary_width)
    return SuperBlock(config, LAYOUT).apply({"params": params}, x, None, sight, condition)


# Models and shapes are those of other tests wherever they can be, so that each program is compiled once.
program, block_program, gradient = (jit(f, static_argnums=0) for f in (apply, block, jax.grad(cubed, 1)))


def run(model, params, x, cache=None, starts=None, condition=None):
    return program(model, params, x, cache, starts, condition)  # all told, since what is left out is another program


def run_block(config, params, x, condition=None):
    return block_program(config, params, x, condition)


def layer_of(params, i):
    """The parameters of superblock ``i`` alone."""
    return jax.tree.map(lambda p: jnp.asarray(np.asarray(p)[i]), params["blocks"])


def normalised(x):
    x = np.asarray(x)
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)


def influence(config, time):
    """How much each input token (T, S) moves each output token (T, S): a (T, S, T, S) array of gradient sizes."""
    model, params = build(config)
    direction = np.random.default_rng(9).normal(size=WIDTH).astype(np.float32)
    jacobian = jit(jax.jacrev(lambda x: apply(model, params, x)[0][0] @ direction))
    return np.abs(np.asarray(jacobian(tokens(1, time)))[:, :, 0]).sum(-1)
