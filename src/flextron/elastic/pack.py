"""Packs: an elastic model as a small file beside any copy of its base checkpoint.

A pack holds the ranking, and for every elastic projection a low-rank change of the ranked weights, W + B A. So a
trained model of 270 MB travels in some 12 MB to everyone who has the base.

Shapes: R rank, A [R, in], B [out, R], both int8 with one scale for each of the R parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from flextron.elastic.checkpoint import ORDERS, Ranking
from flextron.elastic.model import ElasticModel, projections_of
from flextron.elastic.permutation import permute
from flextron.elastic.smollm2 import named
from flextron.elastic.source import PACK
from flextron.errors import CheckpointError
from flextron.records import checked, read_record
from flextron.subnet import SearchSpace

VERSION = 1
FILE = PACK
WEIGHTS = "pack.safetensors"
SHIPPED = "packs"
"""Folder of flextron with the packs that come with it."""
_NAMES = ("base", "base_fingerprint", "fingerprint", "dtype")
_KEYS = (*_NAMES, "search_space", "ranking", "about")


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of a weight, B A."""

    a: torch.Tensor  # [R, in] int8
    b: torch.Tensor  # [out, R] int8
    scales: torch.Tensor  # [R] float32

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> LowRank:
        """Round A and B, of any float type, to 8 bits; each of the R parts has its own scale."""
        tops_a, tops_b = a.abs().amax(1).clamp_min(1e-30), b.abs().amax(0).clamp_min(1e-30)
        rounded_a = (a / tops_a[:, None] * 127).round().to(torch.int8)
        rounded_b = (b / tops_b * 127).round().to(torch.int8)
        return cls(rounded_a, rounded_b, (tops_a * tops_b / 127**2).float())

    def matrix(self) -> torch.Tensor:
        """B A, [out, in] in float64: so that machines that sum in another order get the same weights."""
        return (self.b.double() * self.scales.double()) @ self.a.double()

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, in] and B [out, R] in float32; in each part both are of about the same size."""
        a, b = self.a.float(), self.b.float()
        sizes_a, sizes_b = (each.square().mean(dim).sqrt().clamp_min(1e-30) for each, dim in ((a, 1), (b, 0)))
        ratio = (self.scales * sizes_b / sizes_a).sqrt()
        return a * ratio[:, None], b * (self.scales / ratio)


@dataclass(frozen=True)
class Pack:
    """What turns a base checkpoint into a trained elastic model."""

    base: str
    """Name of the base checkpoint, for people and for loading it where none is named."""
    base_fingerprint: str
    """`ElasticModel.fingerprint` of the base before ranking."""
    fingerprint: str
    """The same of the model that the pack makes; routers and pairs belong to it."""
    search_space: SearchSpace
    dtype: str
    """Type of the trained weights, such as float32, which loading takes unless told otherwise."""
    ranking: Ranking
    changes: Mapping[str, LowRank]
    """By the name of the projection in the transformers model."""
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Trained values of other parameters (norms, biases), by name, in float32."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """How the pack was made, and what it lost: JSON values."""

    def apply(self, model: ElasticModel) -> None:
        """Rank and change the weights of a base checkpoint in place.

        Raises:
            CheckpointError: the model is not the pack's base. Then nothing has changed.
        """
        found = model.fingerprint()
        if found != self.base_fingerprint:
            ranked = " It is ranked already; name the checkpoint that it was ranked from." if model.ranking else ""
            raise CheckpointError(
                f"this pack was made for {self.base} (fingerprint {self.base_fingerprint}), and the model has the "
                f"fingerprint {found}.{ranked} Load the pack's own base."
            )
        self._check_sizes(model)
        permute(model, self.ranking)
        self.change(model)
        model.search_space = self.search_space

    def _check_sizes(self, model: ElasticModel) -> None:
        sizes = {name: tuple(each.matrix().shape) for name, each in projections_of(model).items()}
        wanted: dict[str, tuple[int, ...]]
        wanted = {name: (len(change.b), change.a.shape[1]) for name, change in self.changes.items()}
        sizes |= {name: tuple(parameter.shape) for name, parameter in model.lm.named_parameters()}
        wanted |= {name: tuple(other.shape) for name, other in self.others.items()}
        for name, size in wanted.items():
            if sizes.get(name) != size:
                raise CheckpointError(f"this pack changes {name} of size {size}; the model has {sizes.get(name)}.")

    @torch.no_grad()
    def change(self, model: ElasticModel) -> None:
        """Change the weights of the ranked base in place."""
        projections, parameters = projections_of(model), dict(model.lm.named_parameters())
        for name, change in self.changes.items():
            weight = projections[name].matrix()
            weight.add_(change.matrix().to(weight))
        for name, other in self.others.items():
            parameters[name].copy_(other)

    def made(self, fingerprint: str) -> Pack:
        """The same pack, with the fingerprint of the model that it makes."""
        return replace(self, fingerprint=fingerprint)

    def save(self, folder: Path) -> None:
        """Write pack.safetensors and pack.json into a folder."""
        tensors = {f"ranking.{name}": getattr(self.ranking, name).to(torch.int16).contiguous() for name in ORDERS}
        for name, change in self.changes.items():
            tensors |= {f"{name}.{part}": getattr(change, part).contiguous() for part in ("a", "b", "scales")}
        tensors |= {f"{name}.whole": other.contiguous() for name, other in self.others.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"version": str(VERSION)})
        record = {
            "version": VERSION,
            **{key: getattr(self, key) for key in _NAMES},
            "search_space": asdict(self.search_space),
            "ranking": {key: getattr(self.ranking, key) for key in ("score", "tokens", "text")},
            "about": dict(self.about),
        }
        (folder / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")

    @classmethod
    def load(cls, folder: Path) -> Pack:
        """Read what `save` wrote.

        Raises:
            CheckpointError: a file is missing, damaged, or of another version.
        """
        try:
            record = checked(read_record(folder / FILE, version=VERSION, keys=_KEYS), _Record)
            with safe_open(folder / WEIGHTS, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            orders = {name: tensors.pop(f"ranking.{name}").to(torch.int32) for name in ORDERS}
            whole = [name for name in tensors if name.endswith(".whole")]
            others = {name.removesuffix(".whole"): tensors.pop(name) for name in whole}
            names = {name.rpartition(".")[0] for name in tensors}
            if not all(tensor.isfinite().all() for tensor in others.values()):
                raise ValueError("it has numbers that are not finite")
            return cls(
                base=record["base"],
                base_fingerprint=record["base_fingerprint"],
                fingerprint=record["fingerprint"],
                dtype=record["dtype"],
                about=record["about"],
                search_space=record["search_space"],
                ranking=Ranking(**orders, **record["ranking"]),
                changes={name: _change(name, tensors) for name in sorted(names)},
                others=others,
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the pack {folder}: {error}. Fetch or make it again.") from error


class _Ranked(TypedDict):
    score: str
    tokens: int
    text: str


class _Record(TypedDict):
    """What FILE holds besides its version."""

    base: str
    base_fingerprint: str
    fingerprint: str
    dtype: str
    search_space: SearchSpace
    ranking: _Ranked
    about: dict[str, Any]


def _change(name: str, tensors: Mapping[str, torch.Tensor]) -> LowRank:
    a, b, scales = (tensors[f"{name}.{part}"] for part in ("a", "b", "scales"))
    matrices = a.dtype == b.dtype == torch.int8 and a.dim() == b.dim() == 2
    if not (matrices and scales.dim() == 1 and len(a) == b.shape[1] == len(scales) and scales.isfinite().all()):
        raise ValueError(f"the change of {name} is damaged")
    return LowRank(a, b, scales)


def find_pack(name: str | Path) -> Path:
    """The folder of a pack: a folder, a pack that comes with flextron, or a hub id, which is downloaded.

    Raises:
        CheckpointError: there is none of this name.
    """
    folder = Path(name)
    if (folder / FILE).is_file():
        return folder
    shipped = shipped_packs()
    if str(name) in shipped:
        return shipped[str(name)]
    if not folder.exists() and str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return _downloaded(str(name))
    known = ", ".join(sorted(shipped)) or "none"
    raise CheckpointError(
        f"there is no pack {name}: it is no folder with a {FILE}, and no pack that comes with flextron ({known})."
    )


def changes_of(path: str) -> Mapping[str, LowRank]:
    """The low-rank changes of a pack, by the name of the projection; its place as for `ElasticModel.from_pretrained`.

    Raises:
        CheckpointError: it is no pack, or cannot be read.
    """
    folder = Path(named(path))
    if not (folder / FILE).is_file():
        raise CheckpointError(
            f"{path} is no pack, so it has no changes to train. Make one with `flextron pack`, or pass --lora-rank 16 "
            "in place of --train-pack."
        )
    return Pack.load(folder).changes


def shipped_packs() -> dict[str, Path]:
    """The packs that come with flextron, by name."""
    home = Path(str(resources.files("flextron") / SHIPPED))
    return {file.parent.name: file.parent for file in sorted(home.glob(f"*/{FILE}"))}


def _downloaded(repository: str) -> Path:
    try:
        files = [cached_file(repository, name) for name in (WEIGHTS, FILE)]
    except OSError as error:
        raise CheckpointError(f"cannot fetch the pack {repository}: {str(error).splitlines()[0]}") from None
    return Path(str(files[-1])).parent
