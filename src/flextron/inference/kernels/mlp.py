"""The MLP of a layer. Shapes: M rows (tokens), D model, U neurons."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from flextron.inference.kernels.addresses import matrix_at, norm_at
from flextron.inference.kernels.memory import kernel
from flextron.inference.kernels.norms import normalize
from flextron.inference.kernels.products import BLOCK, close, some_outputs


@kernel()
def _activation(kind: int, x: Any) -> Any:
    if kind == 0:  # silu
        return x / (np.float32(1) + math.exp(-x))
    if kind == 1:  # gelu by a tangent
        return np.float32(0.5) * x * (1 + math.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)))
    if kind >= 3:  # relu, and its square
        positive = max(x, np.float32(0))
        return positive if kind == 3 else positive * positive
    return np.float32(0.5) * x * (1 + math.erf(x * np.float32(0.7071067812)))


@kernel(parallel=True)
def _hidden(
    gate: tuple[np.ndarray, ...],
    up: tuple[np.ndarray, ...],
    x_MD: np.ndarray,
    widths_M: np.ndarray,
    kind: tuple[int, bool],
    gate_UM: np.ndarray,
    up_UM: np.ndarray,
    hidden_MU: np.ndarray,
) -> None:
    """activation(gate(x)) * up(x), or activation(up(x)), each row with its first neurons, and zeros for the others."""
    activation, gated = kind
    neurons = len(gate_UM)
    for block in prange((neurons + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(neurons, (block + 1) * BLOCK)
        if gated:
            some_outputs(gate, first, last, x_MD, gate_UM)
        some_outputs(up, first, last, x_MD, up_UM)
        for m in range(len(widths_M)):
            for u in range(first, min(last, widths_M[m])):
                if gated:
                    hidden_MU[m, u] = _activation(activation, gate_UM[u, m]) * up_UM[u, m]
                else:
                    hidden_MU[m, u] = _activation(activation, up_UM[u, m])
            for u in range(max(first, widths_M[m]), last):
                hidden_MU[m, u] = 0


@kernel()
def mlp(
    h_MD: np.ndarray,
    model: tuple[np.ndarray, ...],
    layer: int,
    widths_M: np.ndarray,
    rooms: tuple[Any, ...],
    is_normed: bool,
) -> None:
    """Add to h what the MLP makes of norm(h), each row with its first neurons; `is_normed`: `rooms` hold norm(h)."""
    like, matrices, norms, full, kinds, numbers = model
    normed_MD, opened, hidden, _scores, sums_PMD, pieces = rooms
    count, width = h_MD.shape
    neurons, units, matrix_of = np.max(widths_M), full[layer, 0], matrices[layer]
    gate, up = matrix_at(matrix_of[0], units, width, like, False), matrix_at(matrix_of[1], units, width, like, False)
    gate_UM = opened[: neurons * count].reshape(neurons, count)
    up_UM = opened[neurons * count : 2 * neurons * count].reshape(neurons, count)
    hidden_MU = hidden[: count * neurons].reshape(count, neurons)
    norms_of, epsilons = norms[layer], numbers[layer]
    if not is_normed:
        normalize(h_MD, norm_at(norms_of, epsilons, 1, width), normed_MD)
    kind = (kinds[layer, 1], matrix_of[0, 0] != 0)
    _hidden(gate, up, normed_MD, widths_M, kind, gate_UM, up_UM, hidden_MU)
    closing = matrix_at(matrix_of[2], width, units, like, True)
    norm = norm_at(norms_of, epsilons, 5, width)
    close(h_MD, closing, hidden_MU, widths_M, norm, np.float32(numbers[layer, 6]), sums_PMD, pieces)
