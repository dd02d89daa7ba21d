"""Threads that work on a plan together: a command is a list of phases, a phase a list of items.

Every thread has its own part of a phase's items, so that it finds the same weights in its caches again, and takes from
the others' parts when its own is empty.  A part is one word: the number of the phase and how many items are left; one
compare-and-swap takes one.  Whoever takes an item knows by it that the command is still running, and reads all else
only then: a thread that wakes late finds nothing, and is not waited for.  The thread that finishes the last item of a
phase opens the next.
"""

import numpy as np

from ..arrays import Array
from . import plan as field
from .addresses import add_to, call, longs_at, look_at, swap, wait_a_while, wait_for
from .decoding import PHASES, run_item, settle
from .jit import Routine, njit

# A team's control words, those that threads wait at on cache lines of their own: commands begun, commands done, items
# done of this phase; then what the command is about.
GO, OVER, DONE, PARTS, PLAN, PHASE, ITEMS, WORK, RUN_ITEM, SETTLE, FIRST_PART = 0, 8, 16, 24, 25, 27, 28, 29, 30, 31, 32
LEFT, ASLEEP, SEEN, PART_SIZE = 0, 8, 9, 16  # of each thread

_PHASE_BITS = 20  # above them in a part's word: a number that no other phase has


def control_words(threads: int) -> Array:
    """Those of a new team, of which all but the first thread sleep."""
    control = np.zeros(FIRST_PART + PART_SIZE * threads, np.int64)
    control[PARTS], control[FIRST_PART + PART_SIZE + ASLEEP :: PART_SIZE] = threads, 1
    control[WORK], control[RUN_ITEM], control[SETTLE] = work.address, run_item.address, settle.address
    return control


def asleep(control: Array, part: int) -> bool:
    """Whether a helper waits to be woken."""
    return bool(control[FIRST_PART + PART_SIZE * part + ASLEEP])


@njit
def _first(control, part):
    return control[ITEMS] * part // control[PARTS]


@njit
def _offer(control, phase, count):
    """So many items of a phase, for whoever comes first."""
    control[PHASE], control[ITEMS] = phase, count
    for part in range(control[PARTS]):
        some = _first(control, part + 1) - _first(control, part)
        add_to(control, FIRST_PART + PART_SIZE * part + LEFT, 1 << _PHASE_BITS | some)  # nothing is left of the last


@njit
def _take(control, part):
    """An item, or -1 if there is none now."""
    parts = control[PARTS]
    for i in range(parts):
        owner = (part + i) % parts
        at = FIRST_PART + PART_SIZE * owner + LEFT
        word = look_at(control, at)
        left = word & ((1 << _PHASE_BITS) - 1)
        while left:
            if swap(control, at, word, word - 1):
                return _first(control, owner + 1) - left
            word = look_at(control, at)
            left = word & ((1 << _PHASE_BITS) - 1)
    return -1


@njit
def _finish(control, plan):
    """An item is done; the last one opens the next phase, or ends the command."""
    items = control[ITEMS]  # after the last one is done it may be the next phase's
    if add_to(control, DONE, 1) < items:
        return
    phase = control[PHASE]
    control[DONE] = 0
    call(control[SETTLE], (control[PLAN], control[PLAN + 1], phase))
    if phase + 1 == plan[field.PHASE_COUNT]:
        add_to(control, OVER, 1)
    else:
        head = plan[field.COMMAND] == field.RUN_HEAD
        _offer(control, phase + 1, plan[field.HEAD_ITEMS if head else field.ITEMS + (phase + 1) % PHASES])


@Routine
def work(control_at, number, part):
    """A thread's part of a command: items until there are no more phases."""
    control = longs_at(control_at, FIRST_PART)
    control = longs_at(control_at, FIRST_PART + PART_SIZE * control[PARTS])
    looks = 0
    while look_at(control, OVER) < number:
        item = _take(control, part)
        if item < 0:
            looks = wait_a_while(looks)
            continue
        looks = 0
        plan = longs_at(control[PLAN], control[PLAN + 1])
        own = plan[field.OWN] + part * plan[field.OWN_STEP]
        arguments = (control[PLAN], control[PLAN + 1], own, control[PHASE], item, control[ITEMS])
        call(control[RUN_ITEM], arguments)
        _finish(control, plan)
    return 0


@Routine
def command(control_at, plan_at, size):
    """Do what the plan says, with the helpers that are awake; one that wakes or sleeps meanwhile is not waited for."""
    control = longs_at(control_at, PLAN)
    control = longs_at(control_at, FIRST_PART + PART_SIZE * control[PARTS])
    control[PLAN], control[PLAN + 1] = plan_at, size
    _offer(control, -1, 1)
    call(control[WORK], (control_at, add_to(control, GO, 1), 0))
    return 0


@Routine
def help_out(control_at, part, patience):
    """Be a helper until no command has come for so many looks."""
    control = longs_at(control_at, FIRST_PART)
    control = longs_at(control_at, FIRST_PART + PART_SIZE * control[PARTS])
    own = FIRST_PART + PART_SIZE * part
    if look_at(control, own + ASLEEP):
        add_to(control, own + ASLEEP, -1)
    while True:
        number = control[own + SEEN] + 1
        if not wait_for(control, GO, number, patience):
            add_to(control, own + ASLEEP, 1)
            if look_at(control, GO) < number:  # else a command came before the flag was seen
                return 0
            add_to(control, own + ASLEEP, -1)
        control[own + SEEN] = look_at(control, GO)
        call(control[WORK], (control_at, control[own + SEEN], part))
