"""Pictures from outside: any still image to RGB, and frames brought to one size and number of channels."""

import io
import re
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, UInt8
from PIL import ExifTags, Image

from dreamer4.errors import UserError

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
# What shows a picture as it was taken, by the orientation of its EXIF data (CIPA DC-008, 4.6.5.1.6).
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 2**26  # 8192 x 8192: a file that declares more is refused before anything of it is decoded
MAX_BYTES = 2**28  # a file of more is refused unread


class BadImageError(Exception):
    """A picture that cannot be read; its text is a reason without names or sizes, so that a report can count it."""


def read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in a file, as RGB.

    Raises BadImageError for what is no regular file, cannot be read or is larger than ``MAX_BYTES``, and as
    ``decode_image`` does.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise BadImageError("not a file")
        if status.st_size > MAX_BYTES:
            raise BadImageError("file too large for a picture")
        data = path.read_bytes()
    except OSError:
        raise BadImageError("file that cannot be read") from None
    return decode_image(data)


def decode_image(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in a file's content, as RGB.

    Gray, palette and 1-bit pictures become RGB, 16-bit ones keep their high byte, what is transparent lies on black,
    and one that was taken lying is turned as its EXIF data say. Of a JPEG with several pictures (MPO: a preview, a gain
    map) it is the first. Raises BadImageError for content that is empty, no picture of ``FORMATS``, truncated, damaged,
    animated, or larger than ``MAX_PIXELS`` by its own declaration.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of sizes that are refused here and of metadata
            return _decode(data)
    except Image.DecompressionBombError:
        raise BadImageError("picture of too many pixels") from None
    except Image.UnidentifiedImageError:
        raise BadImageError("no picture") from None
    # What Pillow raises on damaged files; it documents no common class.
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, struct.error, zlib.error):
        raise BadImageError("damaged picture") from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width of ``HxW``, as in 64x96; None for None. Raises UserError for anything else."""
    if text is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", text):
        raise UserError(f"resize: {text!r} found, HEIGHTxWIDTH expected, as in 64x96")
    height, width = text.split("x")
    return int(height), int(width)


def fit_image(
    image: UInt8[np.ndarray, "H W C"], size: tuple[int, int] | None, gray: bool
) -> UInt8[np.ndarray, "H2 W2 C2"]:
    """The frame in ``size`` (height, width), where one is given, and in one channel (``to_gray``) for ``gray``.

    Shrinking averages over areas, so that small objects fade rather than vanish; growing interpolates.
    """
    if gray:
        image = np.asarray(to_gray(image))
    if size is None or image.shape[:2] == size:
        return image
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = picture.resize((size[1], size[0]), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(*size, image.shape[-1])


def to_gray(frames: UInt8[Array | np.ndarray, "*lead C"]) -> UInt8[Array | np.ndarray, "*lead 1"]:
    """Frames in one channel: the ITU-R 601 luma of red, green and blue, as Pillow rounds it. Those of one channel stay
    as they are.

    In whole numbers, so that numpy and any device agree in every bit.
    """
    if frames.shape[-1] == 1:
        return frames
    red, green, blue = (frames[..., i : i + 1].astype(np.int32) for i in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)


def on_black(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """A picture with an alpha channel (RGBA), of which what is transparent lies on black."""
    ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(ground, image).convert("RGB"))


def _decode(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError("picture of too many pixels")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise BadImageError("animated picture")
    if image.format == "PNG":
        Image.open(io.BytesIO(data), formats=FORMATS).verify()  # the checksums, which decoding does not look at
    image.load()  # of which the next line would hide what goes wrong
    turn = ORIENTATIONS.get(_orientation(image))
    return _to_rgb(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # what Pillow raises on damaged EXIF data is of no common class; the picture may be sound
        return None


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip to white
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return on_black(image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
