"""Numbers in memory, for kernels that Numba compiles: float32, bfloat16 as the bits of uint16, or int8."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload


@intrinsic
def _float_of_bits(_context: Any, bits: Any) -> Any:
    """The float32 whose bits are those of a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], cgutils.ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def pointer(_context: Any, address: Any, like: Any) -> Any:
    """The memory at an address, which holds numbers of the type of the array `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def _bits_of_float(_context: Any, value: Any) -> Any:
    """The bits of a float32 as a uint32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], cgutils.ir.IntType(32))

    return types.uint32(types.float32), generate


def load(value):
    """A stored number as float32; uint16 is bfloat16."""
    raise NotImplementedError


def store(values, place, value):
    """Store a float32 in an array of float32, or of bfloat16 as uint16, rounded to nearest."""
    raise NotImplementedError


@overload(load, inline="always")
def _overload_load(value):
    if value == types.uint16:
        return lambda value: _float_of_bits(np.uint32(np.uint32(value) << np.uint32(16)))
    return lambda value: np.float32(value)


@overload(store, inline="always")
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


def kernel(**options: Any) -> Any:
    """A decorator of functions that Numba compiles, with loose sums, and keeps on disk.

    What is kept is compiled anew when the function's own file changes, not when a file changes that it calls: then
    delete `__pycache__/*.nb*` in this folder.
    """
    return njit(fastmath={"reassoc", "contract", "arcp", "nsz"}, boundscheck=False, cache=True, nogil=True, **options)
