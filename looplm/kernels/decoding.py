"""One loop of the model over a few rows or many, in one compiled call that all threads of a team work on together.

Rows are M = B * S new positions: B blocks of S consecutive ones; short blocks may be of any loops, since loops share
their weights.  Each thread computes a share of every
product's outputs and of the heads, and all norms, so that threads meet four times a layer.  A few rows are multiplied
with the weights as they lie in memory; many go through register tiles, a block of weights widened at a time.  A row's
result does not depend on other rows or on threads, within either way.

Everything is described by a plan: a table of numbers and addresses.  Keys and values are (R * L) x B x G x P x K.
"""

import numpy as np

from . import plan as field
from .addresses import add_to, caller, doubles_at, floats_at, longs_at, look_at, wait_for
from .cached_attention import call_attend
from .intrinsics import exp32
from .jit import Routine, njit
from .product.stored import call_multiply
from .rmsnorm import row_rrms

# A team's control words, each on a cache line of its own.
GO, COUNT, PARTS, WORK, PLAN, FIRST_PART = 0, 8, 16, 17, 18, 24
PASSED, ASLEEP, SEEN = 0, 1, 2

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@njit
def _share(total, part, parts, unit):
    """The part of `total` in whole units: equal where it can be."""
    units = (total + unit - 1) // unit
    return min(total, units * part // parts * unit), min(total, units * (part + 1) // parts * unit)


@njit
def _product(plan, own, matrix, ready, x, x_row, columns, first, last, y, y_row):
    """A share of a matrix's rows times all rows of x; `ready` as in `multiply`."""
    kind, codes, scales = plan[matrix], plan[matrix + 1], plan[matrix + 2]
    rows, scratch = plan[field.BATCH] * plan[field.LENGTH], own + plan[field.SCRATCH]
    arguments = (kind, codes, scales, columns, first, last, x, x_row, rows, y, y_row, scratch, ready)
    return call_multiply(plan[field.MULTIPLY], arguments)


# ---- one loop


@njit
def _norm(y, x, weight, columns, rows, eps):
    gain = floats_at(weight, columns)
    for row in range(rows):
        line, out = floats_at(x + 4 * row * columns, columns), floats_at(y + 4 * row * columns, columns)
        scale = row_rrms(line, eps)
        for i in range(columns):
            out[i] = line[i] * scale * gain[i]


@njit
def _add_norm(state, x, weight, columns, rows, eps):
    """state += norm(x)."""
    gain = floats_at(weight, columns)
    for row in range(rows):
        line, out = floats_at(x + 4 * row * columns, columns), floats_at(state + 4 * row * columns, columns)
        scale = row_rrms(line, eps)
        for i in range(columns):
            out[i] = out[i] + line[i] * scale * gain[i]


@njit
def _swiglu(plan, first, last):
    """The first half of gate_up becomes silu(gate) * up, channels first to last."""
    ff = plan[field.FEED_FORWARD]
    for row in range(plan[field.BATCH] * plan[field.LENGTH]):
        at = plan[field.GATE_UP] + 4 * (2 * ff * row + first)
        gate, up = floats_at(at, last - first), floats_at(at + 4 * ff, last - first)
        for i in range(last - first):
            gate[i] = gate[i] / (_ONE + exp32(-gate[i])) * up[i]


@njit
def _meet(control, part):
    """Wait until all parts have come here."""
    parts = control[PARTS]
    if parts > 1:
        at = FIRST_PART + 8 * part + PASSED
        control[at] += parts
        if add_to(control, COUNT, 1) < control[at]:
            wait_for(control, COUNT, control[at], 0)


@njit
def _run_layer(plan, plan_at, control, own, layer, part):
    parts, rows, width, ff = (
        control[PARTS],
        plan[field.BATCH] * plan[field.LENGTH],
        plan[field.WIDTH_D],
        plan[field.FEED_FORWARD],
    )
    heads, groups, channels = plan[field.HEADS], plan[field.GROUPS], plan[field.CHANNELS]
    at, eps = field.FIRST_LAYER + layer * field.LAYER_SIZE, doubles_at(plan[field.CONSTANTS], 1)[0]
    state, normed, total = own + plan[field.STATE], own + plan[field.NORMED], (heads + 2 * groups) * channels
    first, last = _share(groups, part, parts, 1)
    each, k_at, v_at = heads // groups * channels, heads * channels, (heads + groups) * channels
    _norm(normed, state, plan[at + field.NORM_1], width, rows, eps)
    q, k, v = plan[field.QKV] + 4 * first * each, plan[field.QKV] + 4 * k_at, plan[field.QKV] + 4 * v_at
    low, high = first * channels, last * channels
    ready = _product(plan, own, at + field.Q, -1, normed, width, width, first * each, last * each, q, total)
    ready = _product(plan, own, at + field.K, ready, normed, width, width, low, high, k + 4 * low, total)
    _product(plan, own, at + field.V, ready, normed, width, width, low, high, v + 4 * low, total)
    call_attend(plan[field.ATTEND], (plan_at, own, layer, first, last))
    _meet(control, part)
    first, last = _share(width, part, parts, 16)
    branch = plan[field.BRANCH] + 4 * first
    _product(plan, own, at + field.O, -1, plan[field.ATTENTION], k_at, k_at, first, last, branch, width)
    _meet(control, part)
    _add_norm(state, plan[field.BRANCH], plan[at + field.NORM_2], width, rows, eps)
    _norm(normed, state, plan[at + field.NORM_3], width, rows, eps)
    low, high = _share(ff, part, parts, 16)
    gate, up = plan[field.GATE_UP] + 4 * low, plan[field.GATE_UP] + 4 * (ff + low)
    ready = _product(plan, own, at + field.GATE, -1, normed, width, width, low, high, gate, 2 * ff)
    _product(plan, own, at + field.UP, ready, normed, width, width, low, high, up, 2 * ff)
    _swiglu(plan, low, high)
    _meet(control, part)
    _product(plan, own, at + field.DOWN, -1, plan[field.GATE_UP], 2 * ff, ff, first, last, branch, width)
    _meet(control, part)
    _add_norm(state, plan[field.BRANCH], plan[at + field.NORM_4], width, rows, eps)


@Routine
def work(plan_at, size, control_at, part):
    """One thread's part of what the plan commands."""
    plan, control = longs_at(plan_at, size), longs_at(control_at, PLAN)
    control = longs_at(control_at, FIRST_PART + 8 * control[PARTS])
    rows, width = plan[field.BATCH] * plan[field.LENGTH], plan[field.WIDTH_D]
    own = plan[field.OWN] + part * plan[field.OWN_STEP]
    if plan[field.COMMAND] == field.RUN_HEAD:
        first, last = _share(plan[field.VOCABULARY], part, control[PARTS], 16)
        y = plan[field.OUT] + 4 * first
        _product(plan, own, field.HEAD, -1, plan[field.X], width, width, first, last, y, plan[field.VOCABULARY])
        _meet(control, part)
        return 0
    floats_at(own + plan[field.STATE], rows * width)[:] = floats_at(plan[field.X], rows * width)
    for layer in range(plan[field.LAYERS]):
        _run_layer(plan, plan_at, control, own, layer, part)
    if part == 0:
        _norm(
            plan[field.OUT],
            own + plan[field.STATE],
            plan[field.NORM],
            width,
            rows,
            doubles_at(plan[field.CONSTANTS], 1)[0],
        )
        out, weight = floats_at(plan[field.OUT], rows * width), floats_at(plan[field.GATE_WEIGHT], width)
        logit, bias = floats_at(plan[field.GATE_LOGIT], rows), floats_at(plan[field.GATE_BIAS], 1)[0]
        for row in range(rows):
            line, dot = out[row * width : (row + 1) * width], _ZERO
            for i in range(width):
                dot += line[i] * weight[i]
            logit[row] = dot + bias
    _meet(control, part)
    return 0


call_work = caller(work)


# ---- a team


@njit
def lead(control):
    """The caller's part of a command."""
    call_work(control[WORK], (control[PLAN], control[PLAN + 1], control.ctypes.data, 0))


@njit
def command(plan, control):
    """Begin what the plan says and, if every helper is awake, do it -> whether it is done (else `lead`)."""
    control[PLAN], control[PLAN + 1] = plan.ctypes.data, plan.size
    add_to(control, GO, 1)
    for part in range(1, control[PARTS]):
        if look_at(control, FIRST_PART + 8 * part + ASLEEP):
            return False
    lead(control)
    return True


@njit
def help_out(control, part, patience):
    """Be a helper until no command has come for so many looks."""
    own = FIRST_PART + 8 * part
    if look_at(control, own + ASLEEP):
        add_to(control, own + ASLEEP, -1)
    while True:
        number = control[own + SEEN] + 1
        if not wait_for(control, GO, number, patience):
            add_to(control, own + ASLEEP, 1)
            if look_at(control, GO) < number:  # else a command came before the flag was seen
                return
            add_to(control, own + ASLEEP, -1)
        control[own + SEEN] = number
        call_work(control[WORK], (control[PLAN], control[PLAN + 1], control.ctypes.data, part))
