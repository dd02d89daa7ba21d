# mypy: ignore-errors
"""Products of few rows with weights that are read once, as they lie in memory, in the format they are stored in.

A kernel multiplies a block of weight rows with one or two rows of x.  Lanes run along a row and are summed at its end,
in the same order whatever block a row is in, so that a result never depends on how many rows or threads there are.

float32   x as it is
bfloat16  a word holds two columns: x lies in runs of WIDTH even columns, then WIDTH odd ones
int8      codes times x rounded to 16-bit integers, 64 columns at a time; exact sums, scaled as floats
int4      the same, 32 columns at a time; a code is 8 above its value, which the caller takes off

Memory is given by address, in bytes; nothing is checked.  Uncompiled (NUMBA_DISABLE_JIT), NumPy twins take the place
of everything here.
"""

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .addresses import floats_at, shorts_at, signed_bytes_at, words_at
from .jit import JIT_DISABLED, features
from .vectors import WIDTH, _spread

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
BLOCK = 4  # weight rows that are read side by side
CHANNEL_BLOCK = 32  # channels of values that are summed at once
CODES = 16  # 16-bit integers that are multiplied at once

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
# A block of columns: how many, bytes of a weight row, bytes of a row of x.
_COLUMNS = {FLOAT32: WIDTH, BFLOAT16: 2 * WIDTH, INT8: 64, INT4: 64}
_BYTES = {FLOAT32: 4 * WIDTH, BFLOAT16: 4 * WIDTH, INT8: 64, INT4: 32}
_X_BYTES = {FLOAT32: 4 * WIDTH, BFLOAT16: 8 * WIDTH, INT8: 128, INT4: 128}
_LANES = 8  # sums of codes at once


def _vector(kind, count):
    return ir.VectorType(kind, count)


def _constant(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _at(builder, address, kind):
    """What lies at an address, aligned or not."""
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 1
    return loaded


def _plus(builder, address, offset):
    return builder.add(address, _I64(offset)) if offset else address


def _function(builder, name, result, arguments):
    existing = builder.module.globals.get(name)
    return existing or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _multiply_add(builder, left, right, total):
    """One rounding where the processor has it, two where not: never the compiler's choice."""
    if "fma" not in features() and "neon" not in features():
        return builder.fadd(builder.fmul(left, right), total)
    kind = total.type
    return builder.call(_function(builder, f"llvm.fma.v{kind.count}f32", kind, [kind] * 3), [left, right, total])


def _pair_sums(builder, left, right, total):
    """total (8 x i32) += products of 16-bit integers, neighbours added: left, right: 16 x i16."""
    if "avx2" in features():
        kinds = [left.type, right.type]
        function = _function(builder, "llvm.x86.avx2.pmadd.wd", _vector(_I32, _LANES), kinds)
        return builder.add(total, builder.call(function, [left, right]))
    wide = _vector(_I32, CODES)
    product = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
    for odd in (0, 1):
        mask = ir.Constant(_vector(_I32, _LANES), [2 * i + odd for i in range(_LANES)])
        total = builder.add(total, builder.shuffle_vector(product, product, mask))
    return total


def _lane_sum(builder, line):
    """The sum of all lanes, halves added to halves."""
    while line.type.count > 1:
        half = line.type.count // 2
        low, high = (ir.Constant(_vector(_I32, half), list(range(first, first + half))) for first in (0, half))
        line = builder.fadd(builder.shuffle_vector(line, line, low), builder.shuffle_vector(line, line, high))
    return builder.extract_element(line, _I32(0))


class _Sums:
    """Accumulators of a block: `count` vectors for each pair of rows, in registers."""

    def __init__(self, builder, rows, count, width):
        kind = _vector(_F32, width)
        zero = ir.Constant(kind, None)
        self.builder = builder
        self.places = {pair: [cgutils.alloca_once(builder, kind) for _ in range(count)] for pair in rows}
        for places in self.places.values():
            for place in places:
                builder.store(zero, place)

    def multiply_add(self, pair, which, left, right):
        place = self.places[pair][which]
        self.builder.store(_multiply_add(self.builder, left, right, self.builder.load(place)), place)

    def total(self, pair):
        parts = [self.builder.load(place) for place in self.places[pair]]
        return _lane_sum(self.builder, parts[0] if len(parts) == 1 else self.builder.fadd(*parts))


def _float_columns(builder, sums, weights, lines, scales, index):
    for i, x in enumerate(lines):
        x = _at(builder, x, _vector(_F32, WIDTH))
        for j, weight in enumerate(weights):
            sums.multiply_add((i, j), 0, _at(builder, weight, x.type), x)


def _halves(builder, words):
    """The even and the odd bfloat16 numbers of a line of words, as floats."""
    even, odd = builder.shl(words, _constant(words.type, 16)), builder.and_(words, _constant(words.type, -65536))
    return [builder.bitcast(half, _vector(_F32, words.type.count)) for half in (even, odd)]


def _bfloat_columns(builder, sums, weights, lines, scales, index):
    words, floats = _vector(_I32, WIDTH), _vector(_F32, WIDTH)
    halves = [_halves(builder, _at(builder, weight, words)) for weight in weights]
    for which in (0, 1):
        for i, x in enumerate(lines):
            x = _at(builder, _plus(builder, x, 4 * WIDTH * which), floats)
            for j, both in enumerate(halves):
                sums.multiply_add((i, j), which, both[which], x)


def _scaled(builder, sums, pair, total, scale):
    number = builder.sitofp(total, _vector(_F32, _LANES))
    sums.multiply_add(pair, 0, number, _spread(builder, _at(builder, scale, _F32), _LANES))


def _int8_columns(builder, sums, weights, lines, scales, index):
    codes, wide = _vector(_I8, CODES), _vector(_I16, CODES)
    totals = {pair: ir.Constant(_vector(_I32, _LANES), None) for pair in scales}
    for part in range(4):
        for j, weight in enumerate(weights):
            code = builder.sext(_at(builder, _plus(builder, weight, CODES * part), codes), wide)
            for i, x in enumerate(lines):
                x = _at(builder, _plus(builder, x, 2 * CODES * part), wide)
                totals[i, j] = _pair_sums(builder, code, x, totals[i, j])
    for pair, total in totals.items():
        _scaled(builder, sums, pair, total, builder.add(scales[pair], builder.mul(index, _I64(4))))


def _int4_columns(builder, sums, weights, lines, scales, index):
    wide = _vector(_I16, CODES)
    words = [_at(builder, weight, wide) for weight in weights]
    for group in (0, 1):
        totals = {pair: ir.Constant(_vector(_I32, _LANES), None) for pair in scales}
        for part in (2 * group, 2 * group + 1):
            for j, word in enumerate(words):
                code = builder.lshr(word, _constant(wide, 4 * part)) if part else word
                code = builder.and_(code, _constant(wide, 15)) if part < 3 else code
                for i, x in enumerate(lines):
                    x = _at(builder, _plus(builder, x, 2 * CODES * part), wide)
                    totals[i, j] = _pair_sums(builder, code, x, totals[i, j])
        for pair, total in totals.items():
            scale = builder.add(scales[pair], builder.mul(index, _I64(8)))
            _scaled(builder, sums, pair, total, _plus(builder, scale, 4 * group))


_STEPS = {FLOAT32: _float_columns, BFLOAT16: _bfloat_columns, INT8: _int8_columns, INT4: _int4_columns}


def _emit_stream(kind, x_rows, w_rows, context, builder, values):
    w, w_step, w_count, x, x_step, x_count, s, s_step, y, y_step, y_gap, columns = values
    pairs = [(i, j) for i in range(x_rows) for j in range(w_rows)]
    sums = _Sums(builder, pairs, 2 if kind == BFLOAT16 else 1, _LANES if kind in (INT8, INT4) else WIDTH)

    def rows(start, step, count, number):
        """Addresses of rows; those beyond the last are the last."""
        found, last = [], builder.sub(count, _I64(1))
        for i in range(number):
            inside = builder.icmp_signed("<", _I64(i), count)
            found.append(builder.add(start, builder.mul(step, builder.select(inside, _I64(i), last))))
        return found

    weights, lines = rows(w, w_step, w_count, w_rows), rows(x, x_step, x_count, x_rows)
    scales = {(i, j): builder.add(s, builder.mul(s_step, _I64(i * w_rows + j))) for i, j in pairs}
    whole = builder.udiv(columns, _I64(_COLUMNS[kind]))
    with cgutils.for_range(builder, whole, intp=_I64) as loop:
        here = [builder.add(weight, builder.mul(loop.index, _I64(_BYTES[kind]))) for weight in weights]
        there = [builder.add(line, builder.mul(loop.index, _I64(_X_BYTES[kind]))) for line in lines]
        _STEPS[kind](builder, sums, here, there, scales, loop.index)
    if kind in (FLOAT32, BFLOAT16):
        _emit_rest(kind, context, builder, sums, weights, lines, whole, columns)
    for i, j in pairs:
        inside = builder.and_(builder.icmp_signed("<", _I64(i), x_count), builder.icmp_signed("<", _I64(j), w_count))
        total = sums.total((i, j))
        with builder.if_then(inside):
            place = builder.add(builder.add(y, builder.mul(y_gap, _I64(j))), builder.mul(y_step, _I64(i)))
            builder.store(total, builder.inttoptr(place, _F32.as_pointer())).align = 4
    return context.get_dummy_value()


def _emit_rest(kind, context, builder, sums, weights, lines, whole, columns):
    """The columns after the last whole block: copied beside zeros, since nothing may be read beyond a row's end."""
    size = _BYTES[kind] // _COLUMNS[kind]
    rest = builder.mul(builder.sub(columns, builder.mul(whole, _I64(_COLUMNS[kind]))), _I64(size))
    with builder.if_then(builder.icmp_signed(">", rest, _I64(0))):
        places = []
        for weight in weights:
            place = cgutils.alloca_once(builder, _vector(_I8, _BYTES[kind]))
            builder.store(ir.Constant(_vector(_I8, _BYTES[kind]), None), place)
            source = builder.inttoptr(builder.add(weight, builder.mul(whole, _I64(_BYTES[kind]))), _I8.as_pointer())
            cgutils.raw_memcpy(builder, builder.bitcast(place, _I8.as_pointer()), source, rest, 1)
            places.append(builder.ptrtoint(place, _I64))
        there = [builder.add(line, builder.mul(whole, _I64(_X_BYTES[kind]))) for line in lines]
        _STEPS[kind](builder, sums, places, there, {}, whole)


def _stream(kind, x_rows, w_rows):
    """stream(w, w_step, w_count, x, x_step, x_count, s, s_step, y, y_step, y_gap, columns): y[i, j] = x[i] . w[j].

    Steps are bytes from row to row; y_gap is that from j to j + 1.  At most `x_rows` and `w_rows` rows are multiplied,
    of which only the first x_count and w_count are written.  x is as product/stored.py prepares it; s holds a scale per
    pair of rows and group, for the integer formats.
    """

    def typed(typing_context, w, w_step, w_count, x, x_step, x_count, s, s_step, y, y_step, y_gap, columns):
        def emit(context, builder, signature, values):
            return _emit_stream(kind, x_rows, w_rows, context, builder, values)

        return types.void(*[types.intp] * 12), emit

    def plain(w, w_step, w_count, x, x_step, x_count, s, s_step, y, y_step, y_gap, columns):
        for i in range(x_count):
            for j in range(w_count):
                scales = s + s_step * (i * w_rows + j)
                floats_at(y + i * y_step + j * y_gap, 1)[0] = _DOTS[kind](
                    w + j * w_step, x + i * x_step, scales, columns
                )

    return plain if JIT_DISABLED else intrinsic(typed)


def _dot_float32(w, x, scales, columns):
    return floats_at(w, columns) @ floats_at(x, columns)


def _dot_bfloat16(w, x, scales, columns):
    weight = (words_at(w, columns).astype(np.uint32) << np.uint32(16)).view(np.float32)
    blocks = -(-columns // (2 * WIDTH))
    sorted_x = floats_at(x, 2 * WIDTH * blocks).reshape(blocks, 2, WIDTH)
    return weight @ sorted_x.transpose(0, 2, 1).reshape(-1)[:columns]


def _dot_int8(w, x, scales, columns):
    products = signed_bytes_at(w, columns).astype(np.int32) * shorts_at(x, columns)
    return products.reshape(-1, 64).sum(axis=1).astype(np.float32) @ floats_at(scales, columns // 64)


def _dot_int4(w, x, scales, columns):
    words = words_at(w, columns // 4).reshape(-1, 1, 16)
    codes = (words >> np.arange(0, 16, 4, dtype=np.uint16)[:, None]) & np.uint16(15)
    sums = (codes.reshape(-1).astype(np.int32) * shorts_at(x, columns)).reshape(-1, 32).sum(axis=1)
    return sums.astype(np.float32) @ floats_at(scales, columns // 32)


_DOTS = {FLOAT32: _dot_float32, BFLOAT16: _dot_bfloat16, INT8: _dot_int8, INT4: _dot_int4}


def _emit_weighted(kind, context, builder, values):
    v, v_step, weight, keys, out = values
    floats, words = _vector(_F32, WIDTH), _vector(_I32, WIDTH)
    zero = ir.Constant(floats, None)
    count = CHANNEL_BLOCK // WIDTH
    places = [cgutils.alloca_once_value(builder, zero) for _ in range(count)]
    for place in places:
        builder.store(zero, place)
    with cgutils.for_range(builder, keys, intp=_I64) as loop:
        factor = _spread(builder, _at(builder, builder.add(weight, builder.mul(loop.index, _I64(4))), _F32), WIDTH)
        row = builder.add(v, builder.mul(loop.index, v_step))
        lines = []
        for i in range(count if kind == FLOAT32 else count // 2):
            loaded = _at(builder, _plus(builder, row, 4 * WIDTH * i), words)
            lines += [builder.bitcast(loaded, floats)] if kind == FLOAT32 else _halves(builder, loaded)
        for place, line in zip(places, lines, strict=True):
            builder.store(_multiply_add(builder, line, factor, builder.load(place)), place)
    sums = [builder.load(place) for place in places]
    if kind == BFLOAT16:  # even and odd channels, back in order
        orders = [[i // 2 + WIDTH * (i % 2) for i in range(first, first + WIDTH)] for first in (0, WIDTH)]
        masks = [ir.Constant(words, order) for order in orders]
        sums = [builder.shuffle_vector(sums[i], sums[i + 1], mask) for i in range(0, count, 2) for mask in masks]
    for i, line in enumerate(sums):
        builder.store(line, builder.inttoptr(_plus(builder, out, 4 * WIDTH * i), floats.as_pointer())).align = 4
    return context.get_dummy_value()


def _weighted(kind):
    """weighted(v, v_step, weight, keys, out): out[c] = sum over keys of weight[j] * v[j, c], c < CHANNEL_BLOCK."""

    def typed(typing_context, v, v_step, weight, keys, out):
        def emit(context, builder, signature, values):
            return _emit_weighted(kind, context, builder, values)

        return types.void(*[types.intp] * 5), emit

    def plain(v, v_step, weight, keys, out):
        total = floats_at(out, CHANNEL_BLOCK)
        total[:] = 0.0
        for j, factor in enumerate(floats_at(weight, keys)):
            if kind == FLOAT32:
                total += factor * floats_at(v + j * v_step, CHANNEL_BLOCK)
            else:
                wide = words_at(v + j * v_step, CHANNEL_BLOCK).astype(np.uint32) << np.uint32(16)
                total += factor * wide.view(np.float32)

    return plain if JIT_DISABLED else intrinsic(typed)


weighted_float32, weighted_bfloat16 = _weighted(FLOAT32), _weighted(BFLOAT16)
stream_float32, stream_float32_two = _stream(FLOAT32, 1, BLOCK), _stream(FLOAT32, 2, BLOCK // 2)
stream_bfloat16, stream_bfloat16_two = _stream(BFLOAT16, 1, BLOCK), _stream(BFLOAT16, 2, BLOCK // 2)
stream_int8, stream_int8_two = _stream(INT8, 1, BLOCK), _stream(INT8, 2, BLOCK // 2)
stream_int4, stream_int4_two = _stream(INT4, 1, BLOCK), _stream(INT4, 2, BLOCK // 2)
