"""What `looplm verify` checks of batches: the engine's rows that come and go, in the seat of the judge's candidate."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from looplm.arrays import Array, Ints
from looplm.batching import Batch, Request
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
    ) -> list[Text]:
        wanted = [
            Request(prompt, np.random.default_rng(0), count)  # greedy: chance has no say
            for prompt, count in zip(prompts, new_tokens, strict=True)
        ]
        weights, rule, texts = self._weights(tensors, config), LearnedGate(exit_threshold), [Text() for _ in prompts]
        for number, token in Batch(weights, wanted, rule=rule, rows=rows, sampling=GREEDY, threads=self.threads):
            text = texts[number]
            text.token.append(token.token_id)
            text.exit_loop.append(token.exit_loop)
            text.logprob.append(token.logprob)
        return texts


def batch_checks(threads: int) -> Iterator[tuple[str, list[Row]]]:
    """A name and the comparisons behind it, for each model and threshold."""
    for name in MODELS:
        candidate = BatchCandidate(threads)
        for q in batch_judge.THRESHOLDS:
            yield (
                f"{name}: texts of a batch against each alone, q = {q:g}",
                list(batch_judge.compare(candidate, name, q)),
            )


def batch_mutants() -> Iterator[tuple[str, Row | None]]:
    """Each mistake, and the row that caught it."""
    for name, mutant in batch_judge.MUTANTS.items():
        yield name, batch_judge.caught(mutant)
