"""Slopes of the loss at every token in every layer, from which a token router learns; kept round by round.

Shapes: L layers, N tokens, D model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flextron.atomic import new_folder
from flextron.routers.static.pairs import FOLDER

FILE = "slopes.safetensors"


class Slopes(NamedTuple):
    """Measurements of one round at every token in every layer."""

    hidden_LND: torch.Tensor
    """Inputs of the MLPs, bfloat16."""
    slopes_LN: torch.Tensor
    """Nats that one more neuron would save, as multiples of the layer's mean."""
    log_worths_LN: torch.Tensor
    """Logarithms of worths that the router gave in this round."""
    budgets_N: torch.Tensor
    """Budgets of the tokens' rows, as shares of the full model's cost."""


class KeptSlopes:
    """Measured rounds, kept in a checkpoint's folder until its token router is made."""

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        """Open the rounds that belong to `about`: weights, static router, text and settings; must be JSON."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = Path(folder) / FOLDER / f"slopes-{digest}"

    def load(self, round_: int) -> Slopes | None:
        """Read a round that an earlier run measured; None if there is none or it cannot be read."""
        try:
            slopes = Slopes(**load_file(self._of(round_) / FILE))
        except (OSError, SafetensorError, TypeError):
            return None
        return slopes if all(bool(tensor.isfinite().all()) for tensor in slopes) else None

    def save(self, round_: int, slopes: Slopes) -> None:
        """Write a round, whole or not at all.

        Raises:
            CheckpointError: the write failed.
        """
        with new_folder(self._of(round_), overwrite=True, kind=FILE) as partial:
            save_file({name: tensor.contiguous() for name, tensor in slopes._asdict().items()}, partial / FILE)

    def forget(self) -> None:
        """Remove all rounds."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _of(self, round_: int) -> Path:
        return self.folder / f"round-{round_}"
