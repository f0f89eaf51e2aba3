"""The tokens of a time step: what kinds there are, where they stand, and who reads whom."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True)
class Modality:
    """Tokens of one kind within a time step: ``size`` of them, or a ``grid`` (rows, columns) with places in space.

    ``reads`` names the modalities that its tokens attend to within their time step.
    """

    name: str
    reads: tuple[str, ...]
    size: int = 0
    grid: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1] if self.grid else self.size


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tokens of a time step in order, and how many of them, from the front, attend over time."""

    modalities: tuple[Modality, ...]
    temporal: int

    @property
    def tokens(self) -> int:
        return sum(m.count for m in self.modalities)

    def mask(self) -> Bool[np.ndarray, "S S"]:
        """``mask[i, j]``: token i attends to token j within a time step."""
        owner = np.repeat([m.name for m in self.modalities], [m.count for m in self.modalities])
        mask = np.stack([np.isin(owner, m.reads) for m in self.modalities for _ in range(m.count)])
        if not mask.any(axis=1).all():
            blind = owner[~mask.any(axis=1)][0]
            raise ValueError(f"layout: {blind} tokens attend to nothing, which would mean to everything alike")
        return mask

    def positions(self) -> Float[np.ndarray, "S 2"]:
        """Row and column of each token on its grid; (0, 0) for tokens off any grid."""
        places = []
        for m in self.modalities:
            rows, columns = m.grid or (1, 1)
            grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
            places.append(grid if m.grid else np.zeros((m.count, 2)))
        return np.concatenate(places).astype(np.float32)

    def distances(self) -> Float[np.ndarray, "S S"]:
        """Steps along rows and columns from each token to each; 0 from and to tokens off any grid."""
        places = self.positions()
        placed = np.repeat([m.grid is not None for m in self.modalities], [m.count for m in self.modalities])
        steps = np.abs(places[:, None] - places[None]).sum(-1)
        return np.where(placed[:, None] & placed, steps, 0).astype(np.float32)
