"""What a token router learns from: slopes of the loss at every token in every layer, kept round by round.

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
    """What one round measured at every token in every layer."""

    hidden_LND: torch.Tensor
    """What entered the MLP, bfloat16."""
    slopes_LN: torch.Tensor
    """Nats that a neuron more would save, in means of the layer."""
    log_worths_LN: torch.Tensor
    """As the router had them then."""
    budgets_N: torch.Tensor


class KeptSlopes:
    """Rounds that are measured, in a folder beside a checkpoint until its token router is made."""

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        """Those of a checkpoint that belong to `about`: weights, static router, text and settings, as JSON."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = Path(folder) / FOLDER / f"slopes-{digest}"

    def load(self, round_: int) -> Slopes | None:
        """What an earlier run measured in a round; None where it did not, or where the file cannot be read."""
        try:
            return Slopes(**load_file(self._of(round_) / FILE))
        except (OSError, SafetensorError, TypeError):
            return None

    def save(self, round_: int, slopes: Slopes) -> None:
        """Keep a round, whole or not at all.

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
