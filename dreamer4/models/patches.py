"""Frames to patches and back, and the fixed patterns that a structured start of the tokenizer uses."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8


def patch_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches that cover the frame; the last ones may reach beyond it."""
    return -(-height // patch), -(-width // patch)


def patchify(video: Float[Array, "B T H W C"], patch: int) -> Float[Array, "B T N D"]:
    """Row by row of patches, each flattened to D = patch * patch * C numbers.

    Where the patch does not divide the frame, its last row and column of pixels go on below and to the right.
    """
    height, width = video.shape[2:4]
    rows, columns = patch_grid(height, width, patch)
    beyond = ((0, 0), (0, 0), (0, rows * patch - height), (0, columns * patch - width), (0, 0))
    padded = jnp.pad(video, beyond, mode="edge") if (rows * patch, columns * patch) != (height, width) else video
    return rearrange(padded, "b t (h p) (w q) c -> b t (h w) (p q c)", p=patch, q=patch)


def unpatchify(patches: Float[Array, "B T N D"], patch: int, size: tuple[int, int]) -> Float[Array, "B T H W C"]:
    """The frames of ``size`` (height, width) of which ``patchify`` makes these patches; what lies beyond is cut off."""
    rows, _ = patch_grid(*size, patch)
    video = rearrange(patches, "b t (h w) (p q c) -> b t (h p) (w q) c", p=patch, q=patch, h=rows)
    return video[:, :, : size[0], : size[1]]


def to_float(video: UInt8[Array | np.ndarray, "*lead"]) -> Float[Array, "*lead"]:
    """Frames in [0, 1], in which every loss and metric is stated."""
    return jnp.asarray(video, jnp.float32) / 255.0


def cosine_basis(patch: int, channels: int, features: int) -> Float[np.ndarray, "D features"]:
    """The 2-D cosine transform of a patch as a matrix of unit columns: the lowest frequencies of each channel in turn.

    Features past the patch * patch * channels that exist are zero.
    """
    places = (np.arange(patch) + 0.5) / patch
    waves = np.cos(np.pi * np.arange(patch)[:, None] * places)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    order = sorted(np.ndindex(patch, patch), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    basis = np.zeros((patch, patch, channels, features), np.float32)
    for i in range(min(features, patch * patch * channels)):
        row, column = order[i // channels]
        basis[:, :, i % channels, i] = np.outer(waves[row], waves[column])
    return basis.reshape(-1, features)


def sinusoids(grid: tuple[int, int], features: int) -> Float[np.ndarray, "N features"]:
    """Sines and cosines of the row and the column of each grid cell, unit mean square (ViT's fixed 2-D embedding).

    Frequencies fall from one turn in two cells to one turn in four grids.
    """
    places = np.indices(grid).reshape(2, -1, 1)
    turns = np.pi * np.geomspace(1.0, 0.5 / max(grid), features // 4) * places
    table = np.sqrt(2.0) * np.concatenate([np.sin(turns[0]), np.cos(turns[0]), np.sin(turns[1]), np.cos(turns[1])], 1)
    return np.pad(table, ((0, 0), (0, features - table.shape[1]))).astype(np.float32)
