"""What the evaluations of all objectives that dream have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.models.dynamics import Dynamics, DynamicsConfig
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig
from dreamer4.models.next_frame import NextFrame, NextFrameConfig
from dreamer4.models.tokenizer import Tokenizer, TokenizerConfig
from dreamer4.models.video_tokenizer import VideoTokenizer, VideoTokenizerConfig
from dreamer4.nn.quantizers import FSQConfig
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives import maskgit, next_frame, shortcut_forcing
from dreamer4.rollout.evaluation import Horizon

SIZE = 16
SMALL = TransformerConfig(d_model=16, depth=1, heads=1, time_every=1, context=4)
FSQ = FSQConfig((3, 3))
SIZES = {"dream": 1e-4, "shuffled": 2e-4, "copy": 4e-4, "reconstruction": 5e-5}
ACTIONS = (ActionComponent("button", "categorical", 3),)
CLIPS = fake_batch(BatchSpec(2, 18, SIZE, SIZE, actions=ACTIONS))


def forcing(horizon):
    tokenizer = Tokenizer(TokenizerConfig(8, 2, 2, transformer=SMALL), SIZE, SIZE)
    dynamics = Dynamics(DynamicsConfig(2, 1, transformer=SMALL), ACTIONS, 2, 2)
    return shortcut_forcing.ShortcutForcing(dynamics, tokenizer, horizon=horizon)


def masked(horizon):
    tokenizer = VideoTokenizer(VideoTokenizerConfig(8, FSQ, transformer=SMALL), SIZE, SIZE)
    film = TransformerConfig(d_model=16, depth=1, heads=1, time_every=1, context=4, condition="film")
    dynamics = MaskGIT(MaskGITConfig(transformer=film), FSQ, tokenizer.grid, ACTIONS)
    return maskgit.MaskedTokens(dynamics, tokenizer, sampling=maskgit.Sampling(steps=2), horizon=horizon)


def pixels(horizon):
    flat = TransformerConfig(d_model=16, depth=1, heads=1, time_every=0, positions="none")
    config = NextFrameConfig(patch=8, tokenizer="patches", decoder="attention", transformer=flat)
    return next_frame.NextFramePrediction(NextFrame(config, ACTIONS, SIZE, SIZE), horizon=horizon)


OBJECTIVES = {
    "forcing": (shortcut_forcing, forcing, ""),
    "masked": (maskgit, masked, ""),
    "pixels": (next_frame, pixels, "dream_"),
}


@pytest.mark.parametrize(("length", "step"), [(16, 8), (5, 5)])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_figures_of_dreams_are_those_of_the_scores(monkeypatch, name, length, step):
    """The position at the 8th step, or the last of a shorter horizon; PSNRs are of errors pooled over all steps."""
    module, make, prefix = OBJECTIVES[name]

    def score(dream, reconstruct, clips, horizon, key, *, videos):
        steps = jnp.arange(1.0, horizon.length + 1)
        return {v: {"mse": SIZES[v] * steps, "ssim": 0.01 * steps, "position": 100 + steps} for v in videos}

    monkeypatch.setattr(module, "score", score)
    monkeypatch.setattr(maskgit.MaskedTokens, "_hidden", lambda *_: {})
    monkeypatch.setattr(next_frame, "predict", lambda model, params, video, *_: video)
    found = make(Horizon(2, length)).evaluate({}, None, CLIPS, jax.random.key(0))
    steps = np.arange(1, length + 1)
    psnr = {video: -10 * np.log10(size * steps.mean()) for video, size in SIZES.items()}
    assert float(found["position"]) == 100 + step
    assert float(found[f"{prefix}psnr"]) == pytest.approx(psnr["dream"], abs=1e-3)
    assert float(found[f"{prefix}ssim"]) == pytest.approx(0.01 * steps.mean(), rel=1e-4)
    if name == "forcing":
        assert float(found["psnr_copy"]) == pytest.approx(psnr["copy"], abs=1e-3)
        assert float(found["psnr_shuffled"]) == pytest.approx(psnr["shuffled"], abs=1e-3)
    else:
        assert float(found[f"{prefix}over_copy"]) == pytest.approx(psnr["dream"] - psnr["copy"], abs=1e-3)
        assert float(found[f"{prefix}over_shuffled"]) == pytest.approx(psnr["dream"] - psnr["shuffled"], abs=1e-3)
