"""Products of opening projections on a CPU: the weight lies in memory row by row, a row for each output.

A narrow sub-network takes the first rows, one piece of memory. With one or two tokens, reading it is what takes time:
processors do not fetch far enough ahead where numbers are widened before they are used, so memory is asked for here.

Shapes: M rows of x (tokens), O outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from flextron.inference.kernels import vectors
from flextron.inference.kernels.memory import kernel, load
from flextron.inference.kernels.vectors import LANES

_SUMS = 4
"""Sums that a row is added up in, so that additions do not wait for each other."""
STEP = _SUMS * LANES
"""Inputs that are multiplied at once."""
_AHEAD = 4096
"""Bytes ahead of which memory is asked for."""


def _multiplying(tokens: int) -> Any:
    """The intrinsic for so many rows of x."""

    @intrinsic
    def multiply(_context: Any, w: Any, steps: Any, x: Any, row_of_x: Any, y: Any, like: Any) -> Any:
        """Write x[tokens, steps * STEP] w[steps * STEP] to y[tokens]; addresses, and bytes from one row to the next.

        Args:
            like: an array of the weights' type.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            w, steps, x, row_of_x, y, _ = arguments
            whole, size = vectors.whole, like.dtype.bitwidth // 8

            def body(step: Any, sums: Sequence[Any]) -> Sequence[Any]:
                results: list[Any] = []
                weights, inputs = (builder.mul(step, whole(STEP * each)) for each in (size, 4))
                for line in range(0, STEP * size, 64):
                    vectors.fetch(builder, w, builder.add(weights, whole(_AHEAD + line)))
                for one in range(_SUMS):
                    values = vectors.read(builder, w, builder.add(weights, whole(one * LANES * size)), like.dtype)
                    for token in range(tokens):
                        of_row = builder.add(inputs, builder.mul(row_of_x, whole(token)))
                        factors = vectors.read_floats(builder, x, builder.add(of_row, whole(one * LANES * 4)))
                        results.append(vectors.added(builder, sums[len(results)], values, factors))
                return results

            sums = vectors.loop(builder, steps, [ir.Constant(vectors.FLOATS, [0.0] * LANES)] * (_SUMS * tokens), body)
            for token in range(tokens):
                total = sums[token]
                for one in range(1, _SUMS):
                    total = builder.fadd(total, sums[one * tokens + token], flags=vectors.LOOSE)
                vectors.store_sum(builder, total, y, whole(4 * token))
            return context.get_dummy_value()

        return types.void(*([types.int64] * 5), like), generate

    return multiply


_multiply_one = _multiplying(1)
_multiply_two = _multiplying(2)


def _as_floats(w_OK, first, last, inputs):
    """Some rows of a matrix as float32: views, or copies of numbers of other types."""
    raise NotImplementedError


@overload(_as_floats)
def _overload_as_floats(w_OK, first, last, inputs):
    if w_OK.dtype == types.float32:
        return lambda w_OK, first, last, inputs: w_OK[first:last]  # noqa: ARG005 - a slice of columns has no unit stride

    def copied(w_OK, first, last, inputs):
        floats_OK = np.empty((last - first, inputs), np.float32)
        for o in range(last - first):
            for k in range(inputs):
                floats_OK[o, k] = load(w_OK[first + o, k])
        return floats_OK

    return copied


@kernel()
def product_of_rows(w_OK: np.ndarray, first: int, last: int, x_MK: np.ndarray, y_OM: np.ndarray) -> None:
    """y = W x^T for some rows of W and the first columns; the number of rows of x is 1, 2 or a multiple of 4.

    Two rows of W times four of x fill the registers, and the four stay in the nearest cache.
    """
    count, inputs = x_MK.shape
    zero = np.float32(0)
    if count <= 2:
        steps, x = inputs // STEP, x_MK.ctypes.data
        for o in range(first, last):
            y_OM[o] = zero
            if steps:
                w, y = w_OK.ctypes.data + o * w_OK.shape[1] * w_OK.itemsize, y_OM.ctypes.data + 4 * o * count
                if count == 1:
                    _multiply_one(w, steps, x, 4 * inputs, y, w_OK)
                else:
                    _multiply_two(w, steps, x, 4 * inputs, y, w_OK)
            for k in range(steps * STEP, inputs):
                for m in range(count):
                    y_OM[o, m] += load(w_OK[o, k]) * x_MK[m, k]
    else:
        floats_OK = _as_floats(w_OK, first, last, inputs)
        for m in range(0, count, 4):
            for o in range(0, last - first, 2):
                other = min(o + 1, last - first - 1)  # an odd row is computed twice
                a0, a1, a2, a3 = zero, zero, zero, zero
                b0, b1, b2, b3 = zero, zero, zero, zero
                for k in range(inputs):
                    v, u = floats_OK[o, k], floats_OK[other, k]
                    a0 += x_MK[m, k] * v
                    a1 += x_MK[m + 1, k] * v
                    a2 += x_MK[m + 2, k] * v
                    a3 += x_MK[m + 3, k] * v
                    b0 += x_MK[m, k] * u
                    b1 += x_MK[m + 1, k] * u
                    b2 += x_MK[m + 2, k] * u
                    b3 += x_MK[m + 3, k] * u
                y_OM[first + o, m], y_OM[first + o, m + 1] = a0, a1
                y_OM[first + o, m + 2], y_OM[first + o, m + 3] = a2, a3
                y_OM[first + other, m], y_OM[first + other, m + 1] = b0, b1
                y_OM[first + other, m + 2], y_OM[first + other, m + 3] = b2, b3
