# mypy: ignore-errors
"""float32 numbers as sums of bfloat16 ones, which tile registers (amx.py) multiply.

    x = high + middle + low        high = nearest(x), middle = nearest(x - high), low = nearest(x - high - middle)

Both differences are exact, and three times 8 bits hold the 24 of a float32: so products with bfloat16 numbers are as
exact as float32 ones.  A NaN is one in every part; infinity becomes NaN.  What is beyond the largest bfloat16 number
(3.39e38), or has a part below the smallest normal number, is not told exactly.

Arrays are given with a position, as in vectors.py.  Uncompiled, NumPy twins take the place of everything here.
"""

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic

from .emission import bfloat_bits_of, constant, vector
from .jit import JIT_DISABLED
from .vectors import _from, _load, _pointer, _store, bfloat_bits

WORDS = 16  # of a row of a tile register: 32 numbers
NUMBERS = 2 * WORDS
PARTS = 3

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_UPPER = -65536


def _split(typing_context, parts, into, into_at, into_step, source, source_at):
    """split(parts, ...): NUMBERS of source as WORDS, neighbours in one; part p goes to into_at + p * into_step."""

    def emit(context, builder, signature, values):
        _, into_array, into_at, into_step, source_array, source_at = values
        start = _pointer(context, builder, signature.args[4], source_array, source_at)
        both = [_load(builder, builder.gep(start, [_I64(at)]), vector(_F32, WORDS)) for at in (0, WORDS)]
        masks = [ir.Constant(vector(_I32, WORDS), [2 * i + odd for i in range(WORDS)]) for odd in (0, 1)]
        rest = [builder.shuffle_vector(*both, mask) for mask in masks]
        for part in range(parts.literal_value):
            bits = [bfloat_bits_of(builder, line) for line in rest]
            upper = [builder.and_(line, constant(line.type, _UPPER)) for line in bits]
            lower = builder.lshr(bits[0], constant(bits[0].type, 16))
            at = builder.add(into_at, builder.mul(into_step, _I64(part)))
            place = _pointer(context, builder, signature.args[1], into_array, at)
            _store(builder, builder.or_(lower, upper[1]), place)
            # A flag of its own keeps the compiler's liberties (jit.py) away.
            rest = [
                builder.fsub(line, builder.bitcast(high, line.type), flags=("nsz",))
                for line, high in zip(rest, upper, strict=True)
            ]
        return context.get_dummy_value()

    return types.void(parts, into, types.intp, types.intp, source, types.intp), emit


def _split_plain(parts, into, into_at, into_step, source, source_at):
    rest = _from(source, source_at, NUMBERS).copy()
    for part in range(parts):
        bits = bfloat_bits(rest)
        _from(into, into_at + part * into_step, WORDS)[:] = bits[::2] | (bits[1::2] << np.uint32(16))
        with np.errstate(invalid="ignore"):  # infinity without itself
            rest = rest - (bits << np.uint32(16)).view(np.float32)


def _add_eight(typing_context, into, into_at, source, high_at, middle_at, low_at):
    """Eight numbers of `into` = (high + middle) + low, in this order."""

    def emit(context, builder, signature, values):
        high, middle, low = (
            _load(builder, _pointer(context, builder, signature.args[2], values[2], at), vector(_F32, 8))
            for at in values[3:]
        )
        total = builder.fadd(builder.fadd(high, middle, flags=("nsz",)), low, flags=("nsz",))
        _store(builder, total, _pointer(context, builder, signature.args[0], values[0], values[1]))
        return context.get_dummy_value()

    i = types.intp
    return types.void(into, i, source, i, i, i), emit


def _add_eight_plain(into, into_at, source, high_at, middle_at, low_at):
    high, middle, low = (_from(source, at, 8) for at in (high_at, middle_at, low_at))
    _from(into, into_at, 8)[:] = (high + middle) + low


split: Any = _split_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_split)
add_eight: Any = _add_eight_plain if JIT_DISABLED else intrinsic(_add_eight)
