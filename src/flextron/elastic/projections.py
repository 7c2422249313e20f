"""Projections that compute the first units of a sub-layer only, with views of the full model's weights.

Shapes: B batch, T time, D model, K units kept x rows per unit. Linear weights are [out, in], GPT-2's Conv1D [in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from flextron.errors import FlextronError


class RowGroups(NamedTuple):
    """Rows of a batch, grouped by the number of units of a sub-layer that they use."""

    groups: tuple[tuple[torch.Tensor, int], ...]
    """For each group the indices of its rows, and their number of units."""
    back_B: torch.Tensor
    """Index of each row of the batch in the concatenated groups."""


class Width:
    """Units of one sub-layer that run; choosing a sub-network sets only this. All modules of the sub-layer share it."""

    __slots__ = ("first", "full", "kept", "mask", "rows", "run", "sums")

    def __init__(self, full: int) -> None:
        self.full = full
        self.kept = full
        self.first = 0
        """First unit that runs; above 0 only while `per_token` sums blocks of units."""
        self.mask: torch.Tensor | None = None
        """Factors for the parts of the closing projection's input, [..., parts]; set by `per_token`."""
        self.rows: RowGroups | None = None
        """Rows of the batch that use fewer units than `kept`; set by `per_token`."""
        self.sums: torch.Tensor | None = None
        """Where the closing projection adds a block's output in place, [N, D]; set by `per_token`."""
        self.run: Callable[..., Any] | None = None
        """Runs the sub-layer if its tokens differ in width; called with the sub-layer's forward and its arguments."""

    def of(self, size: int) -> int:
        """Return how many of `size` rows or columns belong to the kept units."""
        return size // self.full * self.kept

    def span(self, size: int) -> slice:
        """Return which of `size` rows or columns run."""
        return slice(size // self.full * self.first, self.of(size))

    @property
    def is_full(self) -> bool:
        """Whether all units run, for all tokens."""
        return self.kept == self.full and not self.first and self.mask is None

    def groups(self, rows: RowGroups) -> Iterator[torch.Tensor]:
        """Yield the row indices of one group after another; meanwhile only that group's units are kept."""
        kept, self.rows = self.kept, None
        try:
            for indices, self.kept in rows.groups:
                yield indices
        finally:
            self.kept, self.rows = kept, rows


class Quantized(Protocol):
    """A matrix [out, in] in few bits."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    def floats(self, rows: slice, columns: slice) -> torch.Tensor:
        """Some rows and columns in float32."""


class Projection(nn.Module):
    """A projection whose rows or columns belong to the units of `width`.

    An opening projection may hold `stacked` matrices, one below the other.
    """

    width: Width
    stacked: int
    transposed = False
    weight: torch.Tensor
    bias: Any
    multiply: Callable[..., torch.Tensor] | None = None
    """Computes products in place of `F.linear`, with the same arguments; set by the serving engine."""
    quantized: Quantized | None = None
    """The numbers of `weight`, which then has a shape only; None for weights in float."""

    def matrix(self) -> torch.Tensor:
        """Return a view of the weight as [out, in].

        Raises:
            FlextronError: the weights are quantised.
        """
        if self.quantized is not None:
            raise FlextronError("the weights of this model are quantised, for running only. Load it in a float type.")
        return self._stored()

    @property
    def inputs(self) -> int:
        """Number of input columns at full width."""
        return self._stored().shape[1]

    def _stored(self) -> torch.Tensor:
        return self.weight.t() if self.transposed else self.weight

    def _part(self, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows and columns of the weight as [out, in]: a view, or if it is quantised a copy in `dtype`."""
        if self.quantized is not None:
            return self.quantized.floats(rows, columns).to(dtype)
        return self._stored()[rows, columns]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project with the units that run."""
        if self.width.rows is not None:
            return self._of_rows(x, self.width.rows)
        if self.width.is_full and self.multiply is None and self.quantized is None:
            return super().forward(x)  # type: ignore[no-any-return]
        return self._narrow(x)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return (self.multiply or F.linear)(x, weight, bias)

    def _of_rows(self, x: torch.Tensor, rows: RowGroups) -> torch.Tensor:
        """Project a batch whose rows use different numbers of units."""
        raise NotImplementedError

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Project all rows with the same units."""
        raise NotImplementedError


class _Opening(Projection):
    """Keeps the first rows: [B, T, D] -> [B, T, stacked * K]."""

    def _narrow(self, x_BTD: torch.Tensor) -> torch.Tensor:
        size = self._stored().shape[0] // self.stacked
        span = self.width.span(size)
        parts = []
        for first in range(0, size * self.stacked, size):
            rows = slice(first + span.start, first + span.stop)
            weight = self._part(rows, slice(None), x_BTD.dtype)
            parts.append(self._product(x_BTD, weight, None if self.bias is None else self.bias[rows]))
        return parts[0] if self.stacked == 1 else torch.cat(parts, dim=-1)

    def _of_rows(self, x_BTD: torch.Tensor, rows: RowGroups) -> torch.Tensor:
        """Project; a row's output holds zeros for kept units that it does not use."""
        most = self.width.of(self._stored().shape[0] // self.stacked)
        outputs = []
        for indices in self.width.groups(rows):
            parts = self.forward(x_BTD[indices]).chunk(self.stacked, dim=-1)
            outputs.append(torch.cat([F.pad(part, (0, most - part.shape[-1])) for part in parts], dim=-1))
        return torch.cat(outputs)[rows.back_B]


class _Closing(Projection):
    """Keeps the first columns: [B, T, K] -> [B, T, D]. The bias is added once, with the first block of columns."""

    def _narrow(self, x_BTK: torch.Tensor) -> torch.Tensor:
        if (mask := self.width.mask) is not None:
            parts = x_BTK.view(*x_BTK.shape[:-1], mask.shape[-1], x_BTK.shape[-1] // mask.shape[-1])
            x_BTK = (parts * mask[..., None].to(x_BTK.dtype)).flatten(-2)
        if not self.width.kept:
            return self._nothing(x_BTK)
        columns = self._part(slice(None), self.width.span(self.inputs), x_BTK.dtype)
        if (sums_ND := self.width.sums) is not None:
            return torch.addmm(sums_ND, x_BTK.flatten(0, -2), columns.t(), out=sums_ND)
        return self._product(x_BTK, columns, None if self.width.first else self.bias)

    def _nothing(self, x_BTK: torch.Tensor) -> torch.Tensor:
        """What no unit adds: zeros, also instead of the bias, for sub-layers without a module that could be skipped."""
        nothing = x_BTK.new_zeros(*x_BTK.shape[:-1], self._stored().shape[0])
        if not torch.is_grad_enabled():
            return nothing
        return _WithZeroGradients.apply(nothing, x_BTK, *self.parameters(recurse=False))  # type: ignore[no-untyped-call, no-any-return]

    def _of_rows(self, x_BTK: torch.Tensor, rows: RowGroups) -> torch.Tensor:
        """Project; a row that uses no unit gets zeros."""
        size, columns = self._stored().shape
        outputs = [
            self.forward(x_BTK[indices][..., : self.width.of(columns)])
            if self.width.kept
            else x_BTK.new_zeros(len(indices), *x_BTK.shape[1:-1], size)
            for indices in self.width.groups(rows)
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


def is_projection(module: nn.Module) -> bool:
    """Whether `make_elastic` takes such a module: it computes what its weight and bias say, and nothing else.

    So do the Linears that families of transformers define for themselves, such as Falcon's; quantised ones do not.
    """
    kind = type(module)
    return (kind, True) in _ELASTIC or (isinstance(module, nn.Linear) and kind.__module__.startswith(_FAMILY_CODE))


_FAMILY_CODE = "transformers.models."


def _elastic_kind(kind: Any, *, opens: bool) -> type[nn.Module]:
    return _ELASTIC.get((kind, opens)) or _mixed(_Opening if opens else _Closing, kind)


def make_elastic(projection: nn.Module, width: Width, *, opens: bool, stacked: int = 1) -> Projection:
    """Turn a projection into its elastic kind in place: same object, same Parameters, same names.

    Raises:
        TypeError: the projection is neither a Linear nor a Conv1D, for instance after quantisation; or it is elastic
            already, or wrapped.
    """
    if isinstance(projection, Projection):
        raise TypeError("this model is elastic already. Use its ElasticModel, or load the model again.")
    if "forward" in vars(projection):
        raise TypeError(
            "this model's modules are wrapped (as accelerate does for device_map), so they cannot be narrowed. "
            "Load it onto one device: pass device instead of device_map. "
            "A model larger than the memory can be ranked with `flextron rank --stream`."
        )
    if not is_projection(projection):
        raise TypeError(
            f"cannot narrow a {type(projection).__name__}: elastic projections are Linear or Conv1D. "
            "Load the model unquantised and without adapters."
        )
    projection.__class__ = _elastic_kind(type(projection), opens=opens)
    elastic = cast(Projection, projection)
    elastic.width = width
    elastic.stacked = stacked
    return elastic


class _WithZeroGradients(torch.autograd.Function):
    """Returns its first input; gives all others zero gradients, as masking does, so that optimisers update them too."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *unused: torch.Tensor) -> torch.Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) if t.requires_grad else None for t in unused]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zeros = [None if like is None else torch.zeros(like[0], dtype=like[1], device=like[2]) for like in ctx.like]
        return (gradients[0], *zeros)


class _Skippable(nn.Module):
    """A sub-layer that is skipped when none of its units runs: it adds zero to the residual stream.

    A skipped attention still writes one number per token to the KV cache, because transformers may read the number of
    past tokens from any layer.
    """

    width: Width
    outputs: int
    layer_idx: int
    layer_id: int
    """Its layer's number in GPT-Neo; other families call it `layer_idx`."""

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
            nothing = nothing.clone()  # Falcon adds to it in place
        if self.outputs == 1:
            return nothing
        for cache_ in (value for value in kwargs.values() if isinstance(value, Cache)):
            passed = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache_.update(passed, passed, self.layer_idx if hasattr(self, "layer_idx") else self.layer_id)
        return nothing, *([None] * (self.outputs - 1))


class _Mixture(_Skippable):
    """A mixture of experts that routes to the first experts only, as if there were no others.

    While it runs, it holds views of the tensors whose first dimension counts experts: the router's and the experts'.
    """

    def _forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.width.kept or self.width.kept == self.width.full:
            return super()._forward(hidden_states, *args, **kwargs)
        with _first(self, self.width):
            return super()._forward(hidden_states, *args, **kwargs)


def expert_tensors(mixture: nn.Module, experts: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where a mixture holds each tensor whose first dimension counts its experts, the shared ones apart."""
    for path, module in mixture.named_modules():
        if "shared" in path:
            continue
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.ndim and tensor.shape[0] == experts:
                    yield held, name


@contextmanager
def _first(mixture: nn.Module, width: Width) -> Iterator[None]:
    """Replace the tensors of all experts by those of the first ones, inside the block."""
    full = [(held, name, held[name]) for held, name in expert_tensors(mixture, width.full)]
    try:
        for held, name, tensor in full:
            held[name] = tensor[: width.kept]
        yield
    finally:
        for held, name, tensor in full:
            held[name] = tensor


class _SkippableNorm(nn.Module):
    """A norm that is skipped together with the only sub-layer that reads it."""

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
    """Skip a norm, changed in place, whenever the sub-layer of `width` is skipped; nothing else may read the norm."""
    kind: Any = type(norm)
    norm.__class__ = _mixed(_SkippableNorm, kind)
    cast(_SkippableNorm, norm).width = width


def make_skippable(sub_layer: nn.Module, width: Width, *, outputs: int, experts: bool = False) -> None:
    """Skip a sub-layer, changed in place, at width 0.

    Args:
        outputs: number of values that it returns: the output alone, or a tuple that begins with it.
        experts: it is a mixture of experts, which routes to the kept ones at other widths.
    """
    kind: Any = type(sub_layer)
    sub_layer.__class__ = _mixed(_Mixture if experts else _Skippable, kind)
    skippable = cast(_Skippable, sub_layer)
    skippable.width = width
    skippable.outputs = outputs
