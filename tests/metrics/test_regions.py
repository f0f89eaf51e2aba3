import numpy as np

from dreamer4.metrics.regions import shown, window_l2

RNG = np.random.default_rng(0)
TRUTH = RNG.random((4, 9, 12, 3), np.float32)


def test_a_window_as_large_as_the_frame_has_the_frames_error():
    other = RNG.random(TRUTH.shape, np.float32)
    found = window_l2(other, TRUTH, np.full((4, 2), 5.0), np.array([20.0, 20.0]))
    np.testing.assert_allclose(found, np.mean((other - TRUTH) ** 2, axis=(1, 2, 3)), rtol=1e-5)


def test_a_window_holds_the_pixels_up_to_half_its_size_from_the_centre():
    other = TRUTH.copy()
    other[:, 2:5, 4:9] = TRUTH[:, 2:5, 4:9] + 0.5
    centers = np.array([[3, 6], [3, 6], [3.5, 6.5], [3, 7]])
    halves = np.array([[1, 2], [2, 2], [0.5, 0.5], [1, 2]])
    found = window_l2(other, TRUTH, centers, halves)
    np.testing.assert_allclose(found, 0.25 * np.array([1, 15 / 25, 1, 12 / 15]), rtol=1e-5)


def test_pixels_beyond_the_frame_do_not_count():
    other = TRUTH.copy()
    other[:, 0, 0] += 1
    centers = np.array([[0.0, 0], [-1, -1], [8, 11], [-5, 3]])
    found = window_l2(other, TRUTH, centers, np.array([1.0, 1.0]))
    np.testing.assert_allclose(found, [1 / 4, 1, 0, np.nan], rtol=1e-5)


def test_what_lies_outside_a_window_may_be_anything():
    other = TRUTH.copy()
    other[:, 8] = np.nan
    found = window_l2(other, TRUTH, np.full((4, 2), 3.0), np.array([1.0, 1.0]))
    np.testing.assert_array_equal(found, 0)


BOXES = np.array([(0, 0, 2, 3), (0, 3, 2, 3), (4, 6, 2, 3)])
COLORS = np.array([(0.8, 0.2, 0.2), (0.2, 0.8, 0.2), (0.2, 0.2, 0.8)], np.float32)
BLACK = np.zeros_like(COLORS)


def painted(present, strength=1.0):
    frame = np.zeros((6, 12, 3), np.float32)
    for (top, left, height, width), color, is_there in zip(BOXES, COLORS, present, strict=True):
        frame[top : top + height, left : left + width] = color * strength * is_there
    return frame


def test_a_box_is_shown_where_its_colour_is_nearer_than_the_background():
    states = np.array([(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], bool)
    for strength, expected in ((1.0, states), (0.6, states), (0.4, states & False)):
        frames = np.stack([painted(state, strength) for state in states])[:, None]
        np.testing.assert_array_equal(shown(frames, BOXES, COLORS, BLACK)[:, 0], expected)


def test_the_mean_of_a_box_counts_and_nothing_beside_it():
    frame = np.tile(COLORS[0], (6, 12, 1))
    frame[:2, :3] = 0
    frame[0, 0] = COLORS[0]
    assert not shown(frame, BOXES, COLORS, BLACK)[0]
    frame[:2, :2] = COLORS[0]
    assert shown(frame, BOXES, COLORS, BLACK)[0]
