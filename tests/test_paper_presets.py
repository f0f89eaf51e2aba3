"""The presets named ``paper`` have the numbers that the paper of Dreamer 4 reports (Hafner, Yan & Lillicrap 2025). How
many parameters that makes is tested with the models."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from dreamer4.data.toy import ACTIONS
from dreamer4.models.dynamics import Dynamics
from dreamer4.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def paper():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
        scripts = {name: importlib.import_module(f"train_{name}") for name in ("tokenizer", "dynamics")}
    return SimpleNamespace(**{name: script.PRESETS["paper"][1] for name, script in scripts.items()})


@pytest.fixture(scope="module")
def models(paper):
    tokenizer = Tokenizer(paper.tokenizer.tokenizer, paper.tokenizer.toy.height, paper.tokenizer.toy.width)
    latents = tokenizer.config.latents, tokenizer.config.bottleneck
    return SimpleNamespace(tokenizer=tokenizer, dynamics=Dynamics(paper.dynamics.dynamics, ACTIONS, *latents))


def test_frames_of_384_by_640_are_960_patches_and_512_latents_of_16_in_256_spatial_tokens_of_32(paper, models):
    tokenizer, dynamics = models.tokenizer, models.dynamics
    assert (paper.dynamics.toy.height, paper.dynamics.toy.width) == (tokenizer.height, tokenizer.width) == (384, 640)
    assert tokenizer.config.patch == 16
    assert tokenizer.grid[0] * tokenizer.grid[1] == 960
    assert (tokenizer.config.latents, tokenizer.config.bottleneck) == (512, 16)
    assert (dynamics.config.spatial, dynamics.channels) == (256, 32)
    assert dynamics.config.registers > 0


@pytest.mark.parametrize("name", ["tokenizer", "dynamics"])
def test_one_layer_in_four_looks_back_192_frames_in_half_precision_with_little_memory(paper, name):
    transformer = getattr(getattr(paper, name), name).transformer
    assert transformer.time_every == 4
    assert transformer.context == 192
    assert transformer.positions == "rotary"
    assert transformer.soft_cap is not None
    assert transformer.dtype == "bfloat16"
    assert transformer.remat


def test_heads_of_the_dynamics_share_keys(paper):
    transformer = paper.dynamics.dynamics.transformer
    assert 0 < (transformer.kv_heads or transformer.heads) < transformer.heads


@pytest.mark.parametrize("name", ["tokenizer", "dynamics"])
def test_clips_of_64_and_of_256_frames_take_turns(paper, name):
    shapes = getattr(paper, name).train.shapes
    assert {time for _, time in shapes} == {64, 256}
    short, long = (sum(time == length for _, time in shapes) for length in (64, 256))
    assert short > long > 0


def test_masking_noise_and_steps(paper):
    tokenizer, dynamics = paper.tokenizer, paper.dynamics
    assert tokenizer.masking.ceiling == 0.9
    assert tokenizer.masking.perceptual_weight == 0.2
    assert tokenizer.perceptual.net != "off"
    assert dynamics.k == 4
    assert dynamics.dynamics.context_noise == 0.1
    forcing = dynamics.forcing
    assert (forcing.ramp_floor, forcing.single_images) == (0.1, 0.3)
    assert (forcing.at_zero, forcing.at_context) == (0.0, 0.0)
    assert dynamics.latent_deviation is None
