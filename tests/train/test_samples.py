import imageio.v3 as imageio
import numpy as np
import pytest

from dreamer4.train import samples
from dreamer4.train.samples import write_gif, write_png


def test_a_picture_keeps_its_pixels_enlarged(tmp_path):
    image = np.random.default_rng(0).uniform(size=(4, 6, 3)).astype(np.float32)
    write_png(tmp_path / "a.png", image, width=18)
    read = imageio.imread(tmp_path / "a.png")
    assert read.shape == (12, 18, 3)
    np.testing.assert_array_equal(read[::3, ::3], np.round(image * 255).astype(np.uint8))
    np.testing.assert_array_equal(read, read[::3, ::3].repeat(3, 0).repeat(3, 1))


def test_gray_and_values_out_of_range(tmp_path):
    image = np.array([[-1.0, 0.0, 0.5, 1.0, 7.0]], np.float32)[..., None]
    write_png(tmp_path / "a.png", image, width=5)
    np.testing.assert_array_equal(
        imageio.imread(tmp_path / "a.png"), np.array([[0, 0, 128, 255, 255]])[..., None].repeat(3, -1)
    )


def test_a_picture_wider_than_asked_keeps_its_size(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((2, 50, 3), np.float32), width=10)
    assert imageio.imread(tmp_path / "a.png").shape == (2, 50, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_film_has_its_frames_in_order(tmp_path, channels):
    levels = [0.0, 0.25, 0.75, 1.0, 0.5]
    film = np.ones((5, 4, 8, channels), np.float32) * np.array(levels, np.float32)[:, None, None, None]
    write_gif(tmp_path / "a.gif", film, fps=10.0, width=16)
    read = imageio.imread(tmp_path / "a.gif", index=None)
    assert read.shape == (5, 8, 16, 3)
    np.testing.assert_allclose(read.mean((1, 2, 3)), np.array(levels) * 255, atol=1)
    assert imageio.immeta(tmp_path / "a.gif")["duration"] == 100
    assert imageio.immeta(tmp_path / "a.gif")["loop"] == 0


@pytest.mark.parametrize("write", [write_png, write_gif])
def test_a_broken_off_write_leaves_the_old_file(tmp_path, monkeypatch, write):
    shape = (8, 8, 3) if write is write_png else (2, 8, 8, 3)
    path = tmp_path / "a"
    write(path, np.zeros(shape, np.float32))
    before = path.read_bytes()

    original = samples.Path.write_bytes

    def torn(path, data):
        original(path, data[:10])
        raise OSError("disk full")

    monkeypatch.setattr(samples.Path, "write_bytes", torn)
    with pytest.raises(OSError, match="disk full"):
        write(path, np.ones(shape, np.float32))
    assert path.read_bytes() == before
