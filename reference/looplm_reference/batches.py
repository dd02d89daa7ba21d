"""Texts that are written side by side: what each must be, and a batch as a definition.

The truth is `alone`: one text, token by token.  `ReferenceBatch` writes many with one loop of every row per pass, rows
at different positions and in different loops; a row that ends leaves its place, and a cache that is full of old keys,
to the next prompt.  Its parts are small enough to be replaced by wrong ones.

Every token is the most likely one, read at the first loop whose exit probabilities add up to the threshold.  The keys
and values of deeper loops, which such a token does not run, are those of the loop it stopped at.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .model import Cache, LoopLM, Place
from .ops import Array


@dataclasses.dataclass
class Text:
    """token, exit_loop (from 0), logprob: one number for each new token."""

    token: list[int] = dataclasses.field(default_factory=list)
    exit_loop: list[int] = dataclasses.field(default_factory=list)
    logprob: list[float] = dataclasses.field(default_factory=list)

    def add(self, logits: Array, exit_loop: int) -> None:
        """logits: V"""
        self.token.append(int(logits.argmax()))
        self.exit_loop.append(exit_loop)
        self.logprob.append(float(logits.max() - np.logaddexp.reduce(logits)))


def exit_of(model: LoopLM, gate_logit: Array, exit_threshold: float) -> int:
    """Where a position with these gate logits (R) stops."""
    return int(model.exit_loop(model.exit_distribution(gate_logit[:, None, None]), exit_threshold)[0, 0])


def repeat_deeper(model: LoopLM, cache: Cache, r: int) -> None:
    """The last position's keys and values of loop r become those of every deeper loop."""
    for layer in range(model.layers):
        for deeper in range(r + 1, model.loops):
            source, slot = model.slot(r, layer), model.slot(deeper, layer)
            past = cache.slots.get(slot, cache.slots[source])
            cache.slots[slot] = tuple(  # type: ignore[assignment]
                np.concatenate([old[:, : cache.filled], new[:, cache.filled : cache.filled + 1]], 1)
                for old, new in zip(past, cache.slots[source], strict=True)
            )


def feed(model: LoopLM, prompt: Array, cache: Cache, exit_threshold: float) -> tuple[Array, int]:
    """A prompt, or one more token, through all loops -> the logits of its last position, and where they are read."""
    tape = model.run(prompt[None], model.place(prompt[None], None, past=cache.filled), cache=cache)
    r = exit_of(model, tape.gate_logit[:, 0, -1], exit_threshold)
    logits: Array = model.logits(tape.hidden[r, 0, -1])
    return logits, r


def alone(model: LoopLM, prompt: Array, new_tokens: int, exit_threshold: float) -> Text:
    """The most likely text.  All loops of a token are run; what it should not have run is then overwritten."""
    text, cache = Text(), Cache()
    logits, r = feed(model, prompt, cache, exit_threshold)
    cache.filled = len(prompt)
    text.add(logits, r)
    while len(text.token) < new_tokens:
        logits, r = feed(model, np.array(text.token[-1:]), cache, exit_threshold)
        repeat_deeper(model, cache, r)
        cache.filled += 1
        text.add(logits, r)
    return text


@dataclasses.dataclass
class Flight:
    """A text that has a place: its cache, and the token in progress with the loops it has run."""

    text: Text
    new_tokens: int
    cache: Cache
    state: Array = dataclasses.field(default_factory=lambda: np.empty(0))  # 11D
    gate_logit: list[float] = dataclasses.field(default_factory=list)


class ReferenceBatch:
    """Many texts, a loop of every row per pass."""

    def __init__(self, model: LoopLM, rows: int, exit_threshold: float) -> None:
        self.model, self.exit_threshold = model, exit_threshold
        self.caches = [Cache() for _ in range(rows)]  # by place
        self.flights: list[Flight | None] = [None] * rows

    def write(self, prompts: Sequence[Array], new_tokens: Sequence[int]) -> list[Text]:
        texts, waiting = [Text() for _ in prompts], list(range(len(prompts)))
        while True:
            for place, flight in enumerate(self.flights):
                while waiting and (flight is None or len(flight.text.token) == flight.new_tokens):
                    number = waiting.pop(0)
                    flight = self.flights[place] = self.admit(place, prompts[number], texts[number], new_tokens[number])
            running = [f for f in self.flights if f is not None and len(f.text.token) < f.new_tokens]
            if not running:
                return texts
            self.run_pass(running)

    def admit(self, place: int, prompt: Array, text: Text, new_tokens: int) -> Flight:
        cache = self.caches[place]
        cache.filled = self.first_position(cache)
        logits, r = feed(self.model, prompt, cache, self.exit_threshold)
        cache.filled += len(prompt)
        flight = Flight(text, new_tokens, cache)
        self.next_token(flight, logits, r)
        return flight

    def next_token(self, flight: Flight, logits: Array, r: int) -> None:
        flight.text.add(logits, r)
        flight.state = self.model.weight["model.embed_tokens.weight"][flight.text.token[-1]][None, None]
        flight.gate_logit = []

    def run_pass(self, running: list[Flight]) -> None:
        states = [self.run_loop(running, m) for m in range(len(running))]
        left = []
        for flight, state in zip(running, states, strict=True):
            flight.state, run = state, len(flight.gate_logit) + 1
            weight = self.model.weight["model.early_exit_gate.weight"][0]
            flight.gate_logit.append(float(state[0, 0] @ weight + self.model.weight["model.early_exit_gate.bias"][0]))
            if run == self.model.loops or self.stops(flight):
                left.append(flight)
        rows = [self.model.logits(flight.state[0, 0]) for flight in left]
        for m, flight in enumerate(left):
            r = len(flight.gate_logit) - 1
            self.leave(flight, r)
            flight.cache.filled += 1
            self.next_token(flight, rows[self.head_row(m, len(left))], r)

    def run_loop(self, running: list[Flight], m: int) -> Array:
        """The next loop of row m of a pass.  -> its state, 11D"""
        flight, r = running[m], self.loop(running, m)
        place = Place(np.array([[self.position(running, m)]]), np.zeros(1, np.int64))
        x = flight.state
        for layer in range(self.model.layers):
            x, _ = self.model.layer_forward(r, layer, x, place, self.cache(running, m))
        return self.model.norm(x, "model.norm.weight")[0]

    def stops(self, flight: Flight) -> bool:
        """Whether the loops run so far are enough: one more is possible, so that none of them takes the remainder."""
        seen = np.array([*flight.gate_logit, 0.0])
        return exit_of(self.model, seen, self.exit_threshold) < len(flight.gate_logit)

    def first_position(self, cache: Cache) -> int:
        """Where a prompt begins in a cache that another may have used."""
        return 0

    def position(self, running: list[Flight], m: int) -> int:
        return running[m].cache.filled

    def cache(self, running: list[Flight], m: int) -> Cache:
        return running[m].cache

    def loop(self, running: list[Flight], m: int) -> int:
        return len(running[m].gate_logit)

    def leave(self, flight: Flight, r: int) -> None:
        repeat_deeper(self.model, flight.cache, r)

    def head_row(self, m: int, rows: int) -> int:
        """Which row of the product with the head is that of the m-th row that stopped."""
        return m
