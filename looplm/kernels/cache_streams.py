# mypy: ignore-errors
"""What attention reads of the cache: a query times many keys, and weights times their values, keys read one by one.

`scored` multiplies KEYS keys at a time and sums their lanes together; `weighted` keeps a block of channels in
registers.  What is read together lies far apart, since memory is faster with several long streams, and the beginning of
what comes next is asked for meanwhile.  A query is prepared as x is for weights of the same format (streams.py).

Memory is given by address, in bytes; nothing is checked.  Uncompiled (NUMBA_DISABLE_JIT), NumPy twins take the place
of everything here.
"""

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .addresses import floats_at
from .emission import fetch, load, plus, vector
from .jit import JIT_DISABLED
from .plain_streams import DOTS, FLOATS
from .streams import (
    BFLOAT16,
    BYTES,
    COLUMNS,
    FLOAT32,
    LINE,
    STEPS,
    X_BYTES,
    Sums,
    both_halves,
    emit_rest,
)
from .vectors import WIDTH, _spread

KEYS = 8  # that are scored at once: as many scores may be written beyond the last
ASKED = 8192  # bytes of what is read next that are asked for ahead: the rest of a longer stream comes in time
CHANNEL_BLOCK = 32  # channels of values that are summed at once

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _emit_scored(kind, builder, keys, step, count, query, channels, out, next_read):
    whole, last = builder.udiv(channels, _I64(COLUMNS[kind])), builder.sub(count, _I64(1))
    sums = Sums(builder, [(0, j) for j in range(KEYS)], WIDTH)
    apart = builder.udiv(builder.add(count, _I64(KEYS - 1)), _I64(KEYS))
    firsts = [builder.mul(apart, _I64(j)) for j in range(KEYS)]
    with cgutils.for_range(builder, apart, intp=_I64) as turn:
        sums.clear()
        numbers = [builder.add(first, turn.index) for first in firsts]
        inside = [builder.select(builder.icmp_signed("<", number, last), number, last) for number in numbers]
        lines = [builder.add(keys, builder.mul(number, step)) for number in inside]
        asked = builder.mul(builder.mul(turn.index, step), _I64(KEYS))
        ask = builder.add(next_read, asked)
        with cgutils.for_range(builder, whole, intp=_I64) as loop:
            here = [builder.add(line, builder.mul(loop.index, _I64(BYTES[kind]))) for line in lines]
            with builder.if_then(builder.icmp_signed("<", asked, _I64(ASKED))):
                ahead = builder.add(ask, builder.mul(loop.index, _I64(KEYS * BYTES[kind])))
                for at in range(0, KEYS * BYTES[kind], LINE):
                    fetch(builder, plus(builder, ahead, at))
            STEPS[kind](builder, sums, here, [builder.add(query, builder.mul(loop.index, _I64(X_BYTES[kind])))])
        emit_rest(kind, builder, sums, lines, [query], whole, channels)
        for four, totals in sums.totals():
            for lane, (_, j) in enumerate(four):
                place = builder.inttoptr(builder.add(out, builder.mul(numbers[j], _I64(4))), _F32.as_pointer())
                builder.store(builder.extract_element(totals, _I32(lane)), place).align = 4


def _scored(typing_context, kind, keys, step, count, query, channels, out, next_read):
    """scored(...): out[j] = query . key j, j < count, keys `step` bytes apart, stored as `kind` says.

    `out` has room for KEYS more; what is written there means nothing.  `next_read`: where reading goes on, if it does.
    """

    def emit(context, builder, signature, values):
        _emit_scored(kind.literal_value, builder, *values[1:])
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 7), emit


def _scored_plain(kind, keys, step, count, query, channels, out, next_read):
    scores = floats_at(out, count)
    for j in range(count):
        scores[j] = DOTS[kind](keys + j * step, query, channels)


def _emit_weighted(kind, builder, v, v_step, weight, keys, out, next_read):
    floats, words = vector(_F32, WIDTH), vector(_I32, WIDTH)
    count = CHANNEL_BLOCK // WIDTH
    # The first and the second half of the keys, each with sums of its own: two streams that memory is read in.
    sums = Sums(builder, [(half, i) for half in (0, 1) for i in range(count)], WIDTH)
    pairs, middle = builder.lshr(keys, _I64(1)), builder.lshr(builder.add(keys, _I64(1)), _I64(1))

    def add(number, half):
        factor = _spread(builder, load(builder, builder.add(weight, builder.mul(number, _I64(4))), _F32), WIDTH)
        offset = builder.mul(number, v_step)
        row, ask = builder.add(v, offset), builder.add(next_read, offset)
        with builder.if_then(builder.icmp_signed("<", offset, _I64(ASKED))):
            for at in range(0, CHANNEL_BLOCK * BYTES[kind] // COLUMNS[kind], LINE):
                fetch(builder, plus(builder, ask, at))
        lines = []
        for i in range(count if kind == FLOAT32 else count // 2):
            loaded = load(builder, plus(builder, row, 4 * WIDTH * i), words)
            lines += [builder.bitcast(loaded, floats)] if kind == FLOAT32 else both_halves(builder, loaded)
        for i, line in enumerate(lines):
            sums.multiply_add((half, i), line, factor)

    with cgutils.for_range(builder, pairs, intp=_I64) as loop:
        add(loop.index, 0)
        add(builder.add(middle, loop.index), 1)
    with builder.if_then(builder.icmp_signed("<", pairs, middle)):
        add(pairs, 0)
    lines = [builder.fadd(*(builder.load(sums.places[half, i]) for half in (0, 1))) for i in range(count)]
    if kind == BFLOAT16:  # even and odd channels, back in order
        orders = [[i // 2 + WIDTH * (i % 2) for i in range(first, first + WIDTH)] for first in (0, WIDTH)]
        masks = [ir.Constant(words, order) for order in orders]
        lines = [builder.shuffle_vector(lines[i], lines[i + 1], mask) for i in range(0, count, 2) for mask in masks]
    for i, line in enumerate(lines):
        place = builder.inttoptr(plus(builder, out, 4 * WIDTH * i), floats.as_pointer())
        builder.store(builder.fadd(builder.load(place, align=4), line), place).align = 4


def _weighted(typing_context, kind, v, v_step, weight, keys, out, next_read):
    """weighted(...): out[c] += sum over keys of weight[j] * v[j, c], c < CHANNEL_BLOCK; v is stored as `kind` says.

    `next_read`: as for `scored`.
    """

    def emit(context, builder, signature, values):
        _emit_weighted(kind.literal_value, builder, *values[1:])
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 6), emit


def _weighted_plain(kind, v, v_step, weight, keys, out, next_read):
    total = floats_at(out, CHANNEL_BLOCK)
    for j, factor in enumerate(floats_at(weight, keys)):
        total += factor * FLOATS[kind](v + j * v_step, CHANNEL_BLOCK)


scored: Any = _scored_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_scored)
weighted: Any = _weighted_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_weighted)
