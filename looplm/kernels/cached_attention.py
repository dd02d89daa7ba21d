"""Attention over the key/value cache: new positions turned, appended, and attended to, one key/value head at a time."""

import numpy as np

from . import plan as field
from .addresses import caller, floats_at, longs_at, words_at
from .attention import _attend
from .intrinsics import exp32, round16, widen16
from .jit import Routine, njit
from .product.stored import FEW_ROWS, call_multiply, row_bytes
from .rope import turn_head
from .streams import BFLOAT16, CHANNEL_BLOCK, FLOAT32, weighted_bfloat16, weighted_float32

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@njit
def _append(kind, cache, at, source, count):
    """Numbers into the cache: `at` counts its elements."""
    if kind == FLOAT32:
        floats_at(cache + 4 * at, count)[:] = source[:count]
    else:
        words = words_at(cache + 2 * at, count)
        for i in range(count):
            words[i] = round16(source[i])


@njit
def _add_weighted(kind, values, keys, channels, weight, out):
    """out[c] = sum over keys of weight times value.  values, weight, out: addresses."""
    item = 4 if kind == FLOAT32 else 2
    whole = channels // CHANNEL_BLOCK * CHANNEL_BLOCK
    for c in range(0, whole, CHANNEL_BLOCK):
        if kind == FLOAT32:
            weighted_float32(values + item * c, item * channels, weight, keys, out + 4 * c)
        else:
            weighted_bfloat16(values + item * c, item * channels, weight, keys, out + 4 * c)
    factors, sums = floats_at(weight, keys), floats_at(out, channels)
    for c in range(whole, channels):
        total = _ZERO
        for j in range(keys):
            at = values + item * (j * channels + c)
            if kind == FLOAT32:
                total += factors[j] * floats_at(at, 1)[0]
            else:
                total += factors[j] * widen16(words_at(at, 1)[0])
        sums[c] = total


@njit
def _attend_few(plan, own, slot, b, g, row, keys):
    """All query heads of a group, one position.  Keys and values are read once."""
    kind, channels, heads, groups = plan[field.CACHE_KIND], plan[field.CHANNELS], plan[field.HEADS], plan[field.GROUPS]
    first = longs_at(plan[field.START], plan[field.CACHE_BATCH])[b]
    per_group, total, count = heads // groups, heads + 2 * groups, keys - first
    query = plan[field.QKV] + 4 * channels * (row * total + g * per_group)
    out = plan[field.ATTENTION] + 4 * channels * (row * heads + g * per_group)
    if count <= 0:
        floats_at(out, per_group * channels)[:] = _ZERO
        return
    size = row_bytes(kind, channels)
    place = ((slot * plan[field.CACHE_BATCH] + b) * groups + g) * plan[field.CAPACITY] + first
    scores, stride = own + plan[field.SCORES], plan[field.CAPACITY]
    keys_at, scratch = plan[field.KEYS] + place * size, own + plan[field.SCRATCH]
    arguments = (kind, keys_at, 0, channels, 0, count, query, channels, per_group, scores, stride, scratch, -1)
    call_multiply(plan[field.MULTIPLY], arguments)
    scale = np.float32(1.0 / np.sqrt(channels))
    for head in range(per_group):
        weight = floats_at(scores + 4 * head * stride, count)
        highest = weight[0]
        for j in range(count):
            highest = max(highest, weight[j])
        sum_of_all = _ZERO
        for j in range(count):
            weight[j] = exp32((weight[j] - highest) * scale)
            sum_of_all += weight[j]
        inverse = _ONE / sum_of_all
        for j in range(count):
            weight[j] *= inverse
        values, into = plan[field.VALUES] + place * size, out + 4 * head * channels
        _add_weighted(kind, values, count, channels, scores + 4 * head * stride, into)


@njit
def _attend_many(plan, own, slot, block, b, g, filled):
    """All query heads of a group, all new positions of a block, through register tiles."""
    kind, channels, length, heads = plan[field.CACHE_KIND], plan[field.CHANNELS], plan[field.LENGTH], plan[field.HEADS]
    per_group, total, keys = (
        heads // plan[field.GROUPS],
        heads + 2 * plan[field.GROUPS],
        filled + plan[field.LENGTH],
    )
    size = row_bytes(kind, channels)
    place = ((slot * plan[field.CACHE_BATCH] + b) * plan[field.GROUPS] + g) * plan[field.CAPACITY]
    key_floats, value_floats = plan[field.KEYS] + place * size, plan[field.VALUES] + place * size
    buffer, used = own + plan[field.SCORES], 0
    if kind == BFLOAT16:
        for source, into in ((key_floats, buffer), (value_floats, buffer + 4 * keys * channels)):
            wide, words = floats_at(into, keys * channels), words_at(source, keys * channels)
            for i in range(keys * channels):
                wide[i] = widen16(words[i])
        key_floats, value_floats, used = buffer, buffer + 4 * keys * channels, 2 * keys * channels
        buffer += 4 * used
    first = plan[field.QKV] + 4 * channels * (block * length * total)
    q = floats_at(first, length * total * channels).reshape((1, length, total, channels))
    out = plan[field.ATTENTION] + 4 * channels * (block * length * heads)
    y = floats_at(out, length * heads * channels).reshape((1, length, heads, channels))
    k = floats_at(key_floats, keys * channels).reshape((1, keys, 1, channels))
    v = floats_at(value_floats, keys * channels).reshape((1, keys, 1, channels))
    lse = floats_at(own + plan[field.LSE], length * per_group).reshape((1, length, per_group))
    some = slice(g * per_group, (g + 1) * per_group)
    start = longs_at(plan[field.START], plan[field.CACHE_BATCH])[b : b + 1]
    _attend(y[:, :, some], lse, q[:, :, some], k, v, keys, start, floats_at(buffer, plan[field.SCORES_SIZE] - used))


@njit
def _place(places, row, layer):
    """Where a row's keys and values go -> slot, row of the cache, position."""
    at = row * field.ROW_SIZE
    return places[at + field.ROW_SLOT] + layer, places[at + field.ROW_B], places[at + field.ROW_POSITION]


@Routine
def attend(plan_at, own, layer, first, last):
    """Turn queries and keys, append keys and values, attend: key/value heads first to last.

    Each row goes where the plan's places say, and attends to the positions up to its own in the slot it is appended to.
    Long blocks (`LENGTH` rows each) must be consecutive positions of one cache row in one loop.
    """
    plan = longs_at(plan_at, field.FIRST_LAYER)
    channels, heads, groups, length = plan[field.CHANNELS], plan[field.HEADS], plan[field.GROUPS], plan[field.LENGTH]
    per_group, total = heads // groups, heads + 2 * groups
    half, kind = channels // 2, plan[field.CACHE_KIND]
    rows, start = plan[field.BATCH] * length, longs_at(plan[field.START], plan[field.CACHE_BATCH])
    qkv = floats_at(plan[field.QKV], rows * total * channels)
    places, highest = longs_at(plan[field.PLACES], rows * field.ROW_SIZE), 0
    for row in range(rows):
        highest = max(highest, places[row * field.ROW_SIZE + field.ROW_POSITION])
    cos, sin = floats_at(plan[field.COS], (highest + 1) * half), floats_at(plan[field.SIN], (highest + 1) * half)
    for g in range(first, last):
        for row in range(rows):
            slot, b, where = _place(places, row, layer)
            at = row * total * channels
            angle = max(0, where - start[b]) * half
            for head in range(g * per_group, (g + 1) * per_group):
                turn_head(qkv, at + head * channels, half, cos, sin, angle, _ONE)
            turn_head(qkv, at + (heads + g) * channels, half, cos, sin, angle, _ONE)
            place = (((slot * plan[field.CACHE_BATCH] + b) * groups + g) * plan[field.CAPACITY] + where) * channels
            _append(kind, plan[field.KEYS], place, qkv[at + (heads + g) * channels :], channels)
            _append(kind, plan[field.VALUES], place, qkv[at + (heads + groups + g) * channels :], channels)
        if length > FEW_ROWS:
            for block in range(plan[field.BATCH]):
                slot, b, where = _place(places, block * length, layer)
                _attend_many(plan, own, slot, block, b, g, where)
        else:
            for row in range(rows):
                slot, b, where = _place(places, row, layer)
                _attend_few(plan, own, slot, b, g, row, where + 1)
    return 0


call_attend = caller(attend)
