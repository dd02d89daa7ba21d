# mypy: ignore-errors
"""Tile instructions (Intel AMX) for compiled code, and the same in plain operations where there are none.

A processor with AMX has eight tile registers of 16 rows x 64 bytes.  One instruction multiplies two of them that hold
bfloat16 pairs and adds the product to a third that holds float32 numbers:

    into[m, n] += sum over k of left[m, k] . right[k, n]        m, n < 16; 16 words k, each of two bfloat16 numbers

Another takes words of four bytes, those on the left with a sign and those on the right without, and adds to integers.

The registers work between `begin_tiles` and `end_tiles`, in the thread that called it, inside one compiled call.  The
number of a register is part of its instruction, so it has to be a literal.  Arrays are given with a position, as in
vectors.py, and a stride between rows, both in elements of 32 bits; what lies in a file by its address, and the bytes
from row to row.  Nothing is checked.

`state` is this thread's memory from `tile_state()`.  The instructions do not need it; without them (on another
processor, and uncompiled) it holds what the registers would: the configuration, then the registers.  That emulation is
for proof, not for speed.  Source: Intel's Architecture Instruction Set Extensions reference, chapter 3, AMX.
"""

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic

from ..arrays import aligned_empty
from .addresses import pairs_at
from .jit import JIT_DISABLED, TILE_FEATURES, features, njit

NATIVE = not JIT_DISABLED and features() >= TILE_FEATURES
NATIVE_BYTES = NATIVE and "amx-int8" in features()
SIDE = 16  # rows of a register, and 32-bit words of its rows
BLOCK = 2 * SIDE  # rows, and columns, of the sums that four registers hold

_TILES, _REGISTER = 8, SIDE * SIDE
_HEADER = 2 * _TILES  # words of the state before the registers: rows of each, then words of each's rows
STATE_SIZE = _HEADER + _TILES * _REGISTER


def _configuration():
    """What `ldtilecfg` reads: palette 1 at byte 0, bytes per row from byte 16 on (16 bits each), rows from byte 48."""
    bytes_of = np.zeros(64, np.uint8)
    bytes_of[0] = 1
    bytes_of[16 : 16 + 2 * _TILES : 2] = 4 * SIDE
    bytes_of[48 : 48 + _TILES] = SIDE
    return bytes_of


CONFIGURATION = _configuration()


def tile_state():
    """Memory that stands for one thread's tile registers where there are none."""
    return aligned_empty((STATE_SIZE,)).view(np.uint32)


# ---- the instructions

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_BYTES = _I8.as_pointer()


def _call(builder, name, *arguments):
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    name = f"llvm.x86.{name}"
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


def _literals(*tiles):
    return all(isinstance(tile, types.IntegerLiteral) and 0 <= tile.literal_value < _TILES for tile in tiles)


def _begin(typing_context, state):
    def emit(context, builder, signature, values):
        content = ir.Constant(ir.ArrayType(_I8, len(CONFIGURATION)), bytearray(CONFIGURATION.tobytes()))
        place = builder.module.globals.get("tile_configuration")
        if place is None:
            place = ir.GlobalVariable(builder.module, content.type, "tile_configuration")
            place.linkage, place.global_constant, place.initializer = "internal", True, content
        _call(builder, "ldtilecfg", builder.bitcast(place, _BYTES))
        return context.get_dummy_value()

    return types.void(state), emit


def _end(typing_context, state):
    def emit(context, builder, signature, values):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(state), emit


def _zero(typing_context, state, tile):
    def emit(context, builder, signature, values):
        _call(builder, "tilezero", _I8(tile.literal_value))
        return context.get_dummy_value()

    return (types.void(state, tile), emit) if _literals(tile) else None


def _move(name):
    """load_tile(state, tile, array, at, stride), or store_tile."""

    def move(typing_context, state, tile, array, at, stride):
        def emit(context, builder, signature, values):
            start = context.make_array(array)(context, builder, values[2]).data
            place = builder.bitcast(builder.gep(start, [values[3]]), _BYTES)
            _call(builder, name, _I8(tile.literal_value), place, builder.mul(values[4], _I64(4)))
            return context.get_dummy_value()

        return (types.void(state, tile, array, types.intp, types.intp), emit) if _literals(tile) else None

    return move


def _load_at(typing_context, state, tile, address, step):
    def emit(context, builder, signature, values):
        _call(builder, "tileloadd64", _I8(tile.literal_value), builder.inttoptr(values[2], _BYTES), values[3])
        return context.get_dummy_value()

    return (types.void(state, tile, types.intp, types.intp), emit) if _literals(tile) else None


def _product(name):
    """dot_tiles(state, into, left, right), or dot_bytes."""

    def product(typing_context, state, into, left, right):
        def emit(context, builder, signature, values):
            _call(builder, name, *(_I8(tile.literal_value) for tile in (into, left, right)))
            return context.get_dummy_value()

        return (types.void(state, into, left, right), emit) if _literals(into, left, right) else None

    return product


# ---- the same without them

_ZERO, _HALF, _UPPER = np.uint32(0), np.uint32(16), np.uint32(0xFFFF0000)


@njit
def _begin_emulated(state):
    for tile in range(_TILES):
        state[tile] = CONFIGURATION[48 + tile]
        state[_TILES + tile] = CONFIGURATION[16 + 2 * tile] // 4


@njit
def _end_emulated(state):
    state[:_HEADER] = _ZERO


@njit
def _register(state, tile):
    """What is configured of a register: nothing outside of `begin_tiles` and `end_tiles`."""
    first = _HEADER + tile * _REGISTER
    return state[first : first + _REGISTER].reshape(SIDE, SIDE)[: np.intp(state[tile]), : np.intp(state[_TILES + tile])]


@njit
def _zero_emulated(state, tile):
    _register(state, tile)[:, :] = _ZERO


@njit
def _load_emulated(state, tile, array, at, stride):
    register, words = _register(state, tile), array.reshape(-1).view(np.uint32)
    for row in range(register.shape[0]):
        start = at + row * stride
        register[row] = words[start : start + register.shape[1]]


@njit
def _load_at_emulated(state, tile, address, step):
    register = _register(state, tile)
    for row in range(register.shape[0]):
        register[row] = pairs_at(address + row * step, register.shape[1])


@njit
def _store_emulated(state, tile, array, at, stride):
    register, words = _register(state, tile), array.reshape(-1).view(np.uint32)
    for row in range(register.shape[0]):
        start = at + row * stride
        words[start : start + register.shape[1]] = register[row]


@njit
def _dot_emulated(state, into, left, right):
    total, a, b = _register(state, into), _register(state, left), _register(state, right)
    if total.size == 0:
        return
    sums = total.copy().view(np.float32)
    a_low, a_high = (a << _HALF).view(np.float32), (a & _UPPER).view(np.float32)
    b_low, b_high = (b << _HALF).view(np.float32), (b & _UPPER).view(np.float32)
    for k in range(a.shape[1]):
        sums += a_low[:, k].copy().reshape(-1, 1) * b_low[k] + a_high[:, k].copy().reshape(-1, 1) * b_high[k]
    total[:, :] = sums.view(np.uint32)


@njit
def _byte(word, number, signed):
    value = np.int64(word) >> 8 * number & 255
    return value - 256 if signed and value > 127 else value


@njit
def _dot_bytes_emulated(state, into, left, right):
    total, a, b = _register(state, into), _register(state, left), _register(state, right)
    sums = total.copy().view(np.int32)
    for m in range(total.shape[0]):
        for n in range(total.shape[1]):
            for k in range(a.shape[1] if b.shape[0] else 0):
                for byte in range(4):
                    sums[m, n] += _byte(a[m, k], byte, True) * _byte(b[k, n], byte, False)
    total[:, :] = sums.view(np.uint32)


def _instruction(native, emulated):
    return intrinsic(prefer_literal=True)(native) if NATIVE else emulated


begin_tiles = _instruction(_begin, _begin_emulated)
end_tiles = _instruction(_end, _end_emulated)
zero_tile = _instruction(_zero, _zero_emulated)
load_tile = _instruction(_move("tileloadd64"), _load_emulated)
load_tile_at = _instruction(_load_at, _load_at_emulated)
store_tile = _instruction(_move("tilestored64"), _store_emulated)
dot_tiles = _instruction(_product("tdpbf16ps"), _dot_emulated)
dot_bytes = _instruction(_product("tdpbsud"), _dot_bytes_emulated)


# ---- what is made of them


@njit(forceinline=True)
def multiply_block(state, c, c_at, c_row, a, a_at, a_row, b, b_at, b_row, depth, accumulate):
    """c: BLOCK x BLOCK (+)= a: BLOCK x depth words, times b: depth x BLOCK words; registers 0 to 3 hold the sums.

    Compiled into what calls it: some thirty numbers go with a call, which takes as long as a short sum.
    """
    low = c_at + SIDE * c_row
    if accumulate:
        load_tile(state, 0, c, c_at, c_row)
        load_tile(state, 1, c, c_at + SIDE, c_row)
        load_tile(state, 2, c, low, c_row)
        load_tile(state, 3, c, low + SIDE, c_row)
    else:
        zero_tile(state, 0)
        zero_tile(state, 1)
        zero_tile(state, 2)
        zero_tile(state, 3)
    for k in range(0, depth, SIDE):
        rows, columns = a_at + k, b_at + k * b_row
        load_tile(state, 4, a, rows, a_row)
        load_tile(state, 6, b, columns, b_row)
        dot_tiles(state, 0, 4, 6)
        load_tile(state, 7, b, columns + SIDE, b_row)
        dot_tiles(state, 1, 4, 7)
        load_tile(state, 5, a, rows + SIDE * a_row, a_row)
        dot_tiles(state, 2, 5, 6)
        dot_tiles(state, 3, 5, 7)
    store_tile(state, 0, c, c_at, c_row)
    store_tile(state, 1, c, c_at + SIDE, c_row)
    store_tile(state, 2, c, low, c_row)
    store_tile(state, 3, c, low + SIDE, c_row)
