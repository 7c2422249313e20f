"""What of a model is elastic, what is not and why, and the entry in FAMILIES that would pin what discovery found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from flextron.elastic.contract import BrokenContractError, check_contract, random_tokens, subnets
from flextron.elastic.coverage import Coverage, coverage_of
from flextron.elastic.discovery import found_for
from flextron.elastic.families import FAMILIES, Family
from flextron.elastic.layers import SubLayer
from flextron.elastic.model import ElasticModel
from flextron.elastic.shrinking import small_copy
from flextron.errors import UnknownFamilyError, first_line
from flextron.subnet import Subnet

_TOLERANCES = {torch.float16: 0.05, torch.bfloat16: 0.1}  # relative to the largest logit
_TOLERANCE = 1e-3  # the same, for wider dtypes
_NAMES = {"neurons": "MLP", "kv_groups": "attention"}


@dataclass(frozen=True)
class Inspection:
    """What was found about a model."""

    model_type: str
    family: Family
    written: bool
    """Whether the spec is an entry in FAMILIES; else discovery found it."""
    coverage: Coverage
    sub_layers: tuple[str, ...]
    """One line for each kind of sub-layer."""
    doubts: tuple[str, ...]
    """Why nothing narrower holds."""
    difference: float
    """Largest difference of a logit between a narrowed and a masked sub-network, over the largest logit."""

    def __str__(self) -> str:
        how = "has an entry in FAMILIES" if self.written else "found by discovery"
        lines = [f"{self.model_type}: {how}; the contract holds on a small random copy"]
        lines += [f"  {line}" for line in self.sub_layers]
        lines += [f"  {self.coverage}", *(f"  nothing narrower holds: {doubt}" for doubt in self.doubts)]
        lines.append(f"  on these weights, narrowed and masked logits differ by {self.difference:.1g} of the largest")
        if not self.written:
            lines += [
                "",
                f"This entry in src/flextron/elastic/families.py pins it:\n{entry(self.model_type, self.family)}",
            ]
        return "\n".join(lines)


def inspect(model: ElasticModel) -> Inspection:
    """Say what of a model narrows, after checking its spec on a small random copy and on its own weights.

    Raises:
        UnknownFamilyError: an equality does not hold; the message names it.
    """
    kind = model.config.model_type
    written = kind in FAMILIES
    if written:
        _check_written(model)
    doubts = () if written else found_for(model.config).doubts
    return Inspection(
        kind,
        model.family,
        written,
        coverage_of(model),
        tuple(_sub_layers(model)),
        doubts,
        _difference(model),
    )


def _check_written(model: ElasticModel) -> None:
    """Hold a written spec against the contract."""
    kind = model.config.model_type
    try:
        check_contract(small_copy(model.config), model.family)
    except BrokenContractError as error:
        raise UnknownFamilyError(f"the entry FAMILIES[{kind!r}] is wrong: {error}.") from None
    except Exception as error:  # configs refuse small sizes with errors of many types
        raise UnknownFamilyError(f"no small copy of {kind} runs, on which to check ({first_line(error)}).") from None


def _sub_layers(model: ElasticModel) -> Iterator[str]:
    total = sum(p.numel() for layer in model.layers for p in layer.module.parameters())
    kinds: dict[tuple[str, str], list[SubLayer]] = {}
    for _, axis, sub in model.sub_layers():
        kinds.setdefault((axis, sub.axis.closes), []).append(sub)
    for (axis, closes), subs in kinds.items():
        share = sum(p.numel() for sub in subs for p in sub.unit_parameters()) / total
        yield f"{_NAMES[axis]:<10}{_units(subs[0], axis):<34}{len(subs)} layers  {share:>4.0%}  closes with {closes}"


def _units(sub: SubLayer, axis: str) -> str:
    if not sub.axis.narrows:
        return "left out as a whole"
    if sub.axis.experts:
        return f"{sub.width.full} experts"
    if axis == "neurons" and sub.closing_size > sub.width.full:
        return f"{sub.width.full} blocks of {sub.closing_size // sub.width.full} neurons"
    if axis == "neurons":
        return f"{sub.width.full:,} neurons"
    return f"{sub.width.full} KV groups of {sub.heads_per_unit} query heads"


def entry(model_type: str, family: Family) -> str:
    """Python code of an entry in FAMILIES, without fields that have their defaults."""
    return f'    "{model_type}": {_code(family, "    ")},'


def _code(value: Any, indent: str) -> str:
    if not is_dataclass(value):
        return repr(value).replace("'", '"')
    inner = indent + "    "
    given = [field for field in fields(value) if getattr(value, field.name) != field.default]
    lines = [f"{inner}{field.name}={_code(getattr(value, field.name), inner)},\n" for field in given]
    return f"{type(value).__name__}(\n{''.join(lines)}{indent})"


@torch.inference_mode()
def _difference(model: ElasticModel) -> float:
    """The largest difference of a logit between narrowed and masked, on the model's own weights, over the largest.

    Raises:
        UnknownFamilyError: it is more than rounding explains.
    """
    tokens_BT = random_tokens(model.lm).to(model.device)
    worst = 0.0
    for subnet in subnets(model.search_space)[:2]:
        with model.use(subnet):
            narrowed_BTV = model(tokens_BT, use_cache=False).logits.float()
        with model.use(model.search_space.full), _masked(model, subnet):
            masked_BTV = model(tokens_BT, use_cache=False).logits.float()
        worst = max(worst, float((narrowed_BTV - masked_BTV).abs().max() / masked_BTV.abs().max()))
    if not worst <= _TOLERANCES.get(model.dtype, _TOLERANCE):
        raise UnknownFamilyError(
            f"the spec of {model.config.model_type} is wrong for these weights: narrowed and masked logits differ by "
            f"{worst:.2g} of the largest."
        )
    return worst


@contextmanager
def _masked(model: ElasticModel, subnet: Subnet) -> Iterator[None]:
    """Let the full model compute `subnet` by zeros in place of what it leaves out."""
    with ExitStack() as hooks:
        for layer, axis, sub in model.sub_layers():
            if sub.axis.experts:  # which experts a token meets depends on those that are kept
                sub.keep(subnet[axis][layer])
                continue
            kept = sub.closing_size // sub.width.full * subnet[axis][layer]
            hooks.callback(sub.closes.register_forward_pre_hook(_first_columns(kept)).remove)
            if not kept:
                hooks.callback(sub.closes.register_forward_hook(_zeros).remove)
        yield


def _first_columns(kept: int) -> Any:
    def mask(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        masked = inputs[0].clone()
        masked[..., kept:] = 0
        return (masked, *inputs[1:])

    return mask


def _zeros(_module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)
