"""Anytime: the depth of each token from what may be spent, loops or time.

A pacer wraps an exit rule: the rule says when a token has had enough, the pacer when it has had all it can get.  It
keeps count, so one pacer is for one text of one row.  The loop that the prompt's last position is read from is the
rule's choice alone: a prompt runs all loops anyway.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from .arrays import Array, Floats
from .errors import UsageError
from .exits import ExitRule, LearnedGate

RESERVE = 8  # saved loops at which a steered gate runs all loops
REMEMBERED = 16  # measurements that a median is taken over


class Pacer:
    """A rule under which the next token may run `allowed` loops (None: as many as the rule wants)."""

    def __init__(self, rule: ExitRule) -> None:
        self.rule = rule
        self.allowed: int | None = None
        self.tokens = self.loops = 0  # decoded since the prompt
        self._prompt_read = False

    def deepest(self, loops: int) -> int:
        return self.rule.deepest(loops)

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        if self.allowed is not None and gate_logit.shape[0] >= self.allowed:
            return np.ones(gate_logit.shape[1], np.bool_)
        return self.rule.stops(hidden, gate_logit)

    def count(self, loops_run: int) -> None:
        """A token has stopped after so many loops; the first is the prompt's last, which nothing is charged for."""
        if self._prompt_read:
            self.tokens, self.loops = self.tokens + 1, self.loops + loops_run
        self._prompt_read = True

    @property
    def mean_loops(self) -> float | None:
        """Loops per token decoded so far."""
        return self.loops / self.tokens if self.tokens else None


class LoopBudget(Pacer):
    """At most so many loops per token on average, at any moment: what easy tokens save, hard ones may spend.

    Without a rule the learned gate is steered: its q rises from 0 to 1 with the loops saved, so that the budget is used
    up, and goes where the gate wants it.  Nothing depends on the clock.

    Raises: UsageError if the budget is below 1: one loop always runs.
    """

    def __init__(self, budget: float, rule: ExitRule | None = None) -> None:
        if not 1.0 <= budget < np.inf:
            raise UsageError(f"a budget of {budget:g} loops per token cannot be kept", "allow at least 1, e.g. 2.5")
        super().__init__(LearnedGate(1.0) if rule is None else rule)
        self.budget, self.steered = budget, rule is None
        self.saved = 0.0  # loops that were allowed and not run

    def __str__(self) -> str:
        how = "gate, steered" if self.steered else str(self.rule)
        return f"{how}, at most {self.budget:g} loops per token on average"

    def count(self, loops_run: int) -> None:
        if self._prompt_read:
            self.saved += self.budget - loops_run
        if self.steered:
            self.rule = LearnedGate(min(1.0, max(0.0, self.saved) / RESERVE))
        self.allowed = int(self.saved + self.budget + 1e-9)  # sums of a budget like 2.1 are rounded
        super().count(loops_run)


class TimeLimit(Pacer):
    """At most so many milliseconds from one token to the next, by what loops and all the rest have taken so far.

    One loop always runs.  Times are medians over the last tokens; until a loop has been timed, the rule alone decides.

    Raises: UsageError for a limit that is not positive.
    """

    def __init__(self, milliseconds: float, rule: ExitRule, clock: Callable[[], float] = time.perf_counter) -> None:
        if not 0.0 < milliseconds < np.inf:
            raise UsageError(f"{milliseconds:g} ms per token cannot be kept", "use a number above 0, e.g. 50")
        super().__init__(rule)
        self.milliseconds = milliseconds
        self.spent: list[float] = []  # milliseconds of each token decoded
        self._clock = clock
        self._loop_ms: deque[float] = deque(maxlen=REMEMBERED)
        self._rest_ms: deque[float] = deque(maxlen=REMEMBERED)  # of a token: head, choice, and whoever takes it
        self._latest = (0, 0.0)  # loops of the token in progress when the rule was last asked, and the time
        self._token_began: float | None = None

    def __str__(self) -> str:
        return f"{self.rule}, at most {self.milliseconds:g} ms per token"

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        self._ran(gate_logit.shape[0])
        return super().stops(hidden, gate_logit)

    def count(self, loops_run: int) -> None:
        now = self._ran(loops_run)  # after the last possible loop no rule is asked
        if self._token_began is not None:
            self.spent.append(now - self._token_began)
            if self._loop_ms:
                self._rest_ms.append(max(0.0, self.spent[-1] - loops_run * statistics.median(self._loop_ms)))
        self._token_began, self._latest = now, (0, now)
        if self._loop_ms:
            left = self.milliseconds - (statistics.median(self._rest_ms) if self._rest_ms else 0.0)
            self.allowed = max(1, int(left / statistics.median(self._loop_ms)))
        super().count(loops_run)

    def _ran(self, loops: int) -> float:
        """So many loops of this token have run by now -> now, in milliseconds."""
        now = 1e3 * self._clock()
        before, then = self._latest
        if 0 < before == loops - 1 and self._token_began is not None:
            self._loop_ms.append(now - then)
        self._latest = (loops, now)
        return now
