# mypy: ignore-errors
"""Products of few rows with weights that are read once, as they lie in memory, in the format they are stored in.

A kernel multiplies a block of weight rows with one row of x or a few.  Lanes run along a row and are summed at its end,
in the same order whatever block a row is in, so that a result never depends on how many rows or threads there are.

float32   x as it is
bfloat16  a word holds two columns: x lies in runs of WIDTH even columns, then WIDTH odd ones
int8      codes times x rounded to 16-bit integers, 64 columns at a time; exact sums, scaled as floats
int4      the same, 32 columns at a time, the upper and the lower byte of x apart: codes are bytes without sign, 8 above
          their values, and processors multiply such bytes with signed ones, four to a lane

Memory is given by address, in bytes; nothing is checked.  Uncompiled (NUMBA_DISABLE_JIT), NumPy twins take the place
of everything here.
"""

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .addresses import floats_at
from .emission import constant, declared, fetch, load, multiply_add, plus, vector
from .jit import JIT_DISABLED, features
from .plain_streams import DOTS, INT4_BLOCK
from .vectors import LANES, WHOLE_LINES, WIDTH, _spread

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
BLOCK = 4  # weight rows that are read side by side, whose lanes are summed together
# Rows of x that are multiplied with each of them, for each kind: what registers there are.
TOGETHER = (4, 4, 2, 2) if WIDTH == 16 else (2, 2, 2, 2)

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
# A block of columns: how many, bytes of a weight row, bytes of a row of x.
COLUMNS = {FLOAT32: WIDTH, BFLOAT16: 2 * WIDTH, INT8: 64, INT4: 128}
BYTES = {FLOAT32: 4 * WIDTH, BFLOAT16: 4 * WIDTH, INT8: 64, INT4: 64}
X_BYTES = {FLOAT32: 4 * WIDTH, BFLOAT16: 8 * WIDTH, INT8: 128, INT4: INT4_BLOCK}
_GROUPS = {INT8: 1, INT4: 4}  # scales of a block of columns
_CODES = 2 * LANES
RUN = 32  # blocks of columns whose scales are multiplied ahead
# Integers are asked for so many bytes ahead: what processors fetch by themselves comes too late where there is much to
# do with a line.  So are bfloat16 numbers in rows of FAR columns, whose matrix comes from memory; others come in time.
AHEAD, FAR = 4096, 2048


def _pair_sums(builder, left, right, total):
    """total (LANES x i32) += products of 16-bit integers (_CODES of them), neighbours added."""
    if WHOLE_LINES:
        operands = [total, *(builder.bitcast(side, total.type) for side in (left, right))]
        function = declared(builder, "llvm.x86.avx512.vpdpwssd.512", total.type, [total.type] * 3)
        return builder.call(function, operands)
    if "avx2" in features():
        kinds = [left.type, right.type]
        function = declared(builder, "llvm.x86.avx2.pmadd.wd", total.type, kinds)
        return builder.add(total, builder.call(function, [left, right]))
    wide = vector(_I32, _CODES)
    product = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
    for odd in (0, 1):
        mask = ir.Constant(total.type, [2 * i + odd for i in range(LANES)])
        total = builder.add(total, builder.shuffle_vector(product, product, mask))
    return total


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

    def totals(self, i, first=0):
        """The sums of row i of x with BLOCK weight rows, from `first` on."""
        lines = [self.builder.load(self.places[i, j]) for j in range(first, first + BLOCK)]
        return _sums_of_four(self.builder, lines)


def _float_columns(builder, sums, weights, lines, scales):
    for i, x in enumerate(lines):
        x = load(builder, x, vector(_F32, WIDTH))
        for j, weight in enumerate(weights):
            sums.multiply_add((i, j), load(builder, weight, x.type), x)


def both_halves(builder, words):
    """The even and the odd bfloat16 numbers of a line of words, as floats."""
    even, odd = builder.shl(words, constant(words.type, 16)), builder.and_(words, constant(words.type, -65536))
    return [builder.bitcast(half, vector(_F32, words.type.count)) for half in (even, odd)]


def _bfloat_columns(builder, sums, weights, lines, scales):
    words, floats = vector(_I32, WIDTH), vector(_F32, WIDTH)
    halves = [both_halves(builder, load(builder, weight, words)) for weight in weights]
    for which in (0, 1):
        for i, x in enumerate(lines):
            x = load(builder, plus(builder, x, 4 * WIDTH * which), floats)
            for j, both in enumerate(halves):
                sums.multiply_add((i, j), both[which], x)


def _int8_columns(builder, sums, weights, lines, scales):
    totals = {pair: ir.Constant(vector(_I32, LANES), None) for pair in scales}
    for at in range(0, 64, _CODES):
        codes = [load(builder, plus(builder, weight, at), vector(_I8, _CODES)) for weight in weights]
        codes = [builder.sext(code, vector(_I16, _CODES)) for code in codes]
        for i, x in enumerate(lines):
            x = load(builder, plus(builder, x, 2 * at), vector(_I16, _CODES))
            for j, code in enumerate(codes):
                totals[i, j] = _pair_sums(builder, code, x, totals[i, j])
    for pair, total in totals.items():
        scale = _spread(builder, load(builder, scales[pair], _F32), LANES)
        sums.multiply_add(pair, builder.sitofp(total, scale.type), scale)


def _sums_of_bytes(builder, codes, x, total):
    """total (LANES x i32) += codes (bytes without sign, up to 15) times x (signed ones), four neighbours added."""
    if WHOLE_LINES:
        function = declared(builder, "llvm.x86.avx512.vpdpbusd.512", total.type, [total.type] * 3)
        for pair in zip(codes, x, strict=True):
            total = builder.call(function, [total, *(builder.bitcast(side, total.type) for side in pair)])
        return total
    wide, kind = vector(_I16, 32), vector(_I16, 16)
    sums = ir.Constant(kind, None)  # of two neighbours in each of four vectors: at most 8 * 15 * 128
    for left, right in zip(codes, x, strict=True):
        if "avx2" in features():
            function = declared(builder, "llvm.x86.avx2.pmadd.ub.sw", kind, [left.type, right.type])
            sums = builder.add(sums, builder.call(function, [left, right]))
        else:
            products = builder.mul(builder.zext(left, wide), builder.sext(right, wide))
            for odd in (0, 1):
                mask = ir.Constant(vector(_I32, 16), [2 * i + odd for i in range(16)])
                sums = builder.add(sums, builder.shuffle_vector(products, products, mask))
    return _pair_sums(builder, sums, constant(kind, 1), total)


def _int4_columns(builder, sums, weights, lines, scales):
    lanes, bytes_ = vector(_I32, LANES), vector(_I8, 4 * LANES)
    codes = []
    for weight in weights:
        stored = [load(builder, plus(builder, weight, at), bytes_) for at in range(0, 64, bytes_.count)]
        lower = [builder.and_(both, constant(bytes_, 15)) for both in stored]
        codes.append(lower + [builder.lshr(both, constant(bytes_, 4)) for both in stored])
    for i, x in enumerate(lines):
        parts = [load(builder, plus(builder, x, at), bytes_) for at in range(0, 256, bytes_.count)]
        high, low = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        start, zero = load(builder, plus(builder, x, 256), lanes), ir.Constant(lanes, None)
        for j, code in enumerate(codes):
            upper = builder.shl(_sums_of_bytes(builder, code, high, zero), constant(lanes, 8))
            total = builder.add(_sums_of_bytes(builder, code, low, start), upper)
            four = load(builder, scales[i, j], vector(_F32, 4))
            scale = builder.shuffle_vector(four, four, ir.Constant(lanes, [0, 1, 2, 3] * (LANES // 4)))
            sums.multiply_add((i, j), builder.sitofp(total, scale.type), scale)


STEPS = {FLOAT32: _float_columns, BFLOAT16: _bfloat_columns, INT8: _int8_columns, INT4: _int4_columns}


def _emit_scales(builder, places, weights, lines, groups):
    """places[i, j]: scales of row i of x (floats) times those of weight row j (bfloat16), `groups` of them."""

    def multiply(first, count):
        left = []
        for weight in weights:
            bits = load(builder, builder.add(weight, builder.mul(first, _I64(2))), vector(_I16, count))
            bits = builder.shl(builder.zext(bits, vector(_I32, count)), constant(vector(_I32, count), 16))
            left.append(builder.bitcast(bits, vector(_F32, count)))
        offset = builder.mul(first, _I64(4))
        for i, line in enumerate(lines):
            right = load(builder, builder.add(line, offset), left[0].type)
            for j, scale in enumerate(left):
                into = builder.inttoptr(builder.add(places[i, j], offset), right.type.as_pointer())
                builder.store(builder.fmul(right, scale), into).align = 4

    def several(number):
        """So many at a time; the last ones overlap those before, since nothing may be read beyond the end."""
        last = builder.sub(groups, _I64(number))
        count = builder.udiv(builder.add(groups, _I64(number - 1)), _I64(number))
        with cgutils.for_range(builder, count, intp=_I64) as loop:
            first = builder.mul(loop.index, _I64(number))
            multiply(builder.select(builder.icmp_signed("<", first, last), first, last), number)

    with builder.if_else(builder.icmp_signed(">=", groups, _I64(8))) as (many, few):
        with many:
            several(8)
        with few, builder.if_else(builder.icmp_signed(">=", groups, _I64(4))) as (some, one):
            with some:
                several(4)
            with one:
                several(1)


def addresses_of(builder, start, step, count, number):
    """Addresses of so many rows; those beyond the last of `count` are the last."""
    found, last = [], builder.sub(count, _I64(1))
    for i in range(number):
        inside = builder.icmp_signed("<", _I64(i), count)
        found.append(builder.add(start, builder.mul(step, builder.select(inside, _I64(i), last))))
    return found


def _emit_stream(kind, together, context, builder, values):
    w, w_step, w_count, x, x_step, x_count, s, s_step, products, y, y_step, y_gap, columns = values
    pairs = [(i, j) for i in range(together) for j in range(BLOCK)]
    integers = kind in _GROUPS
    sums = Sums(builder, pairs, LANES if integers else WIDTH)
    weights = addresses_of(builder, w, w_step, w_count, BLOCK)
    lines = addresses_of(builder, x, x_step, x_count, together)
    whole = builder.udiv(columns, _I64(COLUMNS[kind]))

    def multiply(block, scales, ask):
        here = [builder.add(weight, builder.mul(block, _I64(BYTES[kind]))) for weight in weights]
        for weight in here if ask else ():
            fetch(builder, plus(builder, weight, AHEAD))
        there = [builder.add(line, builder.mul(block, _I64(X_BYTES[kind]))) for line in lines]
        STEPS[kind](builder, sums, here, there, scales)

    if integers:
        size = _GROUPS[kind]
        own = [builder.add(line, builder.mul(whole, _I64(X_BYTES[kind]))) for line in lines]
        theirs = addresses_of(builder, s, s_step, w_count, BLOCK)
        places = {(i, j): plus(builder, products, 4 * size * RUN * (i * BLOCK + j)) for i, j in pairs}
        runs = builder.udiv(builder.add(whole, _I64(RUN - 1)), _I64(RUN))
        with cgutils.for_range(builder, runs, intp=_I64) as run:
            first = builder.mul(run.index, _I64(RUN))
            rest, at = builder.sub(whole, first), builder.mul(first, _I64(size))
            count = builder.select(builder.icmp_signed("<", rest, _I64(RUN)), rest, _I64(RUN))
            left = [builder.add(scale, builder.mul(at, _I64(2))) for scale in theirs]
            right = [builder.add(scale, builder.mul(at, _I64(4))) for scale in own]
            _emit_scales(builder, places, left, right, builder.mul(count, _I64(size)))
            with cgutils.for_range(builder, count, intp=_I64) as loop:
                offset = builder.add(products, builder.mul(loop.index, _I64(4 * size)))
                scales = {(i, j): plus(builder, offset, 4 * size * RUN * (i * BLOCK + j)) for i, j in pairs}
                multiply(builder.add(first, loop.index), scales, True)
    else:

        def every_block(ask):
            with cgutils.for_range(builder, whole, intp=_I64) as loop:
                multiply(loop.index, {}, ask)

        if kind == BFLOAT16:
            with builder.if_else(builder.icmp_signed(">=", columns, _I64(FAR))) as (far, near):
                with far:
                    every_block(True)
                with near:
                    every_block(False)
        else:
            every_block(False)
        emit_rest(kind, builder, sums, weights, lines, whole, columns)
    for i in range(together):
        totals = sums.totals(i)
        with builder.if_then(builder.icmp_signed("<", _I64(i), x_count)):
            for j in range(BLOCK):
                with builder.if_then(builder.icmp_signed("<", _I64(j), w_count)):
                    place = builder.add(builder.add(y, builder.mul(y_gap, _I64(j))), builder.mul(y_step, _I64(i)))
                    total = builder.extract_element(totals, _I32(j))
                    builder.store(total, builder.inttoptr(place, _F32.as_pointer())).align = 4
    return context.get_dummy_value()


def emit_rest(kind, builder, sums, weights, lines, whole, columns):
    """The columns after the last whole block: copied beside zeros, since nothing may be read beyond a row's end."""
    size = BYTES[kind] // COLUMNS[kind]
    rest = builder.mul(builder.sub(columns, builder.mul(whole, _I64(COLUMNS[kind]))), _I64(size))
    with builder.if_then(builder.icmp_signed(">", rest, _I64(0))):
        places = []
        for weight in weights:
            place = cgutils.alloca_once(builder, vector(_I8, BYTES[kind]))
            builder.store(ir.Constant(vector(_I8, BYTES[kind]), None), place)
            source = builder.inttoptr(builder.add(weight, builder.mul(whole, _I64(BYTES[kind]))), _I8.as_pointer())
            cgutils.raw_memcpy(builder, builder.bitcast(place, _I8.as_pointer()), source, rest, 1)
            places.append(builder.ptrtoint(place, _I64))
        there = [builder.add(line, builder.mul(whole, _I64(X_BYTES[kind]))) for line in lines]
        STEPS[kind](builder, sums, places, there, {})


def _stream(
    typing_context,
    kind,
    together,
    w,
    w_step,
    w_count,
    x,
    x_step,
    x_count,
    s,
    s_step,
    products,
    y,
    y_step,
    y_gap,
    columns,
):
    """stream(...): y[i, j] = x[i] . w[j] for rows of x up to `together` and BLOCK weight rows, stored as `kind` says.

    Steps are bytes from row to row; y_gap is that from j to j + 1.  Only the first x_count and w_count rows count.
    x is as product/stored.py prepares it.  For integers s holds the scales of weight rows, columns are whole groups,
    and `products` is room for `PRODUCTS` floats.
    """
    numbers = kind.literal_value, together.literal_value

    def emit(context, builder, signature, values):
        return _emit_stream(*numbers, context, builder, values[2:])

    return types.void(kind, together, *[types.intp] * 13), emit


def _stream_plain(
    kind, together, w, w_step, w_count, x, x_step, x_count, s, s_step, products, y, y_step, y_gap, columns
):
    for i in range(x_count):
        for j in range(w_count):
            total = DOTS[kind](w + j * w_step, x + i * x_step, s + j * s_step, columns)
            floats_at(y + i * y_step + j * y_gap, 1)[0] = total


PRODUCTS = max(_GROUPS.values()) * RUN * max(TOGETHER) * BLOCK  # scales that are multiplied ahead, at most
stream: Any = _stream_plain if JIT_DISABLED else intrinsic(prefer_literal=True)(_stream)
