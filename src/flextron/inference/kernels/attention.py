"""The attention of a layer, over keys and values in pages.

Shapes: M rows (tokens), D model, O outputs, G KV groups, S head size, R rotated numbers of a head, T tokens, P pages.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from flextron.inference.kernels.addresses import matrix_at, norm_at
from flextron.inference.kernels.memory import kernel, load, store
from flextron.inference.kernels.norms import Norm, normalize, normalize_row
from flextron.inference.kernels.products import close, three_products


@kernel()
def _head(x_S: np.ndarray, norm: Norm, cos_R: np.ndarray, sin_R: np.ndarray) -> None:
    """Normalise a head, where there is a norm for it, and rotate its first numbers, where there are angles."""
    if len(norm[0]):
        normalize_row(x_S, norm, x_S)
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
def attention(
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
    """Add to h what attention makes of norm(h), each row with its first groups.

    Keys and values of `cached` groups are written.
    """
    like, matrices, norms, full, kinds, numbers = model
    heads, size = sizes
    tables_MP, page, positions_M, slots_M = texts
    normed_MD, opened, hidden, scores, sums_PMD, pieces = rooms
    count, width = h_MD.shape
    groups, all_rows = np.max(widths_M), full[layer, 1] * size
    rows, cached_rows = groups * heads * size, cached * size
    matrix_of, kind_of_angles = matrices[layer], kinds[layer, 0]
    queries = matrix_at(matrix_of[3], all_rows * heads, width, like, False)
    keys, values = (
        matrix_at(matrix_of[4], all_rows, width, like, False),
        matrix_at(matrix_of[5], all_rows, width, like, False),
    )
    queries_OM = opened[: rows * count].reshape(rows, count)
    rest = opened[rows * count : (rows + 2 * cached_rows) * count].reshape(2 * cached_rows, count)
    keys_OM, values_OM = rest[:cached_rows], rest[cached_rows:]
    norms_of, epsilons = norms[layer], numbers[layer]
    normalize(h_MD, norm_at(norms_of, epsilons, 0, width), normed_MD)
    three_products(queries, keys, values, normed_MD, queries_OM, keys_OM, values_OM)
    which = max(kind_of_angles, 0)
    rotated = angles[0].shape[2] if kind_of_angles >= 0 else 0
    turned = (angles[0][which, :, :rotated], angles[1][which, :, :rotated])
    _write(keys_OM, values_OM, norm_at(norms_of, epsilons, 3, size), turned, slots_M, cache_T2GS)
    if groups:
        mixed_MO = hidden[: count * rows].reshape(count, rows)
        query_norm = norm_at(norms_of, epsilons, 2, size)
        kind = (np.float32(numbers[layer, 7]), kinds[layer, 2], np.float32(numbers[layer, 8]))
        row_texts = (tables_MP, page, positions_M)
        _attend(queries_OM, query_norm, turned, cache_T2GS, row_texts, widths_M, kind, scores, mixed_MO)
        closing = matrix_at(matrix_of[6], width, all_rows * heads, like, True)
        norm = norm_at(norms_of, epsilons, 4, width)
        close(h_MD, closing, mixed_MO, widths_M, norm, np.float32(numbers[layer, 6]), sums_PMD, pieces)
