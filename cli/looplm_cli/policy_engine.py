"""The engine's cache policies in the seat of looplm_reference.policy_judge, and what `looplm verify` checks of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from looplm.arrays import Array, Floats, Ints
from looplm.cache import POLICIES
from looplm.config import model_config_from_json
from looplm.generation import Session
from looplm.weights import Weights
from looplm_reference import policy_judge
from looplm_reference.contract import Row
from looplm_reference.judge import MODELS


class Given:
    """An exit rule that stops row b after loop exit_at[b] (B, counted from 0), whatever it sees."""

    def __init__(self, exit_at: Ints) -> None:
        self.exit_at = exit_at

    def deepest(self, loops: int) -> int:
        return loops

    def stops(self, hidden: Floats, gate_logit: Floats) -> Array:
        stopping: Array = self.exit_at < len(gate_logit)
        return stopping


class EnginePolicies:
    """Rows decode in lockstep, as a batch does, or one after the other, as `generate` does it."""

    name = "engine"

    def __init__(self, together: bool) -> None:
        self.together = together

    def decoded(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        input_ids: Ints,
        prompt: int,
        exit_at: Ints,
        policy: str,
        max_deferred: int,
    ) -> Floats:
        weights = Weights.from_tensors(model_config_from_json(config, "the judge's model"), tensors)
        known = next(each for each in POLICIES if each == policy)
        batch, found = len(input_ids), []
        for rows in [slice(batch)] if self.together else [slice(b, b + 1) for b in range(batch)]:
            session = Session(weights, batch=len(input_ids[rows]), policy=known, max_deferred=max_deferred, capacity=1)
            found.append(_decode(session, np.ascontiguousarray(input_ids[rows]), prompt, exit_at[:, rows]))
        return np.concatenate(found, axis=1)


def _decode(session: Session, input_ids: Ints, prompt: int, exit_at: Ints) -> Floats:
    session.feed(np.ascontiguousarray(input_ids[:, :prompt]))
    states = []
    for column, exits in zip(np.ascontiguousarray(input_ids[:, prompt:].T), exit_at, strict=True):
        session.advance(column, Given(exits))
        states.append(session.hidden.copy())
    return np.stack(states, axis=2)


def policy_checks() -> Iterator[tuple[str, list[Row]]]:
    """Every policy on every model of the judge: name, and its comparisons."""
    for policy in POLICIES:
        for together in (False, True):
            candidate, rows = EnginePolicies(together), "a batch" if together else "single rows"
            found = [row for name in MODELS for row in policy_judge.compare(candidate, policy, name)]
            yield f"{policy}, {rows}", found


def policy_mutants() -> Iterator[tuple[str, Row | None]]:
    """Every mistake: name, and the row that caught it, if any did."""
    for mutant in policy_judge.MUTANTS:
        yield f"{mutant.policy}: {mutant.name}", mutant.first_failure()
