import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from dreamer4.data import toy
from dreamer4.errors import UserError
from dreamer4.models.patches import cosine_basis, sinusoids, to_float
from dreamer4.models.sequence_latent_action import (
    SequenceConfig,
    SequenceLatentAction,
    hide_frames,
    init_sequence,
    sequence_flops,
    variance_loss,
)
from dreamer4.nn.quantizers import FSQConfig, VQConfig, fsq
from dreamer4.nn.transformer import TransformerConfig

CONFIG = SequenceConfig(
    patch=2,
    code_width=2,
    transformer=TransformerConfig(d_model=16, depth=4, heads=2, mlp_ratio=2.0, time_every=2, context=3),
)
FSQ = FSQConfig(levels=(2, 2, 2), rounding="symmetric")
BATCH, TIME = 2, 6


def model_of(config=CONFIG, quantizer=FSQ, size=(4, 5, 3), **transformer):
    """The model of this configuration, with these fields of the transformer's changed."""
    config = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **transformer))
    return SequenceLatentAction(config, quantizer, *size)


def variant(**fields):
    return dataclasses.replace(CONFIG, **fields)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def frames(time=TIME):
    return jnp.asarray(np.random.default_rng(0).random((BATCH, time, 4, 5, 3)), jnp.float32)


def draw(model):
    """Parameters, none of them at a constant under which a mistake might not show."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise *= leaf.shape[-2] ** -0.5
        return jnp.asarray(1 + 0.2 * noise if path[-1].key in ("scale", "gain") else noise, leaf.dtype)

    shapes = jax.eval_shape(functools.partial(init_sequence, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def encode(model, params, video):
    return model.apply({"params": params}, video, method=SequenceLatentAction.encode)


def decode(model, params, video, codes, hidden=None):
    return model.apply({"params": params}, video, codes, hidden, method=SequenceLatentAction.decode)


def influence(f, *arguments):
    """How much step u of each of the arguments moves step t of what ``f`` makes of them, in the first clip: arrays of
    gradient sizes at [t, u]."""
    shape = jax.eval_shape(f, *arguments).shape
    direction = normal(9, *shape[2:])

    def gradients(*arguments):
        each = lambda *x: (f(*x)[0] * direction).reshape(shape[1], -1).sum(-1)  # noqa: E731
        return jax.jacrev(each, argnums=tuple(range(len(arguments))))(*arguments)

    found = jax.jit(gradients)(*arguments)
    assert not any(x[:, 1:].any() for x in found), "clips of a batch are mixed"
    return [np.abs(x[:, 0]).reshape(*x.shape[:1], x.shape[2], -1).sum(-1) for x in found]


@pytest.mark.parametrize(
    ("config", "transformer", "reach"),
    [
        (CONFIG, {}, 5),  # two layers over time, each of 3 frames
        (CONFIG, {"depth": 2, "context": 2}, 2),
        (variant(window="pair", pool="mean"), {}, 2),
        (variant(window="pair", odd=True), {}, 2),
    ],
)
def test_a_vector_sees_frames_up_to_its_second(config, transformer, reach):
    model = model_of(config, **transformer)
    (moved,) = influence(functools.partial(encode, model, draw(model)), frames())
    age = np.arange(1, TIME)[:, None] - np.arange(TIME)
    np.testing.assert_array_equal(moved > 0, (age >= 0) & (age < reach))


@pytest.fixture(scope="module")
def decoder():
    """A function of what is hidden to how much frames and codes move what is told."""
    model = model_of(context=TIME)
    params, codes = draw(model), normal(2, BATCH, TIME - 1, 1, 2)

    def moved(hidden):
        return influence(lambda video, codes: decode(model, params, video, codes, hidden), frames(), codes)

    return moved


def test_decoding_is_causal(decoder):
    by_frames, by_codes = decoder(None)
    past = np.tri(TIME - 1, dtype=bool)
    np.testing.assert_array_equal(by_codes > 0, past)
    np.testing.assert_array_equal(by_frames > 0, np.pad(past, ((0, 0), (0, 1))))


def test_hidden_frames_carry_no_information_and_the_first_is_never_hidden(decoder):
    by_frames, by_codes = decoder(jnp.asarray([[True, True, False, True, False]] * BATCH))
    np.testing.assert_array_equal(by_frames[-1] > 0, [True, False, True, False, True, False])
    assert (by_codes[-1] > 0).all()


def test_frames_are_hidden_at_the_asked_share_and_the_first_never():
    hidden = np.asarray(hide_frames(jax.random.key(0), (200, 11), 0.75))
    assert not hidden[:, 0].any()
    assert hidden[:, 1:].mean() == pytest.approx(0.75, abs=0.03)
    assert hide_frames(jax.random.key(1), (3, 4), 1.0)[:, 1:].all()


def test_variance_loss_by_hand():
    vectors = jnp.asarray([[[[0.0, 1.0, 4.0]], [[2.0, 1.0, 0.0]]]])  # variances 1, 0 and 4 over time
    assert variance_loss(vectors, 2.0) == pytest.approx((1 + 2 + 0) / 3)
    assert variance_loss(vectors.swapaxes(0, 1), 2.0) == pytest.approx(1.0)  # and over the batch alike


def test_variance_loss_opens_a_collapsed_encoder():
    gradient = jax.grad(variance_loss)(1e-3 * normal(0, 4, 3, 1, 2), 1.0)
    assert np.abs(gradient).min() > 0


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize(("size", "patch"), [((32, 32, 3), 8), ((16, 26, 1), 4), ((210, 160, 3), 16)])
def test_frames_of_any_size_come_back_in_float32(size, patch, pool):
    model = model_of(variant(patch=patch, pool=pool), size=size, dtype="bfloat16", remat=True)
    params = jax.eval_shape(functools.partial(init_sequence, model), jax.random.key(0))
    video = jax.ShapeDtypeStruct((2, 4, *size), jnp.float32)
    vectors = jax.eval_shape(functools.partial(encode, model), params, video)
    assert (vectors.shape, vectors.dtype) == ((2, 3, model.tokens, model.code_width), jnp.float32)
    told = jax.eval_shape(functools.partial(decode, model), params, video, vectors)
    assert (told.shape, told.dtype) == ((2, 3, *size), jnp.float32)
    assert model.grid == (math.ceil(size[0] / patch), math.ceil(size[1] / patch))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_codes_are_counted_by_the_quantizer():
    assert model_of().code_count == 8
    assert model_of(variant(code_width=32), VQConfig(codes=20)).code_count == 20


@pytest.mark.parametrize("config", [CONFIG, variant(window="pair", pool="mean", odd=True)])
def test_flops_are_those_of_the_program(config):
    model = model_of(config)
    program = jax.make_jaxpr(lambda params: model.apply({"params": params}, frames()))(draw(model))
    assert sequence_flops(model, TIME) * BATCH == multiplied(program.jaxpr)


def multiplied(jaxpr):
    """Floating point operations of the matrix products in a program."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        for inner in equation.params.values():
            total += times * multiplied(inner.jaxpr) if hasattr(inner, "jaxpr") else 0
    return total


def test_odd_vectors_change_their_sign_with_the_order_of_the_frames():
    model = model_of(variant(window="pair", odd=True))
    params, video = draw(model), frames(3)
    run = jax.jit(functools.partial(encode, model))
    forwards, backwards, still = (run(params, x) for x in (video, video[:, ::-1], jnp.repeat(video[:, :1], 3, axis=1)))
    assert np.abs(np.asarray(forwards)).max() > 1e-3
    np.testing.assert_allclose(forwards, -backwards[:, ::-1], atol=1e-5)
    np.testing.assert_allclose(still, np.zeros_like(still), atol=1e-5)


def test_what_cannot_learn_is_refused():
    with pytest.raises(UserError, match=r"odd: True found with window past, pair expected"):
        variant(odd=True)
    with pytest.raises(UserError, match=r"masked: 1.5 found, 1 or less expected"):
        variant(masked=1.5)
    with pytest.raises(UserError, match=r"pool: token .* set time_every to 2 or more"):
        variant(transformer=TransformerConfig(depth=1, time_every=1))


TOY = SequenceConfig(
    code_width=3,
    window="pair",
    masked=0.5,
    start="structured",
    transformer=TransformerConfig(d_model=48, depth=3, heads=4, mlp_ratio=2.0, time_every=3),
)


@pytest.fixture(scope="module")
def start():
    return jax.jit(functools.partial(init_sequence, SequenceLatentAction(TOY, FSQ, 16, 16)))(jax.random.key(0))


def test_structured_start(start):
    basis = cosine_basis(4, 3, 48)
    for name, expected in (("embed", basis), ("embed_known", basis), ("to_pixels", basis.T)):
        np.testing.assert_array_equal(start[name]["kernel"], expected)
    for name in ("patch_places", "known_places"):
        np.testing.assert_allclose(start[name], sinusoids((4, 4), 48), rtol=1e-6)
    for part in ("encoder", "decoder"):
        space, time = (start[part]["blocks"][layer]["attention"] for layer in ("space_0", "time"))
        np.testing.assert_array_equal(space["query"]["kernel"], space["key"]["kernel"])
        assert np.abs(time["query"]["kernel"] - time["key"]["kernel"]).max() > 0.1  # one step back


def clips_of_one_start(count, time):
    """Clips that begin with the same frame, in which a square goes where the dice say: only a code can tell where."""
    world = toy.ToyConfig(16, 16, min_side=6, max_side=6)
    color, background = jnp.asarray([[255, 255, 0]], jnp.uint8), jnp.asarray([0, 0, 60], jnp.uint8)
    first = toy.ToyState(jnp.asarray([[5, 5]]), jnp.zeros(1, int), jnp.asarray([6]), color, background)

    def play(actions):
        def step(state, action):
            state, frame, _ = toy.step(world, state, action)
            return state, frame

        return jnp.concatenate([toy.render(world, first)[None], jax.lax.scan(step, first, actions)[1]])

    actions = np.random.default_rng(0).integers(toy.UP, toy.RIGHT + 1, (count, time - 1))
    return to_float(jax.vmap(play)(jnp.asarray(actions)))


def test_codes_learn_to_tell_the_motion(start):
    model, video = SequenceLatentAction(TOY, FSQ, 16, 16), clips_of_one_start(8, 4)
    flat, unravel = ravel_pytree(start)  # one array: Adam over each of the many leaves takes seconds to compile
    adam = optax.adam(3e-3)

    def loss(flat, hidden, turn):
        params = unravel(flat)
        vectors = encode(model, params, video)
        codes = jnp.roll(fsq(FSQ, vectors).codes, turn, axis=1)
        error = jnp.mean(jnp.square(decode(model, params, video, codes, hidden) - video[:, 1:]))
        return error + TOY.variance_weight * variance_loss(vectors, TOY.variance_target), error

    def step(carry, given):
        flat, state = carry
        gradient, error = jax.grad(loss, has_aux=True)(flat, *given)
        update, state = adam.update(gradient, state)
        return (flat + update, state), error

    # The last two steps are for their errors: all frames hidden but the first, with the right codes and with others.
    steps = 400
    hidden = np.random.default_rng(1).random((steps + 2, 8, 3)) < TOY.masked
    hidden[steps:] = True
    turns = np.arange(steps + 2) == steps + 1
    # It takes longer to run than to compile.
    (flat, _), errors = jax.jit(
        functools.partial(jax.lax.scan, step), compiler_options={"xla_backend_optimization_level": 3}
    )((flat, adam.init(flat)), (jnp.asarray(hidden), jnp.asarray(turns, int)))
    right, rolled = errors[steps:]
    still = jnp.mean(jnp.square(video[:, 1:] - video[:, :-1]))
    assert right < 0.25 * still
    assert right < 0.25 * rolled
    same = jax.tree.map(lambda old, new: bool((old == new).all()), start, unravel(flat))
    assert not any(jax.tree.leaves(same)), same  # every parameter has a gradient
