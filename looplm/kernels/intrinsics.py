# mypy: ignore-errors
"""Building blocks that Python cannot spell: a fused multiply-add that stays fused, rounding, and 2**n by its bits.

They are generic LLVM operations, legal on every processor.  On top of them stands `exp32`, which vectorises (0.2 ns an
element where the library call takes 2.3) and is within 2 units in the last place.
"""

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emission import NATIVE_BFLOAT, Bfloat, bfloat_bits_of, declared
from .jit import JIT_DISABLED, njit

_F32, _I16, _I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)


@intrinsic
def _fma(typing_context, a, b, c):
    def generate(context, builder, signature, values):
        return builder.call(declared(builder, "llvm.fma.f32", _F32, [_F32] * 3), values)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _round(typing_context, x):
    def generate(context, builder, signature, values):
        return builder.call(declared(builder, "llvm.rint.f32", _F32, [_F32]), values)

    return types.float32(types.float32), generate


@intrinsic
def _larger(typing_context, a, b):
    def generate(context, builder, signature, values):
        return builder.call(declared(builder, "llvm.maximum.f32", _F32, [_F32] * 2), values, fastmath=("nsz",))

    return types.float32(types.float32, types.float32), generate


def _rounded(builder, number):
    """The bits of the nearest bfloat16 number, in 16 bits; LLVM has it for processors alone that have it."""
    if NATIVE_BFLOAT:
        return builder.bitcast(builder.fptrunc(number, Bfloat()), _I16)
    return builder.trunc(builder.lshr(bfloat_bits_of(builder, number), _I32(16)), _I16)


@intrinsic
def _put(typing_context, row, i, x):
    def generate(context, builder, signature, values):
        kind = signature.args[0]
        row = context.make_array(kind)(context, builder, values[0])
        place = cgutils.get_item_pointer(context, builder, kind, row, [values[1]])
        number = values[2]
        if kind.dtype == types.uint16:
            number = _rounded(builder, number)
        builder.store(number, place)
        return context.get_dummy_value()

    return types.void(row, types.intp, types.float32), generate


@intrinsic
def _times_power_of_two(typing_context, x, n):
    def generate(context, builder, signature, values):
        exponent = builder.shl(builder.add(builder.fptosi(values[1], _I32), _I32(127)), _I32(23))
        return builder.fmul(values[0], builder.bitcast(exponent, _F32))

    return types.float32(types.float32, types.float32), generate


if JIT_DISABLED:  # plain Python twins, so that the kernels also run uncompiled

    def _fma(a, b, c):
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))

    _round, _larger = np.rint, np.maximum

    def _times_power_of_two(x, n):
        return x if np.isnan(x) else np.float32(np.ldexp(x, int(n)))

    def _put(row, i, x):
        row[i] = round16(x) if row.dtype == np.uint16 else x


round32: Any = _round  # to the nearest integer, ties to even
put: Any = _put  # row[i] = x, or the bits of the nearest bfloat16 number where the row is of uint16
larger32: Any = _larger  # NaN if one is: Python's max, which may lose one, keeps a loop from using vectors

_LOG2_E = np.float32(1.4426950408889634)
_MINUS_LN2_HIGH, _MINUS_LN2_LOW = np.float32(-0.693359375), np.float32(2.12194440e-4)
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
# Minimax polynomial of (exp(r) - 1 - r) / r**2 on |r| <= ln(2)/2.
_C5, _C4, _C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C2, _C1, _C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_SIXTEEN = np.uint32(16)


@njit(inline="always")
def exp32(x):
    """exp(x) in float32: exactly 0 below -87, 1.7e38 above 88, NaN for NaN."""
    low = _LOWEST if x < _LOWEST else x
    clamped = _HIGHEST if low > _HIGHEST else low
    n = _round(clamped * _LOG2_E)
    r = _fma(n, _MINUS_LN2_LOW, _fma(n, _MINUS_LN2_HIGH, clamped))
    p = _fma(_fma(_fma(_fma(_fma(_C5, r, _C4), r, _C3), r, _C2), r, _C1), r, _C0)
    value = _times_power_of_two(_fma(p, r * r, r) + _ONE, n)
    return _ZERO if x < _LOWEST else value


@njit(inline="always")
def widen16(bits):
    """A bfloat16 number, given by its bits in uint16, as float32."""
    return np.uint32(np.uint32(bits) << _SIXTEEN).view(np.float32)


@njit(inline="always")
def round16(x):
    """The bits of the bfloat16 number nearest to a float32, ties to even; a NaN stays one."""
    bits = np.float32(x).view(np.uint32)
    if x != x:
        return np.uint16(np.uint32(bits >> _SIXTEEN) | np.uint32(0x40))
    odd = np.uint32(bits >> _SIXTEEN) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> _SIXTEEN)
