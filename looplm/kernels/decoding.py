"""One loop of the model over a few rows or many, in one compiled call that all threads of a team work on together.

Rows are M = B * S new positions: B blocks of S consecutive ones; short blocks may be of any loops, since loops share
their weights.  A layer is four phases, each a list of items: a key/value group with its projections, or a run of a
product's outputs.  Threads take items until none is left (team.py), so that a slow one is waited for no longer than an
item takes; whoever finishes the last does what lies between two phases: norms, and x made ready for the next product.
A few rows are multiplied with the weights as they lie in memory; many go through register tiles, a block of weights
widened at a time.  A row's result does not depend on other rows or on threads, within either way.

Everything is described by a plan: a table of numbers and addresses.  Keys and values are (R * L) x B x G x P x K.
"""

import numpy as np

from . import plan as field
from .addresses import call, doubles_at, floats_at, longs_at
from .intrinsics import exp32
from .jit import Routine, njit
from .product.stored import FEW_ROWS
from .product.widened import row_bytes
from .rmsnorm import row_rrms

PHASES = 4  # of a layer: attention and the products before it, the one after it, gate and up, down
(_ATTEND, _ATTENDED, _GATE_UP, _DOWN) = range(PHASES)
ITEM_BYTES = 1 << 16  # weights of an item, at least: some microseconds
MOST_ITEMS = 8  # for each thread
FEW_UNIT, WIDE_UNIT = 16, 256  # an item's outputs are a multiple of it

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@njit
def _rows(plan):
    return plan[field.BATCH] * plan[field.LENGTH]


@njit
def _product(plan, own, matrix, x, x_row, columns, first, last, y, y_row):
    """Rows first to last of a matrix times all rows of x; y: where the first output of the first of them goes."""
    kind, codes, scales, rows = plan[matrix], plan[matrix + 1], plan[matrix + 2], _rows(plan)
    out, scratch = y + 4 * first, own + plan[field.SCRATCH]
    if rows > FEW_ROWS:
        arguments = (kind, codes, scales, columns, first, last, x, x_row, rows, out, y_row, scratch)
        call(plan[field.MULTIPLY_WIDE], arguments)
    else:
        ready = plan[field.PREPARED] + kind * plan[field.PREPARED_STEP]
        call(plan[field.MULTIPLY + kind], (codes, scales, columns, first, last, 0, 0, rows, out, y_row, ready, scratch))


@njit
def _prepare(plan, matrix, count, x, x_row, columns):
    """Make x ready for some matrices, one after the other in the plan: once for each kind of weight among them."""
    rows, done = _rows(plan), 0
    for i in range(count if rows <= FEW_ROWS else 0):
        kind = plan[matrix + 3 * i]
        if not done >> kind & 1:
            done |= 1 << kind
            ready = plan[field.PREPARED] + kind * plan[field.PREPARED_STEP]
            call(plan[field.MULTIPLY + kind], (0, 0, columns, 0, 0, x, x_row, rows, 0, 0, ready, 0))


@njit
def _norm(plan, y, x, weight, add):
    """y = norm(x), or more by it.  y, x: rows of the model's width."""
    width, eps = plan[field.WIDTH_D], doubles_at(plan[field.CONSTANTS], 1)[0]
    gain = floats_at(weight, width)
    for row in range(_rows(plan)):
        line, out = floats_at(x + 4 * row * width, width), floats_at(y + 4 * row * width, width)
        scale = row_rrms(line, eps)
        if add:
            for i in range(width):
                out[i] = out[i] + line[i] * scale * gain[i]
        else:
            for i in range(width):
                out[i] = line[i] * scale * gain[i]


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


@njit
def _outputs(plan, phase):
    """A phase's product -> where it is in the plan, its outputs, its columns."""
    width, ff = plan[field.WIDTH_D], plan[field.FEED_FORWARD]
    if plan[field.COMMAND] == field.RUN_HEAD:
        return field.HEAD, plan[field.VOCABULARY], width
    matrix = field.FIRST_LAYER + phase // PHASES * field.LAYER_SIZE
    if phase % PHASES == _ATTENDED:
        return matrix + field.O, width, plan[field.HEADS] * plan[field.CHANNELS]
    return (matrix + field.GATE, ff, width) if phase % PHASES == _GATE_UP else (matrix + field.DOWN, width, ff)


@njit
def phase_count(plan):
    return 1 if plan[field.COMMAND] == field.RUN_HEAD else PHASES * plan[field.LAYERS]


@njit
def item_count(plan, phase, parts):
    """Into how many items a phase is divided for so many threads."""
    if plan[field.COMMAND] == field.RUN_LOOP and phase % PHASES == _ATTEND:
        return plan[field.GROUPS]
    if parts == 1:
        return 1
    matrix, outputs, columns = _outputs(plan, phase)
    unit = WIDE_UNIT if _rows(plan) > FEW_ROWS else FEW_UNIT
    most = max(1, outputs * row_bytes(plan[matrix], columns) // ITEM_BYTES)
    return min((outputs + unit - 1) // unit, max(min(most, MOST_ITEMS * parts), min(parts, most)))


@njit
def run_item(plan, plan_at, own, phase, item, count):
    """One of a phase's `count` items."""
    layer, which = phase // PHASES, phase % PHASES
    at, width, ff = field.FIRST_LAYER + layer * field.LAYER_SIZE, plan[field.WIDTH_D], plan[field.FEED_FORWARD]
    if plan[field.COMMAND] == field.RUN_LOOP and which == _ATTEND:
        heads, groups, channels = plan[field.HEADS], plan[field.GROUPS], plan[field.CHANNELS]
        total, each, x = (heads + 2 * groups) * channels, heads // groups * channels, plan[field.NORMED]
        low, high, y = item * channels, (item + 1) * channels, plan[field.QKV]
        k, v = y + 4 * heads * channels, y + 4 * (heads + groups) * channels
        _product(plan, own, at + field.Q, x, width, width, item * each, (item + 1) * each, y, total)
        _product(plan, own, at + field.K, x, width, width, low, high, k, total)
        _product(plan, own, at + field.V, x, width, width, low, high, v, total)
        call(plan[field.ATTEND], (plan_at, own, layer, item))
        return
    matrix, outputs, columns = _outputs(plan, phase)
    unit = WIDE_UNIT if _rows(plan) > FEW_ROWS else FEW_UNIT
    units = (outputs + unit - 1) // unit
    first, last = min(outputs, units * item // count * unit), min(outputs, units * (item + 1) // count * unit)
    if plan[field.COMMAND] == field.RUN_HEAD:
        _product(plan, own, matrix, plan[field.X], columns, columns, first, last, plan[field.OUT], outputs)
    elif which == _ATTENDED:
        _product(plan, own, matrix, plan[field.ATTENTION], columns, columns, first, last, plan[field.BRANCH], outputs)
    elif which == _GATE_UP:
        gate, up = plan[field.GATE_UP], plan[field.GATE_UP] + 4 * ff
        _product(plan, own, matrix, plan[field.NORMED], columns, columns, first, last, gate, 2 * ff)
        _product(plan, own, at + field.UP, plan[field.NORMED], columns, columns, first, last, up, 2 * ff)
        _swiglu(plan, first, last)
    else:
        _product(plan, own, matrix, plan[field.GATE_UP], 2 * ff, columns, first, last, plan[field.BRANCH], outputs)


@njit
def _enter(plan, layer):
    """What the first phase of a layer reads."""
    at, width = field.FIRST_LAYER + layer * field.LAYER_SIZE, plan[field.WIDTH_D]
    _norm(plan, plan[field.NORMED], plan[field.STATE], plan[at + field.NORM_1], False)
    _prepare(plan, at + field.Q, 3, plan[field.NORMED], width, width)


@njit
def begin(plan):
    """Before the first phase."""
    if plan[field.COMMAND] == field.RUN_HEAD:
        _prepare(plan, field.HEAD, 1, plan[field.X], plan[field.WIDTH_D], plan[field.WIDTH_D])
        return
    size = _rows(plan) * plan[field.WIDTH_D]
    state, x = floats_at(plan[field.STATE], size), floats_at(plan[field.X], size)
    for i in range(size):
        state[i] = x[i]
    _enter(plan, 0)


@njit
def after(plan, phase):
    """When all items of a phase are done."""
    if plan[field.COMMAND] == field.RUN_HEAD:
        return
    layer, which, width, ff = phase // PHASES, phase % PHASES, plan[field.WIDTH_D], plan[field.FEED_FORWARD]
    at, state, normed = field.FIRST_LAYER + layer * field.LAYER_SIZE, plan[field.STATE], plan[field.NORMED]
    if which == _ATTEND:
        columns = plan[field.HEADS] * plan[field.CHANNELS]
        _prepare(plan, at + field.O, 1, plan[field.ATTENTION], columns, columns)
    elif which == _ATTENDED:
        _norm(plan, state, plan[field.BRANCH], plan[at + field.NORM_2], True)
        _norm(plan, normed, state, plan[at + field.NORM_3], False)
        _prepare(plan, at + field.GATE, 2, normed, width, width)
    elif which == _GATE_UP:
        _prepare(plan, at + field.DOWN, 1, plan[field.GATE_UP], 2 * ff, ff)
    else:
        _norm(plan, state, plan[field.BRANCH], plan[at + field.NORM_4], True)
        if layer + 1 < plan[field.LAYERS]:
            _enter(plan, layer + 1)
        else:
            _read(plan)


@njit
def _read(plan):
    """The loop's result: the state after the final norm, and what the gate says."""
    width = plan[field.WIDTH_D]
    _norm(plan, plan[field.OUT], plan[field.STATE], plan[field.NORM], False)
    weight, bias = floats_at(plan[field.GATE_WEIGHT], width), floats_at(plan[field.GATE_BIAS], 1)[0]
    logit = floats_at(plan[field.GATE_LOGIT], _rows(plan))
    for row in range(_rows(plan)):
        line, dot = floats_at(plan[field.OUT] + 4 * row * width, width), _ZERO
        for i in range(width):
            dot += line[i] * weight[i]
        logit[row] = dot + bias
