"""Memory that a step computes in. Shapes: M rows, N tokens, D model, A kinds of angles, R rotated numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

PARTS = 4
"""Parts of a closing projection's inputs whose sums are added, whatever the number of threads: so is the result."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of a step stand in their texts, and where the texts' keys and values are."""

    positions: Sequence[int]
    """Of each token in its text."""
    slots: Sequence[int]
    """Where each token's key and value go, in the first dimension of the cache."""
    tables: Sequence[Sequence[int]]
    """Pages of each token's text."""
    page: int
    """Tokens of a page."""


class Memory:
    """Arrays of float32 that steps of all sizes use in turn; they grow, and what they hold is of no step."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def of(self, name: str, size: int) -> np.ndarray:
        """An array of at least so many numbers."""
        if name not in self._arrays or size > len(self._arrays[name]):
            self._arrays[name] = np.zeros(2 * size if name == "scores" else size, np.float32)
        return self._arrays[name]


class Room:
    """What one step of M rows is given, used again by the next; the rows beyond the tokens hold zeros."""

    def __init__(self, rows: int, size: int, kinds_of_angles: int) -> None:
        from flextron.inference.kernels.vectors import LANES  # behind Numba, which takes a second to import

        self.h, self.normed = np.zeros((rows, size), np.float32), np.zeros((rows, size), np.float32)
        self.sums = np.zeros((PARTS, rows, -(-size // LANES) * LANES), np.float32)
        self.positions, self.slots = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.cos = self.sin = np.zeros((kinds_of_angles, rows, 0), np.float32)
        self.tables, self.page = np.zeros((rows, 1), np.int64), 1

    def fill(self, h_ND: torch.Tensor, cos_ANR: np.ndarray, sin_ANR: np.ndarray, places: Places) -> None:
        """Take a step's embeddings, angles and places."""
        rows, count = len(self.h), len(h_ND)
        self.h[:count], self.h[count:] = h_ND.numpy(), 0
        if self.cos.shape[2] != cos_ANR.shape[2]:
            self.cos, self.sin = (np.zeros((len(cos_ANR), rows, cos_ANR.shape[2]), np.float32) for _ in range(2))
        self.cos[:, :count], self.sin[:, :count] = cos_ANR, sin_ANR
        self.positions[:count], self.positions[count:] = places.positions, 0
        self.slots[:count], self.slots[count:] = places.slots, -1
        self.page = places.page
        self.tables = np.zeros((rows, max(len(table) for table in places.tables)), np.int64)
        for row, table in zip(self.tables, places.tables, strict=False):
            row[: len(table)] = table

    def padded(self, widths_LN: np.ndarray) -> np.ndarray:
        """Widths for all rows, [L, M]; 0 beyond the tokens."""
        widths_LM = np.zeros((len(widths_LN), len(self.h)), np.int64)
        widths_LM[:, : widths_LN.shape[1]] = widths_LN
        return widths_LM
