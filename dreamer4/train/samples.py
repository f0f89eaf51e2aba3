"""Pictures and films of a run, as PNG and GIF."""

import io
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from jaxtyping import Float, UInt8

PNG_WIDTH = 960


def write_png(path: Path, image: Float[np.ndarray, "H W C"], width: int = PNG_WIDTH) -> None:
    """``image`` in [0, 1], whole pixels enlarged up to about ``width``; the file appears in one piece."""
    _write(path, imageio.imwrite("<bytes>", pixels(image[None], width)[0], extension=".png"))


def write_gif(path: Path, film: Float[np.ndarray, "T H W C"], fps: float = 8, width: int = 640) -> None:
    """``film`` in [0, 1] as an endless GIF, whole pixels enlarged up to about ``width``."""
    frames = pixels(film, width)
    _write(path, imageio.imwrite("<bytes>", frames, extension=".gif", duration=round(1000 / fps), loop=0))


def pixels(film: Float[np.ndarray, "T H W C"], width: int) -> UInt8[np.ndarray, "T H2 W2 3"]:
    """``film`` in [0, 1] as bytes in colour, whole pixels enlarged up to about ``width``."""
    scale = max(1, round(width / film.shape[2]))
    frames = (np.clip(film, 0, 1) * 255 + 0.5).astype(np.uint8)
    frames = np.broadcast_to(frames, (*frames.shape[:3], 3)) if frames.shape[3] == 1 else frames
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _write(path: Path, data: bytes | None) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(io.BytesIO(data or b"").getvalue())
    temporary.replace(path)
