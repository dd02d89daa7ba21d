"""Decoding under each cache policy, one row and one position at a time, in float64: what is kept, and what is seen.

A prompt runs all loops, each with keys and values of its own.  Afterwards every token runs the loops up to its exit,
which is given; the policy says what later tokens find in the slots of each loop.  Source: Section 5.4.2 and Table 14.

full          every loop runs for every token
last-exited   deeper loops find the keys and values of the loop where the token stopped
shared-last   all loops share a slot per layer, in which the last loop run is left; the prompt's slots become one, too
average       the same with the mean over the loops run
first         the same with the first loop
exact         what `full` finds, though nothing is computed before it is needed (`Deferred`)
"""

import numpy as np

from .model import Cache, LoopLM, Place
from .ops import Array

KeyValue = tuple[Array, Array]  # of one position: GK each


class Kept(Cache):
    """Keys and values by slot and position.  `at` is the position of the first that is stored next."""

    def __init__(self) -> None:
        self.by_slot: dict[int, dict[int, KeyValue]] = {}
        self.at = 0

    def store(self, slot: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Put new positions into a slot and give all up to them.  k, v: 1SGK -> 1PGK."""
        known = self.by_slot.setdefault(slot, {})
        for s in range(k.shape[1]):
            known[self.at + s] = k[0, s], v[0, s]
        seen = [known[position] for position in sorted(known) if position < self.at + k.shape[1]]
        return np.stack([key for key, _ in seen])[None], np.stack([value for _, value in seen])[None]


class Full:
    """All loops, always.  `hidden` of a token: the states after each loop up to its exit."""

    def __init__(self, model: LoopLM) -> None:
        self.model, self.kept, self.filled = model, Kept(), 0

    def read(self, prompt: Array) -> Array:
        """prompt: S, behind what is there -> hidden: RSD."""
        x, states = self.embedded(prompt), []
        for r in range(self.model.loops):
            x = self.loop(r, x, self.filled)
            states.append(x[0])
        self.filled += len(prompt)
        return np.stack(states)

    def advance(self, token: int, exit_at: int) -> Array:
        """One token, which is read after loop exit_at (from 0) -> hidden: (exit_at + 1) x D."""
        x, states = self.embedded(np.array([token])), []
        for r in range(self.runs(exit_at)):
            x = self.enter(r, x)
            states.append(x[0, 0])
        self.leave(exit_at, x)
        self.filled += 1
        return np.stack(states[: exit_at + 1])

    def runs(self, exit_at: int) -> int:
        """How many loops a token runs that is read after loop exit_at."""
        return self.model.loops

    def enter(self, r: int, x: Array) -> Array:
        """Loop r of the token in progress.  x: 11D, its state before -> after."""
        return self.loop(r, x, self.filled)

    def leave(self, exit_at: int, x: Array) -> None:
        """The token in progress is done."""

    def embedded(self, ids: Array) -> Array:
        """ids: S -> 1SD"""
        found: Array = self.model.weight["model.embed_tokens.weight"][ids][None]
        return found

    def loop(self, r: int, x: Array, position: int) -> Array:
        """Loop r of consecutive positions from the one given.  x: 1SD, the states before it -> after it."""
        self.kept.at = position
        place = Place(np.arange(position, position + x.shape[1])[None], np.zeros(1, np.int64))
        for layer in range(self.model.layers):
            x, _ = self.model.layer_forward(r, layer, x, place, self.kept)
        return self.model.norm(x, "model.norm.weight")[0]

    def slots(self, r: int) -> list[dict[int, KeyValue]]:
        """What loop r keeps, layer by layer."""
        return [self.kept.by_slot[self.model.slot(r, layer)] for layer in range(self.model.layers)]


class LastExited(Full):
    """A token stops; deeper loops get copies."""

    def runs(self, exit_at: int) -> int:
        return exit_at + 1

    def leave(self, exit_at: int, x: Array) -> None:
        for r in range(exit_at + 1, self.model.loops):
            for deeper, own in zip(self.slots(r), self.slots(exit_at), strict=True):
                deeper[self.filled] = own[self.filled]


class Deferred(Full):
    """A token stops, and its deeper loops run as soon as a later token enters them, or when too many wait."""

    def __init__(self, model: LoopLM, most: int = 16) -> None:
        super().__init__(model)
        self.most = most
        self.waiting: dict[int, tuple[int, Array]] = {}  # position -> loops it has run, state after them (11D)

    def runs(self, exit_at: int) -> int:
        return exit_at + 1

    def enter(self, r: int, x: Array) -> Array:
        for position in sorted(self.waiting):
            self.catch_up(position, r)
        return super().enter(r, x)

    def leave(self, exit_at: int, x: Array) -> None:
        self.waiting[self.filled] = exit_at + 1, x
        if len(self.waiting) >= self.most:
            for r in range(self.model.loops):
                for position in sorted(self.waiting):
                    self.catch_up(position, r)
        self.waiting = {p: (depth, x) for p, (depth, x) in self.waiting.items() if depth < self.model.loops}

    def catch_up(self, position: int, r: int) -> None:
        """A position that waits before loop r runs it."""
        depth, x = self.waiting[position]
        if depth == r:
            self.waiting[position] = r + 1, self.loop(r, x, position)


class Shared(Full):
    """One slot per layer holds the past of all loops; a token's own keys and values there are of the loop it runs."""

    def read(self, prompt: Array) -> Array:
        hidden = super().read(prompt)
        for position in range(self.filled):
            self.unite(position, self.model.loops)
        return hidden

    def runs(self, exit_at: int) -> int:
        return exit_at + 1

    def enter(self, r: int, x: Array) -> Array:
        for mine, one in zip(self.slots(r), self.slots(0), strict=True):
            mine.update({position: one[position] for position in range(self.filled)})
        return super().enter(r, x)

    def leave(self, exit_at: int, x: Array) -> None:
        self.unite(self.filled, exit_at + 1)

    def unite(self, position: int, loops: int) -> None:
        """What stays of a position that ran so many loops; it is kept in the slots of the first loop."""
        by_loop = [self.slots(r) for r in range(loops)]
        for layer, one in enumerate(self.slots(0)):
            one[position] = self.choose([slots[layer][position] for slots in by_loop])

    def choose(self, by_loop: list[KeyValue]) -> KeyValue:
        return by_loop[-1]


class SharedFirst(Shared):
    def choose(self, by_loop: list[KeyValue]) -> KeyValue:
        return by_loop[0]


class SharedAverage(Shared):
    def choose(self, by_loop: list[KeyValue]) -> KeyValue:
        keys, values = (np.mean(parts, axis=0) for parts in zip(*by_loop, strict=True))
        return keys, values


# What is judged by: `exact` by the loops that all run, not by the deferral that is to be proved.
POLICIES: dict[str, type[Full]] = {
    "full": Full,
    "exact": Full,
    "last-exited": LastExited,
    "shared-last": Shared,
    "average": SharedAverage,
    "first": SharedFirst,
}
