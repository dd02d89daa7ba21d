# mypy: ignore-errors
"""Products of one row or a few with weights of small integers, read once, as they lie in memory (integer_lines.py).

Every lane adds up a weight row of its own, so that nothing is summed across lanes.  x is rounded to 16-bit integers,
with a scale for each group of columns; sums of a group are exact, and groups are added up as floats, from the first to
the last: a result never depends on how many rows or threads there are.

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
from .integer_lines import GROUP, IN_BYTES, LINE, LINES, PARTS, SIDE, codes_of_line, repeated, scales_of
from .jit import JIT_DISABLED, features
from .plain_streams import widened
from .streams import AHEAD, INT8, addresses_of
from .vectors import LANES, WHOLE_LINES

# Rows of x that are multiplied with each line, and runs of SIDE weight rows that are read by turns meanwhile.
TOGETHER = ((1, 2), (2, 2), (4, 1)) if WHOLE_LINES else ((1, 1), (2, 1))
RUNS = TOGETHER[0][1]

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LANES, _BYTES, _SHORTS = vector(_I32, LANES), vector(_I8, 4 * LANES), vector(_I16, 2 * LANES)


def _neighbours_added(builder, numbers):
    """Neighbouring lanes added."""
    masks = [
        ir.Constant(vector(_I32, numbers.type.count // 2), list(range(odd, numbers.type.count, 2))) for odd in (0, 1)
    ]
    return builder.add(*(builder.shuffle_vector(numbers, numbers, mask) for mask in masks))


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
        self._low = [start if WHOLE_LINES else zero] * PARTS
        self._high = [zero] * PARTS

    def add(self, codes, x, low_at, column):
        for sums, at in ((self._high, 0), (self._low, low_at)):
            four = repeated(self.builder, plus(self.builder, x, at + column), _I32, _BYTES)
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
        self._sums = [ir.Constant(_LANES, None)] * (2 * PARTS)

    def add(self, codes, x, low_at, column):
        builder = self.builder
        four = repeated(builder, plus(builder, x, 2 * column), _I64, _SHORTS)
        for part, code in enumerate(codes):
            for half in (0, 1):
                mask = ir.Constant(vector(_I32, 2 * LANES), [2 * LANES * half + i for i in range(2 * LANES)])
                wide = builder.zext(builder.shuffle_vector(code, code, mask), _SHORTS)
                at = 2 * part + half
                self._sums[at] = builder.add(self._sums[at], _pair_products(builder, wide, four))

    def totals(self):
        builder, whole = self.builder, ir.Constant(vector(_I32, 2 * LANES), list(range(2 * LANES)))
        both = [builder.shuffle_vector(*self._sums[at : at + 2], whole) for at in range(0, 2 * PARTS, 2)]
        return [builder.add(_neighbours_added(builder, sums), self._start) for sums in both]


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
    every = [(run, i, part) for run in range(runs) for i in range(together) for part in range(PARTS)]
    floats = vector(_F32, LANES)
    sums = {at: cgutils.alloca_once_value(builder, ir.Constant(floats, None)) for at in every}
    with cgutils.for_range(builder, groups, intp=_I64) as loop:
        own = builder.mul(loop.index, _I64(4))
        at = builder.mul(loop.index, _I64(LINES[kind] * LINE))
        codes = [builder.add(place[0], at) for place in places]
        there = [builder.add(line, builder.mul(loop.index, _I64(2 * GROUP[kind]))) for line in lines]
        started = [repeated(builder, builder.add(start, own), _I32, _LANES) for start in starts]
        make = _ByteSums if IN_BYTES[kind] else _ShortSums
        totals = {(run, i): make(builder, start) for run in range(runs) for i, start in enumerate(started)}
        for n in range(LINES[kind]):
            for run, place in enumerate(codes):
                line = plus(builder, place, LINE * n)
                fetch(builder, plus(builder, line, AHEAD))
                fours = codes_of_line(builder, kind, line)
                for four, code in enumerate(fours):
                    for i, number in enumerate(there):
                        totals[run, i].add(code, number, GROUP[kind], 4 * (len(fours) * n + four))
        factors = [repeated(builder, builder.add(scale, own), _F32, floats) for scale in x_scales]
        for run, place in enumerate(places):
            scales = scales_of(builder, builder.add(place[1], builder.mul(loop.index, _I64(2 * SIDE))))
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


def _add_group(typing_context, y, y_step, before, high, low, x, x_step, starts, factors, scales, rows):
    """add_group(...): y[i] = before[i] + the sums of a group, 256 high + low + start, times their scales.

    Rows of SIDE numbers; `before` is 0 if there is nothing before.  Starts and factors lie so many bytes behind the
    beginning of each row of x.
    """

    def emit(context, builder, signature, values):
        y, y_step, before, high, low, x, x_step, starts, factors, scales, rows = values
        every, floats = scales_of(builder, scales), vector(_F32, LANES)
        more = builder.icmp_signed("!=", before, _I64(0))
        before = builder.select(more, before, high)
        with cgutils.for_range(builder, rows, intp=_I64) as loop:
            line = builder.add(x, builder.mul(loop.index, x_step))
            start = repeated(builder, builder.add(line, starts), _I32, _LANES)
            factor = repeated(builder, builder.add(line, factors), _F32, floats)
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


def _add_group_plain(y, y_step, before, high, low, x, x_step, starts, factors, scales, rows):
    for i in range(rows):
        upper, lower = (ints_at(side + LINE * i, SIDE) for side in (high, low))
        line = x + i * x_step
        total = 256 * upper + lower + ints_at(line + starts, 1)
        added = total * (widened(scales, SIDE) * floats_at(line + factors, 1))
        floats_at(y + i * y_step, SIDE)[:] = added + (floats_at(before + LINE * i, SIDE) if before else 0.0)


add_group: Any = _add_group_plain if JIT_DISABLED else intrinsic(_add_group)
integer_stream: Any = _integer_stream_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_integer_stream)
