"""What `looplm verify` checks of batches: the engine's rows that come and go, in the seat of the judge's candidate."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from looplm.arrays import Array, Ints
from looplm.batching import SERVED, Batch, Request
from looplm.exits import LearnedGate
from looplm.sampling import GREEDY
from looplm_cli.engine_candidate import EngineCandidate
from looplm_reference import batch_judge
from looplm_reference.batches import Text
from looplm_reference.contract import Row
from looplm_reference.judge import MODELS


class BatchCandidate(EngineCandidate):
    """Tensors come under the names of the file, config under those of config.json."""

    def batch(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        prompts: Sequence[Ints],
        new_tokens: Sequence[int],
        exit_threshold: float,
        rows: int,
        policy: str,
    ) -> list[Text]:
        wanted = [
            Request(prompt, np.random.default_rng(0), count)  # greedy: chance has no say
            for prompt, count in zip(prompts, new_tokens, strict=True)
        ]
        known = next(each for each in SERVED if each == policy)
        settings: dict[str, Any] = {"rule": LearnedGate(exit_threshold), "sampling": GREEDY, "threads": self.threads}
        texts = [Text() for _ in prompts]
        for number, token in Batch(self._weights(tensors, config), wanted, rows=rows, policy=known, **settings):
            text = texts[number]
            text.token.append(token.token_id)
            text.exit_loop.append(token.exit_loop)
            text.logprob.append(token.logprob)
        return texts


def batch_checks(threads: int) -> Iterator[tuple[str, list[Row]]]:
    """A name and the comparisons behind it, for each model, cache policy of batches and threshold."""
    candidate = BatchCandidate(threads)
    for name, policy, q in itertools.product(MODELS, SERVED, batch_judge.THRESHOLDS):
        rows = list(batch_judge.compare(candidate, name, q, policy))
        yield f"{name}: texts of a batch against each alone, {policy}, q = {q:g}", rows


def batch_mutants() -> Iterator[tuple[str, Row | None]]:
    """Each mistake, and the row that caught it."""
    for name, (policy, mutant) in batch_judge.MUTANTS.items():
        yield name, batch_judge.caught(mutant, policy)
