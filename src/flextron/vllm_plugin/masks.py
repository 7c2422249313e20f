"""Masks that run every token of a batch as its own level, in a model of vLLM's. No vLLM here.

vLLM's own code computes all units. Each closing projection (down, O) then reads, from one buffer on the device, the
level of every token, and drops the units beyond it. Nothing waits for the host, so that a CUDA graph captured once
serves all later levels. K and V of all groups are written to the cache; heads beyond a level are dropped before O.

Shapes: N tokens, L levels, C columns of a closing projection on this device, D model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from flextron.elastic.families import family_of
from flextron.errors import FlextronError
from flextron.serving.saved import Levels


class LevelMasks:
    """The level of every token in a batch, and the closing projections that read it."""

    def __init__(self, levels: Levels, max_tokens: int, device: str | torch.device) -> None:
        """Start with all tokens at the full model's level.

        Args:
            max_tokens: most tokens in a batch, padding included.
        """
        self.levels = levels
        self.full = len(levels) - 1
        self.level_N = torch.full((max_tokens,), self.full, dtype=torch.long, device=device)

    def set(self, levels: Sequence[int], tokens: Sequence[int]) -> None:
        """Set the levels of a batch.

        Args:
            levels: of each request, in the order of the batch.
            tokens: how many tokens of the batch belong to each request.
        """
        level_N = torch.tensor(levels, dtype=torch.long).repeat_interleave(torch.tensor(tokens, dtype=torch.long))
        self.level_N[: len(level_N)].copy_(level_N)

    def install(self, model: nn.Module, model_type: str, *, layers: range | None = None) -> int:
        """Let the closing projections of `model` read the levels; return how many there are.

        Args:
            model: vLLM's, from its own code or from its Transformers backend.
            model_type: of the checkpoint's config.
            layers: those that this process holds, if not all (pipeline parallelism).

        Raises:
            FlextronError: a projection is missing, is of an unknown kind, or has another size than the checkpoint's.
            UnknownFamilyError: the architecture has no spec.
        """
        family, space = family_of(model_type), self.levels.search_space
        module_list = family.layers.rpartition(".")[2]
        found = dict(model.named_modules())
        layers = range(space.layers) if layers is None else layers
        for layer in layers:
            for name, axis in family.axes.items():
                path = re.compile(rf"(.*\.)?{module_list}\.{layer}\.{re.escape(axis.closes)}")
                closing = [module for place, module in found.items() if path.fullmatch(place)]
                if len(closing) != 1:
                    raise FlextronError(
                        f"{module_list}.{layer}.{axis.closes} is there {len(closing)} times in vLLM's "
                        f"{type(model).__name__}, not once. Please report this."
                    )
                if name == "neurons" and _columns(closing[0])[0] != space.neurons[-1]:
                    raise FlextronError(
                        f"levels.json is of a model with {space.neurons[-1]} neurons in each layer, this one has "
                        f"{_columns(closing[0])[0]}. Write it again."
                    )
                widths = [level.subnet[name][layer] for level in self.levels]
                make_masked(closing[0], widths, space[name][-1], self.level_N)
        return len(layers) * len(family.axes)


class _Masked(nn.Module):
    """A closing projection that drops, for each token, the columns beyond its level."""

    flextron_levels: torch.Tensor
    flextron_columns: torch.Tensor
    flextron_bias: bool
    flextron_offset: int

    def forward(self, x: torch.Tensor) -> Any:
        """Project [..., N, C], with columns beyond each token's level set to 0."""
        columns_N = self.flextron_columns[self.flextron_levels[: x.shape[-2]]]
        beyond_NC = torch.arange(x.shape[-1], device=x.device) >= columns_N[:, None]
        result = super().forward(x.masked_fill(beyond_NC, 0))
        if not self.flextron_bias:
            return result
        skipped_N1 = columns_N[:, None] + self.flextron_offset <= 0  # a skipped sub-layer has no bias
        if isinstance(result, tuple):
            return (result[0].masked_fill(skipped_N1, 0), *result[1:])
        return result.masked_fill(skipped_N1, 0)


@cache
def _masked(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Masked{kind.__name__}", (_Masked, kind), {})


def make_masked(closing: nn.Module, widths: Sequence[int], full: int, level_N: torch.Tensor) -> None:
    """Make a projection, changed in place, drop the columns of units beyond each token's level.

    With tensor parallelism it holds a block of the columns (vLLM's RowParallelLinear), and counts from its start.

    Args:
        widths: units of each level, [L].
        full: units of the full model.
        level_N: level of each token, read on every call.

    Raises:
        FlextronError: the projection does not fit.
    """
    size, offset = _columns(closing)
    if isinstance(closing, _Masked) or size % full:
        raise FlextronError(f"a {type(closing).__name__} of {size} columns cannot hold {full} units. Report this.")
    if getattr(closing, "skip_bias_add", False) and getattr(closing, "bias", None) is not None:
        raise FlextronError(
            f"a {type(closing).__name__} gives its bias to others, so it cannot be masked. Report this."
        )
    columns_L = torch.tensor([width * (size // full) - offset for width in widths], device=level_N.device)
    kind: Any = type(closing)
    closing.__class__ = _masked(kind)
    masked = cast(_Masked, closing)
    masked.register_buffer("flextron_levels", level_N, persistent=False)
    masked.register_buffer("flextron_columns", columns_L, persistent=False)
    masked.flextron_bias = getattr(closing, "bias", None) is not None
    masked.flextron_offset = offset


def _columns(closing: nn.Module) -> tuple[int, int]:
    """Number of input columns of a whole projection, and the first one on this device."""
    sizes = (getattr(closing, name, None) for name in ("input_size", "in_features", "nx"))
    whole: int | None = next(filter(None, sizes), None)
    if whole is None:
        raise FlextronError(f"a {type(closing).__name__} does not say how many columns it has, so it is not masked.")
    here = getattr(closing, "input_size_per_partition", whole)
    if here == whole or not getattr(closing, "input_is_parallel", True):
        return whole, 0
    return whole, here * int(cast(Any, closing).tp_rank)
