"""Texts that are written side by side: what each must be, and a batch as a definition.

The truth is `alone`: one text, token by token.  `ReferenceBatch` writes many with one loop of every row per pass, rows
at different positions and in different loops; a row that ends leaves its place, and a cache that is full of old keys,
to the next prompt.  Its parts are small enough to be replaced by wrong ones.

Every token is the most likely one, read at the first loop whose exit probabilities add up to the threshold.  Which
loops it runs, and what later tokens find in the slots of the others, is the cache policy (policies.py).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .model import LoopLM
from .ops import Array
from .policies import POLICIES, Full


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


def gate_of(model: LoopLM, hidden: Array) -> Array:
    """hidden: ...D -> gate_logit: ..."""
    weight = model.weight["model.early_exit_gate.weight"][0]
    found: Array = hidden @ weight + model.weight["model.early_exit_gate.bias"][0]
    return found


def chosen(model: LoopLM, hidden: Array, exit_threshold: float) -> tuple[Array, int]:
    """A position after all loops: hidden: RD -> logits: V, the loop they are read from."""
    r = exit_of(model, gate_of(model, hidden), exit_threshold)
    logits: Array = model.logits(hidden[r])
    return logits, r


def alone(model: LoopLM, prompt: Array, new_tokens: int, exit_threshold: float, policy: str = "last-exited") -> Text:
    """The most likely text.  All loops of a token are run; what it should not have run is then overwritten."""
    text, decoder = Text(), POLICIES[policy](model)
    logits, r = chosen(model, decoder.read(prompt)[:, -1], exit_threshold)
    text.add(logits, r)
    while len(text.token) < new_tokens:
        x, states = decoder.embedded(np.array(text.token[-1:])), []
        for loop in range(model.loops):
            x = decoder.enter(loop, x)
            states.append(x[0, 0])
        logits, r = chosen(model, np.stack(states), exit_threshold)
        decoder.leave(r, x)
        decoder.filled += 1
        text.add(logits, r)
    return text


@dataclasses.dataclass
class Flight:
    """A text that has a place: its keys and values, and the token in progress with the loops it has run."""

    text: Text
    new_tokens: int
    decoder: Full
    state: Array = dataclasses.field(default_factory=lambda: np.empty(0))  # 11D
    hidden: list[Array] = dataclasses.field(default_factory=list)  # D after each loop run
    gate_logit: list[float] = dataclasses.field(default_factory=list)
    exit_at: int | None = None  # the loop it is read from, once that is known


class ReferenceBatch:
    """Many texts, a loop of every row per pass."""

    def __init__(self, model: LoopLM, rows: int, exit_threshold: float, policy: str) -> None:
        self.model, self.exit_threshold = model, exit_threshold
        self.decoders = [POLICIES[policy](model) for _ in range(rows)]  # by place
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
        decoder = self.decoders[place]
        decoder.filled = self.first_position(decoder)
        logits, r = chosen(self.model, decoder.read(prompt)[:, -1], self.exit_threshold)
        flight = Flight(text, new_tokens, decoder)
        self.next_token(flight, logits, r)
        return flight

    def next_token(self, flight: Flight, logits: Array, r: int) -> None:
        flight.text.add(logits, r)
        flight.state = flight.decoder.embedded(np.array(flight.text.token[-1:]))
        flight.hidden, flight.gate_logit, flight.exit_at = [], [], None

    def run_pass(self, running: list[Flight]) -> None:
        states = [self.run_loop(running, m) for m in range(len(running))]
        left = []
        for flight, state in zip(running, states, strict=True):
            flight.state = state
            flight.hidden.append(state[0, 0])
            flight.gate_logit.append(float(gate_of(self.model, state[0, 0])))
            run = len(flight.hidden)
            if flight.exit_at is None and (run == self.model.loops or self.stops(flight)):
                flight.exit_at = run - 1
            if flight.exit_at is not None and run == flight.decoder.runs(flight.exit_at):
                left.append((flight, self.read_at(flight, flight.exit_at)))
        rows = [self.model.logits(flight.hidden[r]) for flight, r in left]
        for m, (flight, r) in enumerate(left):
            self.leave(flight, r)
            flight.decoder.filled += 1
            self.next_token(flight, rows[self.head_row(m, len(left))], r)

    def run_loop(self, running: list[Flight], m: int) -> Array:
        """The next loop of row m of a pass.  -> its state, 11D"""
        decoder = self.decoder(running, m)
        return decoder.loop(self.loop(running, m), running[m].state, self.position(running, m))

    def stops(self, flight: Flight) -> bool:
        """Whether the loops run so far are enough: one more is possible, so that none of them takes the remainder."""
        seen = np.array([*flight.gate_logit, 0.0])
        return exit_of(self.model, seen, self.exit_threshold) < len(flight.gate_logit)

    def first_position(self, decoder: Full) -> int:
        """Where a prompt begins in a cache that another may have used."""
        return 0

    def position(self, running: list[Flight], m: int) -> int:
        return running[m].decoder.filled

    def decoder(self, running: list[Flight], m: int) -> Full:
        return running[m].decoder

    def loop(self, running: list[Flight], m: int) -> int:
        return len(running[m].gate_logit)

    def read_at(self, flight: Flight, exit_at: int) -> int:
        """Which of its loops a row that leaves is read from."""
        return exit_at

    def leave(self, flight: Flight, r: int) -> None:
        flight.decoder.leave(r, flight.state)

    def head_row(self, m: int, rows: int) -> int:
        """Which row of the product with the head is that of the m-th row that stopped."""
        return m
