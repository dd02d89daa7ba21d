# mypy: ignore-errors
"""Rows of a causal softmax and of its gradient, made 2 x WIDTH keys at a time, for products of either precision.

A query sees the keys `first` to `last`, none if `last` is below `first`; scores of the others are never used, whatever
they are.  Exponentials are powers of two, so scores and what is subtracted from them come times log2(e).

Arrays are given with a position, as in vectors.py; counts of keys are multiples of 2 x WIDTH.  Uncompiled, NumPy twins
take the place of everything here.
"""

import functools
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emission import constant, declared, multiply_add, vector
from .jit import JIT_DISABLED
from .vectors import WIDTH, _bfloat_words, _from, _load, _pointer, _spread, _store, bfloat_bits

LOG2_E = np.float32(1.4426950408889634)

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_LINE, _BITS = vector(_F32, WIDTH), vector(_I32, WIDTH)
_UNSEEN = -3.0e38
ROWS = 4 if WIDTH == 16 else 2  # that `weigh` takes at a time: what one waits for, others do meanwhile
# Minimax polynomial of (2**r - 1) / r on |r| <= 1/2, the highest power first: 2**r is within 2e-7.
_POWERS = (1.326472707e-3, 9.671512649e-3, 5.550733744e-2, 2.402224209e-1, 6.931469776e-1)
_SMALLEST = -125.0  # all that is below is as good as zero
_INTEGER = 12582912.0  # 1.5 * 2**23: what is added to it is rounded to an integer, which its lowest bits hold


def _exp2(builder, x):
    """2**x up to 2**127; 2**-125 for less, NaN for NaN.

    A flag of their own keeps the compiler's liberties (jit.py) from sums whose order matters.
    """
    small, shift = constant(_LINE, _SMALLEST), constant(_LINE, _INTEGER)
    x = builder.select(builder.fcmp_ordered("<", x, small), small, x)
    moved = builder.fadd(x, shift, flags=("nsz",))
    rest = builder.fsub(x, builder.fsub(moved, shift, flags=("nsz",)), flags=("nsz",))
    value = constant(_LINE, _POWERS[0])
    for coefficient in (*_POWERS[1:], 1.0):
        value = multiply_add(builder, value, rest, constant(_LINE, coefficient))
    exponent = builder.shl(builder.bitcast(moved, _BITS), constant(_BITS, 23))
    return builder.bitcast(builder.add(builder.bitcast(value, _BITS), exponent), _LINE)


def _sight(builder, first, last):
    """What `_lanes` compares with: how far lanes are beyond `first`, and how many keys are seen."""
    span = builder.add(builder.sub(last, first), _I64(1))
    span = builder.select(builder.icmp_signed("<", span, _I64(0)), _I64(0), span)
    lane = ir.Constant(_BITS, list(range(WIDTH)))
    begin = builder.sub(lane, _spread(builder, builder.trunc(first, _I32), WIDTH))
    return begin, _spread(builder, builder.trunc(span, _I32), WIDTH)


def _lanes(builder, key, half, sight):
    """Which of the WIDTH keys from `key` + half * WIDTH on are seen."""
    begin, span = sight
    at = builder.trunc(builder.add(key, _I64(half * WIDTH)), _I32)
    return builder.icmp_unsigned("<", builder.add(begin, _spread(builder, at, WIDTH)), span)


def _over_keys(builder, count, first, last, emit):
    """emit(key, some) for every 2 x WIDTH keys; `some` is false where all are seen: up to `last` if `first` is 0."""
    whole = builder.and_(builder.add(last, _I64(1)), _I64(-2 * WIDTH))
    whole = builder.select(builder.icmp_signed("<", whole, count), whole, count)
    whole = builder.select(builder.icmp_signed("==", first, _I64(0)), whole, _I64(0))
    for begin, end, some in ((_I64(0), whole, False), (whole, count, True)):
        with cgutils.for_range_slice(builder, begin, end, _I64(2 * WIDTH), _I64) as (key, _):
            emit(key, some)


def _reduced(builder, kind, line, *start):
    """The sum ("fadd") or the largest ("fmax"; none may be NaN) of all lanes."""
    arguments = [*start, line]
    function = declared(builder, f"llvm.vector.reduce.{kind}.v{WIDTH}f32", _F32, [one.type for one in arguments])
    return builder.call(function, arguments, fastmath=("reassoc", "nsz") if kind == "fadd" else ("nnan", "nsz"))


def _store_words(builder, lines, start, key):
    """Two lines of neighbouring keys, as bfloat16."""
    _store(builder, _bfloat_words(builder, *lines, True), builder.gep(start, [builder.lshr(key, _I64(1))]))


def _store_floats(builder, lines, start, key):
    for half, line in enumerate(lines):
        _store(builder, line, builder.gep(start, [builder.add(key, _I64(half * WIDTH))]))


def _neighbours_plain(bits):
    return bits[::2] | (bits[1::2] << np.uint32(16))


def _weigh(typing_context, weights, into_at, into_step, scores, at, step, count, first, last, scale, stats, stats_at):
    """weigh(...): 2**(scale * score - highest), 0 where nothing is seen, of ROWS rows.

    Rows of scores lie `step` apart, those of weights `into_step`; the next row sees one key more.  Weights of uint32
    are words of two neighbours in bfloat16; those of float32 may take the place of the scores.  stats takes each row's
    highest score times scale, and ROWS on the exact sums; a NaN is never the highest, but makes the sum one.
    """

    def emit(context, builder, signature, values):
        weights, into_at, into_step, scores, at, step, count, first, last, scale, stats, stats_at = values
        in_words = signature.args[0].dtype == types.uint32

        def place(index, array, at, step, row):
            return _pointer(
                context, builder, signature.args[index], array, builder.add(at, builder.mul(step, _I64(row)))
            )

        rows, halves, zero = range(ROWS), (0, 1), constant(_LINE, 0.0)
        starts = [place(3, scores, at, step, row) for row in rows]
        sights = [_sight(builder, first, builder.add(last, _I64(row))) for row in rows]
        factor, unseen = _spread(builder, scale, WIDTH), constant(_LINE, _UNSEEN)

        def line(row, key, half):
            return _load(builder, builder.gep(starts[row], [builder.add(key, _I64(half * WIDTH))]), _LINE)

        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        largest = [[cgutils.alloca_once_value(builder, unseen) for _ in halves] for _ in rows]

        def find_largest(key, some):
            for row in rows:
                for half in halves:
                    found = line(row, key, half)
                    if some:
                        found = builder.select(_lanes(builder, key, half, sights[row]), found, unseen)
                    builder.store(larger(found, builder.load(largest[row][half])), largest[row][half])

        _over_keys(builder, count, first, last, find_largest)
        shifts = []
        for row in rows:
            both = larger(*(builder.load(part) for part in largest[row]))
            shift = builder.fmul(_reduced(builder, "fmax", both), scale)
            builder.store(shift, place(10, stats, stats_at, _I64(1), row))
            shifts.append(_spread(builder, builder.fneg(shift), WIDTH))
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in halves] for _ in rows]
        into = [place(0, weights, into_at, into_step, row) for row in rows]

        def add_up(key, some):
            for row in rows:
                lines = []
                for half in halves:
                    weight = _exp2(builder, multiply_add(builder, line(row, key, half), factor, shifts[row]))
                    if some:
                        weight = builder.select(_lanes(builder, key, half, sights[row]), weight, zero)
                    builder.store(builder.fadd(builder.load(totals[row][half]), weight), totals[row][half])
                    lines.append(weight)
                if in_words:
                    _store_words(builder, lines, into[row], key)
                else:
                    _store_floats(builder, lines, into[row], key)

        _over_keys(builder, count, first, last, add_up)
        for row in rows:
            both = builder.fadd(*(builder.load(part) for part in totals[row]))
            total = _reduced(builder, "fadd", both, ir.Constant(_F32, 0.0))
            builder.store(total, place(10, stats, stats_at, _I64(1), ROWS + row))
        return context.get_dummy_value()

    i = types.intp
    return types.void(weights, i, i, scores, i, i, i, i, i, types.float32, stats, i), emit


def _weigh_plain(weights, into_at, into_step, scores, at, step, count, first, last, scale, stats, stats_at):
    for row in range(ROWS):
        line, end, place = _from(scores, at + row * step, count), last + row, into_at + row * into_step
        highest = np.fmax.reduce(line[first : max(first, end + 1)], initial=np.float32(_UNSEEN)) * scale
        weight = _exp2_plain(line, first, end, scale, highest)
        if weights.dtype == np.uint32:
            _from(weights, place, count // 2)[:] = _neighbours_plain(bfloat_bits(weight))
        else:
            _from(weights, place, count)[:] = weight
        stats[stats_at + row], stats[stats_at + ROWS + row] = highest, weight.sum(dtype=np.float32)


def _exp2_plain(scores, first, last, scale, shift):
    weight = np.zeros_like(scores)
    seen = slice(first, max(first, last + 1))
    weight[seen] = np.exp2(scores[seen] * scale - shift)
    return weight


def _argument(context, builder, signature, values, index):
    """The addresses in an array that is argument number `index`."""
    return functools.partial(_pointer, context, builder, signature.args[index], values[index])


def _emit_gradients(builder, score_at, shift_at, values, store):
    """store(key, probabilities, gradients), lines of two rows: the first row's two, then the second's.

    p = 2**(scale * log2(e) * score - shift), d = p * scale * (dprob - dot), 0 where nothing is seen.  The second row
    of scores lies `step` on, and sees keys up to `below`.  score_at and shift_at give addresses.
    """
    scores, dprobs, step, count, first, last, below, scale, shifts, dots = values
    zero, factor = constant(_LINE, 0.0), _spread(builder, scale, WIDTH)
    log2 = builder.fmul(factor, constant(_LINE, float(LOG2_E)))
    rows = []
    for index, end in enumerate((last, below)):
        further = builder.mul(step, _I64(index))
        numbers = [
            _spread(builder, builder.fneg(builder.load(shift_at(builder.add(at, _I64(index))))), WIDTH)
            for at in (shifts, dots)
        ]
        starts = [score_at(builder.add(at, further)) for at in (scores, dprobs)]
        rows.append((starts, _sight(builder, first, end), *numbers))

    def both_rows(key, some):
        probabilities, gradients = [], []
        for starts, sight, shift, dot in rows:
            for half in (0, 1):
                at = builder.add(key, _I64(half * WIDTH))
                score, dprob = (_load(builder, builder.gep(start, [at]), _LINE) for start in starts)
                weight = _exp2(builder, multiply_add(builder, score, log2, shift))
                change = builder.fadd(dprob, dot, flags=("nsz",))  # 0 where one key has all the weight
                change = builder.fmul(builder.fmul(weight, factor), change)
                if some:
                    seen = _lanes(builder, key, half, sight)
                    weight, change = (builder.select(seen, line, zero) for line in (weight, change))
                probabilities.append(weight)
                gradients.append(change)
        store(key, probabilities, gradients)

    least = builder.select(builder.icmp_signed("<", last, below), last, below)
    _over_keys(builder, count, first, least, both_rows)


def _differentiate(
    typing_context,
    pairs,
    prob_at,
    dscore_at,
    rows_at,
    rows_step,
    scores,
    scores_at,
    dprob_at,
    step,
    count,
    first,
    last,
    below,
    scale,
    shifts,
    shift_at,
    dot_at,
):
    """Of two rows of scores and of gradients of probabilities, p and d of `_emit_gradients`, in words of bfloat16.

    Number i of both rows goes into word i at prob_at and at dscore_at; d of each row also as neighbours at rows_at, and
    rows_step on.
    """

    def emit(context, builder, signature, values):
        prob_at, dscore_at, rows_at, rows_step = values[1:5]
        place = functools.partial(_argument, context, builder, signature, values)
        word, score, shift = place(0), place(5), place(14)

        prob_into, dscore_into = word(prob_at), word(dscore_at)
        rows_into = [word(rows_at), word(builder.add(rows_at, rows_step))]

        def store(key, probabilities, gradients):
            for into, lines in ((prob_into, probabilities), (dscore_into, gradients)):
                for half in (0, 1):
                    at = builder.add(key, _I64(half * WIDTH))
                    words = _bfloat_words(builder, lines[half], lines[half + 2], False)
                    _store(builder, words, builder.gep(into, [at]))
            for into, lines in zip(rows_into, (gradients[:2], gradients[2:]), strict=True):
                _store_words(builder, lines, into, key)

        _emit_gradients(builder, score, shift, (*values[6:14], *values[15:]), store)
        return context.get_dummy_value()

    i, f = types.intp, types.float32
    return types.void(pairs, i, i, i, i, scores, i, i, i, i, i, i, i, f, shifts, i, i), emit


def _differentiate_in_place(
    typing_context, scores, scores_at, dprob_at, step, count, first, last, below, scale, shifts, shift_at, dot_at
):
    """The same, p where the scores were and d where the gradients of probabilities were."""

    def emit(context, builder, signature, values):
        place = functools.partial(_argument, context, builder, signature, values)
        score, shift = place(0), place(9)
        scores_at, dprob_at, step = values[1:4]
        into = [[score(at), score(builder.add(at, step))] for at in (scores_at, dprob_at)]

        def store(key, probabilities, gradients):
            for (upper, lower), lines in zip(into, (probabilities, gradients), strict=True):
                _store_floats(builder, lines[:2], upper, key)
                _store_floats(builder, lines[2:], lower, key)

        _emit_gradients(builder, score, shift, (*values[1:9], *values[10:]), store)
        return context.get_dummy_value()

    i, f = types.intp, types.float32
    return types.void(scores, i, i, i, i, i, i, i, f, shifts, i, i), emit


def _gradients_plain(scores, scores_at, dprob_at, step, count, first, last, below, scale, shifts, shift_at, dot_at):
    """p and d of the first row, then of the second."""
    found = []
    for index, end in enumerate((last, below)):
        score, dprob = (_from(scores, at + index * step, count) for at in (scores_at, dprob_at))
        weight = _exp2_plain(score, first, end, scale * LOG2_E, shifts[shift_at + index])
        change = np.zeros_like(weight)
        seen = slice(first, max(first, end + 1))
        change[seen] = weight[seen] * scale * (dprob[seen] - shifts[dot_at + index])
        found.append((weight, change))
    return found


def _differentiate_plain(pairs, prob_at, dscore_at, rows_at, rows_step, scores, *rest):
    found, count = _gradients_plain(scores, *rest), rest[3]
    for index, (_, change) in enumerate(found):
        _from(pairs, rows_at + index * rows_step, count // 2)[:] = _neighbours_plain(bfloat_bits(change))
    for at, upper, lower in zip((prob_at, dscore_at), *found, strict=True):
        _from(pairs, at, count)[:] = bfloat_bits(upper) | (bfloat_bits(lower) << np.uint32(16))


def _differentiate_in_place_plain(scores, scores_at, dprob_at, step, count, *rest):
    found = _gradients_plain(scores, scores_at, dprob_at, step, count, *rest)
    for index, (weight, change) in enumerate(found):
        _from(scores, scores_at + index * step, count)[:] = weight
        _from(scores, dprob_at + index * step, count)[:] = change


weigh: Any = _weigh_plain if JIT_DISABLED else intrinsic(_weigh)
differentiate: Any = _differentiate_plain if JIT_DISABLED else intrinsic(_differentiate)
differentiate_in_place: Any = _differentiate_in_place_plain if JIT_DISABLED else intrinsic(_differentiate_in_place)
