"""The judge of batches: it passes what is right, catches every mistake, and none of its choices is a close call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from looplm.batching import SERVED
from looplm_cli.batch_verification import BatchCandidate, batch_checks
from looplm_reference import batch_judge, batches
from looplm_reference.batch_judge import (
    MODELS,
    MUTANTS,
    NEW,
    POLICIES,
    THRESHOLDS,
    ReferenceCandidate,
    caught,
    compare,
)
from looplm_reference.batches import ReferenceBatch, Text, alone
from looplm_reference.judge import random_tensors
from looplm_reference.model import LoopLM

EVERY = [(name, q, policy) for name in MODELS for q in THRESHOLDS for policy in POLICIES]


@pytest.mark.parametrize(("name", "q", "policy"), EVERY)
def test_reference_and_engine_pass(name: str, q: float, policy: str) -> None:
    for candidate in (ReferenceCandidate(), BatchCandidate(), BatchCandidate(threads=2)):
        rows = list(compare(candidate, name, q, policy))
        assert len(rows) == 3 * len(NEW)
        assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mistake_is_caught(name: str) -> None:
    policy, mutant = MUTANTS[name]
    assert caught(mutant, policy) is not None


@pytest.mark.parametrize("policy", POLICIES)
def test_no_mistake_is_not_caught(policy: str) -> None:
    assert caught(ReferenceBatch, policy) is None


def test_every_policy_of_batches_is_judged_and_has_mutants() -> None:
    assert set(POLICIES) == set(SERVED) == {policy for policy, _ in MUTANTS.values()}
    names = [name for name, _ in batch_checks(1)]
    assert {policy for policy in SERVED for name in names if f", {policy}, " in name} == set(SERVED)
    assert len(names) == len(EVERY)


def test_a_text_that_is_too_short_or_slightly_off_is_objected_to() -> None:
    class Wrong(ReferenceCandidate):
        def batch(self, *given: Any) -> Sequence[Text]:
            texts = list(super().batch(*given))
            texts[1].token.pop()
            texts[3].logprob[2] *= 1.001
            return texts

    failed = [row.name.split("q=0.6.")[1] for row in compare(Wrong(), "grouped", 0.6, "full") if not row.ok]
    assert failed == ["text2.token", "text4.logprob"]


def test_alone_is_greedy_decoding_where_all_loops_run() -> None:
    model = LoopLM(random_tensors(MODELS["grouped"]), MODELS["grouped"])
    for prompt in batch_judge.prompts_for(MODELS["grouped"]):
        expected = model.greedy(prompt[None], 1.0, 6)[0, len(prompt) :]
        assert alone(model, prompt, 6, 1.0).token == expected.tolist()


def test_alone_differs_from_full_caches_once_a_token_has_stopped_early() -> None:
    """Else the deeper slots would have no say, and forgetting them would not show."""
    model = LoopLM(random_tensors(MODELS["grouped"]), MODELS["grouped"])
    prompts = batch_judge.prompts_for(MODELS["grouped"])
    last, full, truth = [], [], []
    for p in prompts:
        last.append(alone(model, p, 8, 0.6).token)
        full.append(alone(model, p, 8, 0.6, "full").token)
        truth.append(model.greedy(p[None], 0.6, 8)[0, len(p) :].tolist())
    assert last != truth
    assert full == truth


@pytest.mark.parametrize(("name", "q", "policy"), EVERY)
def test_no_choice_is_a_close_call(name: str, q: float, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 may differ in the sixth digit, on any processor: neither token nor exit may hang on that."""
    gaps, chosen = [], batches.chosen

    def watched(model: LoopLM, hidden: np.ndarray, exit_threshold: float) -> tuple[np.ndarray, int]:
        logits, r = chosen(model, hidden, exit_threshold)
        second, first = np.sort(logits)[-2:]
        gaps.append(first - second)
        return logits, r

    def exit_of(model: LoopLM, gate_logit: np.ndarray, exit_threshold: float) -> int:
        cdf = np.cumsum(model.exit_distribution(gate_logit[:, None, None])[:-1, 0, 0])
        gaps.extend(abs(cdf - exit_threshold))
        return real(model, gate_logit, exit_threshold)

    real = batches.exit_of
    monkeypatch.setattr(batches, "chosen", watched)
    monkeypatch.setattr(batches, "exit_of", exit_of)
    config = MODELS[name]
    for prompt, count in zip(batch_judge.prompts_for(config), NEW, strict=True):
        alone(LoopLM(random_tensors(config), config), prompt, count, q, policy)
    assert min(gaps) > 2e-4
