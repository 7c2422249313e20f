"""Weights and norms at the addresses that `layers` is given. What lies there is told there."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import overload

from flextron.elastic.quantized import STRIP
from flextron.inference.kernels.memory import kernel, pointer
from flextron.inference.kernels.norms import Norm
from flextron.inference.kernels.strips import BYTES

_FLOATS = np.empty(0, np.float32)
_BITS = np.empty(0, np.uint16)


@kernel()
def _vector(address: int, size: int) -> Any:
    return carray(pointer(address, _FLOATS), (size if address else 0,))


@kernel()
def norm_at(norms: np.ndarray, epsilons: np.ndarray, which: int, size: int) -> Norm:
    """One of a layer's norms: `which` of those that `layers` lists."""
    return _vector(norms[which, 0], size), _vector(norms[which, 1], size), epsilons[which]


def matrix_at(addresses, outputs, inputs, like, by_columns):
    """Weight, scales and bias of a projection."""
    raise NotImplementedError


@overload(matrix_at)
def _overload_matrix(addresses, outputs, inputs, like, by_columns):
    if like.dtype == types.uint8:

        def strips(addresses, outputs, inputs, like, by_columns):
            count, padded = (outputs + STRIP - 1) // STRIP, (inputs + 3) // 4 * 4
            weight_SKb = carray(pointer(addresses[0], like), (count, padded, BYTES))
            scales_2SK = carray(pointer(addresses[1], _BITS), (2, count, padded))
            return weight_SKb, scales_2SK, _vector(addresses[2], outputs)

        return strips

    def plain(addresses, outputs, inputs, like, by_columns):
        shape = (inputs, outputs) if by_columns else (outputs, inputs)
        weight = carray(pointer(addresses[0], like), shape)
        return weight, _vector(addresses[1], outputs), _vector(addresses[2], outputs)

    return plain
