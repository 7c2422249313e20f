"""Products of a projection's weights, in blocks of outputs, each of which one thread computes.

Shapes: M rows (tokens), O outputs, K inputs, D model, P parts of the inputs.
"""

from __future__ import annotations

import numpy as np
from numba import prange, types
from numba.extending import overload

from flextron.elastic.quantized import STRIP
from flextron.inference.kernels.columns import product_of_columns
from flextron.inference.kernels.memory import kernel
from flextron.inference.kernels.norms import Norm, normalize_row
from flextron.inference.kernels.rows import product_of_rows
from flextron.inference.kernels.strips import outputs_of_strip, product_of_strips

BLOCK = STRIP
"""Rows of a matrix that a thread takes at once."""


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
def some_outputs(matrix: tuple[np.ndarray, ...], first: int, last: int, x_MK: np.ndarray, y_OM: np.ndarray) -> None:
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
        some_outputs(matrix, block * BLOCK, min(outputs, (block + 1) * BLOCK), x_MK, y_OM)


@kernel(parallel=True)
def three_products(
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
            some_outputs(queries, first, min(len(queries_OM), first + BLOCK), x_MD, queries_OM)
        elif block < of_queries + of_keys:
            first = (block - of_queries) * BLOCK
            some_outputs(keys, first, min(len(keys_OM), first + BLOCK), x_MD, keys_OM)
        else:
            first = (block - of_queries - of_keys) * BLOCK
            some_outputs(values, first, min(len(values_OM), first + BLOCK), x_MD, values_OM)


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
def close(
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
            normalize_row(total_D, norm, total_D)
        for d in range(h_MD.shape[1]):
            h_MD[m, d] += factor * total_D[d]
