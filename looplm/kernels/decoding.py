"""One loop of the model over a few rows or many, in one compiled call that all threads of a team work on together.

Rows are M = B * S new positions: B blocks of S consecutive ones; short blocks may be of any loops, since loops share
their weights.  A layer is four phases, each a list of items: a key/value group with its projections, or a run of a
product's outputs.  Threads take items until none is left (team.py), so that a slow one is waited for no longer than an
item takes; whoever finishes the last does what lies between two phases: norms, and x made ready for the next product.
A few rows are multiplied with the weights as they lie in memory; many go through register tiles, a block of weights
widened at a time, unless there are tile registers for both.  A row's result does not depend on other rows or on
threads, within either way.

Everything is described by a plan: a table of numbers and addresses.  Keys and values are (R * L) x B x G x P x K.
"""

import numpy as np

from . import plan as field
from .addresses import call, doubles_at, floats_at, longs_at
from .intrinsics import exp32
from .jit import Routine, njit
from .rmsnorm import row_rrms

PHASES = 4  # of a layer: attention and the products before it, the one after it, gate and up, down
(ATTEND, ATTENDED, GATE_UP, DOWN) = range(PHASES)
SIZES, ENDS = (8, 4, 2, 1, 1), (8, 12, 14, 15, 16)  # of a thread's items, where they are not equal
TAPERED = len(SIZES)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@njit
def _rows(plan):
    return plan[field.BATCH] * plan[field.LENGTH]


@njit
def _product(plan, own, matrix, x, x_row, columns, first, last, y, y_row):
    """Rows first to last of a matrix times all rows of x; y: where the first output of the first of them goes."""
    kind, codes, scales, rows = plan[matrix], plan[matrix + 1], plan[matrix + 2], _rows(plan)
    out, scratch = y + 4 * first, own + plan[field.SCRATCH]
    if not plan[field.PREPARED_KINDS] >> kind & 1:
        arguments = (kind, codes, scales, columns, first, last, x, x_row, rows, out, y_row, scratch)
        call(plan[field.MULTIPLY_WIDE], arguments)
    else:
        ready = plan[field.PREPARED] + kind * plan[field.PREPARED_STEP]
        call(plan[field.MULTIPLY + kind], (codes, scales, columns, first, last, 0, 0, rows, out, y_row, ready, scratch))


@njit
def _prepare(plan, matrix, count, x, x_row, columns):
    """Make x ready for some matrices, one after the other in the plan: once for each kind of weight among them."""
    rows, wanted = _rows(plan), plan[field.PREPARED_KINDS]
    for i in range(count):
        kind = plan[matrix + 3 * i]
        if wanted >> kind & 1:
            wanted ^= 1 << kind
            ready = plan[field.PREPARED] + kind * plan[field.PREPARED_STEP]
            call(plan[field.MULTIPLY + kind], (0, 0, columns, 0, 0, x, x_row, rows, 0, 0, ready, 0))


@njit(forceinline=True)
def _norm(plan, y, weight):
    """y = norm(state)."""
    width, eps = plan[field.WIDTH_D], doubles_at(plan[field.CONSTANTS], 1)[0]
    gain = floats_at(weight, width)
    for row in range(_rows(plan)):
        line, out = floats_at(plan[field.STATE] + 4 * row * width, width), floats_at(y + 4 * row * width, width)
        scale = row_rrms(line, eps)
        for i in range(width):
            out[i] = line[i] * scale * gain[i]


@njit(forceinline=True)
def _add_norm(plan, weight):
    """state += norm(branch)."""
    width, eps = plan[field.WIDTH_D], doubles_at(plan[field.CONSTANTS], 1)[0]
    gain = floats_at(weight, width)
    for row in range(_rows(plan)):
        at = 4 * row * width
        line, out = floats_at(plan[field.BRANCH] + at, width), floats_at(plan[field.STATE] + at, width)
        scale = row_rrms(line, eps)
        for i in range(width):
            out[i] = out[i] + line[i] * scale * gain[i]


@njit
def _begin(plan):
    """The state starts from x, if there is one (the head only reads)."""
    size = _rows(plan) * plan[field.WIDTH_D] if plan[field.COMMAND] == field.RUN_LOOP else 0
    state, x = floats_at(plan[field.STATE], size), floats_at(plan[field.X], size)
    for i in range(size):
        state[i] = x[i]


@njit
def _share(plan, outputs, item, count):
    """The outputs of an item, in whole units: equal shares, or of many items smaller and smaller ones.

    Long streams are what memory is fast with, and short ones at the end keep threads from waiting for each other.
    """
    unit, threads = plan[field.UNIT], plan[field.THREADS]
    units, first, last, whole = (outputs + unit - 1) // unit, item, item + 1, count
    if count == TAPERED * threads:
        part, number, whole = item // TAPERED * ENDS[-1], item % TAPERED, ENDS[-1] * threads
        first, last = part + ENDS[number] - SIZES[number], part + ENDS[number]
    return min(outputs, units * first // whole * unit), min(outputs, units * last // whole * unit)


@njit
def _swiglu(plan, first, last):
    """The first half of gate_up becomes silu(gate) * up, channels first to last."""
    ff = plan[field.FEED_FORWARD]
    for row in range(_rows(plan)):
        at = plan[field.GATE_UP] + 4 * (2 * ff * row + first)
        gate, up = floats_at(at, last - first), floats_at(at + 4 * ff, last - first)
        for i in range(last - first):
            gate[i] = gate[i] / (_ONE + exp32(-gate[i])) * up[i]


# ---- phases


@Routine
def run_item(plan_at, size, own, phase, item, count):
    """One of a phase's `count` items.  Before the first phase there is one: to begin."""
    plan = longs_at(plan_at, size)
    width, ff, heads, channels = plan[field.WIDTH_D], plan[field.FEED_FORWARD], plan[field.HEADS], plan[field.CHANNELS]
    which, at = phase % PHASES, field.FIRST_LAYER + phase // PHASES * field.LAYER_SIZE
    normed, attention, branch, y = plan[field.NORMED], plan[field.ATTENTION], plan[field.BRANCH], plan[field.GATE_UP]
    if phase < 0:
        _begin(plan)
    elif plan[field.COMMAND] == field.RUN_HEAD:
        vocabulary = plan[field.VOCABULARY]
        first, last = _share(plan, vocabulary, item, count)
        _product(plan, own, field.HEAD, plan[field.X], width, width, first, last, plan[field.OUT], vocabulary)
    elif which == ATTEND:
        groups, q = plan[field.GROUPS], plan[field.QKV]
        k, v = q + 4 * heads * channels, q + 4 * (heads + groups) * channels
        total, each, low, high = (
            (heads + 2 * groups) * channels,
            heads // groups * channels,
            item * channels,
            (item + 1) * channels,
        )
        _product(plan, own, at + field.Q, normed, width, width, item * each, (item + 1) * each, q, total)
        _product(plan, own, at + field.K, normed, width, width, low, high, k, total)
        _product(plan, own, at + field.V, normed, width, width, low, high, v, total)
        call(plan[field.ATTEND], (plan_at, own, phase // PHASES, item))
    elif which == ATTENDED:
        first, last = _share(plan, width, item, count)
        _product(plan, own, at + field.O, attention, heads * channels, heads * channels, first, last, branch, width)
    elif which == GATE_UP:
        first, last = _share(plan, ff, item, count)
        _product(plan, own, at + field.GATE, normed, width, width, first, last, y, 2 * ff)
        _product(plan, own, at + field.UP, normed, width, width, first, last, y + 4 * ff, 2 * ff)
        _swiglu(plan, first, last)
    else:
        first, last = _share(plan, width, item, count)
        _product(plan, own, at + field.DOWN, y, 2 * ff, ff, first, last, branch, width)
    return 0


@Routine
def settle(plan_at, size, phase):
    """What lies between a phase and the next: norms, and x made ready for products.  Before the first, phase is -1."""
    plan = longs_at(plan_at, size)
    width, ff, which = plan[field.WIDTH_D], plan[field.FEED_FORWARD], phase % PHASES
    at, ended = field.FIRST_LAYER + phase // PHASES * field.LAYER_SIZE, phase + 1 == plan[field.PHASE_COUNT]
    matrix, count, x, x_row, columns = field.HEAD, 1, plan[field.X], width, width
    if plan[field.COMMAND] == field.RUN_LOOP:
        if which == ATTEND:
            columns = plan[field.HEADS] * plan[field.CHANNELS]
            matrix, x, x_row = at + field.O, plan[field.ATTENTION], columns
        elif which == GATE_UP:
            matrix, x, x_row, columns = at + field.DOWN, plan[field.GATE_UP], 2 * ff, ff
        else:
            if phase >= 0:
                _add_norm(plan, plan[at + field.NORM_2] if which == ATTENDED else plan[at + field.NORM_4])
            below = at + field.LAYER_SIZE
            matrix, count = (at + field.GATE, 2) if which == ATTENDED else (below + field.Q, 3)
            gain = field.NORM if ended else at + field.NORM_3 if which == ATTENDED else below + field.NORM_1
            x = plan[field.OUT] if ended else plan[field.NORMED]
            _norm(plan, x, plan[gain])
            if ended:
                _gate(plan)
    if not ended:
        _prepare(plan, matrix, count, x, x_row, columns)
    return 0


@njit(forceinline=True)
def _gate(plan):
    """What the gate says of the loop's result."""
    width = plan[field.WIDTH_D]
    weight, bias = floats_at(plan[field.GATE_WEIGHT], width), floats_at(plan[field.GATE_BIAS], 1)[0]
    logit = floats_at(plan[field.GATE_LOGIT], _rows(plan))
    for row in range(_rows(plan)):
        line, dot = floats_at(plan[field.OUT] + 4 * row * width, width), _ZERO
        for i in range(width):
            dot += line[i] * weight[i]
        logit[row] = dot + bias
