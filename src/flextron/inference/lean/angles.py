"""The angles by which a model rotates queries and keys. Shapes: A kinds of angles, T positions, N tokens, R numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Angles:
    """Cosines and sines of the positions so far: asking the module for them takes 0.1 ms a step."""

    def __init__(self, lm: Any) -> None:
        self._rotary = lm.model.rotary_emb
        types = lm.config.layer_types if isinstance(self._rotary.rope_type, dict) else [None]
        self._types: list[str | None] = types
        self.kinds = sorted(set(types), key=str)
        """Types of layers with angles of their own; one, None, where all have the same."""
        self._cos_ATR = self._sin_ATR = np.zeros((len(self.kinds), 0, 0), np.float32)

    def kind_of(self, layer: int) -> int:
        """Index in `kinds` of a layer's."""
        return self.kinds.index(self._types[layer % len(self._types)])

    def of(self, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, each [A, N, R]."""
        if max(positions) >= self._cos_ATR.shape[1]:
            ids = torch.arange(max(256, 2 * max(positions)))
            both = [self._rotary(torch.zeros(1), ids[None], *([kind] if kind else ())) for kind in self.kinds]
            self._cos_ATR, self._sin_ATR = (torch.cat(each).float().numpy() for each in zip(*both, strict=True))
        chosen = list(positions)
        return self._cos_ATR[:, chosen], self._sin_ATR[:, chosen]
