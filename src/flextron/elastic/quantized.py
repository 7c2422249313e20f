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
from typing import Any, Literal, TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import nn

from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import Projection
from flextron.errors import FlextronError

Bits = Literal["int8", "int4"]
"""Name of the type, in place of a dtype of torch."""
STRIP = 32
"""Outputs whose weights of one input share a scale, and lie together: byte j holds those of outputs j and j + 16."""
_STEPS = 127
_FITS = 3
"""How often scales and lowest values are fitted to rounded weights. None loses 0.0061 of random weights' squares, one
0.0056, three 0.0053, five the same."""
_TINY = torch.finfo(torch.float32).tiny


class EightBits:
    """A matrix in 8 bits."""

    def __init__(self, matrix_OK: torch.Tensor) -> None:
        self.scale = matrix_OK.float().abs().amax(1).div(_STEPS).clamp(min=_TINY)
        """[O], float32."""
        self.weight = (matrix_OK.float() / self.scale[:, None]).round_().to(torch.int8)
        """[O, K]."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.weight.nbytes + self.scale.nbytes

    def floats(self, rows: slice, columns: slice) -> torch.Tensor:
        """Some rows and columns in float32."""
        return self.weight[rows, columns].float().mul_(self.scale[rows, None])


class FourBits:
    """A matrix in 4 bits; zeros fill the last strip, and inputs up to a multiple of 4."""

    def __init__(self, matrix_OK: torch.Tensor) -> None:
        self.shape = matrix_OK.shape
        outputs, inputs = self.shape
        padded_OK = F.pad(matrix_OK.float(), (0, -inputs % 4, 0, -outputs % STRIP))
        strips_SKo = padded_OK.view(-1, STRIP, padded_OK.shape[1]).transpose(1, 2).contiguous()
        self.scale = _fitted(strips_SKo)
        """Scales and lowest values, [2, S, K], bfloat16."""
        steps_SKo = _steps(strips_SKo, *self.scale.float()).to(torch.uint8)
        low, high = steps_SKo.chunk(2, dim=-1)
        self.weight = low | high << 4
        """[S, K, 16] bytes."""

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


def is_quantized(dtype: Any) -> TypeGuard[Bits]:
    """Whether a type is one of ours, which torch does not know."""
    return dtype in get_args(Bits)


@torch.no_grad()
def quantize(model: ElasticModel, bits: Bits) -> None:
    """Replace the weights of projections and embeddings, in place. Norms, biases and experts stay as they are.

    A projection's `weight` keeps its shape, but no numbers: they are in `Projection.quantized`.

    Raises:
        FlextronError: the model is not on a CPU.
    """
    if model.device.type != "cpu":
        raise FlextronError(f"{bits} weights run on a CPU, and this model is on {model.device}. Pass device cpu.")
    fingerprint = model.fingerprint()
    lm: Any = model.lm
    kind = EightBits if bits == "int8" else FourBits
    for _, _, sub in model.sub_layers():
        for projection in (*sub.opens, sub.closes):
            if isinstance(projection, Projection):
                projection.quantized = kind(projection.matrix())
                nothing = torch.empty_like(projection.weight, dtype=torch.int8, device="meta")
                projection.weight = nn.Parameter(nothing, requires_grad=False)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    factor = _factor(embedding)
    with_head, with_embedding = type(head) is nn.Linear, factor is not None
    if tied and not (with_head and with_embedding):
        with_head = with_embedding = False
    if with_head:
        _quantize(head)
        head.__class__ = OutputLinear
    if with_embedding:
        if tied:
            embedding.weight, embedding.scale = head.weight, head.scale
        else:
            _quantize(embedding)
        if factor != 1:
            embedding.scale = embedding.scale * factor
        embedding.__class__ = _Embedding
    model.quantized_to(bits, fingerprint)
    _give_back_memory()


def _give_back_memory() -> None:
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


def _quantize(module: nn.Module) -> None:
    """Let a module that is no projection hold its weight in 8 bits."""
    held = EightBits(module.get_parameter("weight"))
    module.weight = nn.Parameter(held.weight, requires_grad=False)
    module.scale = held.scale
