"""Products of closing projections on a CPU: the weight lies in memory column by column, in place of row by row.

A narrow sub-network takes the first columns. Row by row it would read a piece of each row, and processors fetch ahead
what lies between, so half of the columns take nearly as long as all of them (docs/decisions/0009-decoding.md). Column
by column it reads the first part of the memory, and no more.

Shapes: M rows (tokens), O outputs, K inputs, P parts of the inputs, S strips of LANES outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from flextron.inference.kernels import vectors
from flextron.inference.kernels.memory import kernel, load
from flextron.inference.kernels.vectors import LANES, TOKENS, add_tile

_COLUMNS = 4
"""Columns that are added to the sums of one row at once."""
_BLOCK = 32
"""Columns that are widened to float32 at once, for many rows."""
_STRIPS = 64
"""Strips of outputs that are computed at once: with _BLOCK columns, 128 KB."""
_AHEAD = 4096
"""Bytes ahead of which memory is asked for. A processor does so by itself where a column is long."""

Range = tuple[int, int]
"""First, and one after the last."""


@intrinsic
def _add_columns(_context: Any, w: Any, column: Any, strips: Any, x: Any, y: Any, ahead: Any, like: Any) -> Any:
    """Add x[k] * w[k] of _COLUMNS columns to y; addresses, and bytes from one column to the next.

    Args:
        strips: how many times LANES outputs.
        ahead: bytes from these columns to those that are asked for from memory meanwhile.
        like: an array of the weights' type.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        w, column, strips, x, y, ahead, _ = arguments
        size = like.dtype.bitwidth // 8
        places = [vectors.at(builder, x, vectors.whole(4 * k), vectors.FLOAT) for k in range(_COLUMNS)]
        factors = [vectors.everywhere(builder, builder.load(place)) for place in places]

        def body(strip: Any, _: Sequence[Any]) -> Sequence[Any]:
            offset = builder.mul(strip, vectors.whole(4 * LANES))
            total = vectors.read_floats(builder, y, offset)
            place = builder.mul(strip, vectors.whole(LANES * size))
            further = builder.add(ahead, builder.mul(place, vectors.whole(_COLUMNS)))
            for line in range(0, _COLUMNS * LANES * size, 64):
                vectors.fetch(builder, w, builder.add(further, vectors.whole(line)))
            for k, factor in enumerate(factors):
                of_column = builder.add(place, builder.mul(column, vectors.whole(k)))
                total = vectors.added(builder, total, vectors.read(builder, w, of_column, like.dtype), factor)
            vectors.write(builder, total, y, offset)
            return []

        vectors.loop(builder, strips, [], body)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 6), like), generate


@intrinsic
def _widen(_context: Any, to: Any, source: Any, like: Any) -> Any:
    """Copy LANES stored numbers, of the type of the array `like`, as float32."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        to, source, _ = arguments
        vectors.write(builder, vectors.read(builder, source, vectors.whole(0), like.dtype), to, vectors.whole(0))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, like), generate


@kernel()
def _few(w_KO: np.ndarray, columns: Range, outputs: Range, x_MK: np.ndarray, y_MO: np.ndarray) -> None:
    """Add W x^T to y, for one or two rows of x, some columns and some outputs."""
    size, all_outputs, inputs = w_KO.itemsize, w_KO.shape[1], x_MK.shape[1]
    first, last = columns
    start, stop = outputs
    strips = (stop - start) // LANES
    group = _COLUMNS * all_outputs * size
    ahead = group * ((_AHEAD + group - 1) // group) if group <= 4 * _AHEAD else 0
    for k in range(first, last, _COLUMNS):
        whole = last - k >= _COLUMNS
        for m in range(len(x_MK)):
            if whole and strips:
                address = w_KO.ctypes.data + (k * all_outputs + start) * size
                x, y = x_MK.ctypes.data + 4 * (m * inputs + k), y_MO.ctypes.data + 4 * (m * y_MO.shape[1] + start)
                _add_columns(address, all_outputs * size, strips, x, y, ahead, w_KO)
            for other in range(k, min(k + _COLUMNS, last)):
                for o in range(start + strips * LANES if whole else start, stop):
                    y_MO[m, o] += x_MK[m, other] * load(w_KO[other, o])


@kernel()
def _many(w_KO: np.ndarray, columns: Range, outputs: Range, x_MK: np.ndarray, y_MO: np.ndarray) -> None:
    """Do the same for a multiple of TOKENS rows. Columns are widened once for all of them."""
    size, all_outputs, inputs = w_KO.itemsize, w_KO.shape[1], x_MK.shape[1]
    first, last = columns
    widened_SKO = np.empty((_STRIPS, _BLOCK, LANES), np.float32)
    for start in range(outputs[0], outputs[1], _STRIPS * LANES):
        count = min(outputs[1] - start, _STRIPS * LANES)
        strips = (count + LANES - 1) // LANES
        for k in range(first, last, _BLOCK):
            taken = min(last - k, _BLOCK)
            for i in range(taken):
                source = w_KO.ctypes.data + ((k + i) * all_outputs + start) * size
                for s in range(count // LANES):
                    _widen(widened_SKO.ctypes.data + 4 * LANES * (s * _BLOCK + i), source + s * LANES * size, w_KO)
                for o in range(count // LANES * LANES, strips * LANES):
                    value = load(w_KO[k + i, start + o]) if o < count else np.float32(0)
                    widened_SKO[o // LANES, i, o % LANES] = value
            for s in range(strips):
                for m in range(0, len(x_MK), TOKENS):
                    add_tile(
                        widened_SKO.ctypes.data + 4 * LANES * s * _BLOCK,
                        taken,
                        x_MK.ctypes.data + 4 * (m * inputs + k),
                        4 * inputs,
                        y_MO.ctypes.data + 4 * (m * y_MO.shape[1] + start + s * LANES),
                        4 * y_MO.shape[1],
                    )


@kernel(parallel=True)
def product_of_columns(w_KO: np.ndarray, x_MK: np.ndarray, sums_PMO: np.ndarray, pieces: int) -> None:
    """W x^T for the first columns, as many as x has: the sum over the P parts of `sums`, which start at any values.

    Threads share the columns, P parts of them, because then each reads memory without gaps; more threads than P also
    share the outputs.

    Args:
        x_MK: 1, 2 or a multiple of 4 rows.
        sums_PMO: its last dimension may be larger than O, and is a multiple of LANES.
        pieces: in how many the outputs are cut.
    """
    inputs, outputs, parts = x_MK.shape[1], w_KO.shape[1], len(sums_PMO)
    columns = (inputs + parts * _COLUMNS - 1) // (parts * _COLUMNS) * _COLUMNS
    strips = (outputs + pieces * LANES - 1) // (pieces * LANES) * LANES
    for task in prange(parts * pieces):
        part, piece = task // pieces, task % pieces
        first, start = part * columns, piece * strips
        last, stop = min(inputs, first + columns), min(outputs, start + strips)
        if start >= stop:
            continue
        sums_MO = sums_PMO[part]
        for m in range(len(x_MK)):
            for o in range(start, (stop + LANES - 1) // LANES * LANES):
                sums_MO[m, o] = 0
        if len(x_MK) < TOKENS:
            _few(w_KO, (first, last), (start, stop), x_MK, sums_MO)
        else:
            _many(w_KO, (first, last), (start, stop), x_MK, sums_MO)
