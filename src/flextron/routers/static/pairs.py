"""Measured pairs of sub-network and loss, from which the surrogate learns; they are kept in a file that only grows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch

from flextron.data.blocks import TokenBlocks, batch_tokens
from flextron.elastic.model import ElasticModel
from flextron.errors import RouterError
from flextron.ranking.sensitivity import full_predictions, mixed_loss
from flextron.records import Journal, RecordError, checked, parse_record
from flextron.subnet import AXES, SearchSpace, Subnet

VERSION = 1
FOLDER = "routers"
"""Folder in a checkpoint's folder."""


class LossMeter:
    """Measures the loss of sub-networks on fixed tokens: half to the text, half to the full model's predictions.

    On text that is typical of the model both halves rise alike, but the second has less noise
    (docs/decisions/0003-sensitivity.md).
    """

    def __init__(self, model: ElasticModel, blocks: TokenBlocks, *, arithmetic: torch.dtype | None = None) -> None:
        """Compute the full model's predictions on `blocks`.

        Args:
            arithmetic: dtype to compute in, by default the weights'.
        """
        model.check_tokens(blocks.tokens)
        self.model = model
        self.blocks = blocks
        self.arithmetic = arithmetic or model.dtype
        self.measured = 0
        """Number of sub-networks measured so far; methods are compared at equal numbers."""
        with torch.inference_mode(), self._autocast():
            batches = [tokens_BT.to(model.device) for tokens_BT in blocks.batches(batch_tokens(model.device, 1024))]
            self._batches = [(tokens_BT, full_predictions(model, tokens_BT)) for tokens_BT in batches]

    @torch.inference_mode()
    def __call__(self, subnet: Subnet) -> float:
        """Measure the loss of one sub-network, in nats per token.

        Raises:
            SubnetError: `subnet` is not in the model's search space.
        """
        self.measured += 1
        rows = sum(len(tokens_BT) for tokens_BT, _ in self._batches)
        with self.model.use(subnet), self._autocast():
            losses = [
                len(tokens_BT) / rows * mixed_loss(self.model, tokens_BT, predictions)
                for tokens_BT, predictions in self._batches
            ]
        return sum(losses)

    def _autocast(self) -> torch.autocast:
        enabled = self.arithmetic != self.model.dtype and self.arithmetic.itemsize == 2  # fp32 needs no autocast
        return torch.autocast(self.model.device.type, dtype=self.arithmetic, enabled=enabled)


class Pairs:
    """The pairs of one checkpoint and one text, in a file that gets a line after every measurement.

    The first line says what they belong to; each further line is one pair. A line cut off by a crash is ignored.
    """

    @classmethod
    def beside(cls, folder: str | Path, about: dict[str, Any], space: SearchSpace | None = None) -> Pairs:
        """Open the pairs of the checkpoint and text that `about` describes, in a file of their own."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        return cls(Path(folder) / FOLDER / f"pairs-{digest}.jsonl", about, space)

    @classmethod
    def most_of(cls, folder: str | Path, fingerprint: str, space: SearchSpace | None = None) -> Pairs | None:
        """Open the file with most pairs of these weights beside a checkpoint; None if there is none."""
        found = []
        for file in sorted((Path(folder) / FOLDER).glob("pairs-*.jsonl")):
            about = _about(file)
            if about.get("fingerprint") == fingerprint:
                found.append(cls(file, about, space))
        return max(found, key=len, default=None)

    def __init__(self, file: str | Path, about: dict[str, Any], space: SearchSpace | None = None) -> None:
        """Read the pairs in `file`, those within `space`, or start the file.

        Raises:
            RouterError: the file belongs to another checkpoint or text, or cannot be read.
        """
        self.file = Path(file)
        self.about = about
        self.subnets: list[Subnet] = []
        self.losses: list[float] = []
        self._journal, header = Journal(file), {"version": VERSION, **about}
        if self.file.is_file():
            self._read(header, space)
        else:
            self._journal.replace([header])
        known = self.measured()  # doubles count once
        self.subnets, self.losses = list(known), list(known.values())

    def _read(self, header: dict[str, Any], space: SearchSpace | None) -> None:
        try:
            found = self._journal.read(partial(_header_or_pair, space=space))
            if not found or not isinstance(found[0], dict):
                raise RecordError("the first line, which says what they belong to, is broken")
        except (OSError, RecordError) as error:
            raise RouterError(
                f"cannot read the measured pairs in {self.file}: {error}. Delete it to start again."
            ) from None
        if found[0] != header:
            raise RouterError(
                f"{self.file} holds pairs of another checkpoint or text: {found[0]}. Delete it to start again."
            )
        for pair in (line for line in found if isinstance(line, _Pair)):
            self.subnets.append(Subnet(pair.neurons, pair.kv_groups))
            self.losses.append(pair.loss)

    def __len__(self) -> int:
        return len(self.subnets)

    def add(self, subnet: Subnet, loss: float) -> None:
        """Add one pair, on disk too."""
        self.subnets.append(subnet)
        self.losses.append(loss)
        self._journal.append({**{axis: subnet[axis] for axis in AXES}, "loss": loss})

    def measured(self) -> dict[Subnet, float]:
        """Return the losses by sub-network."""
        return dict(zip(self.subnets, self.losses, strict=True))


@dataclass(frozen=True)
class _Pair(Subnet):
    """One line of the file."""

    loss: float


class _About(TypedDict, total=False):
    fingerprint: str
    text: str
    tokens: int


def _about(file: Path) -> dict[str, Any]:
    """Return what the first line says that the pairs belong to; {} where it cannot be read."""
    try:
        with file.open("rb") as lines:
            return dict(checked(parse_record(lines.readline(), version=VERSION), _About))
    except (OSError, RecordError):
        return {}


def _header_or_pair(record: dict[str, Any], space: SearchSpace | None) -> dict[str, Any] | _Pair:
    if "version" in record:
        return record
    pair = checked(record, _Pair)
    if space is not None:
        space.check(pair)
    return pair
