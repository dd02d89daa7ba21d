"""Deferred loops: what an early exit left out is computed when a later token needs it, many tokens in one pass.

A token that stops early keeps its state after the last loop it ran.  When a later token enters loop d, every position
that waits with d loops behind it runs loop d in the same pass over the weights: all append their keys and values, then
each attends to the positions up to its own.  Earlier positions have never run fewer loops than later ones, so one pass
is enough, and no loop of a token is ever computed twice.  A row of a pass is the same to the bit as alone, so keys,
values and states are those of running every loop for every token.
"""

from typing import NamedTuple

import numpy as np

from .arrays import Floats, Ints, aligned_empty
from .cache import KeyValueCache
from .decoder import Decoder
from .errors import UsageError
from .kernels.product.stored import FEW_ROWS

MAX_DEFERRED = 16  # tokens that wait at most, if nothing else is said
MOST_DEFERRED = FEW_ROWS - 1  # together with the token they wait for, as many as one pass takes


def check_max_deferred(number: int) -> None:
    """Raises: UsageError for a bound under which nothing could wait, or that one pass cannot take."""
    if not 1 <= number <= MOST_DEFERRED:
        raise UsageError(
            f"{number} tokens cannot wait for their deeper loops", f"use a number from 1 to {MOST_DEFERRED}"
        )


class Waiting(NamedTuple):
    """A position whose deeper loops have not run."""

    position: int
    depth: int  # loops it has run
    state: Floats  # BD, after the last of them


class Deferral:
    """The positions of a session that wait, in order, and the passes in which they catch up.

    `rows_run` and `passes` count what was computed for them, and the passes that were run for them alone.
    """

    def __init__(self, decoder: Decoder, cache: KeyValueCache, most: int) -> None:
        check_max_deferred(most)
        self._decoder, self._cache, self._most = decoder, cache, most
        self.waiting: list[Waiting] = []
        self.rows_run = self.passes = 0

    def run_loop(self, r: int) -> None:
        """Loop r of the position in progress, together with that of all positions that lack it."""
        decoder, batch = self._decoder, self._cache.batch
        if r == 0:
            self._forget()
        late = self._late(r)
        if not late:
            decoder.place(np.arange(batch), self._cache.filled, batch)
            decoder.run_loop(r, batch, 1)
            return
        present = Waiting(self._cache.filled, r, decoder.states[r - 1, :batch])
        out, gate_logit = self._run(r, late, [present])
        decoder.states[r, :batch], decoder.gate_logit[r, :batch] = out[-batch:], gate_logit[-batch:]

    def finish(self, loops_run: int) -> None:
        """The position in progress ends after so many loops and waits, if there are more; too many catch up."""
        if loops_run < self._cache.loops:
            state = self._decoder.states[loops_run - 1, : self._cache.batch].copy()
            self.waiting = [*self.waiting, Waiting(self._cache.filled, loops_run, state)]
        if len(self.waiting) >= self._most:
            self._catch_up()

    def catch_up(self) -> None:
        """Run all loops that positions still lack."""
        self._forget()
        self._catch_up()

    def _catch_up(self) -> None:
        for r in range(1, self._cache.loops):
            if late := self._late(r):
                self._run(r, late, [])
                self.passes += 1

    def _forget(self) -> None:
        """Positions that the cache no longer counts, or never came to count, do not wait any more."""
        self.waiting = [each for each in self.waiting if each.position < self._cache.filled]

    def _late(self, r: int) -> list[Waiting]:
        return [each for each in self.waiting if each.depth == r]

    def _run(self, r: int, late: list[Waiting], present: list[Waiting]) -> tuple[Floats, Floats]:
        """Loop r of positions that wait, and of the one in progress -> their states after it and gate logits.

        Rows are ordered by position, then by row of the cache; out: (positions * B) x D, gate_logit: positions * B.
        """
        rows, batch = [*late, *present], self._cache.batch
        x = np.concatenate([each.state for each in rows])
        out, gate_logit = aligned_empty(x.shape), aligned_empty((len(x),))
        positions = np.repeat([each.position for each in rows], batch)
        cache_rows: Ints = np.tile(np.arange(batch), len(rows))
        for first in range(0, len(x), FEW_ROWS):
            part = slice(first, first + FEW_ROWS)
            loops = np.full(len(x[part]), r)
            self._decoder.place(cache_rows[part], positions[part], len(loops))
            self._decoder.run_rows(loops, x[part], out[part], gate_logit[part])
        self.rows_run += batch * len(late)
        after = [
            Waiting(each.position, r + 1, out[index * batch : (index + 1) * batch]) for index, each in enumerate(late)
        ]
        others = [each for each in self.waiting if each.depth != r]  # who lacks an earlier loop comes later
        # In one assignment: whoever is interrupted before it runs the same loop from the same state again.
        self.waiting = [*(after if r + 1 < self._cache.loops else []), *others]
        return out, gate_logit
