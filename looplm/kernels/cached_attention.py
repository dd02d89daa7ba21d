"""Attention over the key/value cache: new positions turned, appended and attended to, one key/value group at a time."""

import numpy as np

from . import plan as field
from .addresses import floats_at, longs_at, rows_at, words_at
from .attention import attend_head, pack_keys
from .cache_streams import CHANNEL_BLOCK, KEYS, scored, weighted
from .intrinsics import exp32, larger32, round16, widen16
from .jit import Routine, njit
from .product.stored import copy_columns, sort_columns
from .rope import turn_head
from .streams import BFLOAT16, FLOAT32

SHARED_KEYS = 256  # that all queries of a group pass by before the next are read

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@njit
def _append(kind, cache, at, source, from_at, count):
    """Numbers into the cache: `at` counts its elements."""
    if kind == FLOAT32:
        floats = floats_at(cache + 4 * at, count)
        for i in range(count):
            floats[i] = source[from_at + i]
    else:
        words = words_at(cache + 2 * at, count)
        for i in range(count):
            words[i] = round16(source[from_at + i])


@njit
def _place(plan, row, layer):
    """Where a row's keys and values go -> slot, row of the cache, position."""
    places = longs_at(plan[field.PLACES] + 8 * field.ROW_SIZE * row, field.ROW_SIZE)
    return places[field.ROW_SLOT] + layer, places[field.ROW_B], places[field.ROW_POSITION]


@njit
def _start(plan, b):
    return longs_at(plan[field.START], plan[field.CACHE_BATCH])[b]


@njit
def _line(plan, slot, b, g, position):
    """The number of a position's keys (or values) among all that the cache has room for."""
    return ((slot * plan[field.CACHE_BATCH] + b) * plan[field.GROUPS] + g) * plan[field.CAPACITY] + position


@njit
def _seen(plan, row, layer, g):
    """What a row attends to -> the first of a group's positions, counted in the cache, and how many there are."""
    slot, b, where = _place(plan, row, layer)
    start = _start(plan, b)
    return _line(plan, slot, b, g, start), where + 1 - start


@njit
def _turn_and_append(plan, layer, g):
    """A group's queries and keys turned by their positions; its keys and values into the cache."""
    channels, heads, groups, kind = plan[field.CHANNELS], plan[field.HEADS], plan[field.GROUPS], plan[field.CACHE_KIND]
    half, per_group, total = channels // 2, heads // groups, heads + 2 * groups
    rows = plan[field.BATCH] * plan[field.LENGTH]
    qkv = floats_at(plan[field.QKV], rows * total * channels)
    for row in range(rows):
        slot, b, where = _place(plan, row, layer)
        at, angle = row * total * channels, max(0, where - _start(plan, b)) * half
        cos, sin = floats_at(plan[field.COS], angle + half), floats_at(plan[field.SIN], angle + half)
        for head in range(g * per_group, (g + 1) * per_group):
            turn_head(qkv, at + head * channels, half, cos, sin, angle, _ONE)
        turn_head(qkv, at + (heads + g) * channels, half, cos, sin, angle, _ONE)
        place = _line(plan, slot, b, g, where) * channels
        _append(kind, plan[field.KEYS], place, qkv, at + (heads + g) * channels, channels)
        _append(kind, plan[field.VALUES], place, qkv, at + (heads + groups + g) * channels, channels)


@njit
def _widen(source, into, count):
    words, wide = words_at(source, count), floats_at(into, count)
    for i in range(count):
        wide[i] = widen16(words[i])


def score_size(keys: int) -> int:
    """Floats that the scores of a query take."""
    return keys + KEYS


@njit(forceinline=True)
def _soften(scores, count, scale):
    """Scores to weights, which sum to 1."""
    weight = floats_at(scores, count)
    highest = weight[0]
    for j in range(count):
        highest = larger32(highest, weight[j])
    total = _ZERO
    for j in range(count):
        weight[j] = exp32((weight[j] - highest) * scale)
        total += weight[j]
    inverse = _ONE / total
    for j in range(count):
        weight[j] *= inverse


@njit(forceinline=True)
def _weigh_rest(kind, values, weight, count, out, first, channels):
    """out += weights times values, channels from `first` on."""
    factors, sums = floats_at(weight, count), floats_at(out, channels)
    for c in range(first, channels):
        dot = _ZERO
        for j in range(count):
            if kind == FLOAT32:
                dot += factors[j] * floats_at(values + 4 * j * channels, channels)[c]
            else:
                dot += factors[j] * widen16(words_at(values + 2 * j * channels, channels)[c])
        sums[c] += dot


def _attend_few(kind: int) -> Routine:
    """The routine of a kind of cache: a number in its closure, so that the other is not compiled."""

    def attend_few(plan_at, own, layer, g):
        """One key/value group: turn queries and keys, append keys and values, attend.

        Each row goes where the plan's places say, and attends to the positions up to its own in the slot it is
        appended to: keys and values are read once, by all queries of the group.
        """
        plan = longs_at(plan_at, field.FIRST_LAYER)
        channels, heads, groups = plan[field.CHANNELS], plan[field.HEADS], plan[field.GROUPS]
        per_group, total, size = heads // groups, heads + 2 * groups, (4 if kind == FLOAT32 else 2) * channels
        queries, query_step = own + plan[field.QUERIES], plan[field.QUERY_STEP]
        scores, score_step = own + plan[field.SCORES], plan[field.SCORE_STEP]
        scale, whole = np.float32(1.0 / np.sqrt(channels)), channels // CHANNEL_BLOCK * CHANNEL_BLOCK
        _turn_and_append(plan, layer, g)
        rows = plan[field.BATCH] * plan[field.LENGTH]
        for row in range(rows):
            at, count = _seen(plan, row, layer, g)
            keys, values = plan[field.KEYS] + at * size, plan[field.VALUES] + at * size
            # Asked for a whole row ahead, where there is one: memory takes longer than a half of a row.
            following = min(row + 1, rows - 1)
            after = _seen(plan, following, layer, g)[0] * size
            next_read, next_values = plan[field.KEYS] + after if following > row else values, plan[field.VALUES] + after
            query = plan[field.QKV] + 4 * channels * (row * total + g * per_group)
            out = plan[field.ATTENTION] + 4 * channels * (row * heads + g * per_group)
            sums = floats_at(out, per_group * channels)
            for i in range(sums.size):
                sums[i] = _ZERO
            run = SHARED_KEYS if per_group > 1 else max(1, count)  # alone, long streams are faster; count may be 0
            for first in range(0, count, run):
                some = min(run, count - first)
                for head in range(per_group):
                    ready, into = queries + head * query_step, scores + head * score_step + 4 * first
                    if first == 0:
                        line = floats_at(query + 4 * head * channels, channels)
                        if kind == FLOAT32:
                            copy_columns(ready, line, channels)
                        else:
                            sort_columns(ready, line, channels)
                    scored(kind, keys + first * size, size, some, ready, channels, into, next_read + first * size)
            for head in range(per_group if count > 0 else 0):
                _soften(scores + head * score_step, count, scale)
            for first in range(0, count, run):
                some = min(run, count - first)
                for head in range(per_group):
                    weight, into = scores + head * score_step + 4 * first, out + 4 * head * channels
                    for c in range(0, whole, CHANNEL_BLOCK):
                        off = first * size + c * (size // channels)
                        weighted(kind, values + off, size, weight, some, into + 4 * c, next_values + off)
                    _weigh_rest(kind, values + first * size, weight, some, into, whole, channels)
        return 0

    return Routine(attend_few)


attend_few = {kind: _attend_few(kind) for kind in (FLOAT32, BFLOAT16)}


@Routine
def attend_many(plan_at, own, layer, g):
    """The same for long blocks (`LENGTH` rows each), through register tiles.

    They must be consecutive positions of one cache row in one loop.
    """
    plan = longs_at(plan_at, field.FIRST_LAYER)
    kind, channels, length, heads = plan[field.CACHE_KIND], plan[field.CHANNELS], plan[field.LENGTH], plan[field.HEADS]
    groups = plan[field.GROUPS]
    per_group, total, size = heads // groups, heads + 2 * groups, (4 if kind == FLOAT32 else 2) * channels
    lse = floats_at(own + plan[field.LSE], length)
    _turn_and_append(plan, layer, g)
    for first in range(0, plan[field.BATCH] * length, length):
        slot, b, where = _place(plan, first, layer)
        place, keys = _line(plan, slot, b, g, 0), where + length
        key_floats, value_floats = plan[field.KEYS] + place * size, plan[field.VALUES] + place * size
        buffer, used = own + plan[field.SCORES], 0
        if kind == BFLOAT16:
            used = 2 * keys * channels
            _widen(key_floats, buffer, used // 2)
            _widen(value_floats, buffer + 2 * used, used // 2)
            key_floats, value_floats = buffer, buffer + 2 * used
        k, v = rows_at(key_floats, keys, channels, 4 * channels), rows_at(value_floats, keys, channels, 4 * channels)
        rest = floats_at(buffer + 4 * used, plan[field.SCORES_SIZE] - used)
        key_panels, value_panels, rest = pack_keys(rest, k, v)
        for head in range(g * per_group, (g + 1) * per_group):
            query = plan[field.QKV] + 4 * channels * (first * total + head)
            out = plan[field.ATTENTION] + 4 * channels * (first * heads + head)
            q = rows_at(query, length, channels, 4 * channels * total)
            y = rows_at(out, length, channels, 4 * channels * heads)
            attend_head(y, lse, q, keys, _start(plan, b), key_panels, value_panels, rest)
    return 0
