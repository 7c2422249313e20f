"""A model's weights as the kernels take them: addresses, norms, and a few numbers for each layer.

Shapes: D model, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flextron.elastic.layers import ElasticLayer, SubLayer
from flextron.elastic.quantized import FourBits
from flextron.inference.lean.angles import Angles
from flextron.inference.lean.parts import (
    ACTIVATIONS,
    activation_of,
    is_side_by_side,
    norms_of,
    residual_factor,
    rotates,
)

_NONE = np.empty(0, np.float32)
Matrix = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Weight, scales, and bias; the last two may be empty."""
_NO_GATE: Matrix = (_NONE, _NONE, _NONE)
Kind = tuple[float, int, float]
"""How an attention weighs: the scale of its scores, how many tokens back it sees or 0, the cap of its scores or 0."""


class Norm:
    """An RMSNorm, a LayerNorm, or nothing. What it computes is asked of the module: some add 1 to their weight."""

    def __init__(self, module: Any) -> None:
        self.weight, self.bias, self.epsilon = _NONE, _NONE, 0.0
        if module is not None:
            epsilon = getattr(module, "variance_epsilon", None)
            self.epsilon = float(module.eps if epsilon is None else epsilon)
            asked = copy.deepcopy(module).float()
            signs_D = torch.ones_like(asked.weight)  # their mean is 0, and that of their squares 1
            signs_D[1::2] = -1
            one_D, other_D = asked(signs_D), asked(-signs_D)
            self.weight = ((one_D - other_D) / 2 * signs_D * (1 + self.epsilon) ** 0.5).detach().numpy()
            if torch.allclose(asked(signs_D + 1), one_D, atol=1e-5):
                self.bias = ((one_D + other_D) / 2).detach().numpy()

    @property
    def of_kernel(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Weight, bias and epsilon, as `kernels.norms` takes them."""
        return self.weight, self.bias, self.epsilon


class Weights:
    """What `kernels.layers` has to know of a model; see there. It keeps alive what it holds the addresses of."""

    def __init__(self, layers: Sequence[ElasticLayer], kinds: Sequence[Kind], angles: Angles) -> None:
        matrices = [[matrix for sub in (layer.mlp, layer.attention) for matrix in _matrices(sub)] for layer in layers]
        norms = [[Norm(module) for module in norms_of(layer.module)] for layer in layers]
        self._alive = matrices, norms
        self.of_kernel = (
            matrices[0][1][0][:0],
            np.array([[[_address(part) for part in matrix] for matrix in row] for row in matrices], np.int64),
            np.array([[(_address(norm.weight), _address(norm.bias)) for norm in row] for row in norms], np.int64),
            np.array([[layer.mlp.width.full, layer.attention.width.full] for layer in layers], np.int64),
            np.array(
                [
                    [
                        angles.kind_of(index) if rotates(layer) else -1,
                        ACTIVATIONS[activation_of(layer)],
                        window,
                        is_side_by_side(layer),
                    ]
                    for index, (layer, (_, window, _)) in enumerate(zip(layers, kinds, strict=True))
                ],
                np.int64,
            ),
            np.array(
                [
                    [*(norm.epsilon for norm in row), residual_factor(layer), scale, cap]
                    for row, layer, (scale, _, cap) in zip(norms, layers, kinds, strict=True)
                ]
            ),
        )


def matrix_of(projection: Any) -> Matrix:
    """The arrays of an opening projection, of a closing one in 4 bits, or of the output projection."""
    held = getattr(projection, "quantized", None) or projection
    scale, bias = getattr(held, "scale", None), projection.bias
    return (
        array_of(held.weight.detach()),
        _NONE if scale is None else array_of(scale),
        _NONE if bias is None else bias.detach().float().numpy(),
    )


def _matrices(sub: SubLayer) -> list[Matrix]:
    if not isinstance(sub.closes.quantized, FourBits):
        _lay_out_by_columns(sub.closes.quantized or sub.closes)
    weight, scale, bias = matrix_of(sub.closes)
    opens = [matrix_of(projection) for projection in sub.opens]
    return [*([_NO_GATE] if len(opens) == 1 else []), *opens, (weight if weight.ndim == 3 else weight.T, scale, bias)]


def _lay_out_by_columns(holder: Any) -> None:
    """Let a matrix lie in memory column by column, where its first columns are one piece; its values stay."""
    if not holder.weight.t().is_contiguous():
        with torch.inference_mode(False), torch.no_grad():
            holder.weight.data = holder.weight.data.t().contiguous().t()


def _address(array: np.ndarray) -> int:
    """Where its numbers lie; 0 if it has none."""
    return array.ctypes.data if array.size else 0


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A view; bfloat16 as the bits of uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
