"""Instructions on vectors of numbers, in LLVM's own language, for kernels that Numba compiles.

Numba turns loops over arrays that might overlap into scalar code, so the inner loops of products are written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
"""Outputs that one instruction, or two, compute."""
TOKENS = 4
"""Rows of x whose sums with LANES outputs fill a processor's registers."""
INT, FLOAT = ir.IntType(64), ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
LOOSE = ("contract", "reassoc", "nsz")


def whole(value: int) -> Any:
    """A constant of 64 bits."""
    return ir.Constant(INT, value)


def at(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    """A pointer to a value of a kind, so many bytes after an address."""
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def everywhere(builder: Any, value: Any) -> Any:
    """A vector whose numbers are all `value`."""
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, first, lanes)


def added(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """total + one * other."""
    return builder.fadd(total, builder.fmul(one, other, flags=LOOSE), flags=LOOSE)


def read(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    """LANES stored numbers as float32."""
    stored = {types.float32: FLOAT, types.uint16: ir.IntType(16), types.int8: ir.IntType(8)}[kind]
    values = builder.load(at(builder, address, offset, ir.VectorType(stored, LANES)))
    values.align = kind.bitwidth // 8
    if kind == types.int8:
        return builder.sitofp(values, FLOATS)
    if kind == types.uint16:
        bits = builder.zext(values, ir.VectorType(ir.IntType(32), LANES))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, [16] * LANES)), FLOATS)
    return values


def read_floats(builder: Any, address: Any, offset: Any) -> Any:
    """LANES numbers of float32."""
    return read(builder, address, offset, types.float32)


def write(builder: Any, values: Any, address: Any, offset: Any) -> None:
    """Store LANES numbers of float32."""
    builder.store(values, at(builder, address, offset, FLOATS)).align = 4


def store_sum(builder: Any, values: Any, address: Any, offset: Any) -> None:
    """Store the sum of LANES numbers as one float32."""
    kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
    adding = builder.module.declare_intrinsic(f"llvm.vector.reduce.fadd.v{LANES}f32", (), kind)
    total = builder.call(adding, [ir.Constant(FLOAT, 0.0), values], fastmath=LOOSE)
    builder.store(total, at(builder, address, offset, FLOAT)).align = 4


def fetch(builder: Any, address: Any, offset: Any) -> None:
    """Ask for a line of memory, so many bytes after an address; it need not exist."""
    byte = ir.IntType(8)
    flags = [ir.Constant(ir.IntType(32), value) for value in (0, 3, 1)]  # to read, keep near, data
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), *(flag.type for flag in flags)])
    asking = builder.module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], kind)
    builder.call(asking, [at(builder, address, offset, byte), *flags])


def loop(builder: Any, count: Any, sums: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]) -> Any:
    """Run `body(index, sums)` for each index below `count`, which is at least 1; return the last sums."""
    before, block, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(INT)
    index.add_incoming(whole(0), before)
    running = [builder.phi(each.type) for each in sums]
    results = body(index, running)
    following = builder.add(index, whole(1))
    index.add_incoming(following, block)
    for phi, first, result in zip(running, sums, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, block)
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return results


@intrinsic
def add_tile(_context: Any, w: Any, columns: Any, x: Any, row_of_x: Any, y: Any, row_of_y: Any) -> Any:
    """Add x[TOKENS, columns] w[columns, LANES] to y[TOKENS, LANES]; addresses, and bytes from one row to the next."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        w, columns, x, row_of_x, y, row_of_y = arguments

        def body(k: Any, sums: Sequence[Any]) -> Sequence[Any]:
            weights = read_floats(builder, w, builder.mul(k, whole(4 * LANES)))
            offset = builder.mul(k, whole(4))
            results = []
            for token, total in enumerate(sums):
                of_row = builder.add(offset, builder.mul(row_of_x, whole(token)))
                factor = everywhere(builder, builder.load(at(builder, x, of_row, FLOAT)))
                results.append(added(builder, total, weights, factor))
            return results

        zero = ir.Constant(FLOATS, [0.0] * LANES)
        for token, total in enumerate(loop(builder, columns, [zero] * TOKENS, body)):
            offset = builder.mul(row_of_y, whole(token))
            old = read_floats(builder, y, offset)
            write(builder, builder.fadd(old, total, flags=LOOSE), y, offset)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 6)), generate
