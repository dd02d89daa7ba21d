# mypy: ignore-errors
"""Memory given by address, and threads that meet in it: what one compiled call over a whole model needs.

Its arguments are a table of addresses, since the parts of a model are many and lie in files, and since the threads that
work on it together have to read the same table.  Uncompiled (NUMBA_DISABLE_JIT) all of this runs in one thread.
"""

import ctypes
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from .jit import JIT_DISABLED, Routine, features, njit

PATIENCE = 2_000  # looks at a word before giving way to other threads of the machine (some 30 microseconds)

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _array_at(kind, dtype):
    """at(address, count): a contiguous array of the memory there.  Spelled out: `carray` compiles far more slowly."""

    def typed(typing_context, address, count):
        array = types.Array(kind, 1, "C")

        def emit(context, builder, signature, values):
            made = context.make_array(array)(context, builder)
            data = builder.inttoptr(values[0], made.data.type)
            size = context.get_constant(types.intp, np.dtype(dtype).itemsize)
            populate_array(made, data=data, shape=[values[1]], strides=[size], itemsize=size, meminfo=None)
            return made._getvalue()

        return array(types.intp, types.intp), emit

    def plain(address, count):
        if count <= 0:
            return np.empty(0, dtype)
        memory = (ctypes.c_uint8 * (int(count) * np.dtype(dtype).itemsize)).from_address(int(address))
        return np.frombuffer(memory, dtype)

    return plain if JIT_DISABLED else intrinsic(typed)


def _rows_at(typing_context, address, rows, columns, step):
    """Rows of float32 numbers, `step` bytes from one to the next."""
    array = types.Array(types.float32, 2, "A")

    def emit(context, builder, signature, values):
        made = context.make_array(array)(context, builder)
        data, size = builder.inttoptr(values[0], made.data.type), context.get_constant(types.intp, 4)
        shape, strides = [values[1], values[2]], [values[3], size]
        populate_array(made, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
        return made._getvalue()

    return array(types.intp, types.intp, types.intp, types.intp), emit


floats_at, doubles_at = _array_at(types.float32, np.float32), _array_at(types.float64, np.float64)
words_at, shorts_at = _array_at(types.uint16, np.uint16), _array_at(types.int16, np.int16)  # words: bfloat16 bits
pairs_at: Any = _array_at(types.uint32, np.uint32)  # words of two bfloat16 numbers
bytes_at, signed_bytes_at = _array_at(types.uint8, np.uint8), _array_at(types.int8, np.int8)
ints_at, longs_at = _array_at(types.int32, np.int32), _array_at(types.int64, np.int64)


def _call(typing_context, address, arguments):
    """A routine (kernels/jit.py), by its address and a tuple of its arguments -> int64."""

    def emit(context, builder, signature, values):
        numbers = cgutils.unpack_tuple(builder, values[1])
        kind = ir.FunctionType(_I64, [_I64] * len(numbers))
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), numbers)

    return types.int64(types.intp, arguments), emit


def _add_to(typing_context, array, at, value):
    """array[at] += value as one step that no thread sees half done -> the new value.  array: int64."""

    def emit(context, builder, signature, values):
        place = builder.gep(context.make_array(signature.args[0])(context, builder, values[0]).data, [values[1]])
        return builder.add(builder.atomic_rmw("add", place, values[2], "seq_cst"), values[2])

    return types.int64(array, types.intp, types.int64), emit


def _swap(typing_context, array, at, expected, value):
    """array[at] = value if it is what is expected -> whether it was, as one step.  array: int64."""

    def emit(context, builder, signature, values):
        place = builder.gep(context.make_array(signature.args[0])(context, builder, values[0]).data, [values[1]])
        return builder.extract_value(builder.cmpxchg(place, values[2], values[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(array, types.intp, types.int64, types.int64), emit


def _look_at(typing_context, array, at):
    """array[at] as it is now, and with it all that was written before.  array: int64."""

    def emit(context, builder, signature, values):
        place = builder.gep(context.make_array(signature.args[0])(context, builder, values[0]).data, [values[1]])
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(array, types.intp), emit


call: Any = intrinsic(_call)
rows_at: Any = intrinsic(_rows_at)
add_to: Any = intrinsic(_add_to)
look_at: Any = intrinsic(_look_at)
swap: Any = intrinsic(_swap)


@intrinsic
def _breathe(typing_context):
    """Tell the processor that this thread only waits."""

    def emit(context, builder, signature, values):
        if "sse2" in features():
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def _give_way(typing_context):
    """Let another thread have this core, if one wants it."""

    def emit(context, builder, signature, values):
        kind = ir.FunctionType(_I32, [])
        builder.call(builder.module.globals.get("sched_yield") or ir.Function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), emit


@njit
def wait_a_while(looks):
    """Between two looks, `looks` of which were in vain -> how many now."""
    if (looks + 1) % PATIENCE == 0:
        _give_way()
    _breathe()
    return looks + 1


@njit
def wait_for(array, at, least, patience):
    """Wait until array[at] >= least, but for so many looks at most -> whether it is."""
    looks = 0
    while look_at(array, at) < least:
        looks = wait_a_while(looks)
        if looks >= patience:
            return False
    return True


if JIT_DISABLED:

    def call(address, arguments):
        return Routine.uncompiled[address](*arguments)

    def rows_at(address, rows, columns, step):
        memory = floats_at(address, (rows - 1) * step // 4 + columns)
        return np.lib.stride_tricks.as_strided(memory, (rows, columns), (step, 4))

    def add_to(array, at, value):
        array[at] += value
        return array[at]

    def look_at(array, at):
        return array[at]

    def swap(array, at, expected, value):
        array[at] = value
        return True

    def wait_a_while(looks):
        return looks + 1

    def wait_for(array, at, least, patience):
        return array[at] >= least
