import numpy as np
import pytest

from dreamer4.nn.layout import Layout, Modality
from tiny_transformer import LAYOUT


def test_layout_says_who_reads_whom():
    expected = np.zeros((7, 7), bool)
    expected[:3] = True  # latents read everything
    expected[3:, 3:] = True  # patches read patches
    np.testing.assert_array_equal(LAYOUT.mask(), expected)
    np.testing.assert_array_equal(LAYOUT.positions()[3:], [[0, 0], [0, 1], [1, 0], [1, 1]])
    assert not LAYOUT.positions()[:3].any()


def test_a_token_that_reads_nothing_is_forbidden():
    blind = Layout((Modality("a", reads=("b",), size=1), Modality("b", reads=("c",), size=1)), temporal=1)
    with pytest.raises(ValueError, match="b tokens attend to nothing"):
        blind.mask()


def test_distances_are_steps_on_the_grid():
    expected = np.zeros((7, 7))
    expected[3:, 3:] = [[0, 1, 1, 2], [1, 0, 2, 1], [1, 2, 0, 1], [2, 1, 1, 0]]
    np.testing.assert_array_equal(LAYOUT.distances(), expected)
