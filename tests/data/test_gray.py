import jax
import numpy as np
import pytest

from dreamer4.data.formats.images import to_gray
from dreamer4.data.gray import GraySource
from dreamer4.data.loader import StoreSource
from dreamer4.data.toy import ToyConfig, ToySource
from stores import ids_of, write_store

SHAPE = (2, 3)
KEY = jax.random.key(0)


@pytest.fixture(params=["toy", "store"])
def source(request, tmp_path):
    if request.param == "toy":
        return ToySource(ToyConfig(height=16, width=16, max_side=8), (SHAPE,))
    lengths = {name: 6 for split in ("train", "validation") for name in ids_of(split)}
    return StoreSource(write_store(tmp_path / "data", lengths, noise=True), [SHAPE], 0)


def test_all_is_the_sources_but_the_frames_are_gray(source):
    gray = GraySource(source)
    assert gray.shapes == source.shapes
    assert gray.spec.channels == 1
    batches = gray.batches(3)
    # As one program: the toy world takes long to compile.
    made = jax.jit(lambda sent: (gray.make(sent, KEY, SHAPE), source.make(sent, KEY, SHAPE)))(next(batches))
    for found, colored in (made, (gray.clips("validation", *SHAPE), source.clips("validation", *SHAPE))):
        assert found.video.shape == (*colored.video.shape[:-1], 1)
        assert found.video.dtype == np.uint8
        np.testing.assert_array_equal(found.video, to_gray(np.asarray(colored.video)))
        np.testing.assert_array_equal(found.action["action"], colored.action["action"])
    if hasattr(batches, "close"):
        batches.close()  # type: ignore[attr-defined]


def test_a_gray_source_stays_as_it_is():
    source = ToySource(ToyConfig(height=16, width=16, max_side=8, channels=1), (SHAPE,))
    found = GraySource(source).clips("validation", 2, 4)
    np.testing.assert_array_equal(found.video, source.clips("validation", 2, 4).video)
