"""Products of a few rows with weights of small integers on tile registers (AMX).

Sixteen rows of x are the left operand, their upper bytes and their lower ones; lines of codes, as they lie in memory,
are the right one.  A group's sums leave the registers as integers and are scaled while those of the next are made: the
same numbers in the same order as without such registers, so that a row's result does not depend on which way it went.
"""

from ..addresses import bytes_at, floats_at, pairs_at
from ..amx import SIDE, STATE_SIZE, dot_bytes, load_tile_at, store_tile, zero_tile
from ..integer_lines import GROUP, LINE, LINES, spread_codes
from ..integer_streams import add_group
from ..jit import njit
from ..streams import AHEAD, INT4, INT8
from ..vectors import fetch_to_read

REGISTER = SIDE * SIDE  # words
_SUMS = 4 * REGISTER  # of a group, with two runs of weight rows
_X, _X_INT4 = GROUP[INT8], GROUP[INT4]  # bytes of a group of x: upper ones, then as many lower ones
_BLOCK = LINES[INT8] * LINE  # bytes of a group of a run
_CODES = 3 * LINES[INT8] // 2 * LINE  # bytes: a group of int4, one code a byte, between lines of zeros
_HALF = LINES[INT8] // 2 * LINE
# Floats of scratch: what stands for registers, two groups' sums, two groups' codes of two runs, results so far.
TILES_ASIDE = STATE_SIZE + 2 * _SUMS + _CODES + 2 * REGISTER


@njit
def _ask_ahead(codes):
    """Ask for what comes behind a group of int8, as reading it in streams.py does."""
    lines = pairs_at(codes + AHEAD, _BLOCK // 4)
    for i in range(0, lines.size, LINE // 4):
        fetch_to_read(lines, i)


@njit
def _int8_sums(state, w, w_2, x, x_step, group, spread):
    """Sums of both bytes in registers 0 and 1, of the second run in 2 and 3."""
    at = group * _BLOCK
    load_tile_at(state, 4, x + 2 * _X * group, x_step)
    load_tile_at(state, 5, x + 2 * _X * group + _X, x_step)
    load_tile_at(state, 6, w + at, LINE)
    dot_bytes(state, 0, 4, 6)
    dot_bytes(state, 1, 5, 6)
    _ask_ahead(w + at)
    load_tile_at(state, 7, w_2 + at, LINE)
    dot_bytes(state, 2, 4, 7)
    dot_bytes(state, 3, 5, 7)
    _ask_ahead(w_2 + at)


@njit
def _int4_sums(state, w, w_2, x, x_step, group, spread):
    """The same; both bytes of x share a register, and zeros meet those which are not wanted."""
    load_tile_at(state, 4, x + 2 * _X_INT4 * group, x_step)
    load_tile_at(state, 6, spread + _HALF, LINE)
    dot_bytes(state, 0, 4, 6)
    load_tile_at(state, 7, spread, LINE)
    dot_bytes(state, 1, 4, 7)
    load_tile_at(state, 6, spread + _CODES + _HALF, LINE)
    dot_bytes(state, 2, 4, 6)
    load_tile_at(state, 7, spread + _CODES, LINE)
    dot_bytes(state, 3, 4, 7)


def on_tiles(kind):
    """The function of a format: its number in the closure, for what intrinsics want literally."""
    columns, lines, sums_of = GROUP[kind], LINES[kind], _int8_sums if kind == INT8 else _int4_sums

    @njit
    def multiply(w, s, y, y_step, w_2, s_2, y_2, y_step_2, groups, x, x_step, rows, scratch):
        """y = up to 16 rows of x times a run of weight rows, y_2 = the same times another; in `begin_tiles`.

        There is memory of 16 rows of x, prepared as in integers.py, whatever it holds.
        """
        state, sums = pairs_at(scratch, STATE_SIZE), floats_at(scratch + 4 * STATE_SIZE, 2 * _SUMS)
        beside = scratch + 4 * (STATE_SIZE + 2 * _SUMS)
        held = beside + 4 * _CODES
        if kind == INT4:
            bytes_at(beside, 4 * _CODES)[:] = 0
            spread_codes(w, beside + _HALF)
            spread_codes(w_2, beside + _CODES + _HALF)
        starts = 2 * columns * groups
        factors = starts + 4 * groups
        for g in range(groups + 1):
            if g < groups:
                here, ahead = beside + g % 2 * 2 * _CODES, beside + (g + 1) % 2 * 2 * _CODES
                zero_tile(state, 0)
                zero_tile(state, 1)
                zero_tile(state, 2)
                zero_tile(state, 3)
                sums_of(state, w, w_2, x, x_step, g, here)
                at = g % 2 * _SUMS
                store_tile(state, 0, sums, at, SIDE)
                store_tile(state, 1, sums, at + REGISTER, SIDE)
                store_tile(state, 2, sums, at + 2 * REGISTER, SIDE)
                store_tile(state, 3, sums, at + 3 * REGISTER, SIDE)
                if kind == INT4 and g + 1 < groups:
                    spread_codes(w + (g + 1) * lines * LINE, ahead + _HALF)
                    spread_codes(w_2 + (g + 1) * lines * LINE, ahead + _CODES + _HALF)
            if g > 0:
                done = g - 1
                high, off, off_scale = scratch + 4 * (STATE_SIZE + done % 2 * _SUMS), starts + 4 * done, 2 * SIDE * done
                low, factor = high + 4 * REGISTER, factors + 4 * done
                before, before_2 = (held, held + 4 * REGISTER) if done else (0, 0)
                into, into_2, step, step_2 = held, held + 4 * REGISTER, LINE, LINE
                if g == groups:
                    into, into_2, step, step_2 = y, y_2, y_step, y_step_2
                add_group(into, step, before, high, low, x, x_step, off, factor, s + off_scale, rows)
                high, low = high + 8 * REGISTER, low + 8 * REGISTER
                add_group(into_2, step_2, before_2, high, low, x, x_step, off, factor, s_2 + off_scale, rows)

    return multiply
