"""Products of a few rows with weights of small integers, and such weights as floats."""

import numpy as np

from .. import amx
from ..addresses import bytes_at, floats_at, pairs_at, words_at
from ..amx import STATE_SIZE, begin_tiles, end_tiles
from ..integer_lines import GROUP, LINE, LINES, SIDE, ZERO_POINT, round_group, widen_group
from ..integer_streams import RUNS, TOGETHER, integer_stream
from ..intrinsics import widen16
from ..jit import Routine, njit
from ..streams import INT4, INT8
from .integer_tiles import TILES_ASIDE, on_tiles

# Compiled code reads no tables.
_GROUP_8, _GROUP_4, _LINES_8, _LINES_4 = GROUP[INT8], GROUP[INT4], LINES[INT8], LINES[INT4]
_ZERO_POINT_8, _ZERO_POINT_4 = np.int32(ZERO_POINT[INT8]), np.int32(ZERO_POINT[INT4])
_ZERO = np.float32(0.0)
FEW_ROWS = 24  # up to so many rows, weights are multiplied as they lie in memory
# So many rows, and more, go through tile registers, if there are such for integers: measured.
TILED_ROWS = {INT8: 5, INT4: 9}
# Floats of scratch: what tile registers want, and results of which not all are wanted.
ASIDE = TILES_ASIDE + 2 * SIDE * SIDE


@njit
def group_size(kind):
    """Columns that share a scale."""
    return _GROUP_8 if kind == INT8 else _GROUP_4


@njit
def groups_of(kind, columns):
    return (columns + group_size(kind) - 1) // group_size(kind)


@njit
def _lines(kind, columns):
    """Lines of codes that a run of SIDE rows takes."""
    return groups_of(kind, columns) * (_LINES_8 if kind == INT8 else _LINES_4)


@njit
def widen_integers(kind, codes, scales, columns, n, out):
    """Row n of a stored matrix of integers as float32 numbers.  out: an array of `columns`."""
    run, row, groups, group = n // SIDE, n % SIDE, groups_of(kind, columns), group_size(kind)
    size = _lines(kind, columns) * LINE
    lines, row_scales = bytes_at(codes + run * size, size), words_at(scales + 2 * SIDE * groups * run, SIDE * groups)
    for g in range(groups):
        scale, line = widen16(row_scales[g * SIDE + row]), out[g * group : min(columns, (g + 1) * group)]
        for i in range(line.size):
            column = g * group + i
            if kind == INT8:
                code = np.int32(lines[column // 4 * LINE + 4 * row + column % 4]) - _ZERO_POINT_8
            else:
                both = np.int32(lines[column // 8 * LINE + 4 * row + column % 4])
                code = (both >> np.int32(column // 4 % 2 * 4) & np.int32(15)) - _ZERO_POINT_4
            line[i] = scale * np.float32(code)


@njit
def _step(kind, columns):
    """Bytes of a prepared row: integers, starts, scales, and room for a last group that is not full; whole lines."""
    group = group_size(kind)
    return ((2 * group + 8) * groups_of(kind, columns) + 4 * group + LINE - 1) // LINE * LINE


def _widening(kind, paired):
    """The function of a format: numbers in its closure, which intrinsics want literally."""

    @njit
    def widen(codes, scales, columns, run, into, step):
        """A run of rows as columns of SIDE floats, or of as many words of two bfloat16 numbers, `step` bytes apart."""
        groups, group = groups_of(kind, columns), group_size(kind)
        size, numbers = _lines(kind, columns) // groups * LINE, group // 2 if paired else group
        for g in range(groups):
            place = scales + 2 * SIDE * (run * groups + g)
            widen_group(kind, paired, codes + (run * groups + g) * size, place, into + g * numbers * step, step)

    return widen


_int8_floats, _int8_pairs = (_widening(INT8, paired) for paired in (0, 1))
_int4_floats, _int4_pairs = (_widening(INT4, paired) for paired in (0, 1))


@njit
def in_whole_runs(kind, columns, n):
    """Whether rows from n on can be widened a run at a time: whole groups, and n is a run's first."""
    return kind >= INT8 and columns % group_size(kind) == 0 and n % SIDE == 0


@njit
def widen_run(kind, paired, codes, scales, columns, n, into, step):
    """Rows n to n + 15, column by column: SIDE floats each, `step` bytes apart, from an address on.

    If `paired`, two columns in a word: the nearest bfloat16 numbers.
    """
    run = n // SIDE
    if kind == INT8 and paired:
        _int8_pairs(codes, scales, columns, run, into, step)
    elif kind == INT8:
        _int8_floats(codes, scales, columns, run, into, step)
    elif paired:
        _int4_pairs(codes, scales, columns, run, into, step)
    else:
        _int4_floats(codes, scales, columns, run, into, step)


# ---- preparing x


def _preparing(kind):
    """The function of a format: its number in the closure, which intrinsics want literally."""
    group = GROUP[kind]

    @njit
    def prepare(at, x, columns):
        """A row of x as integers, group by group, then what the sums of each begin with, then the scales."""
        groups = (columns + group - 1) // group
        starts, scales, rest = at + 2 * group * groups, at + (2 * group + 4) * groups, at + (2 * group + 8) * groups
        for g in range(groups):
            source, count = x + 4 * group * g, columns - group * g
            if count < group:
                given, padded = floats_at(source, count), floats_at(rest, group)
                for i in range(group):
                    padded[i] = given[i] if i < count else _ZERO
                source = rest
            round_group(kind, source, at + 2 * group * g, starts + 4 * g, scales + 4 * g)

    return prepare


def prepared_row_size(columns: int) -> int:
    """Floats that a prepared row takes, in either format."""
    return max(_step(kind, columns) for kind in (INT8, INT4)) // 4


# ---- products


@njit
def _is_whole(run, first, last):
    """Whether all rows of a run are wanted."""
    return first <= run * SIDE and (run + 1) * SIDE <= last


@njit
def _place(run, first, last, y, y_row, spare):
    """Where the results of a run go, and the step from row to row: into y, or aside if not all are wanted."""
    return (y + 4 * (run * SIDE - first), 4 * y_row) if _is_whole(run, first, last) else (spare, LINE)


@njit
def _hand_out(run, first, last, rows, y, y_row, spare):
    """What was put aside."""
    begin, end = max(first, run * SIDE), min(last, (run + 1) * SIDE)
    for i in range(0 if _is_whole(run, first, last) else rows):
        into, found = floats_at(y + 4 * (i * y_row + begin - first), end - begin), floats_at(spare + LINE * i, SIDE)
        for j in range(into.size):
            into[j] = found[begin - run * SIDE + j]


def _placing(kind, products, together, spare):
    """A function for two runs of weight rows, from one that knows where results go.

    `spare`: floats of scratch that the latter wants for itself.
    """
    lines = LINES[kind]

    @njit
    def multiply(codes, scales, groups, run, other, first, last, x, x_step, rows, y, y_row, scratch):
        """A run of weight rows, and another if there are two; -1 is none."""
        size, s_size, aside = groups * lines * LINE, groups * 2 * SIDE, scratch + 4 * spare
        w, s, beside = codes + run * size, scales + run * s_size, aside + LINE * together
        into, step = _place(run, first, last, y, y_row, aside)
        w_2, s_2, into_2, step_2 = w, s, beside, LINE
        if other >= 0:
            w_2, s_2 = codes + other * size, scales + other * s_size
            into_2, step_2 = _place(other, first, last, y, y_row, beside)
        products(w, s, into, step, w_2, s_2, into_2, step_2, groups, x, x_step, rows, scratch)
        _hand_out(run, first, last, rows, y, y_row, aside)
        if other >= 0:
            _hand_out(other, first, last, rows, y, y_row, beside)

    return multiply


def _streaming(kind, together, runs):
    """The function for so many rows of x and runs: numbers in its closure, which intrinsics want literally."""

    @njit
    def products(w, s, y, y_step, w_2, s_2, y_2, y_step_2, groups, x, x_step, rows, scratch):
        integer_stream(kind, together, runs, x, x_step, rows, groups, w, s, y, y_step, w_2, s_2, y_2, y_step_2)

    return _placing(kind, products, together, 0)


def multiply_integers(kind: int) -> Routine:
    """The routine of a format for a few rows, as those of stored.py."""
    prepare = _preparing(kind)
    one, two = (_streaming(kind, together, runs) for together, runs in TOGETHER[:2])
    several, most = _streaming(kind, *TOGETHER[-1]), TOGETHER[-1][0]
    tiled = _placing(kind, on_tiles(kind), SIDE, TILES_ASIDE) if amx.NATIVE_BYTES else one  # which then is never called
    least = TILED_ROWS[kind] if amx.NATIVE_BYTES else FEW_ROWS + 1

    def multiply(codes, scales, columns, first, last, x, x_row, rows, y, y_row, prepared, scratch):
        """y[m, n - first] = row m of x . row n of the weight, first <= n < last.  Rows of x and y in floats.

        x is 0 if it lies in `prepared` already, in the form that this format is multiplied with.  Runs of weight rows
        that are read by turns lie far apart, each followed by its neighbour: two long streams.
        """
        groups, step = groups_of(kind, columns), _step(kind, columns)
        for m in range(rows if x else 0):
            prepare(prepared + m * step, x + 4 * x_row * m, columns)
        begin, end, state = first // SIDE, (last + SIDE - 1) // SIDE, pairs_at(scratch, STATE_SIZE)
        if rows >= least:
            begin_tiles(state)
        apart = (end - begin + RUNS - 1) // RUNS
        for run in range(begin, begin + apart):
            other, m = run + apart if RUNS == 2 and run + apart < end else -1, 0
            while rows - m >= least:
                at, into, some = prepared + m * step, y + 4 * m * y_row, min(SIDE, rows - m)
                tiled(codes, scales, groups, run, other, first, last, at, step, some, into, y_row, scratch)
                m += some
            while most > 2 and rows - m >= 3:  # three rows pass as four
                at, into, some = prepared + m * step, y + 4 * m * y_row, min(most, rows - m)
                several(codes, scales, groups, run, -1, first, last, at, step, some, into, y_row, scratch)
                if other >= 0:
                    several(codes, scales, groups, other, -1, first, last, at, step, some, into, y_row, scratch)
                m += some
            while rows - m >= 2:
                at, into = prepared + m * step, y + 4 * m * y_row
                two(codes, scales, groups, run, other, first, last, at, step, 2, into, y_row, scratch)
                m += 2
            if rows > m:
                at, into = prepared + m * step, y + 4 * m * y_row
                one(codes, scales, groups, run, other, first, last, at, step, 1, into, y_row, scratch)
        if rows >= least:
            end_tiles(state)
        return 0

    return Routine(multiply)
