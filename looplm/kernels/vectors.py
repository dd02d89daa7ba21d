# mypy: ignore-errors
"""Vector operations that the compiler does not find by itself, in a form that every processor has.

The register tile is the innermost loop of every matrix product:

    c[i, j] (+)= sum over k of a[i, k] * b[k, j]        i < rows, j < TILE_COLUMNS, k < depth

Its part of c stays in registers for the whole of k; each step loads one line of b and `rows` single numbers of a.
Multiply and add may be contracted: one instruction where the processor has it, two where not.  The same loops in plain
Python code reach a tenth of its speed.

Arrays are given with a position, counted in elements of memory from the array's first, whatever its shape; nothing is
checked.  Uncompiled (NUMBA_DISABLE_JIT), plain NumPy twins take the place of all of these.
"""

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emission import NATIVE_BFLOAT, Bfloat, bfloat_bits_of, declared, fetch
from .jit import JIT_DISABLED, features

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTORS = 2  # a tile is so many registers wide


def _registers() -> tuple[int, int]:
    """Floats in a vector register, and rows of a tile whose accumulators fit in the registers there are."""
    if "avx512f" in features():
        return 16, 8  # 16 of 32 registers accumulate
    return (8 if "avx" in features() else 4), 6  # 12 of 16 registers accumulate


WIDTH, TILE_ROWS = _registers()
TILE_COLUMNS = WIDTH * _VECTORS
WHOLE_LINES = "avx512vnni" in features()  # integers are multiplied 64 bytes at a time, else 32
LANES = 16 if WHOLE_LINES else 8  # sums of integers at once
PAIR_WORDS = max(8, WIDTH)  # words of two bfloat16 numbers that are made at once


def _numbers(builder, loaded, emission):
    """A loaded float, or the two bfloat16 numbers in 32 bits as floats; emission "dot" leaves them packed."""
    if emission == "float32" or emission == "dot":
        return [loaded]
    high = ir.Constant(loaded.type, -65536 if loaded.type == _I32 else [-65536] * loaded.type.count)
    shift = ir.Constant(loaded.type, 16 if loaded.type == _I32 else [16] * loaded.type.count)
    floats = _F32 if loaded.type == _I32 else ir.VectorType(_F32, loaded.type.count)
    bits = builder.shl(loaded, shift), builder.and_(loaded, high)
    return [builder.bitcast(part, floats) for part in bits]


def _dot(builder, total, left, right):
    """total += left pair . right pair, in every lane: one instruction of AVX-512 BF16."""
    pairs = ir.VectorType(Bfloat(), 2 * WIDTH)
    function = declared(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, [total.type, pairs, pairs])
    return builder.call(function, [total, builder.bitcast(left, pairs), builder.bitcast(right, pairs)])


def _line(count, kind=_F32):
    return ir.VectorType(kind, count)


def _spread(builder, number, count):
    """The same number in every lane."""
    nowhere = ir.Constant(_line(count, number.type), ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(nowhere, number, _I32(0)), nowhere, ir.Constant(_line(count, _I32), None)
    )


def _pointer(context, builder, kind, array, at):
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _load(builder, pointer, kind, align=4):
    loaded = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    loaded.align = align
    return loaded


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def _emit_tile(rows, emission, context, builder, signature, values):
    a, a_at, a_row, a_step, b, b_at, b_step, c, c_at, c_row, depth, accumulate = values
    kind, vector = (_F32 if emission == "float32" else _I32), _line(WIDTH)
    a_start = _pointer(context, builder, signature.args[0], a, a_at)
    b_start = _pointer(context, builder, signature.args[4], b, b_at)
    c_start = _pointer(context, builder, signature.args[7], c, c_at)
    zero = ir.Constant(vector, None)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(_VECTORS)] for _ in range(rows)]
    with cgutils.for_range(builder, depth, intp=_I64) as loop:
        line_start = builder.gep(b_start, [builder.mul(loop.index, b_step)])
        lines = [
            _load(builder, builder.gep(line_start, [_I64(WIDTH * v)]), _line(WIDTH, kind)) for v in range(_VECTORS)
        ]
        lines = [_numbers(builder, line, emission) for line in lines]
        column = builder.gep(a_start, [builder.mul(loop.index, a_step)])
        for row in range(rows):
            loaded = _load(builder, builder.gep(column, [builder.mul(a_row, _I64(row))]), kind)
            spread = [_spread(builder, number, WIDTH) for number in _numbers(builder, loaded, emission)]
            for v in range(_VECTORS):
                total = builder.load(sums[row][v])
                for left, right in zip(spread, lines[v], strict=True):
                    if emission == "dot":
                        total = _dot(builder, total, left, right)
                    else:
                        product = builder.fmul(left, right, flags=("contract",))
                        total = builder.fadd(total, product, flags=("contract",))
                builder.store(total, sums[row][v])

    def store(add):
        for row in range(rows):
            for v in range(_VECTORS):
                place = builder.gep(c_start, [builder.add(builder.mul(c_row, _I64(row)), _I64(WIDTH * v))])
                value = builder.load(sums[row][v])
                _store(builder, builder.fadd(_load(builder, place, vector), value) if add else value, place)

    with builder.if_else(builder.icmp_signed("!=", accumulate, accumulate.type(0))) as (then, otherwise):
        with then:
            store(add=True)
        with otherwise:
            store(add=False)
    return context.get_dummy_value()


def _tile(rows):
    """tile(a, a_at, a_row, a_step, b, b_at, b_step, c, c_at, c_row, depth, accumulate): strides in elements.

    Where a and b are of uint32 they hold two bfloat16 numbers in each, and k counts such pairs.
    """

    def typed(typing_context, a, a_at, a_row, a_step, b, b_at, b_step, c, c_at, c_row, depth, accumulate):
        i, emission = types.intp, PAIR_EMISSION if a.dtype == types.uint32 else "float32"
        signature = types.void(a, i, i, i, b, i, i, c, i, i, i, i)
        return signature, lambda *arguments: _emit_tile(rows, emission, *arguments)

    def plain(a, a_at, a_row, a_step, b, b_at, b_step, c, c_at, c_row, depth, accumulate):
        strided = np.lib.stride_tricks.as_strided
        left = strided(_from(a, a_at, 1), (rows, depth), (4 * a_row, 4 * a_step))
        right = strided(_from(b, b_at, 1), (depth, TILE_COLUMNS), (4 * b_step, 4))
        into = strided(_from(c, c_at, 1), (rows, TILE_COLUMNS), (4 * c_row, 4))
        if a.dtype == np.float32:
            product = left @ right
        else:
            product = sum(
                left_half @ right_half for left_half, right_half in zip(_halves(left), _halves(right), strict=True)
            )
        into[...] = product + into if accumulate else product

    return plain if JIT_DISABLED else intrinsic(typed)


def _halves(pairs):
    return (pairs << np.uint32(16)).view(np.float32), (pairs & np.uint32(0xFFFF0000)).view(np.float32)


def _copy(count, scaled):
    """move(into, into_at, source, source_at), and scale(..., factor): `count` numbers, as they are or times factor."""

    def emit(context, builder, signature, values):
        line = _load(builder, _pointer(context, builder, signature.args[2], values[2], values[3]), _line(count))
        if scaled:
            line = builder.fmul(line, _spread(builder, values[4], count))
        _store(builder, line, _pointer(context, builder, signature.args[0], values[0], values[1]))
        return context.get_dummy_value()

    def move(typing_context, into, into_at, source, source_at):
        return types.void(into, types.intp, source, types.intp), emit

    def scale(typing_context, into, into_at, source, source_at, factor):
        return types.void(into, types.intp, source, types.intp, types.float32), emit

    def plain(into, into_at, source, source_at, factor=None):
        line = _from(source, source_at, count)
        _from(into, into_at, count)[:] = line if factor is None else line * factor

    return plain if JIT_DISABLED else intrinsic(scale if scaled else move)


def _bfloat_words(builder, first, second, neighbours):
    """Two lines as bfloat16: number i of both in word i, or neighbours of all their numbers in one."""
    count = first.type.count
    if NATIVE_BFLOAT and count == WIDTH:
        numbers = ir.VectorType(Bfloat(), 2 * count)
        function = declared(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", numbers, [first.type] * 2)
        shorts = builder.bitcast(builder.call(function, [second, first]), _line(2 * count, ir.IntType(16)))
        if not neighbours:
            turns = ir.Constant(_line(2 * count, _I32), [half * count + i for i in range(count) for half in (0, 1)])
            shorts = builder.shuffle_vector(shorts, shorts, turns)
        return builder.bitcast(shorts, _line(count, _I32))
    low, high = (bfloat_bits_of(builder, line) for line in (first, second))
    if neighbours:
        shorts = [builder.bitcast(line, _line(2 * count, ir.IntType(16))) for line in (low, high)]
        uppers = ir.Constant(_line(2 * count, _I32), list(range(1, 4 * count, 2)))
        return builder.bitcast(builder.shuffle_vector(*shorts, uppers), low.type)
    low = builder.lshr(low, ir.Constant(low.type, [16] * count))
    return builder.or_(low, builder.and_(high, ir.Constant(high.type, [-65536] * count)))


def _pair(count, neighbours=False):
    """pair(into, into_at, source, first_at, second_at): a bfloat16 of each in one word, the first in the lower half.

    With `neighbours` first_at alone is given: word i holds source[first_at + 2 * i] and the number after it.  The
    source is float32, or the bits of such numbers in uint16.
    """

    def emit(context, builder, signature, values):
        rounded = signature.args[2].dtype == types.uint16

        def load(at, kind):
            place = _pointer(context, builder, signature.args[2], values[2], at)
            return _load(builder, place, kind, 2 if rounded else 4)

        if rounded and neighbours:
            words = load(values[3], _line(count, _I32))
        elif rounded:
            halves = [load(at, _line(count, ir.IntType(16))) for at in values[3:5]]
            low, high = (builder.zext(half, _line(count, _I32)) for half in halves)
            words = builder.or_(low, builder.shl(high, ir.Constant(high.type, [16] * count)))
        else:
            second_at = builder.add(values[3], _I64(count)) if neighbours else values[4]
            lines = [load(at, _line(count)) for at in (values[3], second_at)]
            words = _bfloat_words(builder, *lines, neighbours)
        _store(builder, words, _pointer(context, builder, signature.args[0], values[0], values[1]))
        return context.get_dummy_value()

    def apart(typing_context, into, into_at, source, first_at, second_at):
        return types.void(into, types.intp, source, types.intp, types.intp), emit

    def side_by_side(typing_context, into, into_at, source, first_at):
        return types.void(into, types.intp, source, types.intp), emit

    def plain(into, into_at, source, first_at, second_at=None):
        def bits(at, count):
            found = _from(source, at, count)
            return found.astype(np.uint32) if source.dtype == np.uint16 else bfloat_bits(found)

        if second_at is None:
            first, second = bits(first_at, 2 * count)[::2], bits(first_at, 2 * count)[1::2]
        else:
            first, second = bits(first_at, count), bits(second_at, count)
        _from(into, into_at, count)[:] = first | (second << np.uint32(16))

    return plain if JIT_DISABLED else intrinsic(side_by_side if neighbours else apart)


def bfloat_bits(x):
    """The 16 bits of the nearest bfloat16, ties to even, as uint32; a NaN stays one.  For NumPy arrays."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)


def _turn(count):
    """turn(x, low_at, high_at, cos, sin, at, sign): rotate the pairs (x[low_at + i], x[high_at + i]), i < count."""

    def typed(typing_context, x, low_at, high_at, cos, sin, at, sign):
        def emit(context, builder, signature, values):
            def place(array, position):
                return _pointer(context, builder, signature.args[array], values[array], values[position])

            low, high = (_load(builder, place(0, position), _line(count)) for position in (1, 2))
            c, s = (_load(builder, place(array, 5), _line(count)) for array in (3, 4))
            s = builder.fmul(s, _spread(builder, values[6], count))
            turned = builder.fsub(builder.fmul(low, c), builder.fmul(high, s))
            _store(builder, builder.fadd(builder.fmul(high, c), builder.fmul(low, s)), place(0, 2))
            _store(builder, turned, place(0, 1))
            return context.get_dummy_value()

        i = types.intp
        return types.void(x, i, i, cos, sin, i, types.float32), emit

    def plain(x, low_at, high_at, cos, sin, at, sign):
        low, high = _from(x, low_at, count), _from(x, high_at, count)
        c, s = _from(cos, at, count), _from(sin, at, count) * sign
        low[:], high[:] = low * c - high * s, high * c + low * s

    return plain if JIT_DISABLED else intrinsic(typed)


def _fetch_line(written):
    """fetch(array, at): ask for the cache line of array[at], which is read soon, or read and written."""

    def typed(typing_context, array, at):
        def emit(context, builder, signature, values):
            place = builder.ptrtoint(_pointer(context, builder, signature.args[0], *values), _I64)
            fetch(builder, place, written)
            return context.get_dummy_value()

        return types.void(array, types.intp), emit

    def plain(array, at):
        pass

    return plain if JIT_DISABLED else intrinsic(typed)


# Each stage of an 8 x 8 transpose: how two lines that meet are interleaved, first and second half.
_INTERLEAVE = {
    "pairs": ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
    "fours": ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
    "halves": ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
}


def _transpose_eight(typing_context, into, into_at, into_step, source, source_at, source_step):
    """into[into_at + i * into_step + j] = source[source_at + j * source_step + i] for i, j < 8; 32-bit elements."""

    def emit(context, builder, signature, values):
        def meet(first, second, stage, part):
            return builder.shuffle_vector(first, second, ir.Constant(_line(8, _I32), _INTERLEAVE[stage][part]))

        def place(array, start, step, i):
            at = builder.add(values[start], builder.mul(values[step], _I64(i)))
            return _pointer(context, builder, signature.args[array], values[array], at)

        lines = [_load(builder, place(3, 4, 5, j), _line(8)) for j in range(8)]
        pairs = [meet(lines[j], lines[j + 1], "pairs", part) for j in (0, 2, 4, 6) for part in (0, 1)]
        fours = [meet(pairs[j], pairs[j + 2], "fours", part) for j in (0, 1, 4, 5) for part in (0, 1)]
        whole = [meet(fours[j], fours[j + 4], "halves", part) for part in (0, 1) for j in range(4)]
        for i in range(8):
            _store(builder, whole[i], place(0, 1, 2, i))
        return context.get_dummy_value()

    i = types.intp
    return types.void(into, i, i, source, i, i), emit


def _transpose_eight_plain(into, into_at, into_step, source, source_at, source_step):
    strided = np.lib.stride_tricks.as_strided
    target = strided(_from(into, into_at, 1), (8, 8), (4 * into_step, 4))
    target[...] = strided(_from(source, source_at, 1), (8, 8), (4 * source_step, 4)).T


def _from(array, at, count):
    return np.lib.stride_tricks.as_strided(array, (at + count,), (array.itemsize,))[at:]


# Where the processor has no dot product of bfloat16 pairs, each half is widened and multiplied as float32.
PAIR_EMISSION = "dot" if NATIVE_BFLOAT else "pairs"
tile, tile_of_one_row = _tile(TILE_ROWS), _tile(1)
move_eight, scale_eight, scale_one = _copy(8, False), _copy(8, True), _copy(1, True)
turn_eight, turn_one = _turn(8), _turn(1)
pair_words, pair_one, pair_neighbours = _pair(PAIR_WORDS), _pair(1), _pair(PAIR_WORDS, neighbours=True)
fetch_to_read, fetch_to_write = _fetch_line(False), _fetch_line(True)
transpose_eight: Any = _transpose_eight_plain if JIT_DISABLED else intrinsic(_transpose_eight)
