# mypy: ignore-errors
"""What attention reads of the cache: a query times many keys, and weights times their values, keys read one by one.

`scored` multiplies KEYS keys at a time and sums their lanes together; `weighted` keeps a block of channels in
registers.  A query is prepared as x is for weights of the same format (streams.py).

Memory is given by address, in bytes; nothing is checked.  Uncompiled (NUMBA_DISABLE_JIT), NumPy twins take the place
of everything here.
"""

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .addresses import floats_at
from .emission import load, plus, vector
from .jit import JIT_DISABLED
from .plain_streams import DOTS, FLOATS
from .streams import (
    BFLOAT16,
    BLOCK,
    BYTES,
    COLUMNS,
    FLOAT32,
    STEPS,
    X_BYTES,
    Sums,
    addresses_of,
    both_halves,
    emit_rest,
)
from .vectors import WIDTH, _spread

KEYS = 8  # that are scored at once: as many scores may be written beyond the last
CHANNEL_BLOCK = 32  # channels of values that are summed at once

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _emit_scored(kind, builder, keys, step, count, query, channels, out):
    whole = builder.udiv(channels, _I64(COLUMNS[kind]))
    sums = Sums(builder, [(0, j) for j in range(KEYS)], WIDTH)
    blocks = builder.udiv(builder.add(count, _I64(KEYS - 1)), _I64(KEYS))
    with cgutils.for_range(builder, blocks, intp=_I64) as block:
        sums.clear()
        first = builder.mul(block.index, _I64(KEYS))
        start, left = builder.add(keys, builder.mul(first, step)), builder.sub(count, first)
        lines = addresses_of(builder, start, step, left, KEYS)
        with cgutils.for_range(builder, whole, intp=_I64) as loop:
            here = [builder.add(line, builder.mul(loop.index, _I64(BYTES[kind]))) for line in lines]
            STEPS[kind](builder, sums, here, [builder.add(query, builder.mul(loop.index, _I64(X_BYTES[kind])))], {})
        emit_rest(kind, builder, sums, lines, [query], whole, channels)
        into = builder.add(out, builder.mul(first, _I64(4)))
        for j in range(0, KEYS, BLOCK):
            totals = sums.totals(0, j)
            builder.store(totals, builder.inttoptr(plus(builder, into, 4 * j), totals.type.as_pointer())).align = 4


def _scored(typing_context, kind, keys, step, count, query, channels, out):
    """scored(...): out[j] = query . key j, j < count, keys `step` bytes apart, stored as `kind` says.

    `out` has room up to the next multiple of KEYS; what is written there means nothing.
    """

    def emit(context, builder, signature, values):
        _emit_scored(kind.literal_value, builder, *values[1:])
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 6), emit


def _scored_plain(kind, keys, step, count, query, channels, out):
    scores = floats_at(out, count)
    for j in range(count):
        scores[j] = DOTS[kind](keys + j * step, query, 0, channels)


def _emit_weighted(kind, builder, v, v_step, weight, keys, out):
    floats, words = vector(_F32, WIDTH), vector(_I32, WIDTH)
    count = CHANNEL_BLOCK // WIDTH
    # Even and odd keys are summed apart: one chain of additions would be waited for.
    sums = Sums(builder, [(odd, i) for odd in (0, 1) for i in range(count)], WIDTH)

    def add(number, odd):
        factor = _spread(builder, load(builder, builder.add(weight, builder.mul(number, _I64(4))), _F32), WIDTH)
        row, lines = builder.add(v, builder.mul(number, v_step)), []
        for i in range(count if kind == FLOAT32 else count // 2):
            loaded = load(builder, plus(builder, row, 4 * WIDTH * i), words)
            lines += [builder.bitcast(loaded, floats)] if kind == FLOAT32 else both_halves(builder, loaded)
        for i, line in enumerate(lines):
            sums.multiply_add((odd, i), line, factor)

    with cgutils.for_range(builder, builder.udiv(keys, _I64(2)), intp=_I64) as loop:
        first = builder.mul(loop.index, _I64(2))
        add(first, 0)
        add(builder.add(first, _I64(1)), 1)
    with builder.if_then(builder.trunc(keys, ir.IntType(1))):
        add(builder.sub(keys, _I64(1)), 0)
    lines = [builder.fadd(*(builder.load(sums.places[odd, i]) for odd in (0, 1))) for i in range(count)]
    if kind == BFLOAT16:  # even and odd channels, back in order
        orders = [[i // 2 + WIDTH * (i % 2) for i in range(first, first + WIDTH)] for first in (0, WIDTH)]
        masks = [ir.Constant(words, order) for order in orders]
        lines = [builder.shuffle_vector(lines[i], lines[i + 1], mask) for i in range(0, count, 2) for mask in masks]
    for i, line in enumerate(lines):
        place = builder.inttoptr(plus(builder, out, 4 * WIDTH * i), floats.as_pointer())
        builder.store(builder.fadd(builder.load(place, align=4), line), place).align = 4


def _weighted(typing_context, kind, v, v_step, weight, keys, out):
    """weighted(...): out[c] += sum over keys of weight[j] * v[j, c], c < CHANNEL_BLOCK; v is stored as `kind` says."""

    def emit(context, builder, signature, values):
        _emit_weighted(kind.literal_value, builder, *values[1:])
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 5), emit


def _weighted_plain(kind, v, v_step, weight, keys, out):
    total = floats_at(out, CHANNEL_BLOCK)
    for j, factor in enumerate(floats_at(weight, keys)):
        total += factor * FLOATS[kind](v + j * v_step, CHANNEL_BLOCK)


scored: Any = _scored_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_scored)
weighted: Any = _weighted_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_weighted)
