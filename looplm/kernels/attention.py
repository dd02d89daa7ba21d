"""Causal attention with grouped key/value heads: forward and backward.

Scores of a few dozen queries are alive at once, never their square.  Keys and values of a head are packed for the
register tile, which does all seven products; each tile of queries stops at the last key that it sees.
A few queries at a time (decoding) take a kernel of their own, where packing would cost more than the arithmetic.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..arrays import Floats, Ints, aligned_empty
from .head_rows import cut, finish_rows, scale_row, shift_rows, unpack_rows, unpack_scaled
from .intrinsics import exp32, larger32
from .jit import njit
from .softmax import LOG2_E, ROWS, differentiate_in_place, weigh
from .vectors import TILE_COLUMNS, TILE_ROWS, tile, transpose_eight

QUERY_BLOCK = 48  # queries whose scores are alive at once: a multiple of every tile's rows, and of ROWS
FEW_QUERIES = 4  # up to so many, the one-call kernel wins

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_LOWEST = np.float32(-3.0e38)


@njit
def _up(value, unit):
    return (value + unit - 1) // unit * unit


@njit
def _pack_rows(into, width, x):
    """into: rows of `width` from x: rows x K; zeros beyond K and in what is left of the last tile."""
    rows, channels = x.shape
    step = x.strides[0] // 4
    for i in range(rows):
        scale_row(into, i * width, x, i * step, channels, _ONE)
        for c in range(channels, width):
            into[i * width + c] = _ZERO
    into[rows * width : _up(rows, TILE_ROWS) * width] = _ZERO


@njit
def _pack_columns(panels, x):
    """panels: for each TILE_COLUMNS rows of x: PK their transpose, K x TILE_COLUMNS; rows beyond the last are zero."""
    rows, channels = x.shape
    step = x.strides[0] // 4
    for first in range(0, rows, 8):
        at = first // TILE_COLUMNS * TILE_COLUMNS * channels + first % TILE_COLUMNS
        if first + 8 <= rows:
            for c in range(0, channels - 7, 8):
                transpose_eight(panels, at + c * TILE_COLUMNS, TILE_COLUMNS, x, first * step + c, step)
            for c in range(channels // 8 * 8, channels):
                for lane in range(8):
                    panels[at + c * TILE_COLUMNS + lane] = x[first + lane, c]
        else:
            for c in range(channels):
                for lane in range(8):
                    panels[at + c * TILE_COLUMNS + lane] = x[first + lane, c] if first + lane < rows else _ZERO
    for first in range(_up(rows, 8), _up(rows, TILE_COLUMNS), 8):
        at = first // TILE_COLUMNS * TILE_COLUMNS * channels + first % TILE_COLUMNS
        for c in range(channels):
            panels[at + c * TILE_COLUMNS : at + c * TILE_COLUMNS + 8] = _ZERO


@njit
def _pack_panels(panels, x, padded):
    """panels: for each TILE_COLUMNS channels of x: PK, `padded` rows x TILE_COLUMNS; zeros beyond K."""
    rows, channels = x.shape
    step = x.strides[0] // 4
    for first in range(0, channels, TILE_COLUMNS):
        width = min(TILE_COLUMNS, channels - first)
        for i in range(rows):
            at = first * padded + i * TILE_COLUMNS
            scale_row(panels, at, x, i * step + first, width, _ONE)
            for c in range(width, TILE_COLUMNS):
                panels[at + c] = _ZERO


@njit
def _products(into, stride, left, width, channels, panels, count, rows, diagonal):
    """into[i, j] = left[i] . key j, tile by tile, up to the last key that some row of the tile sees."""
    for i in range(0, rows, TILE_ROWS):
        seen = min(diagonal + i + TILE_ROWS, count)
        for j in range(0, seen, TILE_COLUMNS):
            tile(
                left, i * width, width, 1, panels, j * channels, TILE_COLUMNS, into, i * stride + j, stride, channels, 0
            )


@njit
def _weighted(into, width, weight, stride, panels, padded_keys, count, rows, diagonal):
    """into[i] = sum of weight[i, j] * row j of the panels over the keys that the tile sees."""
    for i in range(0, rows, TILE_ROWS):
        seen, row = min(diagonal + i + TILE_ROWS, count), i * stride
        for c in range(0, width, TILE_COLUMNS):
            panel, place = c * padded_keys, i * width + c
            tile(weight, row, stride, 1, panels, panel, TILE_COLUMNS, into, place, width, seen, 0)


@njit
def _collect(into, width, weight, stride, right, rows, keys, diagonal):
    """into[j] += sum of weight[i, j] * right[i] over the block's queries that see key j."""
    for j in range(0, keys, TILE_ROWS):
        first = max(0, j - diagonal)  # queries before it see none of the tile's keys
        if first < rows:
            column, count = first * stride + j, rows - first
            for c in range(0, width, TILE_COLUMNS):
                line, place = first * width + c, j * width + c
                tile(weight, column, 1, stride, right, line, width, into, place, width, count, 1)


@njit
def pack_keys(buffer, k, v):
    """k, v: PK -> their panels, for `attend_head`, and what is left of the buffer."""
    keys, channels = k.shape
    padded_keys = _up(keys, TILE_COLUMNS)
    key_panels, rest = cut(buffer, padded_keys * channels)
    value_panels, rest = cut(rest, padded_keys * _up(channels, TILE_COLUMNS))
    _pack_columns(key_panels, k)
    _pack_panels(value_panels, v, padded_keys)
    return key_panels, value_panels, rest


@njit(inline="always")
def attend_head(y, lse, q, keys, first_key, key_panels, value_panels, buffer):
    """One query head.  y, q: SK, lse: S; the last query sees keys first_key and on, each before it one key less."""
    queries, channels = q.shape
    log2 = np.float32(1.0 / np.sqrt(channels)) * LOG2_E
    padded_keys, padded_channels = _up(keys, TILE_COLUMNS), _up(channels, TILE_COLUMNS)
    stride = padded_keys + TILE_COLUMNS  # a power of two would put a column of scores into one cache set
    q_rows, rest = cut(buffer, QUERY_BLOCK * padded_channels)
    out, rest = cut(rest, QUERY_BLOCK * padded_channels)
    divisor, rest = cut(rest, QUERY_BLOCK)
    stats, scores = cut(rest, 2 * QUERY_BLOCK)
    for begin in range(0, queries, QUERY_BLOCK):
        rows = min(QUERY_BLOCK, queries - begin)
        diagonal = keys - queries + begin  # the last key that the block's first query sees
        block = slice(begin, begin + rows)
        lse_rows = lse[block]
        _pack_rows(q_rows, padded_channels, q[block])
        _products(scores, stride, q_rows, padded_channels, channels, key_panels, keys, rows, diagonal)
        for i in range(0, rows, ROWS):
            tile_end = diagonal + (i + ROWS - 1) // TILE_ROWS * TILE_ROWS + TILE_ROWS  # of the last row's tile
            at, seen = i * stride, _up(min(tile_end, keys), TILE_COLUMNS)
            weigh(scores, at, stride, scores, at, stride, seen, first_key, diagonal + i, log2, stats, 2 * i)
            finish_rows(lse_rows, divisor, stats, 2 * i, i, first_key, diagonal + i)
        _weighted(out, padded_channels, scores, stride, value_panels, padded_keys, keys, rows, diagonal)
        unpack_scaled(y[block], out, padded_channels, divisor)


@njit
def _attend(y, lse, q, k, v, keys, start, buffer):
    per_group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for group in range(k.shape[2]):
            key_panels, value_panels, rest = pack_keys(buffer, k[b, :keys, group], v[b, :keys, group])
            for head in range(group * per_group, (group + 1) * per_group):
                own = y[b, :, head], lse[b, :, head], q[b, :, head]
                attend_head(own[0], own[1], own[2], keys, start[b], key_panels, value_panels, rest)


@njit
def _attend_backward(dq, dk, dv, dy, q, k, v, start, y, lse, buffer):
    batch, queries, heads, channels = q.shape
    keys, groups = k.shape[1], k.shape[2]
    per_group = heads // groups
    scale = np.float32(1.0 / np.sqrt(channels))
    padded_keys, padded_channels = _up(keys, TILE_COLUMNS), _up(channels, TILE_COLUMNS)
    stride = padded_keys + TILE_COLUMNS
    key_columns, rest = cut(buffer, padded_keys * channels)
    value_columns, rest = cut(rest, padded_keys * channels)
    key_panels, rest = cut(rest, padded_keys * padded_channels)
    dkey, rest = cut(rest, (padded_keys + TILE_ROWS) * padded_channels)  # a last tile may reach beyond the last key
    dvalue, rest = cut(rest, (padded_keys + TILE_ROWS) * padded_channels)
    q_rows, rest = cut(rest, QUERY_BLOCK * padded_channels)
    dy_rows, rest = cut(rest, QUERY_BLOCK * padded_channels)
    out, rest = cut(rest, QUERY_BLOCK * padded_channels)
    shifts, scores = cut(rest, 2 * QUERY_BLOCK)
    dots, dscores_at = shifts[QUERY_BLOCK:], QUERY_BLOCK * stride
    dscores = scores[dscores_at:]
    for b in range(batch):
        first_key = start[b]
        for group in range(groups):
            _pack_columns(key_columns, k[b, :, group])
            _pack_columns(value_columns, v[b, :, group])
            _pack_panels(key_panels, k[b, :, group], padded_keys)
            dkey[:] = _ZERO
            dvalue[:] = _ZERO
            for head in range(group * per_group, (group + 1) * per_group):
                for begin in range(0, queries, QUERY_BLOCK):
                    rows = min(QUERY_BLOCK, queries - begin)
                    diagonal = keys - queries + begin
                    block = slice(begin, begin + rows)
                    _pack_rows(q_rows, padded_channels, q[b, block, head])
                    _pack_rows(dy_rows, padded_channels, dy[b, block, head])
                    _products(scores, stride, q_rows, padded_channels, channels, key_columns, keys, rows, diagonal)
                    _products(dscores, stride, dy_rows, padded_channels, channels, value_columns, keys, rows, diagonal)
                    shift_rows(shifts, dots, lse[b, block, head], dy[b, block, head], y[b, block, head])
                    for i in range(0, rows, 2):
                        last, below = diagonal + i, diagonal + i + 1
                        # a tile of gradients of keys reads as many scores behind a row's last
                        beyond = _up(below + TILE_ROWS, TILE_COLUMNS)
                        differentiate_in_place(
                            scores,
                            i * stride,
                            dscores_at + i * stride,
                            stride,
                            beyond,
                            first_key,
                            last,
                            below,
                            scale,
                            shifts,
                            i,
                            QUERY_BLOCK + i,
                        )
                    _weighted(out, padded_channels, dscores, stride, key_panels, padded_keys, keys, rows, diagonal)
                    unpack_rows(dq[b, block, head], out, padded_channels)
                    seen = min(diagonal + rows, keys)
                    _collect(dkey, padded_channels, dscores, stride, q_rows, rows, seen, diagonal)
                    _collect(dvalue, padded_channels, scores, stride, dy_rows, rows, seen, diagonal)
            unpack_rows(dk[b, :, group], dkey, padded_channels)
            unpack_rows(dv[b, :, group], dvalue, padded_channels)


@njit
def _attend_few(y, lse, q, k, v, keys, start, scores):
    """y: BSHK for a handful of queries, one (row, query, head) after the other; the first `keys` positions of k, v."""
    batch, queries, heads, channels = q.shape
    per_group = heads // k.shape[2]
    scale = np.float32(1.0 / np.sqrt(channels))
    for b in range(batch):
        for s in range(queries):
            last = keys - queries + s
            for head in range(heads):
                group, query, out = head // per_group, q[b, s, head], y[b, s, head]
                out[:] = _ZERO
                lse[b, s, head] = _ZERO
                if last < start[b]:
                    continue
                highest = _LOWEST
                for j in range(start[b], last + 1):
                    dot, key = _ZERO, k[b, j, group]
                    for i in range(channels):
                        dot += query[i] * key[i]
                    dot *= scale
                    scores[j] = dot
                    highest = larger32(highest, dot)
                total = _ZERO
                for j in range(start[b], last + 1):
                    weight, value = exp32(scores[j] - highest), v[b, j, group]
                    total += weight
                    for i in range(channels):
                        out[i] += weight * value[i]
                inverse = _ONE / total
                for i in range(channels):
                    out[i] *= inverse
                lse[b, s, head] = highest + np.log(total)


def forward_buffer_size(keys: int, channels: int) -> int:
    """Elements the forward pass needs for up to so many keys."""
    padded_keys, padded_channels = _padded(keys, channels)
    per_key = channels + padded_channels
    per_query = 2 * padded_channels + padded_keys + TILE_COLUMNS + 3  # scores, with a divisor and two of stats
    return padded_keys * per_key + QUERY_BLOCK * per_query


def _backward_buffer_size(keys: int, channels: int) -> int:
    padded_keys, padded_channels = _padded(keys, channels)
    per_key = 2 * channels + 3 * padded_channels
    per_query = 3 * padded_channels + 2 * (padded_keys + TILE_COLUMNS + 1)  # both scores, each with a shift
    return padded_keys * per_key + 2 * TILE_ROWS * padded_channels + QUERY_BLOCK * per_query


def _padded(keys: int, channels: int) -> tuple[int, int]:
    return -(-keys // TILE_COLUMNS) * TILE_COLUMNS, -(-channels // TILE_COLUMNS) * TILE_COLUMNS


class Attends(Protocol):
    """One thread's attention over up to so many keys, all of which a call gives."""

    def forward_into(self, y: Floats, lse: Floats, q: Floats, k: Floats, v: Floats, start: Ints) -> None:
        """y: BSHK and lse: BSH from q: BSHK and k, v: BPGK; all may be views."""

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
        """Overwrites dq: BSHK, dk, dv: BPGK; probabilities are computed again from `lse`, block by block."""


class Attention:
    """One thread's attention in float32 over up to `keys` keys, and if `backward` also its gradient."""

    def __init__(self, keys: int, channels: int, backward: bool = False) -> None:
        size = forward_buffer_size(keys, channels)
        if backward:
            size = max(size, _backward_buffer_size(keys, channels))
        self._buffer = aligned_empty((size,))

    def forward_into(self, y: Floats, lse: Floats, q: Floats, k: Floats, v: Floats, start: Ints) -> None:
        few = q.shape[1] <= FEW_QUERIES
        (_attend_few if few else _attend)(y, lse, q, k, v, k.shape[1], start, self._buffer)

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
        _attend_backward(dq, dk, dv, dy, q, k, v, start, y, lse, self._buffer)


Forward = Callable[[Floats, Floats, Floats, Ints], tuple[Floats, Floats]]
Backward = Callable[[Floats, Floats, Floats, Floats, Ints, Floats, Floats], tuple[Floats, Floats, Floats]]


def attention_with(kind: Callable[[int, int, bool], Attends]) -> tuple[Forward, Backward]:
    """`attention_forward` and `attention_backward` by one of its implementations."""

    def attention_forward(q: Floats, k: Floats, v: Floats, start: Ints) -> tuple[Floats, Floats]:
        y, lse = np.empty_like(q), np.empty(q.shape[:3], q.dtype)
        kind(k.shape[1], q.shape[3], False).forward_into(y, lse, q, k, v, start)
        return y, lse

    def attention_backward(
        dy: Floats, q: Floats, k: Floats, v: Floats, start: Ints, y: Floats, lse: Floats
    ) -> tuple[Floats, Floats, Floats]:
        dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        kind(k.shape[1], q.shape[3], True).backward_into(dq, dk, dv, dy, q, k, v, start, y, lse)
        return dq, dk, dv

    return attention_forward, attention_backward


attention_forward, attention_backward = attention_with(Attention)
