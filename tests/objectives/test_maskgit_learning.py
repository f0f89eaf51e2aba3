import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer4.batch import ActionComponent, Batch, BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig, init_maskgit
from dreamer4.models.video_tokenizer import VideoTokenizer, VideoTokenizerConfig, init_video_tokenizer
from dreamer4.nn.quantizers import FSQConfig, fsq_codes, fsq_ids
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives.maskgit import MaskedTokens, MaskedTokensConfig, Sampling, clip_mean
from dreamer4.rollout.evaluation import Horizon
from dreamer4.rollout.unmask import Unmasker
from dreamer4.train.state import Objective

ACTIONS = (ActionComponent("button", "categorical", 3),)
FSQ = FSQConfig((3, 2), rounding="symmetric")
GRID, TOKENS, CLIPS, TIME = (2, 3), 6, 4, 5
TOKENIZER = VideoTokenizer(
    VideoTokenizerConfig(6, FSQ, transformer=TransformerConfig(8, 1, 1, time_every=1, context=4)), height=12, width=18
)
SMALL = TransformerConfig(
    d_model=16, depth=2, heads=2, mlp_ratio=2.0, time_every=2, context=5, soft_cap=None, condition="film"
)


class Oracle(MaskGIT):
    """Logits that are parameters, one for each token and code, whatever it is shown."""

    def setup(self):
        self.logits = self.param("logits", lambda _: jnp.zeros((CLIPS, TIME, TOKENS, sum(self.heads))))

    def __call__(self, codes, masked, action, labelled, *, cache=None, drafts=False):
        return self.logits, cache, jnp.asarray(1.5)


def objective(model=Oracle, *, transformer=SMALL, **fields):
    made = model(MaskGITConfig(transformer=transformer), FSQ, GRID, ACTIONS)
    return MaskedTokens(made, TOKENIZER, MaskedTokensConfig(**fields), Sampling(steps=3), Horizon(2, 3))


def clips(ids, **fields):
    """A batch of these codes (B, T, N), made beforehand."""
    batch = fake_batch(BatchSpec(*ids.shape[:2], 12, 18, actions=ACTIONS))
    return dataclasses.replace(batch, latents=fsq_codes(FSQ, jnp.asarray(ids)), **fields)


IDS = np.random.default_rng(0).integers(0, FSQ.codes, (CLIPS, TIME, TOKENS))
PARAMS = {"logits": jnp.asarray(np.random.default_rng(1).normal(size=(CLIPS, TIME, TOKENS, 6)), jnp.float32)}


def draw(init, model):
    """Random parameters, without a program that draws them as a model would start."""
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(functools.partial(init, model), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)), shapes)


def loss(ours, params, batch, *, seed=0, frozen=None):
    return ours.loss(params, {}, frozen, batch, jax.random.key(seed), jnp.asarray(0))


def masks(draws=2000, time=TIME, **fields):
    """What is hidden in many batches: (draws * CLIPS, T, N)."""
    draw = functools.partial(objective(**fields).mask, lead=(CLIPS, time))
    found = jax.jit(jax.vmap(lambda key: draw(key)))(jax.random.split(jax.random.key(0), draws))
    return np.asarray(found).reshape(-1, time, TOKENS)


MASKS = {
    "defaults": {},
    "everywhere": {"clean_past": 0.0},
    "all of the rest": {"clean_past": 0.0, "mask_low": 1.0},
    "hardly any": {"mask_low": 0.0, "mask_high": 1e-6},
    "cosine": {"clean_past": 0.0, "mask_ratio": "cosine", "mask_low": 0.0},
    "whole": {"whole": 1.0, "clean_past": 0.2},
    "last": {"clean_past": 1.0, "horizon": 3},
    "pairs": {"time": 2, "horizon": 4},
    "drafts": {"drafts": True},
}


@pytest.mark.parametrize("name", MASKS)
def test_some_of_every_clip_is_hidden_and_one_frame_is_whole(name):
    found = masks(**MASKS[name])
    assert found.any((1, 2)).all()
    assert (~found.any(2)).any(1).all()


def test_tokens_are_hidden_at_the_ratio_of_their_clip():
    found = masks(clean_past=0.0, mask_low=0.5)
    whole = ~found.any(2)
    assert whole.sum(1).mean() == pytest.approx(1, abs=0.1)  # but for frames that chance leaves whole
    np.testing.assert_allclose(whole.mean(0), 0.2, atol=0.03)
    share = found.sum((1, 2)) / (4 * TOKENS)
    assert share.mean() == pytest.approx(0.75, abs=0.01)
    assert share.std() > 0.15  # clips differ by more than chance among their tokens: 0.145 and 0.09
    np.testing.assert_allclose(found.mean(0), 0.75 * 0.8, atol=0.02)
    cosine = masks(clean_past=0.0, mask_low=0.0, mask_ratio="cosine")
    assert cosine.sum((1, 2)).mean() / (4 * TOKENS) == pytest.approx(2 / np.pi, abs=0.01)


def test_a_share_of_clips_has_a_whole_past():
    found = masks(clean_past=1.0, horizon=3, mask_low=1.0)
    hidden = found.any(2)
    lengths = hidden.sum(1)
    np.testing.assert_allclose(np.bincount(lengths, minlength=4)[1:] / len(found), 1 / 3, atol=0.03)
    np.testing.assert_array_equal(hidden, np.arange(TIME) >= TIME - lengths[:, None])
    np.testing.assert_array_equal(found.all(2), hidden)
    half = masks(clean_past=0.5, mask_low=1.0).any(2)
    assert (half.sum(1) == 1).mean() == pytest.approx(0.5, abs=0.03)


def test_drafts_hide_of_each_frame_but_the_first_a_share_of_its_own():
    found = masks(drafts=True, mask_low=0.2, mask_high=0.8)
    assert not found[:, 0].any()
    assert found[:, 1:].mean() == pytest.approx(0.5, abs=0.01)
    # Of tokens of one frame the same ratio decides, of two frames two.
    shares = found[:, 1:].mean(-1)
    within = (found[:, 1, 0] * found[:, 1, 1]).mean()
    across = (found[:, 1, 0] * found[:, 2, 1]).mean()
    assert within == pytest.approx(0.25 + 0.6**2 / 12, abs=0.01)
    assert across == pytest.approx(0.25, abs=0.01)
    assert shares.std() > 0.2


def test_frames_are_left_whole_where_asked():
    found = masks(clean_past=0.0, whole=0.5, mask_low=1.0)
    # One is, one is not, and half of the other three are.
    assert (~found.any(2)).sum(1).mean() == pytest.approx(1 + 3 / 2, abs=0.05)


def test_the_loss_is_the_cross_entropy_of_what_is_hidden():
    ours = objective()
    masked = np.asarray(jax.jit(lambda key: ours.mask(key, (CLIPS, TIME)))(jax.random.key(0)))
    run = jax.jit(jax.value_and_grad(functools.partial(loss, ours), has_aux=True))
    (value, (_, metrics)), gradient = run(PARAMS, clips(IDS))
    logits = np.asarray(PARAMS["logits"], np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, IDS[..., None], -1)[..., 0]
    expected = np.mean([nll[b][masked[b]].mean() for b in range(CLIPS)])
    assert float(value) == pytest.approx(expected, rel=1e-5)  # one network, no experts: nothing is balanced
    assert float(metrics["cross_entropy"]) == pytest.approx(expected, rel=1e-5)
    right = logits.argmax(-1) == IDS
    assert float(metrics["accuracy"]) == pytest.approx(np.mean([right[b][masked[b]].mean() for b in range(CLIPS)]))
    assert float(metrics["masked"]) == pytest.approx(masked.mean())
    np.testing.assert_array_equal(np.abs(gradient["logits"]).sum(-1) > 0, masked)


def test_experts_are_balanced():
    ours = objective(transformer=dataclasses.replace(SMALL, experts=2), balance_weight=0.1)
    value, (_, metrics) = jax.jit(functools.partial(loss, ours))(PARAMS, clips(IDS))
    assert float(value) == pytest.approx(float(metrics["cross_entropy"]) + 0.1 * 1.5)
    assert float(metrics["balance"]) == 1.5


def test_codes_made_beforehand_are_those_made_inside():
    ours = objective()
    frozen = draw(init_video_tokenizer, TOKENIZER)
    batch = fake_batch(BatchSpec(CLIPS, TIME, 12, 18, actions=ACTIONS))
    unmasker = Unmasker(TOKENIZER, ours.model, steps=3)
    codes = jax.jit(unmasker.encode)({"tokenizer": frozen}, batch.video)
    assert len(np.unique(fsq_ids(FSQ, codes))) > 2
    inside, moved = jax.jit(jax.value_and_grad(lambda f: loss(ours, PARAMS, batch, frozen=f)[0]))(frozen)
    beforehand = jax.jit(functools.partial(loss, ours))(PARAMS, dataclasses.replace(batch, latents=codes))[0]
    assert float(inside) == pytest.approx(float(beforehand), rel=1e-6)
    assert not any(np.any(x) for x in jax.tree.leaves(moved))


# Under an action a code becomes another one, the same in all places: the first frame and the actions tell all.
STEPS = 300


def world(seed, count):
    """Clips (count, T, N) in which button 0 keeps the codes, 1 adds one to each, and 2 mirrors the frame."""
    rng = np.random.default_rng(seed)
    buttons = rng.integers(0, 3, (count, TIME))
    frames = [rng.integers(0, FSQ.codes, (count, *GRID))]
    for t in range(1, TIME):
        b, last = buttons[:, t, None, None], frames[-1]
        frames.append(np.where(b == 0, last, np.where(b == 1, (last + 1) % FSQ.codes, last[:, :, ::-1])))
    ids = np.stack(frames, 1).reshape(count, TIME, TOKENS)
    return clips(ids, action={"button": jnp.asarray(buttons, jnp.int32)}), ids


@pytest.fixture(scope="module")
def learned():
    """An objective, its parameters after some steps of Adam on one batch, the batch and its codes."""
    ours = objective(MaskGIT, clean_past=1.0, horizon=TIME - 1)
    batch, ids = world(3, 8)
    optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, STEPS))

    def step(state, number):
        params, opt_state = state
        key = jax.random.fold_in(jax.random.key(1), number)
        (_, (_, metrics)), grads = jax.value_and_grad(ours.loss, has_aux=True)(params, {}, None, batch, key, number)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), metrics

    @jax.jit
    def run(key):
        params, _ = ours.init(key)
        (params, _), metrics = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(STEPS))
        return params, metrics

    params, metrics = run(jax.random.key(0))
    return ours, params, batch, ids, jax.tree.map(np.asarray, metrics)


def test_one_batch_is_learned(learned):
    metrics = learned[-1]
    assert metrics["cross_entropy"][0] == pytest.approx(np.log(6), rel=1e-4)  # all codes start equally likely
    assert metrics["accuracy"][-40:].mean() > 0.95


def test_greedy_dreams_follow_their_actions_and_no_others(learned):
    ours, params, batch, ids, _ = learned
    unmasker = Unmasker(TOKENIZER, ours.model, steps=3)
    both = {"dynamics": params}

    @jax.jit
    def dream(actions):
        start = unmasker.commit(
            both, unmasker.blank(len(ids), jax.random.key(0)), batch.latents[:, :1], {"button": actions[:, :1]}
        )
        return fsq_ids(FSQ, unmasker.rollout_codes(both, start, {"button": actions[:, 1:]})[1])

    buttons = batch.action["button"]
    assert np.mean(dream(buttons) == ids[:, 1:]) > 0.97
    for other in (1, 2):
        assert np.mean(dream((buttons + other) % 3) == ids[:, 1:]) < 0.5


def test_evaluation_tells_tokens_and_dreams():
    ours = objective(MaskGIT, transformer=dataclasses.replace(SMALL, depth=1, time_every=1))
    batch = fake_batch(BatchSpec(CLIPS, TIME, 12, 18, actions=ACTIONS))
    assert isinstance(ours, Objective)

    params, frozen = draw(init_maskgit, ours.model), draw(init_video_tokenizer, TOKENIZER)
    params |= {"to_logits": jax.tree.map(jnp.zeros_like, params["to_logits"])}  # as at the start
    found = jax.jit(ours.evaluate)(params, frozen, batch, jax.random.key(0))
    film = jax.eval_shape(ours.pictures, params, frozen, batch, jax.random.key(0))
    names = {"psnr", "psnr_shuffled", "psnr_copy", "psnr_tokenizer", "over_copy", "over_shuffled", "ssim"}
    assert found.keys() == names | {"accuracy", "perplexity"}
    assert float(found["perplexity"]) == pytest.approx(6, rel=1e-4)
    assert float(found["over_copy"]) == pytest.approx(float(found["psnr"] - found["psnr_copy"]))
    assert abs(float(found["over_shuffled"])) < 1e-6  # an untrained model is deaf, but for last bits
    assert film.shape == (TIME, 3 * 14, CLIPS * 20, 3)


def test_means_are_of_each_clip():
    value = jnp.asarray([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    where = jnp.asarray([[[True, False, True]], [[False, True, False]]])
    np.testing.assert_allclose(clip_mean(value, where), [2, 5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_low": -0.1}, r"masking\.mask_low: -0\.1 found, a share of 0 to 1 expected"),
        ({"mask_high": 1.5}, r"masking\.mask_high: 1\.5 found"),
        ({"clean_past": 2.0}, r"masking\.clean_past: 2\.0 found"),
        ({"mask_low": 0.9, "mask_high": 0.5}, r"mask_low and mask_high: 0\.9 and 0\.5 found"),
        ({"mask_low": 0.0, "mask_high": 0.0}, "masks are not to be empty"),
        ({"horizon": 0}, "horizon: 0 found"),
    ],
)
def test_ways_to_hide_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        MaskedTokensConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"config": MaskedTokensConfig(horizon=5)},
            r"masking\.horizon: 5 frames at once found, fewer than the context",
        ),
        ({"sampling": Sampling(steps=7)}, "T: 7 steps found, 1 to 6 expected"),
        ({"sampling": Sampling(steps=3, horizon=5)}, "horizon: 5 frames at once found"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(objective(), **fields)


def test_clips_of_one_frame_and_codes_of_another_size_are_refused():
    with pytest.raises(UserError, match="clips: 1 frame found, 2 or more expected"):
        objective().mask(jax.random.key(0), (CLIPS, 1))
    batch: Batch = dataclasses.replace(clips(IDS), latents=jnp.zeros((CLIPS, TIME, TOKENS, 3)))
    with pytest.raises(UserError, match=r"data: codes \(6, 3\) of a frame found, \(6, 2\) expected"):
        loss(objective(), PARAMS, batch)
