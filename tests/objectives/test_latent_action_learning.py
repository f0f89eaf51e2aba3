import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer4.batch import BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.models.latent_action import LatentActionConfig, PairConfig, infer
from dreamer4.models.sequence_latent_action import SequenceConfig
from dreamer4.nn.quantizers import FSQConfig, Quantized, VQConfig
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives import latent_action
from dreamer4.objectives.latent_action import LatentActionLearning, LatentActionWeights, changes, dilate
from dreamer4.train.state import init_state, make_step

VQ = VQConfig(codes=4, reset_every=4)
PAIR = LatentActionConfig(pair=PairConfig(channels=(8, 16), tokens=1, code_width=4), vq=VQ)
# Where nothing is to be learned.
SHALLOW = dataclasses.replace(PAIR, pair=dataclasses.replace(PAIR.pair, channels=(8,)))
KEY = jax.random.key(0)


def objective(config=PAIR):
    return LatentActionLearning(config.build(12, 12, 3))


def moved_squares(clips=4):
    """Clips of two frames in which the same square goes one of four ways."""
    batch = fake_batch(BatchSpec(clips, 2, 12, 12))
    video = np.zeros((clips, 2, 12, 12, 3), np.uint8)
    for i, (dy, dx) in enumerate([(-3, 0), (3, 0), (0, -3), (0, 3)]):
        for t in (0, 1):
            top, left = 4 + dy * t, 4 + dx * t
            video[i, t, top : top + 4, left : left + 4] = 255
    return dataclasses.replace(batch, video=jnp.asarray(video))


def started(config, optimizer):
    """The objective, its step and the state that it starts from."""
    learning = objective(config)
    state = jax.jit(functools.partial(init_state, learning, optimizer, ema=False))(KEY)
    return learning, jax.jit(make_step(learning, optimizer)), state


def trained(config, steps, optimizer):
    learning, step, state = started(config, optimizer)
    batch = moved_squares()
    for _ in range(steps):
        state, _ = step(state, None, batch, KEY)
    return learning, state


@pytest.fixture(scope="module")
def fitted():
    return trained(PAIR, 300, optax.adam(3e-3))


def test_what_happened_is_learned_and_the_codes_carry_it(fitted):
    learning, state = fitted
    found = jax.jit(learning.evaluate)(state.params, None, moved_squares(), KEY)
    np.testing.assert_allclose(found.pop("code_usage"), [0.25] * 4)
    assert found["psnr"] > 25
    assert found["gain"] > 10
    assert found["codes_used"] == 1
    ids = jax.jit(lambda params: infer(learning.model, params, moved_squares().video / 255.0).ids)(state.params)
    assert len(np.unique(ids)) == 4


def test_parameters_alone_are_what_inference_needs(fitted):
    _, state = fitted
    np.testing.assert_array_equal(state.params["codebook"], state.carry.codebook)
    assert int(state.carry.vq.steps) == 300


def test_a_collapsed_codebook_is_used_again_after_a_reset():
    config = dataclasses.replace(SHALLOW, vq=dataclasses.replace(VQ, entropy=0.0))
    _, step, state = started(config, optax.sgd(0.0))
    far = np.full((4, 4), 50.0, np.float32)
    far[0] = 0
    vq = dataclasses.replace(state.carry.vq, sums=far)
    state = dataclasses.replace(
        state, params=state.params | {"codebook": far}, carry=dataclasses.replace(state.carry, vq=vq, codebook=far)
    )
    used = []
    for _ in range(6):
        state, metrics = step(state, None, moved_squares(), KEY)
        used.append(float(metrics["codes_used"]))
    assert used[:4] == [0.25] * 4
    assert used[4] >= 0.75


def test_a_codebook_that_learns_by_gradient_is_the_optimizers():
    config = dataclasses.replace(SHALLOW, vq=dataclasses.replace(VQ, codebook="loss", reset_every=100))
    _, step, state = started(config, optax.sgd(0.1))
    before = state.params["codebook"]
    state, metrics = step(state, None, moved_squares(), KEY)
    moved = np.any(np.asarray(state.params["codebook"] != before), axis=1)
    assert moved.sum() > 0
    assert float(metrics["quantizer"]) > 0


def some_paint():
    return jnp.asarray(np.random.default_rng(0).random((4, 1, 12, 12, 3)), jnp.float32)


@pytest.fixture
def painted_loss(monkeypatch):
    """The loss as a function of the painted frames and its weights, without a model and the quantizer's part."""
    vectors = jnp.zeros((4, 1, 1, 4))
    monkeypatch.setattr(latent_action, "encode", lambda *_, **__: (vectors, {}))

    def loss(painted, weights, batch):
        monkeypatch.setattr(latent_action, "decode", lambda *_, **__: (painted, {}))
        learning = dataclasses.replace(objective(), weights=LatentActionWeights(quantizer=0.0, **weights))
        shapes = jax.eval_shape(learning.init, KEY)
        params, carry = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        value, (_, metrics) = learning.loss(params, carry, None, batch, KEY, jnp.int32(0))
        return value, metrics

    return loss


def test_what_changes_can_weigh_more_and_nothing_else_then_does(painted_loss):
    batch = moved_squares()
    video = np.array(batch.video)
    video[0, 1, 0, 0, 2] = 5  # one channel, by a hair more than noise
    video[0, 1, 0, 1] = 4
    batch = dataclasses.replace(batch, video=video)
    painted = some_paint()
    changed = np.any(np.abs(np.diff(np.asarray(batch.video, int), axis=1)) > 4, -1)
    assert changed[0, 0, 0, 0]
    assert not changed[0, 0, 0, 1]
    assert 0.1 < changed.mean() < 0.3
    error = np.square(np.asarray(painted) - np.asarray(batch.video[:, 1:], np.float32) / 255)
    gradient = jax.grad(painted_loss, has_aux=True)
    (off, plain), (on, found) = jax.jit(lambda p: [gradient(p, {"changed": x, "noise": 4}, batch) for x in (0.0, 0.5)])(
        painted
    )
    assert "changed" not in plain
    assert float(found["mse"]) == pytest.approx(error.mean(), rel=1e-5)
    assert float(found["changed"]) == pytest.approx(error[changed].mean(), rel=1e-5)
    extra = np.asarray(on - off)
    assert not np.any(extra[~changed])
    # At the first step each term is over itself.
    of_term = (np.asarray(painted) - np.asarray(batch.video[:, 1:]) / 255) * 2 / (3 * changed.sum())
    np.testing.assert_allclose(extra[changed], 0.5 * of_term[changed] / error[changed].mean(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("noise", [1, 4])
def test_noise_of_as_many_levels_changes_nothing(noise):
    """Up and down, at both ends of the levels, where differences of bytes would wrap around."""
    clean = np.asarray(moved_squares().video)
    grain = np.random.default_rng(0).integers(0, noise + 1, clean.shape)  # of two frames they differ by as much at most
    noisy = np.where(clean > 127, clean - grain, clean + grain).astype(np.uint8)
    assert np.mean(np.any(noisy[:, 1:] != noisy[:, :-1], -1)) > 0.8
    really = np.any(clean[:, 1:] != clean[:, :-1], -1)
    np.testing.assert_array_equal(changes(jnp.asarray(noisy), noise), really)
    np.testing.assert_array_equal(changes(jnp.asarray(clean), 0), really)


def test_where_nothing_changes_there_is_nothing_to_weigh(painted_loss):
    batch = moved_squares()
    batch = dataclasses.replace(batch, video=np.repeat(batch.video[:, :1], 2, axis=1))
    painted = some_paint()
    gradient = jax.value_and_grad(painted_loss, has_aux=True)
    both = jax.jit(lambda p: [gradient(p, {"changed": x}, batch) for x in (0.0, 0.5)])(painted)
    ((off, _), of_off), ((on, found), of_on) = both
    assert float(found["changed"]) == 0
    assert float(on) == float(off)
    np.testing.assert_array_equal(of_on, of_off)


def test_round_a_changed_pixel_others_count_as_changed():
    chosen = np.zeros((1, 2, 5, 6), bool)
    chosen[0, 0, 1, 2] = chosen[0, 1, 4, 5] = True
    near = np.zeros_like(chosen)
    near[0, 0, :3, 1:4] = near[0, 1, 3:, 4:] = True
    np.testing.assert_array_equal(dilate(jnp.asarray(chosen), 1), near)
    np.testing.assert_array_equal(dilate(jnp.asarray(chosen), 0), chosen)


def test_without_its_weight_the_changed_pixels_are_not_looked_at(painted_loss, monkeypatch):
    monkeypatch.delattr(latent_action, "_mean_where")
    painted = some_paint()
    value, metrics = jax.jit(lambda p: painted_loss(p, {}, moved_squares()))(painted)
    assert float(value) == pytest.approx(1, abs=1e-6)
    assert jax.eval_shape(objective().init, KEY)[1].scales.mean_square.keys() == {"mse"}
    assert metrics.keys() == {"mse", "quantizer", "codes_used", "perplexity"}


def test_vectors_reach_the_decoder_as_they_are_until_the_warm_up_ends():
    learning = dataclasses.replace(objective(SHALLOW), weights=LatentActionWeights(warmup=0.25), steps=100)
    params, carry = jax.jit(learning.init)(KEY)
    hardness = jax.vmap(learning._hardness)(jnp.asarray([0, 25, 30, 50, 99]))
    np.testing.assert_allclose(hardness, [0, 0, 0.2, 1, 1], atol=1e-6)
    other = params | {"codebook": params["codebook"] + 1.0}
    loss = jax.jit(learning.loss)
    for step, same in ((0, True), (99, False)):
        found = [loss(p, carry, None, moved_squares(), KEY, jnp.int32(step))[1][1] for p in (params, other)]
        assert (float(found[0]["mse"]) == float(found[1]["mse"])) == same


@pytest.mark.parametrize("entropy", [0.0, 1.0])
def test_what_is_set_and_not_learned_has_no_part_in_the_norm_of_the_gradient(entropy):
    pair = dataclasses.replace(SHALLOW.pair, norm="batch")
    learning = objective(dataclasses.replace(SHALLOW, pair=pair, vq=dataclasses.replace(VQ, entropy=entropy)))

    @jax.jit
    def gradient(key):
        params, carry = learning.init(key)
        return jax.grad(lambda p: learning.loss(p, carry, None, moved_squares(), key, jnp.int32(0))[0])(params)

    found = gradient(KEY)
    assert found.keys() == {"net", "codebook", "moments"}
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves((found["codebook"], found["moments"])))


def test_batch_norm_and_parts_do_not_go_together():
    learning = objective(dataclasses.replace(SHALLOW, pair=dataclasses.replace(SHALLOW.pair, frame_norm="batch")))
    shapes = jax.eval_shape(learning.init, KEY)
    with pytest.raises(UserError, match=r"train\.accumulate: 2 found with pair\.norm batch, 1 expected"):
        learning.loss(*shapes, None, moved_squares(), KEY, jnp.int32(0), parts=2)


def test_a_gain_is_over_a_clip_far_away_and_a_lone_clip_has_none(monkeypatch):
    """Each clip's code is the brightness of its second frame, and what is painted from a code is 0.1 brighter."""
    learning, own = objective(SHALLOW), np.array([0.0, 51, 0, 102, 0, 204]) / 255
    video = np.zeros((6, 2, 12, 12, 3), np.uint8)
    video[:, 1] = np.round(255 * own)[:, None, None, None]
    batch, seen = dataclasses.replace(fake_batch(BatchSpec(6, 2, 12, 12)), video=video), []

    def bright(model, params, frames):
        return SimpleNamespace(codes=frames[:, 1:, :1, :1, 0], usage=jnp.ones(4) / 4)

    def paint(model, params, frames, codes):
        seen.append(codes)
        return jnp.broadcast_to(codes[..., None] + 0.1, frames[:, 1:].shape)

    monkeypatch.setattr(latent_action, "infer", bright)
    monkeypatch.setattr(latent_action, "predict", paint)
    found, other = learning.evaluate({}, None, batch, KEY), own[[3, 4, 5, 0, 1, 2]]
    expected = 10 * np.log10(np.mean((other + 0.1 - own) ** 2) / 0.1**2)
    assert float(found["gain"]) == pytest.approx(expected, abs=1e-3)
    seen.clear()
    learning.pictures({}, None, batch, KEY)
    np.testing.assert_allclose(np.ravel(seen[1]), other, atol=1e-6)
    one = jax.tree.map(lambda x: x[:1], batch)
    assert "gain" not in learning.evaluate({}, None, one, KEY)
    assert learning.pictures({}, None, one, KEY).shape == (1, 4 * 14, 14, 3)  # a row less


def test_batch_norm_remembers_what_batches_were_like():
    config = dataclasses.replace(SHALLOW, pair=dataclasses.replace(SHALLOW.pair, norm="batch"))
    _, state = trained(config, 3, optax.sgd(0.1))
    first = state.params["moments"]["pair"]["norm_0"]
    assert np.all(np.asarray(first[1]) < 1)
    np.testing.assert_allclose(first, state.carry.moments["pair"]["norm_0"], rtol=1e-6)


def test_the_model_of_clips_is_trained_by_the_same_loss():
    transformer = TransformerConfig(d_model=16, depth=2, heads=2, time_every=2)
    plain = SequenceConfig(code_width=2, variance_weight=0.0, transformer=transformer)
    fsq, batch = FSQConfig((3, 3)), fake_batch(BatchSpec(2, 4, 12, 12))
    first, second = (
        objective(LatentActionConfig(model="sequence", quantizer="fsq", fsq=fsq, sequence=sequence))
        for sequence in (plain, dataclasses.replace(plain, variance_weight=1.0))
    )

    @jax.jit
    def losses(key):
        params, carry = first.init(key)
        return [learning.loss(params, carry, None, batch, key, jnp.int32(0)) for learning in (first, second)]

    (value, (_, metrics)), (varied, _) = losses(KEY)
    assert float(value) == pytest.approx(1, abs=1e-3)  # the scaled squared error at the first step
    assert float(varied) > float(value) + 1e-3
    assert np.isfinite(float(metrics["mse"]))


def test_each_term_of_the_loss_has_its_weight(monkeypatch):
    """At the first step a scaled term is 1, so that the weights can be read off the loss."""
    weights = LatentActionWeights(quantizer=3.0, changed=0.5, perceptual=0.25)
    seen = []

    def perceptual(scale, ours, truth):
        seen.append((ours.shape, truth.shape))
        return scale * jnp.abs(ours - truth).mean((1, 2, 3))

    full = dataclasses.replace(objective(SHALLOW), weights=weights, perceptual=perceptual)
    params, carry = jax.jit(full.init)(KEY)
    batch = moved_squares()

    def loss(painted, weights):
        monkeypatch.setattr(latent_action, "decode", lambda *_, **__: (painted, {}))
        learning = dataclasses.replace(full, weights=weights)
        value, (_, metrics) = learning.loss(params, carry, jnp.asarray(2.0), batch, KEY, jnp.int32(0))
        return value, metrics

    without = dataclasses.replace(weights, perceptual=0.0)
    gradient = jax.value_and_grad(loss, has_aux=True)
    both = jax.jit(lambda painted: [gradient(painted, x) for x in (weights, without)])(some_paint())
    ((value, metrics), felt), (_, unfelt) = both
    error = np.asarray(some_paint() - batch.video[:, 1:] / 255.0)
    assert float(metrics["lpips"]) == pytest.approx(2 * np.abs(error).mean(), rel=1e-4)
    assert set(seen) == {((4, 12, 12, 3), (4, 12, 12, 3))}
    assert float(metrics["quantizer"]) > 0.1
    assert float(value) == pytest.approx(1 + 0.5 + 0.25 + 3 * float(metrics["quantizer"]), rel=1e-4)
    expected = 0.25 * np.sign(error) / np.abs(error).sum()
    np.testing.assert_allclose(felt - unfelt, expected, atol=1e-3 * np.abs(expected).max())


def test_the_figures_of_predictions_that_are_known(monkeypatch):
    """Frames of one level each: the prediction, another clip's codes and the copy miss by what can be counted."""
    levels = np.array([[10, 40, 100, 130], [200, 190, 150, 90]]) / 255
    video = np.broadcast_to((255 * levels).round().astype(np.uint8)[..., None, None, None], (2, 4, 12, 12, 3))
    codes = jnp.asarray(np.diff(levels, axis=1), jnp.float32)

    def infer(model, params, frames):
        found = (frames[:, 1:] - frames[:, :-1]).mean((2, 3, 4))[..., None, None]
        return Quantized(found, jnp.zeros(found.shape[:3], int), jnp.zeros(()), jnp.asarray([0.5, 0, 0.5, 0]))

    def predict(model, params, frames, codes):
        return frames[:, :-1] + 0.9 * codes[..., None]

    monkeypatch.setattr(latent_action, "infer", infer)
    monkeypatch.setattr(latent_action, "predict", predict)
    batch = dataclasses.replace(fake_batch(BatchSpec(2, 4, 12, 12)), video=video)
    found = jax.jit(objective().evaluate)({}, None, batch, KEY)
    moves = np.asarray(codes)
    errors = {"psnr": 0.1 * moves, "gain": 0.9 * moves[::-1] - moves, "over_copy": moves}
    expected = {name: -10 * np.log10(np.mean(np.square(error))) for name, error in errors.items()}
    assert float(found["psnr"]) == pytest.approx(expected["psnr"], abs=1e-3)
    assert float(found["over_copy"]) == pytest.approx(20, abs=1e-3)
    assert float(found["gain"]) == pytest.approx(expected["psnr"] - expected["gain"], abs=1e-3)
    assert float(found["perplexity"]) == pytest.approx(2, abs=1e-5)
    assert float(found["codes_used"]) == 0.5
