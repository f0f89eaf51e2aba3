"""A step whose networks take the batch in parts is the step of the whole batch, for every objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.models.discriminator import Discriminator, DiscriminatorConfig
from dreamer4.models.dynamics import Dynamics, DynamicsConfig
from dreamer4.models.latent_action import LatentActionConfig, PairConfig
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig
from dreamer4.models.next_frame import NextFrame, NextFrameConfig
from dreamer4.models.sequence_latent_action import SequenceConfig
from dreamer4.models.tokenizer import Tokenizer, TokenizerConfig, init_tokenizer
from dreamer4.models.video_tokenizer import VideoTokenizer, VideoTokenizerConfig, init_video_tokenizer
from dreamer4.nn.quantizers import FSQConfig, VQConfig, fsq_codes, init_vq
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives import latent_action as latent_action_module
from dreamer4.objectives.adversarial import AdversaryConfig
from dreamer4.objectives.latent_action import LatentActionLearning, LatentActionWeights
from dreamer4.objectives.loss_scales import init_scales
from dreamer4.objectives.masked_autoencoding import MaskedAutoencoding, MaskingConfig
from dreamer4.objectives.maskgit import MaskedTokens, MaskedTokensConfig, Sampling
from dreamer4.objectives.next_frame import NextFrameLossConfig, NextFramePrediction
from dreamer4.objectives.shortcut_forcing import ForcingConfig, ShortcutForcing
from dreamer4.rollout.evaluation import Horizon
from dreamer4.train.state import TrainState, make_step

CLIPS, TIME, SIDE = 4, 3, 12
ACTIONS = (ActionComponent("button", "categorical", 3),)
KEY = jax.random.key(0)
TINY = TransformerConfig(d_model=8, depth=1, heads=1, mlp_ratio=1.0, time_every=1, context=TIME, soft_cap=None)
STILL = dataclasses.replace(TINY, time_every=0, positions="none")
FSQ = FSQConfig((3, 2), rounding="symmetric")
TOKENIZER = Tokenizer(TokenizerConfig(patch=6, latents=2, bottleneck=2, transformer=TINY), SIDE, SIDE)
CODES = VideoTokenizer(VideoTokenizerConfig(6, FSQ, transformer=TINY), SIDE, SIDE)
VQ = VQConfig(codes=16, decay=0.8, reset_every=1, entropy=0.5)
PAIR = PairConfig(channels=(4,), tokens=2, code_width=2)
# Single pixels, and of each clip another number: their mean is not the mean of the parts' means.
CHANGED = LatentActionWeights(changed=1.0)


def far(weights, x, y):
    """Stands in for LPIPS: a distance whose size is not that of the squared error."""
    return weights * jnp.abs(x - y).max((1, 2, 3))


def batch():
    made = fake_batch(BatchSpec(CLIPS, TIME, SIDE, SIDE, actions=ACTIONS))
    video = np.array(made.video)
    still = np.random.default_rng(0).random(video[:, 1:].shape[:-1]) < np.linspace(0.2, 0.9, CLIPS)[:, None, None, None]
    for t in range(1, TIME):
        video[:, t] = np.where(still[:, t - 1, ..., None], video[:, t - 1], video[:, t])
    return dataclasses.replace(made, video=jnp.asarray(video), labelled=jnp.arange(CLIPS) % 3 > 0)


def latent_action(weights=CHANGED, **fields):
    return LatentActionLearning(LatentActionConfig(**fields).build(SIDE, SIDE, 3), weights, perceptual=far)


def next_frame(**fields):
    config = NextFrameConfig(
        patch=6,
        tokenizer="patches",
        decoder="attention",
        decoder_depth=1,
        action_hidden=4,
        noise=0.1,
        transformer=STILL,
    )
    return NextFramePrediction(NextFrame(config, ACTIONS, SIDE, SIDE), horizon=Horizon(1, 2), perceptual=far, **fields)


def filled(shapes, scale):
    """Numbers in place of fresh parameters, whose programs take long to compile."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), shapes)


def frozen_of(init, model):
    return filled(jax.eval_shape(functools.partial(init, model), KEY), 0.3)


def tokenizer():
    return MaskedAutoencoding(TOKENIZER, MaskingConfig(perceptual_share=0.5), perceptual=far), 2.0


def tokenizer_of_codes():
    return MaskedAutoencoding(CODES, MaskingConfig(ceiling=0.0)), None


def dynamics():
    model = Dynamics(DynamicsConfig(spatial=1, registers=1, k_max=4, transformer=TINY), ACTIONS, 2, 2)
    # Levels at which nothing is asked are drawn, so that frames that count are not as many in each part.
    forcing = ForcingConfig(bootstrap_share=0.5, at_context=0.3)
    return ShortcutForcing(model, TOKENIZER, forcing, horizon=Horizon(1, 2)), frozen_of(init_tokenizer, TOKENIZER)


def dynamics_of_codes():
    model = MaskGIT(MaskGITConfig(transformer=dataclasses.replace(TINY, condition="film")), FSQ, (2, 2), ACTIONS)
    learning = MaskedTokens(model, CODES, MaskedTokensConfig(whole=0.3), Sampling(steps=2), Horizon(1, 2))
    return learning, frozen_of(init_video_tokenizer, CODES)


def predictions():
    weights = NextFrameLossConfig(sobel=1.0, fft=1.0, ssim=1.0, perceptual=1.0, steps_ahead=2)
    return next_frame(config=weights), 2.0


def predictions_and_a_judge():
    judge = Discriminator(DiscriminatorConfig((4, 6), conditional=True, norm="group"), ACTIONS, SIDE, SIDE)
    return next_frame(discriminator=judge, adversary=AdversaryConfig(weight=1.0, flip=0.4)), 2.0


def pairs():
    return latent_action(pair=PAIR, vq=VQ), 2.0


def pairs_whose_codebook_learns_by_gradient():
    return latent_action(pair=PAIR, vq=dataclasses.replace(VQ, codebook="loss")), 2.0


def pairs_of_rounded_numbers():
    return latent_action(pair=PAIR, quantizer="fsq", fsq=FSQ), 2.0


def clips_of_rounded_numbers():
    sequence = SequenceConfig(patch=6, code_width=2, pool="mean", masked=0.5, transformer=TINY)
    return latent_action(model="sequence", sequence=sequence, quantizer="fsq", fsq=FSQ), 2.0


def clips_with_a_codebook():
    sequence = SequenceConfig(patch=6, code_width=2, pool="mean", masked=0.5, transformer=TINY)
    return latent_action(model="sequence", sequence=sequence, vq=dataclasses.replace(VQ, codes=8, codebook="loss")), 2.0


EVERY = [
    tokenizer,
    tokenizer_of_codes,
    dynamics,
    dynamics_of_codes,
    predictions,
    predictions_and_a_judge,
    pairs,
    pairs_whose_codebook_learns_by_gradient,
    pairs_of_rounded_numbers,
    clips_of_rounded_numbers,
    clips_with_a_codebook,
]


def assert_parts_are_the_whole(objective, frozen, clips, start=None):
    """``start`` are parameters and carry, where not as the objective has them."""
    optimizer, zero = optax.sgd(0.1), jnp.zeros((), jnp.int32)
    if start is None:
        params, carry = jax.eval_shape(objective.init, KEY)
        start = filled(params, 0.3), filled(carry, 0.0)
    params, carry = start
    start = TrainState(zero, params, optimizer.init(params), carry, None, zero, zero)
    ends = []
    for parts in (1, 2):
        SEEN.clear()
        ends.append(jax.jit(make_step(objective, optimizer, accumulate=parts))(start, frozen, clips, KEY))
        assert max(SEEN, default=CLIPS // parts) == CLIPS // parts
    whole, split = ends
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), whole[0].params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), whole, split)


@pytest.mark.slow
@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_parts_are_the_whole_batch(make):
    assert_parts_are_the_whole(*make(), batch())


# ----- the same with networks that compile in no time -----


WEIGHT = {"weight": jnp.asarray([0.3, -0.2, 0.5])}


SEEN: list[int] = []
"""How many clips a network was given at once, each time."""


def weight(module):
    return module.param("weight", lambda _: WEIGHT["weight"])


class Tinted(Tokenizer):
    def setup(self):
        self.weight = weight(self)

    def __call__(self, video, masked=None):
        SEEN.append(len(video))
        return video * self.weight + masked.mean(-1)[..., None, None, None]


class Affine(Dynamics):
    def setup(self):
        self.weight = weight(self)

    def __call__(self, noised, signal, step, action, labelled, *, agent=None, cache=None, starts=None):
        SEEN.append(len(noised))
        told = step + jnp.where(labelled, action["button"], 0.5) + 2 * starts
        w = self.weight
        return noised * w[0] + (w[1] + w[2] * told)[..., None, None] * jnp.cos(signal)[..., None, None], None, None


class Table(MaskGIT):
    def setup(self):
        self.weight = weight(self)

    def __call__(self, codes, masked, action, labelled, *, cache=None, drafts=False):
        SEEN.append(len(codes))
        waves = jnp.sin(jnp.arange(sum(self.heads)) + codes[..., :1] + action["button"][..., None, None])
        return waves * self.weight[0] + masked[..., None] * waves**2 * self.weight[1], None, jnp.asarray(1.0)


class Shaded(NextFrame):
    def setup(self):
        self.weight = weight(self)

    def __call__(self, video, action, labelled, noise=None):
        SEEN.append(len(video))
        told = jnp.where(labelled, action["button"], 0.5) / 9 + noise.mean((2, 3))
        return video * self.weight + told[..., None, None, None]


def test_parts_are_the_whole_batch_of_frames_with_hidden_patches():
    tinted = Tinted(TOKENIZER.config, SIDE, SIDE)
    objective = MaskedAutoencoding(tinted, MaskingConfig(perceptual_share=0.5), perceptual=far)
    assert_parts_are_the_whole(objective, 2.0, batch(), (WEIGHT, init_scales(("mse", "lpips"))))


def test_parts_are_the_whole_batch_of_noised_frames():
    real, _ = dynamics()
    model = Affine(real.model.config, ACTIONS, 2, 2)
    latents = jax.random.normal(KEY, (CLIPS, TIME, 2, 2))
    clips = dataclasses.replace(batch(), latents=latents)
    start = WEIGHT, init_scales(("forcing",))
    assert_parts_are_the_whole(dataclasses.replace(real, model=model), None, clips, start)


def test_parts_are_the_whole_batch_of_codes():
    real, _ = dynamics_of_codes()
    model = Table(real.model.config, FSQ, (2, 2), ACTIONS)
    codes = fsq_codes(FSQ, jax.random.randint(KEY, (CLIPS, TIME, 4), 0, FSQ.codes))
    clips = dataclasses.replace(batch(), latents=codes)
    assert_parts_are_the_whole(dataclasses.replace(real, model=model), None, clips, (WEIGHT, {}))


def test_parts_are_the_whole_batch_of_predictions():
    real, _ = predictions()
    model = Shaded(real.model.config, ACTIONS, SIDE, SIDE)
    objective = dataclasses.replace(real, model=model, config=NextFrameLossConfig(perceptual=1.0))
    assert_parts_are_the_whole(objective, 2.0, batch(), (WEIGHT, {}))


@pytest.mark.parametrize("make", [pairs, clips_of_rounded_numbers], ids=lambda make: make.__name__)
def test_parts_are_the_whole_batch_of_transitions(monkeypatch, make):
    """Codebooks, their resets, the entropy of their use and, of clips, what is hidden and the batch's variance."""

    def init(model, key):
        params = {"net": {"weight": jnp.zeros(3)}}
        if isinstance(model.quantizer, FSQConfig):
            return params, None
        codebook, state = init_vq(model.quantizer, model.code_width, key)
        return params | {"codebook": codebook}, state

    def encode(model, params, video, *, train):
        SEEN.append(len(video))
        seen = video.reshape(*video.shape[:2], model.tokens, model.code_width, -1)
        change = 10 * (seen[:, 1:, ..., :3] - seen[:, :-1, ..., :3])
        return jnp.tanh(change @ params["net"]["weight"]), {}

    def decode(model, params, video, codes, *, hidden, train):
        SEEN.append(len(video))
        told = codes.mean((2, 3)) if hidden is None else jnp.where(hidden, 0.5, codes.mean((2, 3)))
        return video[:, :-1] * params["net"]["weight"] + told[..., None, None, None], {}

    for function in (encode, decode):
        monkeypatch.setattr(latent_action_module, function.__name__, function)
    monkeypatch.setattr(latent_action_module, "init_latent_action", init)
    assert_parts_are_the_whole(*make(), batch())
