# mypy: ignore-errors
"""Products of few rows with weights of floats that are read once, as they lie in memory, in the format stored.

A kernel multiplies a block of weight rows with one row of x or a few.  Lanes run along a row and are summed at its end,
in the same order whatever block a row is in, so that a result never depends on how many rows or threads there are.

float32   x as it is
bfloat16  a word holds two columns: x lies in runs of WIDTH even columns, then WIDTH odd ones

Weights of integers have kernels of their own (integer_streams.py).
Memory is given by address, in bytes; nothing is checked.  Uncompiled (NUMBA_DISABLE_JIT), NumPy twins take the place
of everything here.
"""

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .addresses import floats_at
from .emission import constant, fetch, load, multiply_add, plus, vector
from .jit import JIT_DISABLED
from .plain_streams import DOTS, widen_in_order_plain
from .vectors import WIDTH

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
LINE = 64  # bytes of a cache line
BLOCK = 4  # weight rows that are read side by side, with one row of x or two
# With four rows of x, by format: as many sums as leave registers for what is multiplied.
BLOCK_OF_FOUR = (4, 4) if WIDTH == 16 else (3, 2)

_F32, _I8, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
# A block of columns: how many, bytes of a weight row, bytes of a row of x.
COLUMNS = {FLOAT32: WIDTH, BFLOAT16: 2 * WIDTH}
BYTES = {FLOAT32: 4 * WIDTH, BFLOAT16: 4 * WIDTH}
X_BYTES = {FLOAT32: 4 * WIDTH, BFLOAT16: 8 * WIDTH}
# What is asked for so many bytes ahead: what processors fetch by themselves comes too late where there is much to do
# with a line.  So are bfloat16 numbers in rows of FAR columns, whose matrix comes from memory; others come in time.
AHEAD, FAR = 4096, 2048


def _sums_of_four(builder, lines):
    """The sums of all lanes of four lines, as one vector: halves added to halves, first two lines in one, then four."""

    def fold(first, second, runs, size):
        """Runs of `size` lanes, counted through both lines: the first half of each added to the second."""
        masks = [[run * size + i + half for run in range(runs) for i in range(size // 2)] for half in (0, size // 2)]
        parts = [ir.Constant(vector(_I32, len(mask)), mask) for mask in masks]
        return builder.fadd(*(builder.shuffle_vector(first, second, part) for part in parts))

    width = lines[0].type.count
    pairs = [fold(lines[i], lines[i + 1], 2, width) for i in (0, 2)]
    total = fold(*pairs, 4, width // 2)
    while total.type.count > 4:
        total = fold(total, total, 4, total.type.count // 4)
    return total


class Sums:
    """Accumulators of a block: a vector for each pair of rows, in registers."""

    def __init__(self, builder, pairs, width):
        self.builder, self._kind = builder, vector(_F32, width)
        self.places = {pair: cgutils.alloca_once(builder, self._kind) for pair in pairs}
        self.clear()

    def clear(self):
        for place in self.places.values():
            self.builder.store(ir.Constant(self._kind, None), place)

    def multiply_add(self, pair, left, right):
        place = self.places[pair]
        self.builder.store(multiply_add(self.builder, left, right, self.builder.load(place)), place)

    def totals(self):
        """Four pairs after the other, and a vector of their sums."""
        pairs = list(self.places)
        for first in range(0, len(pairs), 4):
            four = pairs[first : first + 4]
            yield four, _sums_of_four(self.builder, [self.builder.load(self.places[pair]) for pair in four])


def _float_columns(builder, sums, weights, lines):
    for i, x in enumerate(lines):
        x = load(builder, x, vector(_F32, WIDTH))
        for j, weight in enumerate(weights):
            sums.multiply_add((i, j), load(builder, weight, x.type), x)


def both_halves(builder, words):
    """The even and the odd bfloat16 numbers of a line of words, as floats."""
    even, odd = builder.shl(words, constant(words.type, 16)), builder.and_(words, constant(words.type, -65536))
    return [builder.bitcast(half, vector(_F32, words.type.count)) for half in (even, odd)]


def _bfloat_columns(builder, sums, weights, lines):
    words, floats = vector(_I32, WIDTH), vector(_F32, WIDTH)
    halves = [both_halves(builder, load(builder, weight, words)) for weight in weights]
    for which in (0, 1):
        for i, x in enumerate(lines):
            x = load(builder, plus(builder, x, 4 * WIDTH * which), floats)
            for j, both in enumerate(halves):
                sums.multiply_add((i, j), both[which], x)


STEPS = {FLOAT32: _float_columns, BFLOAT16: _bfloat_columns}


def addresses_of(builder, start, step, count, number):
    """Addresses of so many rows; those beyond the last of `count` are the last."""
    found, last = [], builder.sub(count, _I64(1))
    for i in range(number):
        inside = builder.icmp_signed("<", _I64(i), count)
        found.append(builder.add(start, builder.mul(step, builder.select(inside, _I64(i), last))))
    return found


def _emit_stream(kind, block, together, context, builder, values):
    w, w_step, w_count, x, x_step, x_count, y, y_step, y_gap, columns = values
    sums = Sums(builder, [(i, j) for i in range(together) for j in range(block)], WIDTH)
    weights = addresses_of(builder, w, w_step, w_count, block)
    lines = addresses_of(builder, x, x_step, x_count, together)
    whole = builder.udiv(columns, _I64(COLUMNS[kind]))

    def every_block(ask):
        with cgutils.for_range(builder, whole, intp=_I64) as loop:
            here = [builder.add(weight, builder.mul(loop.index, _I64(BYTES[kind]))) for weight in weights]
            for weight in here if ask else ():
                fetch(builder, plus(builder, weight, AHEAD))
            there = [builder.add(line, builder.mul(loop.index, _I64(X_BYTES[kind]))) for line in lines]
            STEPS[kind](builder, sums, here, there)

    if kind == BFLOAT16:
        with builder.if_else(builder.icmp_signed(">=", columns, _I64(FAR))) as (far, near):
            with far:
                every_block(True)
            with near:
                every_block(False)
    else:
        every_block(False)
    emit_rest(kind, builder, sums, weights, lines, whole, columns)
    for four, totals in sums.totals():
        for lane, (i, j) in enumerate(four):
            inside = [builder.icmp_signed("<", _I64(n), count) for n, count in ((i, x_count), (j, w_count))]
            with builder.if_then(builder.and_(*inside)):
                place = builder.add(builder.add(y, builder.mul(y_gap, _I64(j))), builder.mul(y_step, _I64(i)))
                total = builder.extract_element(totals, _I32(lane))
                builder.store(total, builder.inttoptr(place, _F32.as_pointer())).align = 4
    return context.get_dummy_value()


def emit_rest(kind, builder, sums, weights, lines, whole, columns):
    """The columns after the last whole block: copied beside zeros, since nothing may be read beyond a row's end."""
    size = BYTES[kind] // COLUMNS[kind]
    rest = builder.mul(builder.sub(columns, builder.mul(whole, _I64(COLUMNS[kind]))), _I64(size))
    with builder.if_then(builder.icmp_signed(">", rest, _I64(0))):
        here = [builder.add(weight, builder.mul(whole, _I64(BYTES[kind]))) for weight in weights]
        there = [builder.add(line, builder.mul(whole, _I64(X_BYTES[kind]))) for line in lines]
        STEPS[kind](builder, sums, [_beside_zeros(kind, builder, weight, rest) for weight in here], there)


def _beside_zeros(kind, builder, weight, size):
    """A block of columns of which only the first bytes are there, copied -> the address of the copy."""
    place = cgutils.alloca_once(builder, vector(_I8, BYTES[kind]))
    builder.store(ir.Constant(vector(_I8, BYTES[kind]), None), place)
    source = builder.inttoptr(weight, _I8.as_pointer())
    cgutils.raw_memcpy(builder, builder.bitcast(place, _I8.as_pointer()), source, size, 1)
    return builder.ptrtoint(place, _I64)


def _stream(typing_context, kind, block, together, w, w_step, w_count, x, x_step, x_count, y, y_step, y_gap, columns):
    """stream(...): y[i, j] = x[i] . w[j] for rows of x up to `together` and `block` weight rows, as `kind` says.

    Steps are bytes from row to row; y_gap is that from j to j + 1.  Only the first x_count and w_count rows count.
    x is as product/stored.py prepares it.
    """
    numbers = kind.literal_value, block.literal_value, together.literal_value

    def emit(context, builder, signature, values):
        return _emit_stream(*numbers, context, builder, values[3:])

    return types.void(kind, block, together, *[types.intp] * 10), emit


def _widen_in_order(typing_context, w, columns, into):
    """widen_in_order(w, columns, into): a row of bfloat16 numbers as floats in the order of x, in whole blocks.

    So the kernel of float32 adds the same products in the same order as that of bfloat16 does.
    """

    def emit(context, builder, signature, values):
        w, columns, into = values
        whole = builder.udiv(columns, _I64(COLUMNS[BFLOAT16]))
        rest = builder.mul(builder.sub(columns, builder.mul(whole, _I64(COLUMNS[BFLOAT16]))), _I64(2))

        def block(number, source):
            out = builder.add(into, builder.mul(number, _I64(X_BYTES[BFLOAT16])))
            for which, line in enumerate(both_halves(builder, load(builder, source, vector(_I32, WIDTH)))):
                place = builder.inttoptr(plus(builder, out, 4 * WIDTH * which), line.type.as_pointer())
                builder.store(line, place).align = 4

        with cgutils.for_range(builder, whole, intp=_I64) as loop:
            block(loop.index, builder.add(w, builder.mul(loop.index, _I64(BYTES[BFLOAT16]))))
        with builder.if_then(builder.icmp_signed(">", rest, _I64(0))):
            last = builder.add(w, builder.mul(whole, _I64(BYTES[BFLOAT16])))
            block(whole, _beside_zeros(BFLOAT16, builder, last, rest))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit


def _stream_plain(kind, block, together, w, w_step, w_count, x, x_step, x_count, y, y_step, y_gap, columns):
    for i in range(min(x_count, together)):
        for j in range(min(w_count, block)):
            total = DOTS[kind](w + j * w_step, x + i * x_step, columns)
            floats_at(y + i * y_step + j * y_gap, 1)[0] = total


stream: Any = _stream_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_stream)
widen_in_order: Any = widen_in_order_plain if JIT_DISABLED else intrinsic(_widen_in_order)
