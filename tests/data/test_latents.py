import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.data.latents import PIECE, LatentSource, encode_corpus
from dreamer4.data.toy import ToyConfig, ToySource
from dreamer4.errors import UserError
from dreamer4.train.fit import Source

SHAPES = ((5, 3), (5, 3), (2, 7))
TOY = ToySource(ToyConfig(height=10, width=10, min_side=3, max_side=5), ((4, 3),), seed=2, label_fraction=0.5)


def encode(video):
    """Latents (B, T, 2, 3) that say which frames they are of: the mean colours of the upper and the lower half."""
    middle = video.shape[2] // 2
    halves = jnp.stack([video[:, :, :middle], video[:, :, middle:]], axis=2)
    return halves.astype(jnp.float32).mean((3, 4))


def take(source, start, count):
    return list(itertools.islice(source.batches(start), count))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def fields(batch):
    """All that has a time axis and content."""
    return batch.latents, batch.action, batch.reward, batch.is_first, batch.is_terminal


def cut(batch, clip, start, time):
    return jax.tree.map(lambda x: x[clip, start : start + time], fields(batch))


class Fixed:
    """A source whose corpus is one batch."""

    def __init__(self, batch):
        self.batch = jax.device_get(batch)
        self.spec = BatchSpec(1, 1, *batch.video.shape[2:])

    def clips(self, split, count, time):
        return self.batch

    def corpus(self, count, time, batch=PIECE):
        for first in range(0, min(count, len(self.batch.video)), batch):
            yield jax.tree.map(lambda x, i=first: x[i : min(i + batch, count)], self.batch)


@pytest.fixture(scope="module")
def corpus():
    """30 clips of 9 frames of noise, every third labelled: no two frames are alike."""
    actions = (ActionComponent("key", "categorical", 5), ActionComponent("stick", "continuous", 2))
    batch = fake_batch(BatchSpec(30, 9, 4, 4, actions=actions))
    return encode_corpus(Fixed(dataclasses.replace(batch, labelled=np.arange(30) % 3 == 0)), encode, 30, 9)


@pytest.mark.parametrize("clips", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 20])
def test_padding_changes_nothing_and_every_call_has_one_shape(clips):
    source = Fixed(fake_batch(BatchSpec(clips, 2, 4, 4)))
    shapes = []

    def noted(video):
        shapes.append(video.shape)
        return encode(video)

    encoded = encode_corpus(source, noted, 1000, 2)
    assert set(shapes) == {(PIECE, 2, 4, 4, 3)}
    assert encoded.latents.dtype == np.float32
    np.testing.assert_allclose(encoded.latents, encode(source.batch.video), rtol=1e-6)
    for name in ("action", "reward", "is_first", "is_terminal", "labelled"):
        assert_same(getattr(encoded, name), getattr(source.batch, name))


def test_an_encoded_corpus_holds_latents_in_place_of_pixels():
    (piece,) = TOY.corpus(30, 9)
    traces = []

    @jax.jit
    def half(video):
        traces.append(video.shape)
        return encode(video).astype(jnp.bfloat16)

    encoded = encode_corpus(TOY, half, 30, 9)
    assert traces == [(30, 9, 10, 10, 3)]
    assert encoded.video.shape == (30, 9, 0, 0, 3)
    assert encoded.state == {}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(encoded))
    assert encoded.latents.dtype == np.float32
    np.testing.assert_allclose(encoded.latents, encode(piece.video), rtol=2**-8)
    np.testing.assert_array_equal(encoded.action["action"], piece.action["action"])
    np.testing.assert_array_equal(encoded.labelled, piece.labelled)


@pytest.mark.parametrize(("start", "count"), [(0, 8), (1, 4), (5, 2)])
def test_batch_n_is_a_function_of_seed_and_n_alone(corpus, start, count):
    expected = take(LatentSource(TOY, corpus, SHAPES, seed=3), 0, 8)
    assert_same(take(LatentSource(TOY, corpus, SHAPES, seed=3), start, count), expected[start : start + count])
    assert [b.latents.shape for b in expected[:3]] == [(*shape, 2, 3) for shape in SHAPES]
    assert (expected[0].latents != expected[1].latents).any()
    assert (expected[0].latents != take(LatentSource(TOY, corpus, SHAPES, seed=4), 0, 1)[0].latents).any()


def test_windows_are_those_of_the_corpus_with_every_field_aligned(corpus):
    found = set()
    for batch in take(LatentSource(TOY, corpus, SHAPES, seed=0), 0, 90):
        clips, time = batch.reward.shape
        assert batch.video.shape == (clips, time, 0, 0, 3)
        for b in range(clips):
            window = jax.tree.map(lambda x, b=b: x[b], fields(batch))
            ((clip, offset),) = np.argwhere((corpus.latents == batch.latents[b, 0]).all((2, 3))).tolist()
            assert_same(window, cut(corpus, clip, offset, time))
            assert batch.labelled[b] == corpus.labelled[clip]
            found.add((time, clip, offset))
    # Every offset of both lengths comes up, the last one included, and so does every clip.
    assert {(time, offset) for time, _, offset in found} == {(3, t) for t in range(7)} | {(7, t) for t in range(3)}
    assert {clip for _, clip, _ in found} == set(range(30))


def test_it_is_a_source_with_the_clips_of_the_inner_one(corpus):
    source = LatentSource(TOY, corpus, SHAPES)
    assert isinstance(source, Source)
    assert source.spec == TOY.spec
    assert_same(source.clips("validation", 3, 4), TOY.clips("validation", 3, 4))
    (batch,) = take(source, 0, 1)
    assert source.make(batch, jax.random.key(0), SHAPES[0]) is batch
    assert_same(jax.jit(lambda x: x)(batch), batch)


def test_what_cannot_be_is_refused(corpus):
    with pytest.raises(UserError, match="clips of 9 frames found, expected 10 or more"):
        LatentSource(TOY, corpus, ((4, 3), (1, 10)))
    for count, time in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match=f"corpus: {count} clips of {time} frames found, 1 or more of each"):
            encode_corpus(TOY, encode, count, time)
