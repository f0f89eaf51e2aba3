import functools

import jax
import numpy as np
import pytest

from dreamer4.data.toy import ToyConfig, ToySource, ToyState, render
from dreamer4.metrics.position import locate, position_error

locate_jitted = jax.jit(locate)
position_error_jitted = jax.jit(position_error)

COLOR, BACKGROUND = np.array([200, 30, 90], np.uint8), np.array([40, 60, 250], np.uint8)


def every_place(height, width, sides, channels=3):
    """States of worlds with one square, for every place of each side, in random colours."""
    ranges = [(side, range(height - side + 1), range(width - side + 1)) for side in sides]
    places = np.array([(row, column, side) for side, rows, columns in ranges for row in rows for column in columns])
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (len(places), channels), np.uint8)
    color = background + rng.integers(64, 192, (len(places), channels)).astype(np.uint8)
    side = places[:, 2:]
    return ToyState(places[:, None, :2], np.zeros_like(side), side, color[:, None], background)


def rendered(state, height, width):
    config = ToyConfig(height=height, width=width, channels=state.background.shape[-1], max_side=6)
    frames = jax.jit(jax.vmap(functools.partial(render, config)))(state)
    return np.asarray(frames, np.float32) / 255


def found(frames, state):
    return np.asarray(locate_jitted(frames, state.side[:, 0], state.color[:, 0], state.background))


def drawn(places, side=6, size=20):
    """Frames of squares at places between pixels: each pixel shows the part of it that the square covers."""
    pixel, start = np.arange(size), np.asarray(places)[..., None]
    covered = np.clip(np.minimum(pixel + 1, start + side) - np.maximum(pixel, start), 0, 1)
    covered = (covered[:, 0, :, None] * covered[:, 1, None, :])[..., None]
    return ((BACKGROUND * (1 - covered) + COLOR * covered) / 255).astype(np.float32)


def found_drawn(frames, side=6):
    count = len(frames)
    colors = (np.tile(color, (count, 1)) for color in (COLOR, BACKGROUND))
    return np.asarray(locate_jitted(frames, np.full(count, side), *colors))


@pytest.mark.parametrize(
    ("height", "width", "sides", "channels"), [(32, 32, (1, 6, 11, 14, 32), 3), (16, 23, (3, 6, 16), 1)]
)
def test_every_place_of_the_toy_world_is_found(height, width, sides, channels):
    state = every_place(height, width, sides, channels)
    np.testing.assert_allclose(found(rendered(state, height, width), state), state.position[:, 0], atol=1e-4)


def test_a_square_one_level_brighter_than_its_background_is_found():
    state = every_place(16, 16, (4,))
    state = state._replace(color=state.background[:, None] ^ np.array([1, 0, 0], np.uint8))
    np.testing.assert_allclose(found(rendered(state, 16, 16), state), state.position[:, 0], atol=1e-3)


def test_a_square_faded_to_a_fifth_is_found():
    state = every_place(16, 16, (6,))
    faded = 0.2 * rendered(state, 16, 16) + 0.8 * state.background[:, None, None] / np.float32(255)
    np.testing.assert_allclose(found(faded, state), state.position[:, 0], atol=1e-3)


def test_the_place_is_that_of_the_least_squared_error_whatever_the_frame_shows():
    height, width, side = 8, 11, 3
    state = every_place(height, width, (side,))
    rng = np.random.default_rng(1)
    state = state._replace(color=rng.integers(0, 256, state.color.shape, np.uint8))
    frames = rng.uniform(size=(len(state.side), height, width, 3)).astype(np.float32)
    errors = []
    for row in range(height - side + 1):
        for column in range(width - side + 1):
            painted = np.broadcast_to(state.background[:, None, None] / 255, frames.shape).copy()
            painted[:, row : row + side, column : column + side] = state.color[:, :, None] / 255
            errors.append(((frames - painted) ** 2).sum((1, 2, 3)))
    best = np.stack(np.divmod(np.argmin(errors, axis=0), width - side + 1), axis=-1)
    assert np.abs(found(frames, state) - best).max() <= 0.5 + 1e-5


def test_noise_moves_the_place_by_a_fraction_of_a_pixel():
    state = every_place(24, 24, (6, 14))
    frames = rendered(state, 24, 24)
    noisy = frames + 0.1 * np.random.default_rng(0).normal(size=frames.shape).astype(np.float32)
    error = np.abs(found(noisy, state) - state.position[:, 0])
    assert np.median(error) < 0.1
    assert error.max() < 0.5


@pytest.mark.parametrize("blend", [0.1, 0.3, 0.5, 0.8])
def test_the_blend_of_two_neighbouring_places_is_located_between_them(blend):
    here = np.array([(0, 0), (0, 5), (13, 13), (3, 13), (7, 8)])
    for step in np.array([(1, 0), (0, 1)]):
        frames = (1 - blend) * drawn(here) + blend * drawn(here + step)
        np.testing.assert_allclose(found_drawn(frames), here + blend * step, atol=1e-4)


def test_round_edges_and_oblique_steps_cost_less_than_a_tenth_of_a_pixel():
    places = np.array([(3 + i / 8, 7 + j / 8) for i in range(8) for j in range(8)])
    sharp = drawn(places)
    blurred = np.mean([np.roll(sharp, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)
    for frames in (sharp, blurred):
        np.testing.assert_allclose(found_drawn(frames), places, atol=0.1)


def test_the_place_stays_inside_the_frame():
    np.testing.assert_allclose(found_drawn(drawn([(-1, 0), (15.3, 4), (-2.5, 16)])), [(0, 0), (14, 4), (0, 14)])


def test_nothing_to_see_is_finite_and_nan_is_nan():
    state = every_place(16, 16, (6,))
    flat = np.broadcast_to(state.background[:, None, None] / np.float32(255), (*state.side.shape[:1], 16, 16, 3))
    assert np.isfinite(found(flat, state)).all()
    same = state._replace(color=state.background[:, None])
    assert np.isfinite(found(rendered(same, 16, 16), same)).all()
    broken = rendered(state, 16, 16)
    broken[::2, 3, 4, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(found(broken, state)).all(-1), np.arange(len(broken)) % 2 == 0)


def test_a_shift_by_two_pixels_is_an_error_of_two_and_only_the_first_square_counts():
    clips = ToySource(ToyConfig(squares=2, max_side=8), ((1, 1),)).clips("test", 16, 3)
    state = {name: clips.state[name] for name in ("position", "side", "color", "background")}
    first = ToyState(*(clips.state[name] for name in ToyState._fields))
    first = jax.tree.map(lambda x: x.reshape(48, *x.shape[2:]), first)
    first = first._replace(**{name: getattr(first, name)[:, :1] for name in ToyState._fields[:-1]})
    frames = rendered(first, 32, 32).reshape(16, 3, 32, 32, 3)
    # Shifted away from the nearer wall, the gap filled with background, the square is still whole.
    down = state["position"][..., 0, 0] < 12
    shifted = np.empty_like(frames)
    for index in np.ndindex(16, 3):
        gap = np.broadcast_to(state["background"][index] / np.float32(255), (2, 32, 3))
        frame = frames[index]
        shifted[index] = np.concatenate([gap, frame[:-2]] if down[index] else [frame[2:], gap])
    error = position_error_jitted(frames, **state)
    assert error.shape == (16, 3)
    np.testing.assert_allclose(error, 0, atol=1e-4)
    np.testing.assert_allclose(position_error_jitted(shifted, **state), 2, atol=1e-4)
    both = state | {"position": state["position"] - np.array([3, 4])}
    np.testing.assert_allclose(position_error_jitted(frames, **both), 5, atol=1e-4)


def test_jit_changes_nothing():
    state = every_place(9, 9, (6,))
    frames = rendered(state, 9, 9)
    arguments = state.side[:, 0], state.color[:, 0], state.background
    np.testing.assert_allclose(locate(frames, *arguments), locate_jitted(frames, *arguments), atol=1e-5)
    one = locate(frames[3], np.array(6), state.color[3, 0], state.background[3])
    np.testing.assert_allclose(one, state.position[3, 0], atol=1e-4)
