"""Frames as files: one to be seen now, and films of many."""

import io
import itertools

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Frame = UInt8[np.ndarray, "H W C"]
GIF_WIDTH = 320
"""Whole pixels of a dream are enlarged up to about this in a film."""
PNG_PIXELS = 128 * 128
"""Larger frames go as JPEG."""


def encode_frame(frame: Frame) -> tuple[bytes, str]:
    """A picture file and its type: PNG, which loses nothing, or for large frames JPEG, which takes less time."""
    image = Image.fromarray(frame[..., 0] if frame.shape[-1] < 3 else frame[..., :3])
    small, out = frame.shape[0] * frame.shape[1] <= PNG_PIXELS, io.BytesIO()
    if small:
        image.save(out, "png", compress_level=1)
    else:
        image.save(out, "jpeg", quality=92)
    return out.getvalue(), "image/png" if small else "image/jpeg"


def make_gif(film: list[list[Frame]], rate: float) -> bytes:
    """An endless GIF of what was side by side at each tick, ``rate`` of which take a second."""
    height, width = film[0][0].shape[:2]
    most = max(len(shown) for shown in film)
    scale = max(1, round(GIF_WIDTH / (width * most)))

    def picture(shown: list[Frame]) -> Image.Image:
        row = np.zeros((height, width * most, 3), np.uint8)
        for i, frame in enumerate(shown):
            row[:, i * width : (i + 1) * width] = frame[..., :3]
        # Enlarged when its colours are counted: a film of enlarged RGB would be hundreds of megabytes.
        return Image.fromarray(row).quantize().resize((width * most * scale, height * scale), Image.Resampling.NEAREST)

    out, pictures = io.BytesIO(), map(picture, film)
    first = next(pictures)
    first.save(out, "gif", save_all=True, append_images=pictures, duration=gif_durations(len(film), rate), loop=0)
    return out.getvalue()


def gif_durations(count: int, rate: float) -> list[int]:
    """Milliseconds of each picture, in hundredths of a second, as a GIF has them, that add up to what they should. At
    least two: browsers make ten of less."""
    ends = [round(100 * i / rate) for i in range(count + 1)]
    return [10 * max(2, end - start) for start, end in itertools.pairwise(ends)]
