"""The judge of whole models: the reference passes, and every mutant is caught where it goes wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from looplm_reference.contract import Row, first_failure
from looplm_reference.judge import (
    MODELS,
    TOLERANCE,
    Candidate,
    ReferenceCandidate,
    compare,
    judge_model,
    random_tensors,
)
from looplm_reference.model import PER_LAYER, LoopLM, Taps
from looplm_reference.mutants import MODEL_MUTANTS, ModelMutant

PROMISED = {  # the mistakes a reader is told about by these names
    "no norm between loops",
    "norms of a layer swapped",
    "RoPE interleaved instead of half-split",
    "key/value slot of the wrong loop",
    "exit off by one",
    "last loop does not take the remainder",
    "eps forgotten",
    "positions off by one under padding",
}


class Changed(ReferenceCandidate):
    """The reference with what one of its functions returns changed."""

    def __init__(self, function: str, change: Callable[[Any], Any]) -> None:
        super().__init__()
        right = getattr(self, function)
        setattr(self, function, lambda *given, **named: change(right(*given, **named)))


def failure(candidate: Candidate) -> Row:
    row = first_failure(compare(candidate))
    assert row is not None
    return row


def test_the_reference_passes_exactly() -> None:
    rows = judge_model(ReferenceCandidate(), tolerance=1e-12)
    assert [row for row in rows if not row.ok] == []
    assert len({row.name for row in rows}) == len(rows)


def test_rows_follow_the_computation() -> None:
    names = [row.name for row in judge_model(ReferenceCandidate(), models=("grouped",))]
    expected = []
    for r in (1, 2, 3):
        expected += [f"grouped: loop{r}.layer{layer}.{name}" for layer in (1, 2) for name in PER_LAYER]
        expected += [f"grouped: loop{r}.hidden", f"grouped: loop{r}.gate_logit"]
    assert names[: len(expected)] == expected
    landmarks = ["logits", "exit_loop@0.5", "cached.prefix7.loop3.hidden", "left padding.exit_prob"]
    landmarks += ["right padding.exit_prob", "stage1.grad/lm_head.weight", "left padding.stage1.grad/lm_head.weight"]
    places = [names.index(f"grouped: {name}") for name in landmarks]
    assert places == sorted(places)


@pytest.mark.parametrize("mutant", MODEL_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught_where_it_goes_wrong(mutant: ModelMutant) -> None:
    row = mutant.first_failure()
    assert row is not None
    assert row.name == mutant.first
    assert row.error > 1000 * TOLERANCE


def test_the_promised_mutants_are_there() -> None:
    names = [mutant.name for mutant in MODEL_MUTANTS]
    assert len(set(names)) == len(names)
    assert set(names) >= PROMISED


def test_one_weight_off_by_a_little_is_found_in_its_layer() -> None:
    class Nudged(LoopLM):
        def __init__(self, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
            super().__init__(tensors, config)
            self.weight["model.layers.1.mlp.up_proj.weight"] = self.weight["model.layers.1.mlp.up_proj.weight"].copy()
            self.weight["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-2

    assert failure(ReferenceCandidate(Nudged)).name == "grouped: loop1.layer2.up"


@pytest.mark.parametrize(
    ("function", "change", "row", "note"),
    [
        ("forward", lambda out: {**out, "logits": out["logits"][..., :-1]}, "grouped: logits", ""),
        ("forward", lambda out: {**out, "exit_prob": out["exit_prob"] * np.nan}, "grouped: exit_prob", ""),
        ("forward", lambda out: {k: v for k, v in out.items() if k != "hidden"}, "grouped: hidden", "missing"),
        ("cached_hidden", lambda hidden: hidden + 1e-3, "grouped: cached.prefix1.loop1.hidden", ""),
        ("stage1", lambda out: {**out, "loss": 2 * out["loss"]}, "grouped: stage1.loss", ""),
        ("stage1", lambda out: {**out, "grads": {}}, "grouped: stage1.grad/model.embed_tokens.weight", "missing"),
        ("exit_loop", lambda index: index[None], "grouped: exit_loop@0", ""),
    ],
)
def test_a_wrong_answer_is_named(function: str, change: Callable[[Any], Any], row: str, note: str) -> None:
    found = failure(Changed(function, change))
    assert (found.name, found.error, found.note) == (row, found.error if note == "" else np.inf, note)


def test_a_candidate_that_fills_no_taps_is_told_so() -> None:
    class Silent(ReferenceCandidate):
        def forward(self, *given: Any, taps: Taps | None = None, **named: Any) -> Mapping[str, np.ndarray]:
            return super().forward(*given, **named)

    found = failure(Silent())
    assert (found.name, found.note) == ("grouped: loop1.layer1.x", "missing")


@pytest.mark.parametrize("name", MODELS)
def test_the_models_use_every_part(name: str) -> None:
    """Tensors are float32 and seeded; the exit law leaves some chance to every loop."""
    config = MODELS[name]
    tensors, again = random_tensors(config), random_tensors(config)
    assert all(tensor.dtype == np.float32 and np.array_equal(tensor, again[key]) for key, tensor in tensors.items())
    ids = np.random.default_rng(5).integers(0, config["vocab_size"], (3, 7))
    shares = LoopLM(tensors, config).forward(ids)["exit_prob"].mean((1, 2))
    assert len(shares) == config["total_ut_steps"]
    assert shares.min() > 0.05
