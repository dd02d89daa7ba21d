# mypy: ignore-errors
"""Products of one row or a few with weights of small integers, read once, as they lie in memory (docs/formats.md).

Sixteen weight rows lie side by side, four columns of each in a cache line, so that every lane adds up a weight row of
its own and nothing is summed across lanes.  x is rounded to 16-bit integers, with a scale for each group of columns;
sums of a group are exact, and groups are added up as floats, from the first to the last: a result never depends on how
many rows or threads there are.

Stored codes are bytes without sign, ZERO_POINT above their values.  Processors that multiply such bytes with signed
ones, four to a lane, are given x in two bytes, 256 high + low; others, for int8, as it is.

Memory is given by address, in bytes; nothing is checked.  Uncompiled (NUMBA_DISABLE_JIT), NumPy twins take the place
of everything here.
"""

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .addresses import bytes_at, floats_at, ints_at, shorts_at, signed_bytes_at
from .emission import constant, declared, fetch, load, multiply_add, plus, vector
from .jit import JIT_DISABLED, features
from .plain_streams import widened
from .streams import AHEAD, INT4, INT8, addresses_of
from .vectors import LANES, WHOLE_LINES, WIDTH, _spread

SIDE = 16  # weight rows that lie side by side
LINE = 4 * SIDE  # bytes of a line: four columns of each, or in int4 eight
GROUP = {INT8: 64, INT4: 32}  # columns that share a scale
LINES = {INT8: 16, INT4: 4}  # of codes, in a group of SIDE rows
ZERO_POINT = {INT8: 128, INT4: 8}
IN_BYTES = {INT8: WHOLE_LINES, INT4: True}  # whether x comes in two bytes: 16-bit sums could not hold int8 products
# Rows of x that are multiplied with each line, and runs of SIDE weight rows that are read by turns meanwhile.
TOGETHER = ((1, 2), (2, 2), (4, 1)) if WHOLE_LINES else ((1, 1), (2, 1))
RUNS = TOGETHER[0][1]

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_MOST = np.float32(127 * 256 + 127)  # whose high byte is one, too
_SHIFT = np.float32(1.5 * 2.0**23)  # plus a small number: its nearest integer in the lower bits, ties to even
_PARTS = SIDE // LANES  # vectors that hold a number of each of SIDE rows
_LANES, _BYTES, _SHORTS = vector(_I32, LANES), vector(_I8, 4 * LANES), vector(_I16, 2 * LANES)


def _repeated(builder, address, kind, whole):
    """A number there in every lane; integers may be seen as several shorter ones."""
    count = whole.count if kind == _F32 else whole.count * whole.element.width // kind.width
    return builder.bitcast(_spread(builder, load(builder, address, kind), count), whole)


def _neighbours_added(builder, numbers):
    """Neighbouring lanes added."""
    masks = [
        ir.Constant(vector(_I32, numbers.type.count // 2), list(range(odd, numbers.type.count, 2))) for odd in (0, 1)
    ]
    return builder.add(*(builder.shuffle_vector(numbers, numbers, mask) for mask in masks))


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


def _pair_products(builder, left, right):
    """Products of 16-bit integers (32 bits each), neighbours added."""
    if "avx2" in features():
        function = declared(builder, "llvm.x86.avx2.pmadd.wd", _LANES, [_SHORTS] * 2)
        return builder.call(function, [left, right])
    wide = vector(_I32, left.type.count)
    return _neighbours_added(builder, builder.mul(builder.sext(left, wide), builder.sext(right, wide)))


class _ByteSums:
    """Sums of a group for one row of x, from its two bytes: those of the high ones and the low ones, for SIDE rows."""

    def __init__(self, builder, start):
        self.builder = builder
        zero = ir.Constant(_LANES if WHOLE_LINES else _SHORTS, None)
        self._start = start
        self._low = [start if WHOLE_LINES else zero] * _PARTS
        self._high = [zero] * _PARTS

    def add(self, codes, x, low_at, column):
        for sums, at in ((self._high, 0), (self._low, low_at)):
            four = _repeated(self.builder, plus(self.builder, x, at + column), _I32, _BYTES)
            for part, code in enumerate(codes):
                sums[part] = self._added(sums[part], code, four)

    def _added(self, total, codes, x):
        """Products of four neighbours added to each lane, or of two to each half of it, which holds a group of int4."""
        builder = self.builder
        if WHOLE_LINES:
            function = declared(builder, "llvm.x86.avx512.vpdpbusd.512", _LANES, [_LANES] * 3)
            return builder.call(function, [total, builder.bitcast(codes, _LANES), builder.bitcast(x, _LANES)])
        if "avx2" in features():
            function = declared(builder, "llvm.x86.avx2.pmadd.ub.sw", _SHORTS, [_BYTES] * 2)
            return builder.add(total, builder.call(function, [codes, x]))
        wide = vector(_I16, 4 * LANES)
        return builder.add(
            total, _neighbours_added(builder, builder.mul(builder.zext(codes, wide), builder.sext(x, wide)))
        )

    def totals(self):
        builder, found = self.builder, []
        for high, low in zip(self._high, self._low, strict=True):
            if not WHOLE_LINES:
                high, low = (_pair_products(builder, half, constant(_SHORTS, 1)) for half in (high, low))
                low = builder.add(low, self._start)
            found.append(builder.add(builder.shl(high, constant(_LANES, 8)), low))
        return found


class _ShortSums:
    """The same of int8 from x in 16 bits: sums of two columns are kept next to those of the other two until the end."""

    def __init__(self, builder, start):
        self.builder, self._start = builder, start
        self._sums = [ir.Constant(_LANES, None)] * (2 * _PARTS)

    def add(self, codes, x, low_at, column):
        builder = self.builder
        four = _repeated(builder, plus(builder, x, 2 * column), _I64, _SHORTS)
        for part, code in enumerate(codes):
            for half in (0, 1):
                mask = ir.Constant(vector(_I32, 2 * LANES), [2 * LANES * half + i for i in range(2 * LANES)])
                wide = builder.zext(builder.shuffle_vector(code, code, mask), _SHORTS)
                at = 2 * part + half
                self._sums[at] = builder.add(self._sums[at], _pair_products(builder, wide, four))

    def totals(self):
        builder, whole = self.builder, ir.Constant(vector(_I32, 2 * LANES), list(range(2 * LANES)))
        both = [builder.shuffle_vector(*self._sums[at : at + 2], whole) for at in range(0, 2 * _PARTS, 2)]
        return [builder.add(_neighbours_added(builder, sums), self._start) for sums in both]


def _codes_of_line(builder, kind, line):
    """What the columns of a line are multiplied as, four columns after the other: vectors of four codes a lane."""
    stored = [load(builder, plus(builder, line, at), _BYTES) for at in range(0, LINE, 4 * LANES)]
    if kind == INT8:
        return [stored]
    lower = [builder.and_(both, constant(_BYTES, 15)) for both in stored]
    return [lower, [builder.lshr(both, constant(_BYTES, 4)) for both in stored]]


def _scales_of(builder, address):
    """Those of SIDE weight rows as floats."""
    found = []
    for at in range(0, 2 * SIDE, 2 * LANES):
        bits = builder.zext(load(builder, plus(builder, address, at), vector(_I16, LANES)), _LANES)
        found.append(builder.bitcast(builder.shl(bits, constant(_LANES, 16)), vector(_F32, LANES)))
    return found


def _added(builder, total, scales, factor, before):
    """A group's sums, as floats, added to those of the groups before it."""
    floats = scales.type
    return multiply_add(builder, builder.sitofp(total, floats), builder.fmul(scales, factor), before)


def _emit(kind, together, runs, context, builder, values):
    x, x_step, x_count, groups = values[:4]
    places = [values[4 + 4 * run : 8 + 4 * run] for run in range(runs)]  # codes, scales, results, their step
    lines = addresses_of(builder, x, x_step, x_count, together)
    numbers = builder.mul(groups, _I64(2 * GROUP[kind]))  # after them: starts and scales, one each a group
    starts = [builder.add(line, numbers) for line in lines]
    x_scales = [builder.add(start, builder.mul(groups, _I64(4))) for start in starts]
    every = [(run, i, part) for run in range(runs) for i in range(together) for part in range(_PARTS)]
    floats = vector(_F32, LANES)
    sums = {at: cgutils.alloca_once_value(builder, ir.Constant(floats, None)) for at in every}
    with cgutils.for_range(builder, groups, intp=_I64) as loop:
        own = builder.mul(loop.index, _I64(4))
        at = builder.mul(loop.index, _I64(LINES[kind] * LINE))
        codes = [builder.add(place[0], at) for place in places]
        there = [builder.add(line, builder.mul(loop.index, _I64(2 * GROUP[kind]))) for line in lines]
        started = [_repeated(builder, builder.add(start, own), _I32, _LANES) for start in starts]
        make = _ByteSums if IN_BYTES[kind] else _ShortSums
        totals = {(run, i): make(builder, start) for run in range(runs) for i, start in enumerate(started)}
        for n in range(LINES[kind]):
            for run, place in enumerate(codes):
                line = plus(builder, place, LINE * n)
                fetch(builder, plus(builder, line, AHEAD))
                fours = _codes_of_line(builder, kind, line)
                for four, code in enumerate(fours):
                    for i, number in enumerate(there):
                        totals[run, i].add(code, number, GROUP[kind], 4 * (len(fours) * n + four))
        factors = [_repeated(builder, builder.add(scale, own), _F32, floats) for scale in x_scales]
        for run, place in enumerate(places):
            scales = _scales_of(builder, builder.add(place[1], builder.mul(loop.index, _I64(2 * SIDE))))
            for i, factor in enumerate(factors):
                for part, total in enumerate(totals[run, i].totals()):
                    into = sums[run, i, part]
                    builder.store(_added(builder, total, scales[part], factor, builder.load(into)), into)
    for run, i, part in every:
        with builder.if_then(builder.icmp_signed("<", _I64(i), x_count)):
            place = builder.add(places[run][2], builder.mul(places[run][3], _I64(i)))
            place = builder.inttoptr(plus(builder, place, 4 * LANES * part), floats.as_pointer())
            builder.store(builder.load(sums[run, i, part]), place).align = 4
    return context.get_dummy_value()


def _integer_stream(
    typing_context, kind, together, runs, x, x_step, x_count, groups, w, s, y, y_step, w_2, s_2, y_2, y_step_2
):
    """integer_stream(...): y[i, j] = x[i] . w[j] for up to `together` rows of x and a run of SIDE weight rows, or two.

    Steps are bytes from row to row.  Only the first x_count rows count.  s: where the run's scales are.
    x is as product/integers.py prepares it.
    """
    numbers = kind.literal_value, together.literal_value, runs.literal_value

    def emit(context, builder, signature, values):
        return _emit(*numbers, context, builder, values[3:])

    return types.void(kind, together, runs, *[types.intp] * 12), emit


def _spread_codes(typing_context, lines, into):
    """spread_codes(...): a group of int4 as lines of one code a byte, as those of int8 are."""

    def emit(context, builder, signature, values):
        for n in range(LINES[INT4]):
            line = plus(builder, values[0], LINE * n)
            fetch(builder, plus(builder, line, AHEAD))
            for four, codes in enumerate(_codes_of_line(builder, INT4, line)):
                for part, code in enumerate(codes):
                    at = LINE * (2 * n + four) + 4 * LANES * part
                    builder.store(code, builder.inttoptr(plus(builder, values[1], at), _BYTES.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), emit


def _add_group(typing_context, y, y_step, before, high, low, x, x_step, starts, factors, scales, rows):
    """add_group(...): y[i] = before[i] + the sums of a group, 256 high + low + start, times their scales.

    Rows of SIDE numbers; `before` is 0 if there is nothing before.  Starts and factors lie so many bytes behind the
    beginning of each row of x.
    """

    def emit(context, builder, signature, values):
        y, y_step, before, high, low, x, x_step, starts, factors, scales, rows = values
        every, floats = _scales_of(builder, scales), vector(_F32, LANES)
        more = builder.icmp_signed("!=", before, _I64(0))
        before = builder.select(more, before, high)
        with cgutils.for_range(builder, rows, intp=_I64) as loop:
            line = builder.add(x, builder.mul(loop.index, x_step))
            start = _repeated(builder, builder.add(line, starts), _I32, _LANES)
            factor = _repeated(builder, builder.add(line, factors), _F32, floats)
            into, at = builder.add(y, builder.mul(loop.index, y_step)), builder.mul(loop.index, _I64(LINE))
            for part, scale in enumerate(every):
                off = 4 * LANES * part
                upper, lower = (
                    load(builder, plus(builder, builder.add(side, at), off), _LANES) for side in (high, low)
                )
                total = builder.add(builder.shl(upper, constant(_LANES, 8)), builder.add(lower, start))
                held = load(builder, builder.add(plus(builder, before, off), at), floats)
                held = builder.select(more, held, ir.Constant(floats, None))
                place = builder.inttoptr(plus(builder, into, off), floats.as_pointer())
                builder.store(_added(builder, total, scale, factor, held), place).align = 4
        return context.get_dummy_value()

    return types.void(*[types.intp] * 11), emit


def _integer_stream_plain(kind, together, runs, x, x_step, x_count, groups, w, s, y, y_step, w_2, s_2, y_2, y_step_2):
    group = GROUP[kind]
    for codes_at, scales_at, into, step in ((w, s, y, y_step), (w_2, s_2, y_2, y_step_2))[:runs]:
        stored = bytes_at(codes_at, groups * LINES[kind] * LINE).reshape(-1, SIDE, 4)
        codes = stored[:, None] if kind == INT8 else np.stack([stored & 15, stored >> 4], axis=1)
        codes = codes.transpose(2, 0, 1, 3).reshape(SIDE, groups, group).astype(np.int32)
        scales = widened(scales_at, groups * SIDE)
        for i in range(x_count):
            at = x + i * x_step
            if IN_BYTES[kind]:
                both = signed_bytes_at(at, 2 * group * groups).astype(np.int32).reshape(groups, 2, group)
                numbers = 256 * both[:, 0] + both[:, 1]
            else:
                numbers = shorts_at(at, group * groups).astype(np.int32).reshape(groups, group)
            starts = ints_at(at + 2 * group * groups, groups)
            totals = (codes * numbers).sum(axis=2, dtype=np.int32) + starts
            own = floats_at(at + (2 * group + 4) * groups, groups)
            floats_at(into + i * step, SIDE)[:] = (totals * (scales.reshape(groups, SIDE).T * own)).sum(axis=1)


def _spread_codes_plain(lines, into):
    stored = bytes_at(lines, LINES[INT4] * LINE).reshape(-1, 1, LINE)
    bytes_at(into, 2 * LINES[INT4] * LINE)[:] = np.concatenate([stored & 15, stored >> 4], axis=1).reshape(-1)


def _add_group_plain(y, y_step, before, high, low, x, x_step, starts, factors, scales, rows):
    for i in range(rows):
        upper, lower = (ints_at(side + LINE * i, SIDE) for side in (high, low))
        line = x + i * x_step
        total = 256 * upper + lower + ints_at(line + starts, 1)
        added = total * (widened(scales, SIDE) * floats_at(line + factors, 1))
        floats_at(y + i * y_step, SIDE)[:] = added + (floats_at(before + LINE * i, SIDE) if before else 0.0)


spread_codes: Any = _spread_codes_plain if JIT_DISABLED else intrinsic(_spread_codes)
add_group: Any = _add_group_plain if JIT_DISABLED else intrinsic(_add_group)
round_group: Any = _round_group_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_round_group)
integer_stream: Any = _integer_stream_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_integer_stream)
