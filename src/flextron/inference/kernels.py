"""Kernels of a decoding step on a CPU, compiled by Numba when they are first called, and kept on disk.

A step reads every weight once for a few tokens, so the speed of memory is its limit. torch's products of few rows do
not reach it (docs/decisions/0009-decoding.md). All sums are in float32.

Shapes: M rows (tokens), D model, O outputs, K inputs, U neurons, G KV groups, S head size, R rotated numbers of a head,
T tokens, P pages. Weights are float32, or bfloat16 as the bits of uint16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

BLOCK = 32
"""Rows of a matrix that a thread takes at once."""


@intrinsic
def _float_of_bits(_context: Any, bits: Any) -> Any:
    """The float32 whose bits are those of a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], cgutils.ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of_float(_context: Any, value: Any) -> Any:
    """The bits of a float32 as a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], cgutils.ir.IntType(32))

    return types.uint32(types.float32), generate


def _load(value):
    """A stored number as float32; uint16 is bfloat16."""
    raise NotImplementedError


def _store(values, place, value):
    """Store a float32 in an array of float32, or of bfloat16 as uint16, rounded to nearest."""
    raise NotImplementedError


@overload(_load, inline="always")
def _overload_load(value):
    if value == types.uint16:
        return lambda value: _float_of_bits(np.uint32(np.uint32(value) << np.uint32(16)))
    return lambda value: np.float32(value)


@overload(_store, inline="always")
def _overload_store(values, place, value):
    if values.dtype == types.uint16:

        def rounded(values, place, value):
            bits = _bits_of_float(value)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            values[place] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return rounded

    def plain(values, place, value):
        values[place] = value

    return plain


def _kernel(**options: Any) -> Any:
    return njit(fastmath={"reassoc", "contract", "arcp", "nsz"}, boundscheck=False, cache=True, nogil=True, **options)


@_kernel()
def _rows(w_OK: np.ndarray, first: int, last: int, x_MK: np.ndarray, inputs: int, y_OM: np.ndarray) -> None:
    """y = W x^T for some rows of W and the first `inputs` columns; the number of rows of x is 1, 2, 4 or 8, 16, ..."""
    count = len(x_MK)
    zero = np.float32(0)
    for o in range(first, last):
        if count == 1:
            a = zero
            for k in range(inputs):
                a += _load(w_OK[o, k]) * x_MK[0, k]
            y_OM[o, 0] = a
        elif count == 2:
            a0, a1 = zero, zero
            for k in range(inputs):
                v = _load(w_OK[o, k])
                a0 += x_MK[0, k] * v
                a1 += x_MK[1, k] * v
            y_OM[o, 0], y_OM[o, 1] = a0, a1
        elif count == 4:
            a0, a1, a2, a3 = zero, zero, zero, zero
            for k in range(inputs):
                v = _load(w_OK[o, k])
                a0 += x_MK[0, k] * v
                a1 += x_MK[1, k] * v
                a2 += x_MK[2, k] * v
                a3 += x_MK[3, k] * v
            y_OM[o, 0], y_OM[o, 1], y_OM[o, 2], y_OM[o, 3] = a0, a1, a2, a3
        else:
            for m in range(0, count, 8):
                a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
                for k in range(inputs):
                    v = _load(w_OK[o, k])
                    a0 += x_MK[m, k] * v
                    a1 += x_MK[m + 1, k] * v
                    a2 += x_MK[m + 2, k] * v
                    a3 += x_MK[m + 3, k] * v
                    a4 += x_MK[m + 4, k] * v
                    a5 += x_MK[m + 5, k] * v
                    a6 += x_MK[m + 6, k] * v
                    a7 += x_MK[m + 7, k] * v
                y_OM[o, m], y_OM[o, m + 1] = a0, a1
                y_OM[o, m + 2], y_OM[o, m + 3] = a2, a3
                y_OM[o, m + 4], y_OM[o, m + 5] = a4, a5
                y_OM[o, m + 6], y_OM[o, m + 7] = a6, a7


@_kernel(parallel=True)
def product(w_OK: np.ndarray, x_MK: np.ndarray, y_OM: np.ndarray) -> None:
    """y = W x^T, for as many rows of W as y has and as many columns as x has."""
    rows = len(y_OM)
    for block in prange((rows + BLOCK - 1) // BLOCK):
        _rows(w_OK, block * BLOCK, min(rows, (block + 1) * BLOCK), x_MK, x_MK.shape[1], y_OM)


@_kernel()
def normalize(x_MD: np.ndarray, w_D: np.ndarray, epsilon: float, y_MD: np.ndarray) -> None:
    """y = x / rms(x) * w, for each row."""
    size = x_MD.shape[1]
    for m in range(len(x_MD)):
        total = np.float32(0)
        for d in range(size):
            total += x_MD[m, d] * x_MD[m, d]
        scale = np.float32(1 / math.sqrt(total / size + epsilon))
        for d in range(size):
            y_MD[m, d] = x_MD[m, d] * scale * w_D[d]


@_kernel()
def _activation(kind: int, x: Any) -> Any:
    if kind == 0:  # silu
        return x / (np.float32(1) + math.exp(-x))
    if kind == 1:  # gelu by a tangent
        return np.float32(0.5) * x * (1 + math.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)))
    return np.float32(0.5) * x * (1 + math.erf(x * np.float32(0.7071067812)))


@_kernel()
def _add(h_MD: np.ndarray, y_OM: np.ndarray, bias_D: np.ndarray, widths_M: np.ndarray, factor: float) -> None:
    """Add outputs to the residual stream; the bias goes to rows that use a unit."""
    for m in range(len(widths_M)):
        if widths_M[m] == 0:
            continue
        for d in range(h_MD.shape[1]):
            y = y_OM[d, m]
            if len(bias_D):
                y += bias_D[d]
            h_MD[m, d] += factor * y


@_kernel(parallel=True)
def mlp(
    h_MD: np.ndarray,
    normed_MD: np.ndarray,
    gate: tuple[np.ndarray, np.ndarray],
    up: tuple[np.ndarray, np.ndarray],
    down: tuple[np.ndarray, np.ndarray],
    widths_M: np.ndarray,
    activation: int,
    opened: np.ndarray,
    hidden: np.ndarray,
    y_OM: np.ndarray,
    factor: float,
) -> None:
    """h += down(activation(gate(normed)) * up(normed)), each row with its first neurons.

    Args:
        gate, up, down: weights, and biases or none.
        opened, hidden: room for 2 * neurons * M numbers, and for M * neurons.
    """
    count = len(h_MD)
    neurons = max(np.max(widths_M), 1)
    gate_UM = opened[: neurons * count].reshape(neurons, count)
    up_UM = opened[neurons * count : 2 * neurons * count].reshape(neurons, count)
    hidden_MU = hidden[: count * neurons].reshape(count, neurons)
    inputs = normed_MD.shape[1]
    for block in prange((neurons + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(neurons, (block + 1) * BLOCK)
        _rows(gate[0], first, last, normed_MD, inputs, gate_UM)
        _rows(up[0], first, last, normed_MD, inputs, up_UM)
        for m in range(count):
            for u in range(first, min(last, widths_M[m])):
                g, v = gate_UM[u, m], up_UM[u, m]
                if len(gate[1]):
                    g += gate[1][u]
                if len(up[1]):
                    v += up[1][u]
                hidden_MU[m, u] = _activation(activation, g) * v
            for u in range(max(first, widths_M[m]), last):
                hidden_MU[m, u] = 0
    product(down[0], hidden_MU, y_OM)
    _add(h_MD, y_OM, down[1], widths_M, factor)


@_kernel()
def _head(x_S: np.ndarray, weight_S: np.ndarray, epsilon: float, cos_R: np.ndarray, sin_R: np.ndarray) -> None:
    """Normalise a head, where there is a weight for it, and rotate it, where there are angles."""
    size = len(x_S)
    if len(weight_S):
        total = np.float32(0)
        for i in range(size):
            total += x_S[i] * x_S[i]
        scale = np.float32(1 / math.sqrt(total / size + epsilon))
        for i in range(size):
            x_S[i] *= scale * weight_S[i]
    half = len(cos_R) // 2
    for i in range(half):
        first, second = x_S[i], x_S[i + half]
        x_S[i] = first * cos_R[i] - second * sin_R[i]
        x_S[i + half] = second * cos_R[i + half] + first * sin_R[i + half]


@_kernel()
def keys_and_values(
    normed_MD: np.ndarray,
    keys: tuple[np.ndarray, np.ndarray],
    values: tuple[np.ndarray, np.ndarray],
    norm: tuple[np.ndarray, float],
    cos_MR: np.ndarray,
    sin_MR: np.ndarray,
    slots_M: np.ndarray,
    groups: int,
    opened: np.ndarray,
    cache_T2GS: np.ndarray,
) -> None:
    """Write keys and values of the first groups at `slots_M`; rows without a slot (-1) write none."""
    count, size = len(normed_MD), cache_T2GS.shape[3]
    rows = groups * size
    y_OM = opened[: 2 * rows * count].reshape(2 * rows, count)
    product(keys[0], normed_MD, y_OM[:rows])
    product(values[0], normed_MD, y_OM[rows:])
    head_S = np.empty(size, np.float32)
    for m in range(count):
        if slots_M[m] < 0:
            continue
        for g in range(groups):
            for i in range(size):
                head_S[i] = y_OM[g * size + i, m]
                if len(keys[1]):
                    head_S[i] += keys[1][g * size + i]
            _head(head_S, norm[0], norm[1], cos_MR[m], sin_MR[m])
            for i in range(size):
                value = y_OM[rows + g * size + i, m]
                if len(values[1]):
                    value += values[1][g * size + i]
                _store(cache_T2GS, (slots_M[m], 0, g, i), head_S[i])
                _store(cache_T2GS, (slots_M[m], 1, g, i), value)


@_kernel(parallel=True)
def attention(
    h_MD: np.ndarray,
    normed_MD: np.ndarray,
    queries: tuple[np.ndarray, np.ndarray],
    output: tuple[np.ndarray, np.ndarray],
    norm: tuple[np.ndarray, float],
    cos_MR: np.ndarray,
    sin_MR: np.ndarray,
    cache_T2GS: np.ndarray,
    tables_MP: np.ndarray,
    page: int,
    positions_M: np.ndarray,
    widths_M: np.ndarray,
    heads_per_group: int,
    kind: tuple[float, int, float],
    opened: np.ndarray,
    hidden: np.ndarray,
    scores: np.ndarray,
    y_OM: np.ndarray,
    factor: float,
) -> None:
    """h += output(attention(normed)), each row with its first groups, over the keys and values of its own text.

    Args:
        tables_MP: pages of `page` tokens of each row's text.
        kind: scale of the scores; how many tokens back are seen, or 0; the cap of the scores, or 0.
        scores: room for M * groups * heads_per_group * T numbers, T the longest text.
    """
    count, size = len(h_MD), cache_T2GS.shape[3]
    scale, window, cap = kind
    groups = max(np.max(widths_M), 1)
    rows = groups * heads_per_group * size
    y_RM = opened[: rows * count].reshape(rows, count)
    mixed_MR = hidden[: count * rows].reshape(count, rows)
    product(queries[0], normed_MD, y_RM)
    for m in range(count):
        for o in range(rows):
            mixed_MR[m, o] = y_RM[o, m] + (queries[1][o] if len(queries[1]) else np.float32(0))
    longest = np.max(positions_M) + 1
    for task in prange(count * groups):
        m, g = task // groups, task % groups
        first = g * heads_per_group * size
        if g >= widths_M[m]:
            mixed_MR[m, first : first + heads_per_group * size] = 0
            continue
        length = positions_M[m] + 1
        start = max(0, length - window) if window else 0
        for q in range(heads_per_group):
            query_S = mixed_MR[m, first + q * size : first + (q + 1) * size]
            _head(query_S, norm[0], norm[1], cos_MR[m], sin_MR[m])
            place = (task * heads_per_group + q) * longest
            highest = np.float32(-np.inf)
            for t in range(start, length):
                slot = tables_MP[m, t // page] * page + t % page
                score = np.float32(0)
                for i in range(size):
                    score += query_S[i] * _load(cache_T2GS[slot, 0, g, i])
                score *= scale
                if cap:
                    score = np.float32(cap * math.tanh(score / cap))
                scores[place + t] = score
                highest = max(highest, score)
            total = np.float32(0)
            for t in range(start, length):
                weight = np.float32(math.exp(scores[place + t] - highest))
                scores[place + t] = weight
                total += weight
            for i in range(size):
                query_S[i] = 0
            for t in range(start, length):
                slot = tables_MP[m, t // page] * page + t % page
                weight = scores[place + t] / total
                for i in range(size):
                    query_S[i] += weight * _load(cache_T2GS[slot, 1, g, i])
    product(output[0], mixed_MR, y_OM)
    _add(h_MD, y_OM, output[1], widths_M, factor)
