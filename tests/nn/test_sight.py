import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.nn.sight import make_sight
from dreamer4.nn.transformer import empty_cache
from tiny_transformer import CONFIG, LAYOUT, jit


def test_who_sees_whom_after_a_cache():
    cache = dataclasses.replace(empty_cache(CONFIG, LAYOUT, 1), frame=jnp.asarray(4))
    # Frames 4 and 5; the ring of 3 holds frames 3, 1 and 2 in its slots.
    sight = jit(lambda cache: make_sight(2, CONFIG.context, None, cache))(cache)
    np.testing.assert_array_equal(sight.past[0], [[True, False, True], [True, False, False]])
    np.testing.assert_array_equal(sight.now[0], [[True, False], [True, True]])
    np.testing.assert_array_equal(sight.ages, [[1, 3, 2, 0, -1], [2, 4, 3, 1, 0]])


def test_frames_after_a_cache_cannot_start_anew():
    with pytest.raises(ValueError, match="starts: frames that follow a cache"):
        make_sight(7, CONFIG.context, None, empty_cache(CONFIG, LAYOUT, 2), jnp.ones((2, 7), bool))
