# mypy: ignore-errors
"""Lines of small integers, as docs/formats.md lays weights out: what they hold, and numbers rounded to meet them.

Sixteen weight rows lie side by side, four columns of each in a cache line (of int4 eight).  Stored codes are bytes
without sign, ZERO_POINT above their values.  Processors that multiply such bytes with signed ones, four to a lane, are
given x in two bytes, 256 high + low; others, for int8, as it is.

Memory is given by address, in bytes; nothing is checked.  Uncompiled (NUMBA_DISABLE_JIT), NumPy twins take the place
of everything here.
"""

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic

from .addresses import bytes_at, floats_at, ints_at, shorts_at, signed_bytes_at
from .emission import bfloat_bits_of, constant, fetch, load, multiply_add, plus, vector
from .jit import JIT_DISABLED
from .plain_streams import widened
from .streams import AHEAD, INT4, INT8
from .vectors import LANES, WHOLE_LINES, WIDTH, _spread, bfloat_bits

SIDE = 16  # weight rows that lie side by side
LINE = 4 * SIDE  # bytes of a line: four columns of each, or in int4 eight
GROUP = {INT8: 64, INT4: 32}  # columns that share a scale
LINES = {INT8: 16, INT4: 4}  # of codes, in a group of SIDE rows
ZERO_POINT = {INT8: 128, INT4: 8}
IN_BYTES = {INT8: WHOLE_LINES, INT4: True}  # whether x comes in two bytes: 16-bit sums could not hold int8 products
PARTS = SIDE // LANES  # vectors that hold a number of each of SIDE rows

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LANES, _BYTES = vector(_I32, LANES), vector(_I8, 4 * LANES)
_MOST = np.float32(127 * 256 + 127)  # whose high byte is one, too
_SHIFT = np.float32(1.5 * 2.0**23)  # plus a small number: its nearest integer in the lower bits, ties to even


def repeated(builder, address, kind, whole):
    """A number there in every lane; integers may be seen as several shorter ones."""
    count = whole.count if kind == _F32 else whole.count * whole.element.width // kind.width
    return builder.bitcast(_spread(builder, load(builder, address, kind), count), whole)


def codes_of_line(builder, kind, line):
    """What the columns of a line are multiplied as, four columns after the other: vectors of four codes a lane."""
    stored = [load(builder, plus(builder, line, at), _BYTES) for at in range(0, LINE, 4 * LANES)]
    if kind == INT8:
        return [stored]
    lower = [builder.and_(both, constant(_BYTES, 15)) for both in stored]
    return [lower, [builder.lshr(both, constant(_BYTES, 4)) for both in stored]]


def scales_of(builder, address):
    """Those of SIDE weight rows as floats."""
    found = []
    for at in range(0, 2 * SIDE, 2 * LANES):
        bits = builder.zext(load(builder, plus(builder, address, at), vector(_I16, LANES)), _LANES)
        found.append(builder.bitcast(builder.shl(bits, constant(_LANES, 16)), vector(_F32, LANES)))
    return found


def _folded(builder, numbers, add):
    """All lanes in one: halves upon halves."""
    while numbers.type.count > 1:
        half = numbers.type.count // 2
        masks = [ir.Constant(vector(_I32, half), list(range(at, at + half))) for at in (0, half)]
        numbers = add(*(builder.shuffle_vector(numbers, numbers, mask) for mask in masks))
    return builder.extract_element(numbers, _I32(0))


def _emit_rounding(kind, context, builder, values):
    source, place, start_at, scale_at = values
    group, floats, integers = GROUP[kind], vector(_F32, WIDTH), vector(_I32, WIDTH)
    zero, offsets = ir.Constant(floats, None), range(0, group, WIDTH)

    def larger(left, right):
        return builder.select(builder.fcmp_ordered(">", left, right), left, right)

    def stored(numbers, type_, at):
        at = builder.inttoptr(plus(builder, place, at), vector(type_, WIDTH).as_pointer())
        builder.store(builder.trunc(numbers, vector(type_, WIDTH)), at).align = 1

    highest, poison, total = zero, zero, ir.Constant(integers, None)
    lines = [load(builder, plus(builder, source, 4 * at), floats) for at in offsets]
    for line in lines:
        magnitude = builder.and_(builder.bitcast(line, integers), constant(integers, 0x7FFFFFFF))
        highest = larger(builder.bitcast(magnitude, floats), highest)
        poison = multiply_add(builder, line, zero, poison)  # integers have no NaN: the scale carries it on
    highest, poison = _folded(builder, highest, larger), _folded(builder, poison, builder.fadd)
    some = builder.fcmp_ordered(">", highest, _F32(0.0))
    inverse = builder.select(some, builder.fdiv(_F32(_MOST), highest), _F32(0.0))
    for at, line in zip(offsets, lines, strict=True):
        shifted = builder.fadd(builder.fmul(line, _spread(builder, inverse, WIDTH)), constant(floats, _SHIFT))
        code = builder.sub(builder.bitcast(shifted, integers), builder.bitcast(constant(floats, _SHIFT), integers))
        total = builder.add(total, code)
        if IN_BYTES[kind]:
            high = builder.ashr(builder.add(code, constant(integers, 128)), constant(integers, 8))
            stored(high, _I8, at)
            stored(builder.sub(code, builder.shl(high, constant(integers, 8))), _I8, group + at)
        else:
            stored(code, _I16, 2 * at)
    start = builder.mul(_folded(builder, total, builder.add), _I32(-ZERO_POINT[kind]))
    scale = builder.fadd(builder.fdiv(highest, _F32(_MOST)), poison)
    for number, at in ((start, start_at), (scale, scale_at)):
        builder.store(number, builder.inttoptr(at, number.type.as_pointer())).align = 4
    return context.get_dummy_value()


def _round_group(typing_context, kind, source, place, start, scale):
    """round_group(...): a group of columns of x as integers of 16 bits, stored as `kind` wants them.

    With it go what sums begin with, since codes lie above their values, and what an integer is worth: NaN if a column
    is no number.
    """

    def emit(context, builder, signature, values):
        return _emit_rounding(kind.literal_value, context, builder, values[1:])

    return types.void(kind, *[types.intp] * 4), emit


def _round_group_plain(kind, source, place, start, scale):
    line, group = floats_at(source, GROUP[kind]), GROUP[kind]
    highest = np.abs(line).max()
    with np.errstate(invalid="ignore"):
        scaled = line * (_MOST / highest if highest > 0.0 else np.float32(0.0))
        scale_of_one = highest / _MOST + (line * np.float32(0.0)).sum()
    codes = np.rint(np.where(np.isfinite(scaled), scaled, 0.0)).astype(np.int32)
    if IN_BYTES[kind]:
        high = (codes + 128) >> 8
        signed_bytes_at(place, 2 * group)[:] = np.concatenate([high, codes - 256 * high])
    else:
        shorts_at(place, group)[:] = codes
    ints_at(start, 1)[0], floats_at(scale, 1)[0] = -ZERO_POINT[kind] * codes.sum(), scale_of_one


def _widen_group(typing_context, kind, paired, lines, scales, into, step):
    """widen_group(...): a group of SIDE rows as floats, columns `step` bytes apart, each of SIDE numbers.

    If `paired` is 1, as words of two bfloat16 numbers, nearest ones: half as many of them.
    """

    def emit(context, builder, signature, values):
        lines, scales, into, step = values[2:]
        every, floats, zero = scales_of(builder, scales), vector(_F32, LANES), ZERO_POINT[kind.literal_value]
        halves = [[] for _ in range(PARTS)]
        for n in range(GROUP[kind.literal_value] // 4):
            whole = LINES[kind.literal_value] * 4 == GROUP[kind.literal_value]
            line = plus(builder, lines, LINE * (n if whole else n // 2))
            fours = codes_of_line(builder, kind.literal_value, line)[0 if whole else n % 2]
            for byte in range(4):
                column = 4 * n + byte
                for part, four in enumerate(fours):
                    code = builder.lshr(builder.bitcast(four, _LANES), constant(_LANES, 8 * byte))
                    code = builder.sub(builder.and_(code, constant(_LANES, 255)), constant(_LANES, zero))
                    number = builder.fmul(builder.sitofp(code, floats), every[part])
                    if paired.literal_value:
                        halves[part].append(bfloat_bits_of(builder, number))
                        if len(halves[part]) == 1:
                            continue
                        low, high = halves[part]
                        halves[part].clear()
                        low = builder.lshr(low, constant(_LANES, 16))
                        number = builder.or_(low, builder.and_(high, constant(_LANES, -65536)))
                    at = builder.mul(step, _I64(column // 2 if paired.literal_value else column))
                    place = plus(builder, builder.add(into, at), 4 * LANES * part)
                    builder.store(number, builder.inttoptr(place, number.type.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(kind, paired, *[types.intp] * 4), emit


def _widen_group_plain(kind, paired, lines, scales, into, step):
    stored = bytes_at(lines, LINES[kind] * LINE).reshape(-1, SIDE, 4)
    if kind == INT4:
        stored = np.stack([stored & 15, stored >> 4], axis=1).reshape(-1, SIDE, 4)
    codes = stored.transpose(0, 2, 1).reshape(-1, SIDE).astype(np.float32) - np.float32(ZERO_POINT[kind])
    numbers = codes * widened(scales, SIDE)
    if paired:
        bits = bfloat_bits(numbers)
        numbers = (bits[::2] | bits[1::2] << np.uint32(16)).view(np.float32)
    for column, line in enumerate(numbers):
        floats_at(into + column * step, SIDE)[:] = line


def _spread_codes(typing_context, lines, into):
    """spread_codes(...): a group of int4 as lines of one code a byte, as those of int8 are."""

    def emit(context, builder, signature, values):
        for n in range(LINES[INT4]):
            line = plus(builder, values[0], LINE * n)
            fetch(builder, plus(builder, line, AHEAD))
            for four, codes in enumerate(codes_of_line(builder, INT4, line)):
                for part, code in enumerate(codes):
                    at = LINE * (2 * n + four) + 4 * LANES * part
                    builder.store(code, builder.inttoptr(plus(builder, values[1], at), _BYTES.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit


def _spread_codes_plain(lines, into):
    stored = bytes_at(lines, LINES[INT4] * LINE).reshape(-1, 1, LINE)
    bytes_at(into, 2 * LINES[INT4] * LINE)[:] = np.concatenate([stored & 15, stored >> 4], axis=1).reshape(-1)


spread_codes: Any = _spread_codes_plain if JIT_DISABLED else intrinsic(_spread_codes)
widen_group: Any = _widen_group_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_widen_group)
round_group: Any = _round_group_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_round_group)
