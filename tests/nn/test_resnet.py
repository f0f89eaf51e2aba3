from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.conv import LAYOUT
from dreamer4.nn.resnet import (
    ConvolutionalDecoder,
    ConvolutionalTokenizer,
    ResidualBlock,
    decoder_flops,
    tokenizer_flops,
)


def drawn(module, *inputs):
    """Parameters of its shapes, all at random: with NumPy, which needs nothing compiled."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)


def apply(module, params, *inputs) -> Any:
    return module.apply({"params": params}, *inputs)


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


def convolve(x, params, stride=1):
    kernel = params["kernel"].reshape(3, 3, x.shape[-1], -1)
    padding = [(1, 1), (1, 1)] if stride == 1 or x.shape[1] % 2 else [(0, 1), (0, 1)]
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT)


def normalized(x, params):
    x = (x - x.mean((1, 2), keepdims=True)) / jnp.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    return x * params["scale"] + params["shift"]


def repeated(x):
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def plain_block(params, x, resample):
    """What a block is by definition: the nearest-neighbour upsampling first, then everything on the large grid."""
    x = repeated(x) if resample == "double" else x
    y = convolve(x, params["conv_0"], stride=2 if resample == "halve" else 1)
    y = jax.nn.gelu(normalized(y, params["norm_0"]))
    y = normalized(convolve(y, params["conv_1"]), params["norm_1"])
    if "shortcut" in params:
        x = x[:, ::2, ::2] if resample == "halve" else x
        x = x @ params["shortcut"]["kernel"] + params["shortcut"]["bias"]
    return jax.nn.gelu(x + y)


@pytest.mark.parametrize(
    ("resample", "size", "features"),
    [("keep", 6, 3), ("halve", 6, 5), ("halve", 7, 3), ("double", 3, 5)],
)
def test_a_block_and_its_gradient_are_those_of_its_definition(resample, size, features):
    x = pictures(2, size, size, 3)
    block = ResidualBlock(features, resample)
    params = drawn(block, x)

    def both(apply):
        def loss(params, x):
            y = apply(params, x)
            return jnp.sum(jnp.sin(3 * y)), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    found = both(lambda params, x: apply(block, params, x))
    expected = both(lambda params, x: plain_block(params, x, resample))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


@pytest.mark.parametrize("size", [(16, 16), (13, 10)])
def test_a_picture_is_halved_rounding_up_and_doubled_exactly(size):
    tokenizer, decoder = ConvolutionalTokenizer((4, 5, 6)), ConvolutionalDecoder((5, 4, 3), out=2)

    def run(x):
        (tokens, stages), _ = tokenizer.init_with_output(jax.random.key(0), x)
        return tokens, stages, decoder.init_with_output(jax.random.key(0), tokens)[0]

    tokens, stages, picture = jax.eval_shape(run, jnp.zeros((2, *size, 3)))
    up = [tuple(-(-n // 2**i) for n in size) for i in range(4)]
    assert tokens.shape == (2, *up[3], 6)
    assert [x.shape for x in stages] == [(2, *up[2], 5), (2, *up[1], 4)]
    assert picture.shape == (2, 8 * up[3][0], 8 * up[3][1], 2)


def test_without_norms_a_pixel_sees_the_places_around_it():
    x = pictures(1, 6, 6, 4)
    decoder = ConvolutionalDecoder((4,), blocks=1, norm="none")
    params = drawn(decoder, x)

    def corner(x):
        return jnp.sum(apply(decoder, params, x)[0, 0, 0])

    reach = np.any(np.asarray(jax.jit(jax.grad(corner))(x))[0] != 0, axis=-1)
    seen = np.zeros((6, 6), bool)
    seen[:2, :2] = True  # three convolutions reach the fourth pixel, which is of the second place
    np.testing.assert_array_equal(reach, seen)


def test_stages_join_where_the_grids_are_alike():
    decoder = ConvolutionalDecoder((5, 4, 3), blocks=1, norm="none")
    tokens, stages = pictures(1, 1, 1, 6), (pictures(1, 2, 2, 5), pictures(1, 4, 4, 4))
    params = drawn(decoder, tokens, stages)

    def total(stages):
        return jnp.sum(apply(decoder, params, tokens, stages) ** 2)

    for gradient in jax.jit(jax.grad(total))(stages):
        assert np.all(np.any(gradient != 0, axis=-1))
    assert {"skip_0", "skip_1"} == {name for name in params if name.startswith("skip")}
    assert not any(
        name.startswith("skip") for name in jax.eval_shape(decoder.init, jax.random.key(0), tokens)["params"]
    )


@pytest.mark.parametrize(("norm", "activation"), [("instance", "gelu"), ("none", "relu")])
def test_gradients_of_flat_pictures_are_finite_and_bfloat16_is_kept(norm, activation):
    tokenizer, decoder = (kind((4,), 1, norm, activation) for kind in (ConvolutionalTokenizer, ConvolutionalDecoder))
    x = jnp.full((1, 4, 4, 3), 0.5, jnp.bfloat16)
    both = {"tokenizer": drawn(tokenizer, x), "decoder": drawn(decoder, jnp.zeros((1, 2, 2, 4)))}

    def loss(params, x):
        tokens, _ = apply(tokenizer, params["tokenizer"], x)
        painted = apply(decoder, params["decoder"], tokens)
        assert tokens.dtype == painted.dtype == x.dtype
        return jnp.abs(painted).sum().astype(jnp.float32), tokens

    gradients, tokens = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(both, x)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradients))
    assert (activation == "relu") == (np.min(tokens) >= 0)


def test_the_count_is_two_for_each_weight_and_place():
    channels = {"tokenizer": (64, 128, 256, 256, 308), "decoder": (240, 180, 96, 64, 48)}
    tokenizer, decoder = ConvolutionalTokenizer(channels["tokenizer"]), ConvolutionalDecoder(channels["decoder"])
    x, grid = jnp.zeros((1, 256, 256, 3)), jnp.zeros((1, 8, 8, 308))
    found = {}
    for name, module, inputs in (("tokenizer", tokenizer, x), ("decoder", decoder, grid)):
        params = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
        found[name] = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            layer = path[0].key
            stage = int(layer.split("_")[1]) if layer.startswith("block") else 4
            side = 2 ** (7 - stage) if name == "tokenizer" else 2 ** (4 + stage)
            found[name] += 2 * leaf.size * side * side if path[-1].key == "kernel" else 0
    assert found["tokenizer"] == tokenizer_flops((256, 256), 3, channels["tokenizer"], 2)
    assert found["decoder"] == decoder_flops((8, 8), 308, channels["decoder"], 2, 3)
