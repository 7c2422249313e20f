"""Weights in 8 bits: a scale for each row of a matrix, and 127 steps up and down.

A row is an output of its projection, so sub-networks share the quantised weights as they share others: an opening
projection keeps its first rows and their scales, a closing one the first columns.

Only what is run is quantised; whatever changes weights needs them in float (`Projection.matrix` refuses).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from flextron.elastic.model import ElasticModel
from flextron.elastic.projections import Projection
from flextron.errors import FlextronError

INT8 = "int8"
"""Name of the type, in place of a dtype of torch."""
_STEPS = 127


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


@torch.no_grad()
def quantize(model: ElasticModel) -> None:
    """Replace the weights of projections and embeddings by int8, in place. Norms, biases and experts stay as they are.

    Raises:
        FlextronError: the model is not on a CPU.
    """
    if model.device.type != "cpu":
        raise FlextronError(f"int8 weights run on a CPU, and this model is on {model.device}. Pass device cpu.")
    fingerprint = model.fingerprint()
    lm: Any = model.lm
    for _, _, sub in model.sub_layers():
        for projection in (*sub.opens, sub.closes):
            if isinstance(projection, Projection):
                _quantize(projection, transposed=projection.transposed)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if type(head) is nn.Linear and (not tied or type(embedding) is nn.Embedding):
        _quantize(head)
        head.__class__ = OutputLinear
        if tied:
            embedding.weight, embedding.scale = head.weight, head.scale
            embedding.__class__ = _Embedding
    if not tied and type(embedding) is nn.Embedding:
        _quantize(embedding)
        embedding.__class__ = _Embedding
    model.quantized_to(INT8, fingerprint)


def _quantize(module: nn.Module, *, transposed: bool = False) -> None:
    weight = cast(torch.Tensor, module.weight)
    inputs = 0 if transposed else 1
    scale_O = weight.float().abs().amax(inputs).div(_STEPS).clamp(min=torch.finfo(torch.float32).tiny)
    steps = (weight.float() / scale_O.unsqueeze(inputs)).round_().to(torch.int8)
    module.weight = nn.Parameter(steps, requires_grad=False)
    module.scale = scale_O
