"""Products of 4-bit projections on a CPU (`elastic/quantized.py` has the layout).

All weights of one input and 32 outputs lie together, so a token adds an input to 32 sums at once, and reads memory
without gaps whether it takes the first outputs or the first inputs.

Shapes: M rows (tokens), O outputs, K inputs, S strips of 32 outputs, b bytes of an input in a strip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from flextron.elastic.quantized import STRIP
from flextron.inference.kernels import vectors
from flextron.inference.kernels.memory import kernel, load
from flextron.inference.kernels.vectors import LANES, TOKENS, add_tile

BYTES = STRIP // 2
"""Bytes of one input in a strip."""
_AT_ONCE = 2
"""Inputs with sums of their own, so that additions do not wait for each other."""
_AHEAD = 2048
"""Bytes ahead of which memory is asked for."""
_BLOCK = 32
"""Inputs that are widened to float32 at once, for many rows."""


def _halves(builder: Any, address: Any, offset: Any) -> Sequence[Any]:
    """The steps of one input, from 0 to 15: those of the strip's first outputs, and of the others."""
    kind = ir.VectorType(ir.IntType(8), LANES)
    both = builder.load(vectors.at(builder, address, offset, kind))
    both.align = 1
    low, high = (ir.Constant(kind, [value] * LANES) for value in (15, 4))
    return [builder.uitofp(half, vectors.FLOATS) for half in (builder.and_(both, low), builder.lshr(both, high))]


def _adding(tokens: int) -> Any:
    """The intrinsic for so many rows."""

    @intrinsic
    def add_strip(_context: Any, w: Any, inputs: Any, x: Any, row_of_x: Any, y: Any) -> Any:
        """Write x[tokens, inputs] w[inputs, 32] to y[tokens, 32]; addresses, and bytes from one row to the next."""

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            w, inputs, x, row_of_x, y = arguments
            whole = vectors.whole

            def body(step: Any, sums: Sequence[Any]) -> Sequence[Any]:
                results: list[Any] = []
                line = builder.mul(step, whole(_AT_ONCE * BYTES))
                vectors.fetch(builder, w, builder.add(line, whole(_AHEAD)))
                for one in range(_AT_ONCE):
                    k = builder.add(builder.mul(step, whole(_AT_ONCE)), whole(one))
                    halves = _halves(builder, w, builder.mul(k, whole(BYTES)))
                    for token in range(tokens):
                        place = builder.add(builder.mul(k, whole(4)), builder.mul(row_of_x, whole(token)))
                        factor = vectors.everywhere(builder, builder.load(vectors.at(builder, x, place, vectors.FLOAT)))
                        for half in halves:
                            results.append(vectors.added(builder, sums[len(results)], half, factor))
                return results

            zero = ir.Constant(vectors.FLOATS, [0.0] * LANES)
            steps = builder.sdiv(inputs, whole(_AT_ONCE))
            sums = vectors.loop(builder, steps, [zero] * (_AT_ONCE * tokens * 2), body)
            for place in range(tokens * 2):
                total = sums[place]
                for one in range(1, _AT_ONCE):
                    total = builder.fadd(total, sums[one * tokens * 2 + place], flags=vectors.LOOSE)
                vectors.write(builder, total, y, whole(4 * LANES * place))
            return context.get_dummy_value()

        return types.void(*([types.int64] * 5)), generate

    return add_strip


_add_of_one = _adding(1)
_add_of_two = _adding(2)


@intrinsic
def _widen(_context: Any, to: Any, further: Any, source: Any, scale: Any, lowest: Any) -> Any:
    """Write the weights of one input as float32: those of the first outputs, and `further` bytes on the others."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        to, further, source, scale, lowest = arguments
        factor, base = vectors.everywhere(builder, scale), vectors.everywhere(builder, lowest)
        for place, half in zip((vectors.whole(0), further), _halves(builder, source, vectors.whole(0)), strict=True):
            vectors.write(builder, vectors.added(builder, base, half, factor), to, place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.float32), generate


@kernel()
def outputs_of_strip(w_SKb: np.ndarray, scales_2SK: np.ndarray, strip: int, x_MK: np.ndarray, y_Mo: np.ndarray) -> None:
    """The 32 outputs of a strip, of the first inputs, as many as x has.

    Args:
        scales_2SK: scales and lowest values.
        x_MK: 1, 2 or a multiple of 4 rows.
    """
    count, inputs = x_MK.shape
    row = w_SKb.ctypes.data + strip * w_SKb.shape[1] * BYTES
    if count <= 2:
        taken = (inputs + _AT_ONCE - 1) // _AT_ONCE * _AT_ONCE
        factors_MK = np.empty((count, taken), np.float32)
        for m in range(count):
            for k in range(inputs):
                factors_MK[m, k] = x_MK[m, k] * load(scales_2SK[0, strip, k])
            factors_MK[m, inputs:] = 0
        if count == 1:
            _add_of_one(row, taken, factors_MK.ctypes.data, 4 * taken, y_Mo.ctypes.data)
        else:
            _add_of_two(row, taken, factors_MK.ctypes.data, 4 * taken, y_Mo.ctypes.data)
        for m in range(count):
            base = np.float32(0)
            for k in range(inputs):
                base += x_MK[m, k] * load(scales_2SK[1, strip, k])
            for o in range(STRIP):
                y_Mo[m, o] += base
        return
    y_Mo[:] = 0
    widened_2Ko = np.empty((2, _BLOCK, LANES), np.float32)
    half = 4 * _BLOCK * LANES
    for k in range(0, inputs, _BLOCK):
        taken = min(inputs - k, _BLOCK)
        for i in range(taken):
            to = widened_2Ko.ctypes.data + 4 * LANES * i
            scale, lowest = load(scales_2SK[0, strip, k + i]), load(scales_2SK[1, strip, k + i])
            _widen(to, half, row + (k + i) * BYTES, scale, lowest)
        for m in range(0, count, TOKENS):
            for which in range(2):
                add_tile(
                    widened_2Ko.ctypes.data + half * which,
                    taken,
                    x_MK.ctypes.data + 4 * (m * inputs + k),
                    4 * inputs,
                    y_Mo.ctypes.data + 4 * (m * STRIP + which * LANES),
                    4 * STRIP,
                )


@kernel(parallel=True)
def product_of_strips(w_SKb: np.ndarray, scales_2SK: np.ndarray, x_MK: np.ndarray, y_MO: np.ndarray) -> None:
    """The outputs of a projection, as many as y has, of the first inputs, as many as x has."""
    outputs = y_MO.shape[1]
    for strip in prange((outputs + STRIP - 1) // STRIP):
        y_Mo = np.empty((len(x_MK), STRIP), np.float32)
        outputs_of_strip(w_SKb, scales_2SK, strip, x_MK, y_Mo)
        first = strip * STRIP
        for m in range(len(x_MK)):
            for o in range(min(STRIP, outputs - first)):
                y_MO[m, first + o] = y_Mo[m, o]
