"""Weights in 8 or 4 bits, which all sub-networks share: the first units of a sub-layer are a view of all of them.

8 bits: a scale for each row of a matrix, and 127 steps up and down. A row is an output of its projection.

4 bits: each input has a scale and a lowest value for a strip of 32 outputs, and 15 steps up from there. An opening
projection of a sub-network keeps the first strips, a closing one the first inputs of all strips. Embeddings and the
output projection are in 8 bits, as in llama.cpp's Q4_0. With scales and lowest values, a weight takes 5 bits.

Only what is run is quantised; whatever changes weights needs them in float (`Projection.matrix` refuses).

Shapes: O outputs, K inputs, S strips of 32 outputs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import nn

from flextron.elastic.model import ElasticModel, projections_of
from flextron.elastic.projections import Projection
from flextron.environment import default_device
from flextron.errors import FlextronError

Bits = Literal["int8", "int4"]
"""Name of the type, in place of a dtype of torch."""
STRIP = 32
"""Outputs whose weights of one input share a scale, and lie together: byte j holds those of outputs j and j + 16."""
_STEPS = 127
_FITS = 3
"""How often scales and lowest values are fitted to rounded weights. None loses 0.0061 of random weights' squares, one
0.0056, three 0.0053, five the same."""
_ROWS = 4096
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class EightBits:
    """A matrix in 8 bits."""

    weight: torch.Tensor
    """[O, K]."""
    scale: torch.Tensor
    """[O], float32."""

    @classmethod
    def of(cls, matrix_OK: torch.Tensor) -> EightBits:
        """Round a matrix."""
        lowest_O, highest_O = matrix_OK.aminmax(dim=1)
        scale_O = torch.maximum(highest_O, -lowest_O).float().div_(_STEPS).clamp_(min=_TINY)
        rounded_OK = torch.empty(matrix_OK.shape, dtype=torch.int8)
        for first in range(0, len(scale_O), _ROWS):  # no second copy of a large matrix in float
            rows = slice(first, first + _ROWS)
            rounded_OK[rows] = (matrix_OK[rows].float() / scale_O[rows, None]).round_().to(torch.int8)
        return cls(rounded_OK, scale_O)

    @classmethod
    def stored(cls, weight: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> EightBits:
        """The matrix of this shape that a file holds.

        Raises:
            ValueError: it is of another shape or type.
        """
        _check(weight, shape, torch.int8)
        _check(scale, shape[:1], torch.float32)
        return cls(weight, scale)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.weight.nbytes + self.scale.nbytes

    def floats(self, rows: slice, columns: slice) -> torch.Tensor:
        """Some rows and columns in float32."""
        return self.weight[rows, columns].float().mul_(self.scale[rows, None])


@dataclass(frozen=True)
class FourBits:
    """A matrix in 4 bits; zeros fill the last strip, and inputs up to a multiple of 4."""

    weight: torch.Tensor
    """[S, K, 16] bytes."""
    scale: torch.Tensor
    """Scales and lowest values, [2, S, K], bfloat16."""
    shape: torch.Size
    """O and K."""

    @classmethod
    def of(cls, matrix_OK: torch.Tensor) -> FourBits:
        """Round a matrix."""
        padded_OK = F.pad(matrix_OK.float(), (0, -matrix_OK.shape[1] % 4, 0, -matrix_OK.shape[0] % STRIP))
        strips_SKo = padded_OK.view(-1, STRIP, padded_OK.shape[1]).transpose(1, 2).contiguous()
        scale_2SK = _fitted(strips_SKo)
        steps_SKo = _steps(strips_SKo, *scale_2SK.float()).to(torch.uint8)
        low, high = steps_SKo.chunk(2, dim=-1)
        return cls(low | high << 4, scale_2SK, matrix_OK.shape)

    @classmethod
    def stored(cls, weight: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> FourBits:
        """The matrix of this shape that a file holds.

        Raises:
            ValueError: it is of another shape or type.
        """
        strips, inputs = -(-shape[0] // STRIP), -(-shape[1] // 4) * 4
        _check(weight, (strips, inputs, STRIP // 2), torch.uint8)
        _check(scale, (2, strips, inputs), torch.bfloat16)
        return cls(weight, scale, shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.weight.nbytes + self.scale.nbytes

    def floats(self, rows: slice, columns: slice) -> torch.Tensor:
        """Some rows and columns in float32."""
        outputs, inputs = self.shape
        first, last, _ = rows.indices(outputs)
        strips = slice(first // STRIP, -(-last // STRIP))
        columns = slice(*columns.indices(inputs))
        bytes_SKb = self.weight[strips, columns]
        steps_SKo = torch.cat((bytes_SKb & 15, bytes_SKb >> 4), dim=-1)
        scale_SK, lowest_SK = self.scale[:, strips, columns].float()
        values_SKo = steps_SKo.float().mul_(scale_SK[..., None]).add_(lowest_SK[..., None])
        values_OK = values_SKo.transpose(1, 2).flatten(0, 1)
        start = strips.start * STRIP
        return values_OK[first - start : last - start]


def _check(tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(f"it is {list(tensor.shape)} of {tensor.dtype}, not {list(shape)} of {dtype}")
    if dtype.is_floating_point and not bool(tensor.float().sum().isfinite()):
        raise ValueError("it has values that are no numbers")


def _steps(strips_SKo: torch.Tensor, scale_SK: torch.Tensor, lowest_SK: torch.Tensor) -> torch.Tensor:
    """Steps from the lowest value, 0 to 15."""
    return (strips_SKo - lowest_SK[..., None]).div_(scale_SK[..., None]).round_().clamp_(0, 15)


def _fitted(strips_SKo: torch.Tensor) -> torch.Tensor:
    """Scales and lowest values in bfloat16: first from the range, then by least squares, given the rounded weights."""
    lowest_SK, highest_SK = strips_SKo.aminmax(dim=-1)
    scale_SK = (highest_SK - lowest_SK).div_(15).clamp_(min=_TINY)
    mean_SK = strips_SKo.mean(-1)
    for _ in range(_FITS):
        steps_SKo = _steps(strips_SKo, scale_SK, lowest_SK)
        mean_steps_SK = steps_SKo.mean(-1)
        apart_SKo = steps_SKo.sub_(mean_steps_SK[..., None])
        slope_SK = (apart_SKo * strips_SKo).sum(-1) / apart_SKo.square().sum(-1).clamp(min=_TINY)
        scale_SK = slope_SK.bfloat16().float().clamp(min=_TINY)
        lowest_SK = (mean_SK - scale_SK * mean_steps_SK).bfloat16().float()
    return torch.stack((scale_SK, lowest_SK)).bfloat16()


class _Embedding(nn.Embedding):
    """An Embedding with a scale for each word."""

    scale: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up: [...] -> [..., D]."""
        return F.embedding(ids, self.weight).to(self.scale.dtype) * self.scale[ids][..., None]


class OutputLinear(nn.Linear):
    """A Linear with a scale for each row."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: [..., D] -> [..., V]."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


KINDS: dict[str, type[EightBits] | type[FourBits]] = {"int8": EightBits, "int4": FourBits}


def is_quantized(dtype: Any) -> TypeGuard[Bits]:
    """Whether a type is one of ours, which torch does not know."""
    return dtype in get_args(Bits)


def check_on_cpu(device: str | torch.device, bits: str) -> None:
    """Pass if a device, or "auto", is a CPU.

    Raises:
        FlextronError: it is not.
    """
    found = torch.device(default_device() if device == "auto" else device)
    if found.type != "cpu":
        raise FlextronError(f"{bits} weights run on a CPU, not on {found}. Pass device cpu.")


@torch.no_grad()
def quantize(model: ElasticModel, bits: Bits) -> None:
    """Replace the weights of projections and embeddings, in place. Norms, biases and experts stay as they are.

    A projection's `weight` keeps its shape, but no numbers: they are in `Projection.quantized`.

    Raises:
        FlextronError: the model is not on a CPU.
    """
    check_on_cpu(model.device, bits)
    fingerprint = model.fingerprint()
    for projection in projections_of(model).values():
        hold(projection, KINDS[bits].of(projection.matrix()))
    quantize_embeddings(model)
    model.quantized_to(bits, fingerprint)
    give_back_memory()


def hold(projection: Projection, quantized: EightBits | FourBits) -> None:
    """Let a projection hold numbers in few bits in place of its weight."""
    projection.quantized = quantized
    nothing = torch.empty(projection.weight.shape, dtype=torch.int8, device="meta")
    projection.weight = nn.Parameter(nothing, requires_grad=False)


def quantize_embeddings(model: ElasticModel) -> None:
    """Let embeddings and output projection hold 8 bits, if they compute nothing but products and a factor."""
    lm: Any = model.lm
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    factor = _factor(embedding)
    with_head = type(head) is nn.Linear
    if tied and not (with_head and factor is not None):
        return
    if with_head:
        put(head, EightBits.of(head.weight))
    if factor is not None:
        held = EightBits.of(embedding.weight) if not tied else EightBits(head.weight, head.scale)
        put(embedding, held if factor == 1 else replace(held, scale=held.scale * factor))
        if tied:
            embedding.weight = head.weight


def put(module: nn.Module, held: EightBits) -> None:
    """Let an Embedding or a Linear hold its weight in 8 bits."""
    module.weight = nn.Parameter(held.weight, requires_grad=False)
    module.scale = held.scale
    module.__class__ = _Embedding if isinstance(module, nn.Embedding) else OutputLinear


def give_back_memory() -> None:
    """Let glibc return to the system what it holds of freed weights, 360 MB for SmolLM2."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _factor(embedding: nn.Module) -> float | None:
    """What an embedding multiplies its weight by, as Gemma's does; None if it computes something else."""
    if not isinstance(embedding, nn.Embedding):
        return None
    ids = torch.arange(embedding.num_embeddings // 2, embedding.num_embeddings)[:8]
    rows, found = embedding.weight[ids].float(), embedding(ids).float()
    factor = (found.norm() / rows.norm().clamp(min=_TINY)).item()
    return factor if torch.allclose(found, rows * factor, rtol=1e-3, atol=1e-6) else None
