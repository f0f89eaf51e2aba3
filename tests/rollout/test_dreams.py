"""What ``dream`` means, whatever dreams: frames and the actions that led to them begin it, other actions lead it on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.models.dynamics import Dynamics, DynamicsConfig
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig
from dreamer4.models.next_frame import NextFrame, NextFrameConfig
from dreamer4.models.tokenizer import Tokenizer, TokenizerConfig
from dreamer4.models.video_tokenizer import VideoTokenizer, VideoTokenizerConfig
from dreamer4.nn.quantizers import FSQConfig
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.rollout.generate import Generator
from dreamer4.rollout.predict import Predictor
from dreamer4.rollout.unmask import Unmasker

ACTIONS = (ActionComponent("button", "categorical", 9), ActionComponent("stick", "continuous", 2))
SMALL = TransformerConfig(d_model=16, depth=1, heads=1, time_every=1, context=4)
FILM = TransformerConfig(d_model=16, depth=1, heads=1, time_every=1, context=4, condition="film")
FLAT = TransformerConfig(d_model=16, depth=1, heads=1, time_every=0, positions="none")
FSQ = FSQConfig((3, 3))
PIXELS = NextFrameConfig(patch=4, tokenizer="patches", decoder="attention", transformer=FLAT)
DREAMERS = {
    Generator: (
        Tokenizer(TokenizerConfig(4, 2, 2, transformer=SMALL), 8, 8),
        Dynamics(DynamicsConfig(2, 1, transformer=SMALL), ACTIONS, 2, 2),
    ),
    Unmasker: (
        VideoTokenizer(VideoTokenizerConfig(4, FSQ, transformer=SMALL), 8, 8),
        MaskGIT(MaskGITConfig(transformer=FILM), FSQ, (2, 2), ACTIONS),
        2,
    ),
    Predictor: (NextFrame(PIXELS, ACTIONS, 8, 8),),
}


@pytest.mark.parametrize("kind", DREAMERS, ids=lambda kind: kind.__name__)
def test_actions_of_the_past_begin_a_dream_and_the_others_lead_it(monkeypatch, kind):
    frames, dreamt = jnp.zeros((2, 3, 8, 8, 3), jnp.uint8), jnp.zeros((2, 4, 8, 8, 3))
    number = np.arange(14).reshape(2, 7)
    actions = {"button": number, "stick": np.stack([number, -number], axis=-1).astype(np.float32)}
    calls, key = [], jax.random.key(0)
    monkeypatch.setattr(kind, "init", lambda self, *given: calls.append(given) or "state")
    monkeypatch.setattr(kind, "rollout", lambda self, *given: calls.append(given) or ("end", dreamt))
    assert kind(*DREAMERS[kind]).dream("params", frames, actions, key) is dreamt
    (params, *seen, past, drawn), (params_after, state, future) = calls
    assert (params, params_after, state) == ("params", "params", "state")
    assert seen[0] is frames
    assert drawn is key
    for name in actions:
        if kind is not Predictor:  # to which the last frame says all
            np.testing.assert_array_equal(past[name], actions[name][:, :3])
        np.testing.assert_array_equal(future[name], actions[name][:, 3:])
