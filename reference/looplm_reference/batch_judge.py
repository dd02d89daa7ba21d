"""The judge of batches: every text as it is alone; and wrong batches, each of which must be caught."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .batches import Flight, ReferenceBatch, Text, alone
from .contract import Row, first_failure, relative_error
from .judge import MODELS, TOLERANCE, random_tensors
from .model import LoopLM
from .ops import Array
from .policies import Full

ROWS = 3  # places: fewer than prompts, so that each is used again
LENGTHS = (5, 1, 3, 7, 2, 4, 1)  # of the prompts
NEW = (6, 9, 3, 5, 1, 8, 7)  # tokens asked for
THRESHOLDS = (0.35, 0.6, 1.0)
POLICIES = ("last-exited", "full")  # under which rows come and go


class Candidate(Protocol):
    """Who writes texts: greedy, `rows` at once; tensors and config as in the judge of models."""

    name: str

    def batch(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        prompts: Sequence[Array],
        new_tokens: Sequence[int],
        exit_threshold: float,
        rows: int,
        policy: str,
    ) -> Sequence[Text]: ...


class ReferenceCandidate:
    """The reference's batch, or a wrong one, in the candidate's seat."""

    def __init__(self, batch: type[ReferenceBatch] = ReferenceBatch, name: str = "reference") -> None:
        self.kind, self.name = batch, name

    def batch(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        prompts: Sequence[Array],
        new_tokens: Sequence[int],
        exit_threshold: float,
        rows: int,
        policy: str,
    ) -> Sequence[Text]:
        return self.kind(LoopLM(tensors, config), rows, exit_threshold, policy).write(prompts, new_tokens)


def prompts_for(config: Mapping[str, Any]) -> list[Array]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, config["vocab_size"], length) for length in LENGTHS]


def compare(candidate: Candidate, name: str, exit_threshold: float, policy: str) -> Iterator[Row]:
    """Every text of a batch with the same text alone: tokens and exits exactly, log-probabilities as float32 can."""
    config = MODELS[name]
    tensors, prompts = random_tensors(config), prompts_for(config)
    model = LoopLM(tensors, config)
    found = candidate.batch(tensors, config, prompts, NEW, exit_threshold, ROWS, policy)
    for number, (prompt, new_tokens, text) in enumerate(zip(prompts, NEW, found, strict=True), 1):
        expected = alone(model, prompt, new_tokens, exit_threshold, policy)
        for what, tolerance in (("token", 0.0), ("exit_loop", 0.0), ("logprob", TOLERANCE)):
            error = relative_error(getattr(expected, what), getattr(text, what))
            yield Row(f"{name}: {policy}.q={exit_threshold:g}.text{number}.{what}", error, tolerance)


# ---- mistakes


class _WrittenElsewhere(ReferenceBatch):
    def leave(self, flight: Flight, r: int) -> None:
        with contextlib.suppress(KeyError):  # what is not where it should be cannot be copied to deeper loops
            super().leave(flight, r)


class _PositionOfTheNeighbour(_WrittenElsewhere):
    def position(self, running: list[Flight], m: int) -> int:
        return running[m - 1].decoder.filled


class _CacheRowOfTheNeighbour(_WrittenElsewhere):
    def decoder(self, running: list[Flight], m: int) -> Full:
        return running[m - 1].decoder


class _EveryRowInTheFirstOnesLoop(_WrittenElsewhere):
    def loop(self, running: list[Flight], m: int) -> int:
        return len(running[0].gate_logit)


class _OldKeysSeen(ReferenceBatch):
    def first_position(self, decoder: Full) -> int:
        return decoder.filled


class _HeadRowsSwapped(ReferenceBatch):
    def head_row(self, m: int, rows: int) -> int:
        return rows - 1 - m


class _DeeperSlotsLeft(ReferenceBatch):
    def leave(self, flight: Flight, r: int) -> None:
        """Whatever was there: here the keys and values of the position before."""
        now = flight.decoder.filled
        for deeper in range(r + 1, self.model.loops):
            for slot in flight.decoder.slots(deeper):
                slot[now] = slot[now - 1]


class _RowsInLockstep(ReferenceBatch):
    def run_pass(self, running: list[Flight]) -> None:
        """A row that has stopped runs on with the others, and is read where they stop."""
        self.deepest = min(len(flight.gate_logit) for flight in running)
        super().run_pass(running)

    def stops(self, flight: Flight) -> bool:
        return super().stops(flight) and len(flight.gate_logit) > self.deepest + 1


class _LeavesAtItsExit(ReferenceBatch):
    """Rows whose deeper loops have to run do not run them: their slots get copies."""

    def __init__(self, model: LoopLM, rows: int, exit_threshold: float, policy: str) -> None:
        super().__init__(model, rows, exit_threshold, "last-exited")


class _ReadAfterAllLoops(ReferenceBatch):
    def read_at(self, flight: Flight, exit_at: int) -> int:
        return len(flight.hidden) - 1


# Each mistake, and the policy under which it is one.
MUTANTS: dict[str, tuple[str, type[ReferenceBatch]]] = {
    "position of the neighbouring row": ("last-exited", _PositionOfTheNeighbour),
    "cache row of the neighbouring row": ("last-exited", _CacheRowOfTheNeighbour),
    "every row in the loop of the first": ("last-exited", _EveryRowInTheFirstOnesLoop),
    "keys of the text before are seen": ("last-exited", _OldKeysSeen),
    "rows of the head's product swapped": ("last-exited", _HeadRowsSwapped),
    "deeper slots not filled": ("last-exited", _DeeperSlotsLeft),
    "rows wait for the deepest": ("last-exited", _RowsInLockstep),
    "full: cache row of the neighbouring row": ("full", _CacheRowOfTheNeighbour),
    "full: a row leaves at its exit": ("full", _LeavesAtItsExit),
    "full: a row is read after all loops": ("full", _ReadAfterAllLoops),
}


def caught(mutant: type[ReferenceBatch], policy: str) -> Row | None:
    """The first row that catches a wrong batch, if any does."""
    candidate = ReferenceCandidate(mutant)
    with np.errstate(all="ignore"):
        return first_failure(row for q in THRESHOLDS for row in compare(candidate, "grouped", q, policy))
