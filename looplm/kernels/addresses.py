# mypy: ignore-errors
"""Memory given by address, and threads that meet in it: what one compiled call over a whole model needs.

Its arguments are a table of addresses, since the parts of a model are many and lie in files, and since the threads that
work on it together have to read the same table.  Uncompiled (NUMBA_DISABLE_JIT) all of this runs in one thread.
"""

import ctypes
from typing import Any

import llvmlite.ir as ir
import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import JIT_DISABLED, features, njit

PATIENCE = 2_000  # looks at a word before giving way to other threads of the machine (some 30 microseconds)

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _pointer_to(kind):
    """pointer(address): for Numba's `carray`."""

    def typed(typing_context, address):
        def emit(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), emit

    return intrinsic(typed)


_float, _double, _word = _pointer_to(types.float32), _pointer_to(types.float64), _pointer_to(types.uint16)
_short, _signed, _long = _pointer_to(types.int16), _pointer_to(types.int8), _pointer_to(types.int64)


@njit(inline="always")
def floats_at(address, count):
    """An array of float32 numbers."""
    return numba.carray(_float(address), (count,))


@njit(inline="always")
def doubles_at(address, count):
    return numba.carray(_double(address), (count,))


@njit(inline="always")
def words_at(address, count):
    """An array of uint16: bfloat16 numbers."""
    return numba.carray(_word(address), (count,))


@njit(inline="always")
def shorts_at(address, count):
    return numba.carray(_short(address), (count,))


@njit(inline="always")
def signed_bytes_at(address, count):
    return numba.carray(_signed(address), (count,))


@njit(inline="always")
def longs_at(address, count):
    return numba.carray(_long(address), (count,))


def caller(routine) -> Any:
    """call(address, ...) with a routine's arguments -> int64.  Uncompiled, the address does not matter."""

    @intrinsic
    def call(typing_context, address, arguments):
        def emit(context, builder, signature, values):
            numbers = cgutils.unpack_tuple(builder, values[1])
            kind = ir.FunctionType(_I64, [_I64] * len(numbers))
            return builder.call(builder.inttoptr(values[0], kind.as_pointer()), numbers)

        return types.int64(types.intp, arguments), emit

    return (lambda address, arguments: routine.function(*arguments)) if JIT_DISABLED else call


def _add_to(typing_context, array, at, value):
    """array[at] += value as one step that no thread sees half done -> the new value.  array: int64."""

    def emit(context, builder, signature, values):
        place = builder.gep(context.make_array(signature.args[0])(context, builder, values[0]).data, [values[1]])
        return builder.add(builder.atomic_rmw("add", place, values[2], "seq_cst"), values[2])

    return types.int64(array, types.intp, types.int64), emit


def _look_at(typing_context, array, at):
    """array[at] as it is now, and with it all that was written before.  array: int64."""

    def emit(context, builder, signature, values):
        place = builder.gep(context.make_array(signature.args[0])(context, builder, values[0]).data, [values[1]])
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(array, types.intp), emit


add_to: Any = intrinsic(_add_to)
look_at: Any = intrinsic(_look_at)


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
def wait_for(array, at, least, patience):
    """Wait until array[at] >= least -> whether it is; with a patience above 0, only for so many looks."""
    looks = 0
    while look_at(array, at) < least:
        looks += 1
        if patience and looks >= patience:
            return False
        if looks % PATIENCE == 0:
            _give_way()
        _breathe()
    return True


if JIT_DISABLED:

    def _plain(kind):
        def at(address, count):
            if count <= 0:
                return np.empty(0, kind)
            memory = (ctypes.c_uint8 * (int(count) * np.dtype(kind).itemsize)).from_address(int(address))
            return np.frombuffer(memory, kind)

        return at

    floats_at, doubles_at, words_at = _plain(np.float32), _plain(np.float64), _plain(np.uint16)
    shorts_at, signed_bytes_at = _plain(np.int16), _plain(np.int8)
    longs_at = _plain(np.int64)

    def add_to(array, at, value):
        array[at] += value
        return array[at]

    def look_at(array, at):
        return array[at]

    def wait_for(array, at, least, patience):
        return array[at] >= least
