"""Projections that run on the first units only, by views of the weights that they share with the full model.

Shapes: B batch, T time, D model, K units kept x rows per unit. Linear weights are [out, in], GPT-2's Conv1D [in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D


class Rows(NamedTuple):
    """Rows of a batch, put together by how many units of a sub-layer they use."""

    groups: tuple[tuple[torch.Tensor, int], ...]
    """Places of the rows that use so many."""
    back_B: torch.Tensor
    """Place of each row of the batch among all groups, one after the other."""


class Width:
    """How many units of one sub-layer run: the one thing that choosing a sub-network sets, shared by its modules."""

    __slots__ = ("first", "full", "kept", "mask", "rows", "run", "sums")

    def __init__(self, full: int) -> None:
        self.full = full
        self.kept = full
        self.first = 0
        """The first unit that runs; above 0 only while `per_token` adds up blocks of units."""
        self.mask: torch.Tensor | None = None
        """What each part of the closing projection's input is multiplied by, [..., parts]; set by `per_token`."""
        self.rows: Rows | None = None
        """Rows that use fewer units than are kept: their projections are narrower still; set by `per_token`."""
        self.sums: torch.Tensor | None = None
        """What the closing projection adds a block's output to, in place, [N, D]; set by `per_token`."""
        self.run: Callable[..., Any] | None = None
        """What runs the sub-layer where its tokens differ in width, given its own forward and what that takes."""

    def of(self, size: int) -> int:
        """The part of `size` rows or columns that the kept units own."""
        return size // self.full * self.kept

    def span(self, size: int) -> slice:
        """Those of `size` rows or columns that run."""
        return slice(size // self.full * self.first, self.of(size))

    @property
    def is_full(self) -> bool:
        """Whether all units run, for all tokens."""
        return self.kept == self.full and not self.first and self.mask is None

    def groups(self, rows: Rows) -> Iterator[torch.Tensor]:
        """Places of one group of rows after another, whose units alone are kept meanwhile."""
        kept, self.rows = self.kept, None
        try:
            for places, self.kept in rows.groups:
                yield places
        finally:
            self.kept, self.rows = kept, rows


class Projection(nn.Module):
    """A projection whose rows or columns belong to the units of `width`, `stacked` times one below the other."""

    width: Width
    stacked: int
    transposed = False
    weight: torch.Tensor
    bias: Any

    def matrix(self) -> torch.Tensor:
        """The weight as [out, in], a view."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The projection by the units that run."""
        if self.width.rows is not None:
            return self._of_rows(x, self.width.rows)
        if self.width.is_full:
            return super().forward(x)  # type: ignore[no-any-return]
        return self._narrow(x)

    def _of_rows(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Rows of the batch that use different numbers of units."""
        raise NotImplementedError

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """All rows by the same units."""
        raise NotImplementedError


class _Opening(Projection):
    """Keeps the first rows: [B, T, D] -> [B, T, stacked * K]."""

    def _narrow(self, x_BTD: torch.Tensor) -> torch.Tensor:
        weights = self.matrix().chunk(self.stacked)
        biases = (None,) * self.stacked if self.bias is None else self.bias.chunk(self.stacked)
        rows = self.width.span(weights[0].shape[0])
        parts = [
            F.linear(x_BTD, weight[rows], None if bias is None else bias[rows])
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return parts[0] if self.stacked == 1 else torch.cat(parts, dim=-1)

    def _of_rows(self, x_BTD: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Each row has zeros where units are kept that it does not use."""
        most = self.width.of(self.matrix().shape[0] // self.stacked)
        outputs = []
        for places in self.width.groups(rows):
            parts = self.forward(x_BTD[places]).chunk(self.stacked, dim=-1)
            outputs.append(torch.cat([F.pad(part, (0, most - part.shape[-1])) for part in parts], dim=-1))
        return torch.cat(outputs)[rows.back_B]


class _Closing(Projection):
    """Keeps the first columns, and the whole bias: [B, T, K] -> [B, T, D]; a block of columns after the first, none."""

    def _narrow(self, x_BTK: torch.Tensor) -> torch.Tensor:
        if (mask := self.width.mask) is not None:
            parts = x_BTK.view(*x_BTK.shape[:-1], mask.shape[-1], x_BTK.shape[-1] // mask.shape[-1])
            x_BTK = (parts * mask[..., None].to(x_BTK.dtype)).flatten(-2)
        matrix = self.matrix()
        columns = matrix[:, self.width.span(matrix.shape[1])]
        if (sums_ND := self.width.sums) is not None:
            return torch.addmm(sums_ND, x_BTK.flatten(0, -2), columns.t(), out=sums_ND)
        return F.linear(x_BTK, columns, None if self.width.first else self.bias)

    def _of_rows(self, x_BTK: torch.Tensor, rows: Rows) -> torch.Tensor:
        """A row that uses no unit gets zeros."""
        size, columns = self.matrix().shape
        outputs = [
            self.forward(x_BTK[places][..., : self.width.of(columns)])
            if self.width.kept
            else x_BTK.new_zeros(len(places), *x_BTK.shape[1:-1], size)
            for places in self.width.groups(rows)
        ]
        return torch.cat(outputs)[rows.back_B]


class OpeningLinear(_Opening, nn.Linear):
    """A Linear that opens an elastic sub-layer."""


class ClosingLinear(_Closing, nn.Linear):
    """A Linear that closes an elastic sub-layer."""


class OpeningConv1D(_Opening, Conv1D):  # type: ignore[misc]
    """A GPT-2 Conv1D that opens an elastic sub-layer."""

    transposed = True


class ClosingConv1D(_Closing, Conv1D):  # type: ignore[misc]
    """A GPT-2 Conv1D that closes an elastic sub-layer."""

    transposed = True


_ELASTIC: dict[tuple[type, bool], type[Projection]] = {
    (nn.Linear, True): OpeningLinear,
    (nn.Linear, False): ClosingLinear,
    (Conv1D, True): OpeningConv1D,
    (Conv1D, False): ClosingConv1D,
}


def make_elastic(projection: nn.Module, width: Width, *, opens: bool, stacked: int = 1) -> Projection:
    """Turn a projection into its elastic kind in place: same object, same Parameters, same names.

    Raises:
        TypeError: neither a Linear nor a Conv1D, for instance one that a quantiser has replaced.
    """
    if isinstance(projection, Projection):
        raise TypeError("this model is elastic already; use the ElasticModel that made it so, or load it again.")
    if "forward" in vars(projection):
        raise TypeError(
            "this model's modules are wrapped (as accelerate does for device_map), so they cannot be narrowed. "
            "Load it onto one device: pass device instead of device_map."
        )
    try:
        projection.__class__ = _ELASTIC[type(projection), opens]
    except KeyError:
        raise TypeError(
            f"cannot narrow a {type(projection).__name__}: elastic projections are Linear or Conv1D. "
            "Load the model unquantised and without adapters."
        ) from None
    elastic = cast(Projection, projection)
    elastic.width = width
    elastic.stacked = stacked
    return elastic


class _WithZeroGradients(torch.autograd.Function):
    """Its first input, and zeros as gradients of all others, as masking gives them: every step moves every weight."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *unused: torch.Tensor) -> torch.Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) if t.requires_grad else None for t in unused]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zeros = [None if like is None else torch.zeros(like[0], dtype=like[1], device=like[2]) for like in ctx.like]
        return (gradients[0], *zeros)


class _Skippable(nn.Module):
    """A sub-layer that is left out when no unit of it runs: it adds zero to the residual stream.

    A skipped attention still tells the KV cache that its tokens passed, by one number per token: transformers reads
    the number of past tokens from whichever layer it likes.
    """

    width: Width
    gives_weights: bool
    layer_idx: int

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.width.run is not None:
            return self.width.run(self._forward, hidden_states, *args, **kwargs)
        return self._forward(hidden_states, *args, **kwargs)

    def _forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.width.kept:
            return super().forward(hidden_states, *args, **kwargs)
        nothing = torch.zeros_like(hidden_states)
        if torch.is_grad_enabled():
            nothing = _WithZeroGradients.apply(nothing, hidden_states, *self.parameters())  # type: ignore[no-untyped-call]
        if not self.gives_weights:
            return nothing
        for cache_ in (value for value in kwargs.values() if isinstance(value, Cache)):
            passed = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache_.update(passed, passed, self.layer_idx)
        return nothing, None


class _SkippableNorm(nn.Module):
    """A norm that is left out with the sub-layer that alone reads it."""

    width: Width

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.width.kept or self.width.run is not None:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        if torch.is_grad_enabled():
            return _WithZeroGradients.apply(hidden_states, *self.parameters())  # type: ignore[no-untyped-call, no-any-return]
        return hidden_states


@cache
def _mixed(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Elastic{kind.__name__}", (mixin, kind), {})


def make_norm_skippable(norm: nn.Module, width: Width) -> None:
    """Let a norm be skipped, in place, where the sub-layer of `width`, which alone reads it, is."""
    kind: Any = type(norm)
    norm.__class__ = _mixed(_SkippableNorm, kind)
    cast(_SkippableNorm, norm).width = width


def make_skippable(sub_layer: nn.Module, width: Width, *, gives_weights: bool) -> None:
    """Let a sub-layer be skipped at width 0, in place; `gives_weights` says that it returns (output, weights)."""
    kind: Any = type(sub_layer)
    sub_layer.__class__ = _mixed(_Skippable, kind)
    skippable = cast(_Skippable, sub_layer)
    skippable.width = width
    skippable.gives_weights = gives_weights
