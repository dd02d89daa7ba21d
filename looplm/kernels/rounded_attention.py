"""Attention as in attention.py with the operands of its seven products rounded to bfloat16; sums stay float32.

What is rounded: queries, keys, values, the incoming gradient, probabilities and the gradients of scores (with the
scale in them).  The forward pass rounds exp(score - largest) and divides by the sum of what is not rounded.
Everything is made of blocks, BLOCK x BLOCK, which tile registers multiply if there is a `state` of them, and otherwise
the register tile of vectors.py.  Gradients of keys and values are summed up turned, channels x keys: so probabilities
and gradients of scores need no turning, only the narrow queries and incoming gradients do.
"""

import numpy as np

from ..arrays import LINE, Array, Floats, Ints, aligned_empty
from .amx import BLOCK, begin_tiles, end_tiles, multiply_block, tile_state
from .head_rows import cut, finish_rows, shift_rows, unpack_rows, unpack_scaled
from .jit import njit
from .product import packing
from .softmax import LOG2_E, ROWS, differentiate, weigh
from .vectors import (
    TILE_COLUMNS,
    TILE_ROWS,
    fetch_to_read,
    fetch_to_write,
    tile,
    tile_of_one_row,
    transpose_eight,
)

QUERY_BLOCK = 64  # queries whose scores are alive at once

_ZERO, _NOTHING = np.float32(0.0), np.uint32(0)


@njit
def _up(count):
    return (count + BLOCK - 1) // BLOCK * BLOCK


@njit(forceinline=True)
def _multiply(state, c, c_at, c_row, a, a_at, a_row, b, b_at, b_row, depth, accumulate):
    """c: BLOCK x BLOCK (+)= a: BLOCK x depth words, times b: depth x BLOCK words."""
    if state is None:
        for j in range(0, BLOCK, TILE_COLUMNS):
            for i in range(0, BLOCK // TILE_ROWS * TILE_ROWS, TILE_ROWS):
                row, into = a_at + i * a_row, c_at + i * c_row + j
                tile(a, row, a_row, 1, b, b_at + j, b_row, c, into, c_row, depth, accumulate)
            for i in range(BLOCK // TILE_ROWS * TILE_ROWS, BLOCK):
                row, into = a_at + i * a_row, c_at + i * c_row + j
                tile_of_one_row(a, row, a_row, 1, b, b_at + j, b_row, c, into, c_row, depth, accumulate)
    else:
        multiply_block(state, c, c_at, c_row, a, a_at, a_row, b, b_at, b_row, depth, accumulate)


@njit
def _pack_rows(words, x, depth):
    """words: rows x depth from x: rows x K, and zeros in what is left of the last strip."""
    rows = x.shape[0]
    packing.pair_rows(words, x, 0, rows, depth)
    words[rows * depth : _up(rows) * depth] = _NOTHING


@njit
def _seen(diagonal, strip, keys):
    """Keys in the blocks that the strip of BLOCK queries sees; `diagonal` is the last that the first query sees."""
    return _up(min(diagonal + strip + BLOCK, keys))


@njit
def _scores(state, into, stride, rows, words, depth, panels, diagonal, keys):
    """into[i, j] = row i of words . key j of panels."""
    for strip in range(0, rows, BLOCK):
        for j in range(0, _seen(diagonal, strip, keys), BLOCK):
            into_at, row = strip * stride + j, strip * depth
            _multiply(state, into, into_at, stride, words, row, depth, panels, j * depth, BLOCK, depth, False)


@njit
def _weighted(state, into, width, rows, words, half, panels, padded_keys, diagonal, keys):
    """into[i] = sum of words[i, j] * row j of the panels."""
    for strip in range(0, rows, BLOCK):
        depth = _seen(diagonal, strip, keys) // 2
        for c in range(0, width, BLOCK):
            into_at, right = strip * width + c, c * (padded_keys // 2)
            _multiply(state, into, into_at, width, words, strip * half, half, panels, right, BLOCK, depth, False)


@njit
def _collect(state, into, stride, width, rows, turned, pairs, diagonal, keys):
    """into[c, j] += sum of turned[c, i] * pairs[i, j] over the strips of queries that see key j."""
    strip, half = 0, QUERY_BLOCK // 2
    for j in range(0, _seen(diagonal, _up(rows) - BLOCK, keys), BLOCK):
        while _seen(diagonal, strip, keys) <= j:
            strip += BLOCK
        first, depth = strip // 2, (_up(rows) - strip) // 2
        for c in range(0, width, BLOCK):
            into_at, row, right = c * stride + j, c * half + first, first * stride + j
            _multiply(state, into, into_at, stride, turned, row, half, pairs, right, stride, depth, True)


@njit
def _ask_for(x, b, begin, rows, head, written):
    """Ask for the cache lines of some rows of a head, if there is one, while something else is being computed."""
    if b < x.shape[0]:
        step = x.strides[1] // 4
        at = b * (x.strides[0] // 4) + begin * step + head * (x.strides[2] // 4)
        for i in range(min(rows, x.shape[1] - begin)):
            for c in range(0, x.shape[3], LINE):
                if written:
                    fetch_to_write(x, at + i * step + c)
                else:
                    fetch_to_read(x, at + i * step + c)


@njit
def _ask_for_next(q, k, v, b, head, begin, rows):
    """The same of what the next head reads: its queries, and where a group of heads begins its keys and values."""
    heads, groups = q.shape[2], k.shape[2]
    following, per_group = b * heads + head + 1, heads // groups
    _ask_for(q, following // heads, begin, rows, following % heads, False)
    if following % per_group == 0:
        upcoming = following // per_group
        _ask_for(k, upcoming // groups, begin, rows, upcoming % groups, False)
        _ask_for(v, upcoming // groups, begin, rows, upcoming % groups, False)


@njit
def _turn_back(x, turned, stride):
    """x: PK from turned: K x stride."""
    keys, channels = x.shape
    step = x.strides[0] // 4
    whole_keys, whole_channels = keys // 8 * 8, channels // 8 * 8
    for j in range(0, whole_keys, 8):
        for c in range(0, whole_channels, 8):
            transpose_eight(x, j * step + c, step, turned, c * stride + j, stride)
    for j in range(keys):
        for c in range(whole_channels if j < whole_keys else 0, channels):
            x[j, c] = turned[c * stride + j]


@njit
def _attend(y, lse, q, k, v, start, words, floats, state):
    batch, queries, heads, channels = q.shape
    keys, groups = k.shape[1], k.shape[2]
    per_group = heads // groups
    scale = np.float32(1.0 / np.sqrt(channels))
    padded_keys, width = _up(keys), _up(channels)
    depth, stride = width // 2, padded_keys + BLOCK  # a power of two would put a column of scores into one cache set
    half = stride // 2
    key_panels, rest = cut(words, padded_keys * depth)
    value_panels, rest = cut(rest, padded_keys * depth)
    lines, rest = cut(rest, 8 * width)
    q_rows, prob = cut(rest, QUERY_BLOCK * depth)
    prob[: QUERY_BLOCK * half] = _NOTHING  # a block's last rows may be none
    out, rest_floats = cut(floats, QUERY_BLOCK * width)
    divisor, rest_floats = cut(rest_floats, QUERY_BLOCK)
    stats, scores = cut(rest_floats, 2 * QUERY_BLOCK)
    log2 = scale * LOG2_E
    if state is not None:
        begin_tiles(state)
    for b in range(batch):
        first_key = start[b]
        for group in range(groups):
            packing.pack_transposed(key_panels, k[b, :, group], lines[: 8 * depth], BLOCK, depth)
            packing.pack_right(value_panels, v[b, :, group], 0, keys, BLOCK, padded_keys // 2)
            for head in range(group * per_group, (group + 1) * per_group):
                for begin in range(0, queries, QUERY_BLOCK):
                    rows = min(QUERY_BLOCK, queries - begin)
                    diagonal = keys - queries + begin
                    block = slice(begin, begin + rows)
                    lse_rows = lse[b, block, head]
                    _pack_rows(q_rows, q[b, block, head], depth)
                    _ask_for_next(q, k, v, b, head, begin, rows)
                    _ask_for(y, b, begin, rows, head, True)
                    _scores(state, scores, stride, rows, q_rows, depth, key_panels, diagonal, keys)
                    for i in range(0, rows, ROWS):
                        seen = _seen(diagonal, i // BLOCK * BLOCK, keys)
                        weigh(
                            prob,
                            i * half,
                            half,
                            scores,
                            i * stride,
                            stride,
                            seen,
                            first_key,
                            diagonal + i,
                            log2,
                            stats,
                            2 * i,
                        )
                        finish_rows(lse_rows, divisor, stats, 2 * i, i, first_key, diagonal + i)
                    _weighted(state, out, width, rows, prob, half, value_panels, padded_keys, diagonal, keys)
                    unpack_scaled(y[b, block, head], out, width, divisor)
    if state is not None:
        end_tiles(state)


@njit
def _attend_backward(dq, dk, dv, dy, q, k, v, start, y, lse, words, floats, state):
    batch, queries, heads, channels = q.shape
    keys, groups = k.shape[1], k.shape[2]
    per_group = heads // groups
    scale = np.float32(1.0 / np.sqrt(channels))
    padded_keys, width = _up(keys), _up(channels)
    depth, stride = width // 2, padded_keys + BLOCK
    half = stride // 2
    key_columns, rest = cut(words, padded_keys * depth)
    value_columns, rest = cut(rest, padded_keys * depth)
    key_panels, rest = cut(rest, padded_keys * depth)
    lines, rest = cut(rest, 8 * width)
    q_rows, rest = cut(rest, QUERY_BLOCK * depth)
    dy_rows, rest = cut(rest, QUERY_BLOCK * depth)
    q_turned, rest = cut(rest, QUERY_BLOCK * depth)
    dy_turned, rest = cut(rest, QUERY_BLOCK * depth)
    q_turned[:] = _NOTHING  # channels that are none
    dy_turned[:] = _NOTHING
    pairs = rest  # of probabilities, of gradients of scores, and the latter in rows
    prob_pairs, rest = cut(rest, QUERY_BLOCK * half)
    dscore_pairs, dscore_rows = cut(rest, QUERY_BLOCK * half)
    dkey, rest_floats = cut(floats, width * stride)
    dvalue, rest_floats = cut(rest_floats, width * stride)
    out, rest_floats = cut(rest_floats, QUERY_BLOCK * width)
    shifts, scores = cut(rest_floats, 2 * QUERY_BLOCK)
    dots, dprob = shifts[QUERY_BLOCK:], scores[QUERY_BLOCK * stride :]
    if state is not None:
        begin_tiles(state)
    for b in range(batch):
        first_key = start[b]
        for group in range(groups):
            packing.pack_transposed(key_columns, k[b, :, group], lines[: 8 * depth], BLOCK, depth)
            packing.pack_transposed(value_columns, v[b, :, group], lines[: 8 * depth], BLOCK, depth)
            packing.pack_right(key_panels, k[b, :, group], 0, keys, BLOCK, padded_keys // 2)
            dkey[:] = _ZERO
            dvalue[:] = _ZERO
            for head in range(group * per_group, (group + 1) * per_group):
                for begin in range(0, queries, QUERY_BLOCK):
                    rows = min(QUERY_BLOCK, queries - begin)
                    diagonal = keys - queries + begin
                    block = slice(begin, begin + rows)
                    q_own, dy_own = q[b, block, head], dy[b, block, head]
                    _pack_rows(q_rows, q_own, depth)
                    _pack_rows(dy_rows, dy_own, depth)
                    packing.pack_rows_of_transpose(q_turned, lines, q_own, 0, rows, 0, channels, QUERY_BLOCK // 2)
                    packing.pack_rows_of_transpose(dy_turned, lines, dy_own, 0, rows, 0, channels, QUERY_BLOCK // 2)
                    _ask_for_next(q, k, v, b, head, begin, rows)
                    following = b * heads + head + 1
                    _ask_for(dy, following // heads, begin, rows, following % heads, False)
                    _ask_for(y, following // heads, begin, rows, following % heads, False)
                    _ask_for(dq, b, begin, rows, head, True)
                    if following % per_group == 0:
                        _ask_for(dk, b, begin, rows, group, True)
                        _ask_for(dv, b, begin, rows, group, True)
                    _scores(state, scores, stride, rows, q_rows, depth, key_columns, diagonal, keys)
                    _scores(state, dprob, stride, rows, dy_rows, depth, value_columns, diagonal, keys)
                    shift_rows(shifts, dots, lse[b, block, head], dy_own, y[b, block, head])
                    for i in range(0, _up(rows), 2):
                        last, below = diagonal + i, diagonal + i + 1
                        differentiate(
                            pairs,
                            i // 2 * stride,
                            (QUERY_BLOCK + i) // 2 * stride,
                            QUERY_BLOCK * stride + i * half,
                            half,
                            scores,
                            i * stride,
                            (QUERY_BLOCK + i) * stride,
                            stride,
                            _seen(diagonal, i // BLOCK * BLOCK, keys),
                            first_key,
                            last if i < rows else -1,
                            below if i + 1 < rows else -1,
                            scale,
                            shifts,
                            i,
                            QUERY_BLOCK + i,
                        )
                    _weighted(state, out, width, rows, dscore_rows, half, key_panels, padded_keys, diagonal, keys)
                    unpack_rows(dq[b, block, head], out, width)
                    _collect(state, dkey, stride, width, rows, q_turned, dscore_pairs, diagonal, keys)
                    _collect(state, dvalue, stride, width, rows, dy_turned, prob_pairs, diagonal, keys)
            _turn_back(dk[b, :, group], dkey, stride)
            _turn_back(dv[b, :, group], dvalue, stride)
    if state is not None:
        end_tiles(state)


class PairAttention:
    """One thread's attention over up to `keys` keys, and if `backward` also its gradient; vectors multiply."""

    def __init__(self, keys: int, channels: int, backward: bool = False) -> None:
        padded_keys, width = (-(-count // BLOCK) * BLOCK for count in (keys, channels))
        row, of_keys = padded_keys + BLOCK, padded_keys * width // 2
        of_queries, scores = QUERY_BLOCK * width // 2, QUERY_BLOCK * row
        words, floats = 2 * of_keys + of_queries + scores // 2, 2 * of_queries + 3 * QUERY_BLOCK + scores
        if backward:
            words, floats = (
                3 * of_keys + 4 * of_queries + 3 * scores // 2,
                2 * (width * row + of_queries + QUERY_BLOCK + scores),
            )
        self._words, self._floats = packing.empty_words(words + 8 * width), aligned_empty((floats,))
        self._state: Array | None = None

    def forward_into(self, y: Floats, lse: Floats, q: Floats, k: Floats, v: Floats, start: Ints) -> None:
        _attend(y, lse, q, k, v, start, self._words, self._floats, self._state)

    def backward_into(
        self,
        dq: Floats,
        dk: Floats,
        dv: Floats,
        dy: Floats,
        q: Floats,
        k: Floats,
        v: Floats,
        start: Ints,
        y: Floats,
        lse: Floats,
    ) -> None:
        _attend_backward(dq, dk, dv, dy, q, k, v, start, y, lse, self._words, self._floats, self._state)


class TileAttention(PairAttention):
    """The same; tile registers multiply."""

    def __init__(self, keys: int, channels: int, backward: bool = False) -> None:
        super().__init__(keys, channels, backward)
        self._state = tile_state()
