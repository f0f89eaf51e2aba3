import io
import resource
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dreamer4.data.formats import images
from dreamer4.data.formats.images import BadImageError, decode_image, fit_image, read_image, to_gray

NOISE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, depth, color, rows, *chunks):
    """A PNG by hand, of ``rows`` with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def webp(width, height):
    """A WebP that declares a size and has next to no content."""
    declared = (
        b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    body = b"WEBP" + declared + encoded(NOISE, "WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def reason_against(content):
    with pytest.raises(BadImageError) as e:
        decode_image(content)
    return str(e.value)


def test_a_picture_comes_back_as_it_was():
    np.testing.assert_array_equal(decode_image(encoded(NOISE)), NOISE)
    np.testing.assert_array_equal(decode_image(encoded(NOISE, "BMP")), NOISE)
    np.testing.assert_array_equal(decode_image(encoded(NOISE, "WEBP", lossless=True)), NOISE)
    assert np.abs(decode_image(encoded(np.full((8, 8, 3), 90, np.uint8), "JPEG")).astype(int) - 90).max() < 3


# Where the first row and the first column of what is stored are to be seen, in the words of CIPA DC-008: for each of
# them the axis of the picture, and whether it runs backwards along it.
TAKEN = {
    1: lambda row, column, height, width: (row, column),
    2: lambda row, column, height, width: (row, width - 1 - column),
    3: lambda row, column, height, width: (height - 1 - row, width - 1 - column),
    4: lambda row, column, height, width: (height - 1 - row, column),
    5: lambda row, column, height, width: (column, row),
    6: lambda row, column, height, width: (column, height - 1 - row),
    7: lambda row, column, height, width: (width - 1 - column, height - 1 - row),
    8: lambda row, column, height, width: (width - 1 - column, row),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TAKEN)
def test_a_picture_that_was_taken_lying_is_turned(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode_image(encoded(NOISE, kind, exif=exif, lossless=True))
    height, width, _ = NOISE.shape
    assert shown.shape == ((height, width, 3) if orientation < 5 else (width, height, 3))
    for row in range(height):
        for column in range(width):
            assert (shown[TAKEN[orientation](row, column, height, width)] == NOISE[row, column]).all()


def test_a_jpeg_lies_as_it_was_taken_and_damaged_exif_data_lose_no_picture():
    half = np.zeros((16, 24, 3), np.uint8)
    half[:, 12:] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(half, "JPEG", exif=exif)
    turned = decode_image(content)
    assert turned.shape == (24, 16, 3)
    assert (turned[:12].mean(), turned[12:].mean()) == (pytest.approx(0, abs=3), pytest.approx(200, abs=3))
    place = content.index(b"Exif\0\0") + 6
    assert decode_image(content[:place] + b"\xff" * 8 + content[place + 8 :]).shape == (16, 24, 3)


def test_a_jpeg_with_a_second_picture_is_the_first():
    plain, other = np.full((8, 8, 3), 90, np.uint8), np.full((8, 8, 3), 200, np.uint8)
    content = encoded(plain, "MPO", save_all=True, append_images=[Image.fromarray(other)])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert np.abs(decode_image(content).astype(int) - 90).max() < 3
    moving = encoded(plain, "PNG", save_all=True, append_images=[Image.fromarray(other)])
    assert reason_against(moving) == "animated picture"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(2, 1, 8, 0, b"\0\x07\xc8"), [[7] * 3, [200] * 3]),
        (png(4, 1, 2, 0, b"\0\x1b"), [[0] * 3, [85] * 3, [170] * 3, [255] * 3]),
        (png(3, 1, 1, 0, b"\0\xa0"), [[255] * 3, [0] * 3, [255] * 3]),
        (png(2, 1, 16, 0, b"\0\x80\x01\x12\xff"), [[128] * 3, [18] * 3]),
        (png(1, 1, 16, 2, b"\0\x80\x01\x12\xff\x40\x00"), [[128, 18, 64]]),
        (png(2, 1, 8, 3, b"\0\x01\x00", chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6]))), [[4, 5, 6], [1, 2, 3]]),
        # What is transparent lies on black: by a channel, by a palette entry, by a colour.
        (png(2, 1, 8, 6, b"\0\xc8\x64\x32\x80\x09\x09\x09\x00"), [[100, 50, 25], [0] * 3]),
        (png(2, 1, 8, 4, b"\0\xc8\xff\xc8\x00"), [[200] * 3, [0] * 3]),
        (png(2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", b"\7" * 6), chunk(b"tRNS", b"\0\xff")), [[0] * 3, [7] * 3]),
        (png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", chunk(b"tRNS", b"\0\1\0\2\0\3")), [[0] * 3, [4, 5, 6]]),
    ],
    ids=["gray", "2-bit", "1-bit", "16-bit gray", "16-bit RGB", "palette", "RGBA", "LA", "palette alpha", "colour key"],
)
def test_any_png_becomes_rgb(content, expected):
    image = decode_image(content)
    assert image.dtype == np.uint8
    assert image.tolist() == [expected]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"\0" * 100, "no picture"),
        (b"hello", "no picture"),
        (encoded(NOISE, "TIFF"), "no picture"),
        (encoded(NOISE)[:-20], "damaged picture"),
        (encoded(NOISE)[:60], "damaged picture"),
        (encoded(NOISE, "JPEG")[:-20], "damaged picture"),
        (encoded(NOISE, "BMP")[:-20], "damaged picture"),
        (
            encoded(Image.fromarray(NOISE), save_all=True, append_images=[Image.fromarray(NOISE[::-1])]),
            "animated picture",
        ),
    ],
    ids=[
        "empty",
        "zeros",
        "text",
        "tiff",
        "png without end",
        "png without data",
        "short jpeg",
        "short bmp",
        "animated",
    ],
)
def test_what_cannot_be_read_has_a_reason(content, reason):
    assert reason_against(content) == reason


def test_every_flipped_bit_of_a_png_is_found():
    content = encoded(NOISE)
    for bit in range(8 * (len(content) - 12)):  # the last chunk is empty
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        assert reason_against(bytes(broken)) in ("damaged picture", "no picture")


@pytest.mark.parametrize("side", [8193, 10_000, 60_000])
@pytest.mark.parametrize("make", [lambda n: png(n, n, 8, 2, bytes(1000)), lambda n: bmp(n, n)], ids=["png", "bmp"])
def test_a_bomb_is_refused_by_the_size_that_it_declares(make, side, monkeypatch):
    monkeypatch.setattr(images, "_to_rgb", lambda image: pytest.fail("decoded"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason_against(make(side)) == "picture of too many pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_a_webp_bomb_is_refused():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason_against(webp(16_383, 16_383)) == "picture of too many pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_files_are_read_with_a_limit(tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    good.write_bytes(encoded(NOISE))
    np.testing.assert_array_equal(read_image(good), NOISE)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no disk
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    for name, reason in {
        "huge.png": "file too large for a picture",
        "broken.png": "file that cannot be read",
        ".": "not a file",
    }.items():
        with pytest.raises(BadImageError, match=reason):
            read_image(tmp_path / name)


def test_fitting_keeps_what_already_fits():
    assert fit_image(NOISE, None, gray=False) is NOISE
    assert fit_image(NOISE, (6, 9), gray=False) is NOISE


def test_shrinking_averages_over_areas():
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0] = 200
    assert fit_image(image, (2, 2), gray=False)[..., 1].tolist() == [[50, 0], [0, 0]]
    assert fit_image(image[..., :1], (2, 2), gray=False).tolist() == [[[50], [0]], [[0], [0]]]


def test_growing_keeps_the_range_and_the_sides():
    grown = fit_image(NOISE, (12, 27), gray=False)
    assert grown.shape == (12, 27, 3)
    assert grown.min() >= NOISE.min()
    assert grown.max() <= NOISE.max()


def test_gray_is_the_luma():
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]], np.uint8)
    assert fit_image(image, None, gray=True).tolist() == [[[76], [150], [29], [9]]]  # BT.601
    assert fit_image(image[..., :1], None, gray=True).tolist() == image[..., :1].tolist()
    many = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    np.testing.assert_array_equal(to_gray(many)[..., 0], np.asarray(Image.fromarray(many).convert("L")))
    np.testing.assert_array_equal(to_gray(jnp.asarray(many)), to_gray(many))
