"""Kernels of a decoding step on a CPU, compiled by Numba when they are first called, and kept on disk.

A step reads every weight once for a few tokens, so the speed of memory is its limit. torch's products of few rows do
not reach it (docs/decisions/0009-decoding.md). All sums are in float32.

A call from Python costs 20 to 50 microseconds, as long as reading the weights of a small layer. So `layers` runs all
layers in one call, and is given addresses instead of hundreds of arrays.

Shapes: M rows (tokens), L layers, D model, O outputs, K inputs, U neurons, G KV groups, S head size, R rotated numbers
of a head, T tokens, P pages. Weights are float32, bfloat16 as the bits of uint16, int8 with a scale for each row, or 4
bits in strips of 32 outputs as uint8, of which `strips` knows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, prange, types
from numba.extending import overload

from flextron.elastic.quantized import STRIP
from flextron.inference.columns import product_of_columns
from flextron.inference.memory import kernel, load, pointer, store
from flextron.inference.rows import product_of_rows
from flextron.inference.strips import BYTES, outputs_of_strip, product_of_strips

BLOCK = STRIP
"""Rows of a matrix that a thread takes at once."""
_FLOATS = np.empty(0, np.float32)
_BITS = np.empty(0, np.uint16)


def _weighted(weight, scale, first, last, x_MK, y_OM):
    """Some outputs of a projection without its bias; `first` is a multiple of BLOCK, and `last` at most BLOCK more."""
    raise NotImplementedError


@overload(_weighted)
def _overload_weighted(weight, scale, first, last, x_MK, y_OM):
    if weight.dtype == types.uint8:

        def of_strip(weight, scale, first, last, x_MK, y_OM):
            y_Mo = np.empty((len(x_MK), BLOCK), np.float32)
            outputs_of_strip(weight, scale, first // BLOCK, x_MK, y_Mo)
            for o in range(first, last):
                for m in range(len(x_MK)):
                    y_OM[o, m] = y_Mo[m, o - first]

        return of_strip

    def of_rows(weight, scale, first, last, x_MK, y_OM):
        product_of_rows(weight, first, last, x_MK, y_OM)
        if len(scale):
            for o in range(first, last):
                for m in range(len(x_MK)):
                    y_OM[o, m] *= scale[o]

    return of_rows


@kernel()
def _outputs(matrix: tuple[np.ndarray, ...], first: int, last: int, x_MK: np.ndarray, y_OM: np.ndarray) -> None:
    """Some outputs of a projection: its weights times x, and the bias."""
    weight, scale, bias_O = matrix
    _weighted(weight, scale, first, last, x_MK, y_OM)
    if len(bias_O):
        for o in range(first, last):
            for m in range(len(x_MK)):
                y_OM[o, m] += bias_O[o]


@kernel(parallel=True)
def product(matrix: tuple[np.ndarray, np.ndarray, np.ndarray], x_MK: np.ndarray, y_OM: np.ndarray) -> None:
    """The first outputs of a projection, as many as y has, of as many inputs as x has.

    Args:
        matrix: weight [O, K], scales [O] or none, bias [O] or none.
    """
    outputs = len(y_OM)
    for block in prange((outputs + BLOCK - 1) // BLOCK):
        _outputs(matrix, block * BLOCK, min(outputs, (block + 1) * BLOCK), x_MK, y_OM)


@kernel(parallel=True)
def _three_products(
    queries: tuple[np.ndarray, ...],
    keys: tuple[np.ndarray, ...],
    values: tuple[np.ndarray, ...],
    x_MD: np.ndarray,
    queries_OM: np.ndarray,
    keys_OM: np.ndarray,
    values_OM: np.ndarray,
) -> None:
    """The same as three `product`s."""
    of_queries = (len(queries_OM) + BLOCK - 1) // BLOCK
    of_keys = (len(keys_OM) + BLOCK - 1) // BLOCK
    for block in prange(of_queries + 2 * of_keys):
        if block < of_queries:
            first = block * BLOCK
            _outputs(queries, first, min(len(queries_OM), first + BLOCK), x_MD, queries_OM)
        elif block < of_queries + of_keys:
            first = (block - of_queries) * BLOCK
            _outputs(keys, first, min(len(keys_OM), first + BLOCK), x_MD, keys_OM)
        else:
            first = (block - of_queries - of_keys) * BLOCK
            _outputs(values, first, min(len(values_OM), first + BLOCK), x_MD, values_OM)


Norm = tuple[np.ndarray, np.ndarray, float]
"""Weight, bias and epsilon. With a bias it is a LayerNorm, else an RMSNorm; without a weight it is none."""


@kernel()
def _normalize(x_D: np.ndarray, norm: Norm, y_D: np.ndarray) -> None:
    weight_D, bias_D, epsilon = norm
    size = len(weight_D)
    mean, total = np.float32(0), np.float32(0)
    if len(bias_D):
        for d in range(size):
            mean += x_D[d]
        mean /= np.float32(size)
    for d in range(size):
        apart = x_D[d] - mean
        total += apart * apart
    scale = np.float32(1 / math.sqrt(total / size + epsilon))
    for d in range(size):
        y_D[d] = (x_D[d] - mean) * scale * weight_D[d]
    for d in range(len(bias_D)):
        y_D[d] += bias_D[d]


@kernel()
def normalize(x_MD: np.ndarray, norm: Norm, y_MD: np.ndarray) -> None:
    """y = norm(x) for each row; x itself where there is no norm."""
    for m in range(len(x_MD)):
        if len(norm[0]):
            _normalize(x_MD[m], norm, y_MD[m])
        else:
            y_MD[m] = x_MD[m]


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


def _closed(weight, scale, x_MK, sums_PMD, pieces):
    """The outputs of a closing projection without its bias, in the first of the P sums."""
    raise NotImplementedError


@overload(_closed)
def _overload_closed(weight, scale, x_MK, sums_PMD, pieces):
    if weight.dtype == types.uint8:
        return lambda weight, scale, x_MK, sums_PMD, pieces: product_of_strips(weight, scale, x_MK, sums_PMD[0])  # noqa: ARG005

    def by_columns(weight, scale, x_MK, sums_PMD, pieces):
        product_of_columns(weight, x_MK, sums_PMD, pieces)
        outputs = weight.shape[1]
        for m in range(len(x_MK)):
            total_D = sums_PMD[0, m]
            for p in range(1, len(sums_PMD)):
                for d in range(outputs):
                    total_D[d] += sums_PMD[p, m, d]
            if len(scale):
                for d in range(outputs):
                    total_D[d] *= scale[d]

    return by_columns


@kernel()
def _close(
    h_MD: np.ndarray,
    matrix: tuple[np.ndarray, ...],
    x_MK: np.ndarray,
    widths_M: np.ndarray,
    norm: Norm,
    factor: float,
    sums_PMD: np.ndarray,
    pieces: int,
) -> None:
    """Add the outputs of a closing projection, normalised where there is a norm after it, to the residual stream.

    Only rows that use a unit of it change.
    """
    weight, scale, bias_D = matrix
    _closed(weight, scale, x_MK, sums_PMD, pieces)
    for m in range(len(widths_M)):
        if not widths_M[m]:
            continue
        total_D = sums_PMD[0, m]
        if len(bias_D):
            for d in range(h_MD.shape[1]):
                total_D[d] += bias_D[d]
        if len(norm[0]):
            _normalize(total_D, norm, total_D)
        for d in range(h_MD.shape[1]):
            h_MD[m, d] += factor * total_D[d]


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
            _outputs(gate, first, last, x_MD, gate_UM)
        _outputs(up, first, last, x_MD, up_UM)
        for m in range(len(widths_M)):
            for u in range(first, min(last, widths_M[m])):
                if gated:
                    hidden_MU[m, u] = _activation(activation, gate_UM[u, m]) * up_UM[u, m]
                else:
                    hidden_MU[m, u] = _activation(activation, up_UM[u, m])
            for u in range(max(first, widths_M[m]), last):
                hidden_MU[m, u] = 0


@kernel()
def _head(x_S: np.ndarray, norm: Norm, cos_R: np.ndarray, sin_R: np.ndarray) -> None:
    """Normalise a head, where there is a norm for it, and rotate its first numbers, where there are angles."""
    if len(norm[0]):
        _normalize(x_S, norm, x_S)
    half = len(cos_R) // 2
    for i in range(half):
        first, second = x_S[i], x_S[i + half]
        x_S[i] = first * cos_R[i] - second * sin_R[i]
        x_S[i + half] = second * cos_R[i + half] + first * sin_R[i + half]


@kernel()
def _write(
    keys_OM: np.ndarray,
    values_OM: np.ndarray,
    norm: Norm,
    angles: tuple[np.ndarray, np.ndarray],
    slots_M: np.ndarray,
    cache_T2GS: np.ndarray,
) -> None:
    """Write keys and values at `slots_M`; rows without a slot (-1) write none."""
    size = cache_T2GS.shape[3]
    head_S = np.empty(size, np.float32)
    for m in range(len(slots_M)):
        if slots_M[m] < 0:
            continue
        for g in range(len(keys_OM) // size):
            for i in range(size):
                head_S[i] = keys_OM[g * size + i, m]
            _head(head_S, norm, angles[0][m], angles[1][m])
            for i in range(size):
                store(cache_T2GS, (slots_M[m], 0, g, i), head_S[i])
                store(cache_T2GS, (slots_M[m], 1, g, i), values_OM[g * size + i, m])


@kernel()
def _mix(
    query_S: np.ndarray,
    cache_T2GS: np.ndarray,
    group: int,
    table_P: np.ndarray,
    page: int,
    seen: tuple[int, int],
    scale: float,
    cap: float,
    scores_T: np.ndarray,
) -> None:
    """Replace a query by the mean of the values that it sees, weighted by a softmax of its scores."""
    size = len(query_S)
    start, end = seen
    highest = np.float32(-np.inf)
    for p in range(start // page, (end + page - 1) // page):
        before = table_P[p] * page - p * page
        for t in range(max(start, p * page), min(end, (p + 1) * page)):
            score = np.float32(0)
            for i in range(size):
                score += query_S[i] * load(cache_T2GS[before + t, 0, group, i])
            score *= scale
            if cap:
                score = np.float32(cap * math.tanh(score / cap))
            scores_T[t] = score
            highest = max(highest, score)
    total = np.float32(0)
    for t in range(start, end):
        weight = np.float32(math.exp(scores_T[t] - highest))
        scores_T[t] = weight
        total += weight
    for i in range(size):
        query_S[i] = 0
    for p in range(start // page, (end + page - 1) // page):
        before = table_P[p] * page - p * page
        for t in range(max(start, p * page), min(end, (p + 1) * page)):
            weight = scores_T[t] / total
            for i in range(size):
                query_S[i] += weight * load(cache_T2GS[before + t, 1, group, i])


@kernel(parallel=True)
def _attend(
    queries_OM: np.ndarray,
    norm: Norm,
    angles: tuple[np.ndarray, np.ndarray],
    cache_T2GS: np.ndarray,
    texts: tuple[np.ndarray, int, np.ndarray],
    widths_M: np.ndarray,
    kind: tuple[float, int, float],
    scores: np.ndarray,
    mixed_MO: np.ndarray,
) -> None:
    """Each row's first groups attend to the keys and values of its own text; the others give zeros."""
    tables_MP, page, positions_M = texts
    scale, window, cap = kind
    count, size = len(widths_M), cache_T2GS.shape[3]
    heads = mixed_MO.shape[1] // size
    heads_per_group = heads // max(np.max(widths_M), 1)
    longest = np.max(positions_M) + 1
    for task in prange(count * heads):
        m, head = task // heads, task % heads
        group, first = head // heads_per_group, head * size
        query_S = mixed_MO[m, first : first + size]
        if group >= widths_M[m]:
            query_S[:] = 0
            continue
        for i in range(size):
            query_S[i] = queries_OM[first + i, m]
        _head(query_S, norm, angles[0][m], angles[1][m])
        end = positions_M[m] + 1
        start = max(0, end - window) if window else 0
        scores_T = scores[task * longest : (task + 1) * longest]
        _mix(query_S, cache_T2GS, group, tables_MP[m], page, (start, end), scale, cap, scores_T)


@kernel()
def _vector(address: int, size: int) -> Any:
    return carray(pointer(address, _FLOATS), (size if address else 0,))


@kernel()
def _norm(norms: np.ndarray, epsilons: np.ndarray, which: int, size: int) -> Norm:
    return _vector(norms[which, 0], size), _vector(norms[which, 1], size), epsilons[which]


def _matrix(addresses, outputs, inputs, like, by_columns):
    """Weight, scales and bias of a projection."""
    raise NotImplementedError


@overload(_matrix)
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


@kernel()
def _attention(
    h_MD: np.ndarray,
    model: tuple[np.ndarray, ...],
    layer: int,
    sizes: tuple[int, int],
    angles: tuple[np.ndarray, np.ndarray],
    texts: tuple[np.ndarray, int, np.ndarray, np.ndarray],
    cache_T2GS: np.ndarray,
    widths_M: np.ndarray,
    cached: int,
    rooms: tuple[Any, ...],
) -> None:
    """h += attention(norm(h)), each row with its first groups; keys and values of `cached` groups are written."""
    like, matrices, norms, full, kinds, numbers = model
    heads, size = sizes
    tables_MP, page, positions_M, slots_M = texts
    normed_MD, opened, hidden, scores, sums_PMD, pieces = rooms
    count, width = h_MD.shape
    groups, all_rows = np.max(widths_M), full[layer, 1] * size
    rows, cached_rows = groups * heads * size, cached * size
    matrix_of, kind_of_angles = matrices[layer], kinds[layer, 0]
    queries = _matrix(matrix_of[3], all_rows * heads, width, like, False)
    keys, values = (
        _matrix(matrix_of[4], all_rows, width, like, False),
        _matrix(matrix_of[5], all_rows, width, like, False),
    )
    queries_OM = opened[: rows * count].reshape(rows, count)
    rest = opened[rows * count : (rows + 2 * cached_rows) * count].reshape(2 * cached_rows, count)
    keys_OM, values_OM = rest[:cached_rows], rest[cached_rows:]
    norms_of, epsilons = norms[layer], numbers[layer]
    normalize(h_MD, _norm(norms_of, epsilons, 0, width), normed_MD)
    _three_products(queries, keys, values, normed_MD, queries_OM, keys_OM, values_OM)
    which = max(kind_of_angles, 0)
    rotated = angles[0].shape[2] if kind_of_angles >= 0 else 0
    turned = (angles[0][which, :, :rotated], angles[1][which, :, :rotated])
    _write(keys_OM, values_OM, _norm(norms_of, epsilons, 3, size), turned, slots_M, cache_T2GS)
    if groups:
        mixed_MO = hidden[: count * rows].reshape(count, rows)
        query_norm = _norm(norms_of, epsilons, 2, size)
        kind = (np.float32(numbers[layer, 7]), kinds[layer, 2], np.float32(numbers[layer, 8]))
        row_texts = (tables_MP, page, positions_M)
        _attend(queries_OM, query_norm, turned, cache_T2GS, row_texts, widths_M, kind, scores, mixed_MO)
        closing = _matrix(matrix_of[6], width, all_rows * heads, like, True)
        norm = _norm(norms_of, epsilons, 4, width)
        _close(h_MD, closing, mixed_MO, widths_M, norm, np.float32(numbers[layer, 6]), sums_PMD, pieces)


@kernel()
def _mlp(
    h_MD: np.ndarray,
    model: tuple[np.ndarray, ...],
    layer: int,
    widths_M: np.ndarray,
    rooms: tuple[Any, ...],
    is_normed: bool,
) -> None:
    """h += mlp(norm(h)), each row with its first neurons. `is_normed`: `rooms` hold what to compute from already."""
    like, matrices, norms, full, kinds, numbers = model
    normed_MD, opened, hidden, _scores, sums_PMD, pieces = rooms
    count, width = h_MD.shape
    neurons, units, matrix_of = np.max(widths_M), full[layer, 0], matrices[layer]
    gate, up = _matrix(matrix_of[0], units, width, like, False), _matrix(matrix_of[1], units, width, like, False)
    gate_UM = opened[: neurons * count].reshape(neurons, count)
    up_UM = opened[neurons * count : 2 * neurons * count].reshape(neurons, count)
    hidden_MU = hidden[: count * neurons].reshape(count, neurons)
    norms_of, epsilons = norms[layer], numbers[layer]
    if not is_normed:
        normalize(h_MD, _norm(norms_of, epsilons, 1, width), normed_MD)
    kind = (kinds[layer, 1], matrix_of[0, 0] != 0)
    _hidden(gate, up, normed_MD, widths_M, kind, gate_UM, up_UM, hidden_MU)
    closing = _matrix(matrix_of[2], width, units, like, True)
    norm = _norm(norms_of, epsilons, 5, width)
    _close(h_MD, closing, hidden_MU, widths_M, norm, np.float32(numbers[layer, 6]), sums_PMD, pieces)


@kernel()
def layers(
    h_MD: np.ndarray,
    model: tuple[np.ndarray, ...],
    sizes: tuple[int, int],
    angles: tuple[np.ndarray, np.ndarray],
    texts: tuple[np.ndarray, int, np.ndarray, np.ndarray],
    caches_L3: np.ndarray,
    cache_like: np.ndarray,
    neurons_LM: np.ndarray,
    groups_LM: np.ndarray,
    cached_groups_L: np.ndarray,
    rooms: tuple[Any, ...],
) -> None:
    """Run tokens through all layers; `h` holds their embeddings before, and the last layer's outputs after.

    Args:
        model: what `lean.LeanStep` knows of the model: an array of the weights' type, then [L, ...] for each layer:
            [7, 3] addresses of weight, scales and bias of gate, up, down, queries, keys, values and output (down and
            output, which close, lie column by column; no gate: 0); [6, 2] addresses of weight and bias of norms (before
            attention, before MLP, of queries, of keys, after attention, after MLP), 0 where there is none; [2] neurons
            and KV groups; [4] which angles rotate it or -1, its activation, how many tokens back it sees or 0, whether
            the MLP reads what attention reads; [9] numbers: epsilons of the six norms, factor of the residual, scale
            and cap of the scores.
        sizes: query heads of a group, and head size.
        angles: cosines and sines, [A, M, R], for models with A kinds of them.
        texts: pages [M, P] of each row's text, tokens of a page, positions [M], slots [M].
        caches_L3: address, tokens and groups of each layer's cache; `cache_like` is of its type.
        neurons_LM, groups_LM: widths of each row.
        cached_groups_L: groups whose keys and values are written.
        rooms: normed [M, D], opened and hidden, scores, sums of P parts of a closing projection's inputs [P, M, D'] (D
            rounded up to a multiple of `columns.LANES`), and in how many pieces its outputs are cut.
    """
    for layer in range(len(neurons_LM)):
        cached = cached_groups_L[layer]
        if cached:
            address, tokens, held = caches_L3[layer]
            cache_T2GS = carray(pointer(address, cache_like), (tokens, 2, held, sizes[1]))
            _attention(h_MD, model, layer, sizes, angles, texts, cache_T2GS, groups_LM[layer], cached, rooms)
        if np.max(neurons_LM[layer]):
            _mlp(h_MD, model, layer, neurons_LM[layer], rooms, cached > 0 and model[4][layer, 3] > 0)
