"""Every exit rule, between every bounds, in generate, inspect, eval and batches: one loop each, whoever is asked."""

import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import tiny_models
from in_process import looplm, report_of
from looplm.batching import SERVED
from looplm.cache import POLICIES
from looplm.data import save_tokens
from looplm.exits import RULES, Bounded
from looplm.text import byte_tokenizer

TEXT = tiny_models.HELD_OUT[:40]
WISHES = {
    "gate": "gate:0.5",
    "fixed": "fixed:2",
    "change": "change:0.6",
    "kl": "kl:0.5",
    "top": "top:0.2",
    "margin": "margin:0.5",
    "stable": "stable:2",
}
BOUNDS = [(1, 4), (2, 4), (1, 3), (3, 3), (2, 3), (4, 4)]  # least and most loops, of 4
SOME_BOUNDS = [(1, 4), (2, 3)]
PROMPTS = ["It was the best", "of times", "x", "the age of"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    found = tiny_models.text_run(folder / "run")
    held_out = byte_tokenizer().encode(tiny_models.HELD_OUT[: len(TEXT) + 1])  # so that each position has a next token
    save_tokens(folder / "run" / "data" / "val.npy", held_out)
    return found


def place(model: pathlib.Path) -> pathlib.Path:
    return model.parents[1]


def asked(rule: str, least: int, most: int, name_of_most: str = "--loops") -> list[object]:
    bounds = [*(["--min-loops", least] if least > 1 else []), *([name_of_most, most] if most < 4 else [])]
    return ["--exit", WISHES[rule], *bounds]


def looked(model: pathlib.Path, rule: str, least: int, most: int) -> np.ndarray:
    """The exit loop of every position of the text, as inspect shows it."""
    report = report_of("inspect", "-m", model, "-p", TEXT, *asked(rule, least, most))
    return np.array([position["exit_loop"] for position in report["positions"]])


def batch_of(model: pathlib.Path, *settings: object) -> list[dict[str, Any]]:
    out, _ = looplm("generate", "-m", model, "--prompts", place(model) / "prompts.txt", *settings, "--quiet")
    return [json.loads(line) for line in out.splitlines()]


def singles(model: pathlib.Path, *settings: object) -> list[dict[str, Any]]:
    return [
        report_of("generate", "-m", model, "-p", prompt, "--seed", number, *settings)
        for number, prompt in enumerate(PROMPTS)
    ]


def test_every_rule_is_among_them() -> None:
    assert set(WISHES) == set(RULES)
    assert all(wish.partition(":")[0] == rule for rule, wish in WISHES.items())


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_all_commands_stop_at_the_same_loop_and_within_bounds(
    model: pathlib.Path, rule: str, bounds: tuple[int, int]
) -> None:
    least, most = bounds
    unbounded, found = looked(model, rule, 1, 4), looked(model, rule, least, most)
    if rule != "fixed":
        assert len(set(unbounded.tolist())) > 1
    within = unbounded >= least
    np.testing.assert_array_equal(found[within], np.minimum(unbounded[within], most))
    assert ((least <= found) & (found <= most)).all()
    if rule in ("gate", "fixed"):  # once enough, always enough; a margin may shrink again
        np.testing.assert_array_equal(found[~within], least)

    wish = asked(rule, least, most, "--max-loops")
    (measured,) = report_of("eval", "-m", model, "--seq-len", 64, *wish, "--quiet")["thresholds"]
    assert measured["mean_loops"] == pytest.approx(found.mean())
    np.testing.assert_allclose(measured["exits"], np.bincount(found, minlength=most + 1)[1:] / len(TEXT))

    for prompt_tokens in (5, 20, len(TEXT)):
        settings = ["-p", TEXT[:prompt_tokens], "-n", 6, *asked(rule, least, most)]
        written = report_of("generate", "-m", model, *settings)["generated"]
        assert written[0]["exit_loop"] == found[prompt_tokens - 1]
        assert all(least <= token["exit_loop"] <= most for token in written)
        assert all(token["loops_run"] == token["exit_loop"] for token in written[1:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("policy", SERVED)
def test_a_batch_stops_where_each_alone_does(model: pathlib.Path, rule: str, policy: str) -> None:
    for least, most in SOME_BOUNDS:
        settings = ["-n", 8, "--cache", policy, *asked(rule, least, most)]
        together, alone = batch_of(model, *settings, "--batch", 3), singles(model, *settings)
        for answer, report in zip(together, alone, strict=True):
            for key in ("text", "tokens", "finish", "exits", "mean_loops", "seed"):
                assert answer[key] == report[key]
            within = [share for loop, share in enumerate(answer["exits"], 1) if least <= loop <= most]
            assert sum(within) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_every_policy_reads_within_bounds_and_exact_writes_what_full_does(model: pathlib.Path, rule: str) -> None:
    for least, most in SOME_BOUNDS:
        reports = {
            policy: report_of(
                "generate", "-m", model, "-p", TEXT[:9], "-n", 12, "--cache", policy, *asked(rule, least, most)
            )
            for policy in POLICIES
        }
        for policy, report in reports.items():
            assert report["kv"] == policy
            assert all(least <= token["exit_loop"] <= most for token in report["generated"])
            deepest = max(least, 2) if (rule, most) == ("fixed", 4) else most  # of a fixed depth no more can be asked
            runs = [deepest if policy == "full" else token["exit_loop"] for token in report["generated"][1:]]
            assert [token["loops_run"] for token in report["generated"][1:]] == runs
        read = [
            [(token["id"], token["exit_loop"], token["logprob"]) for token in reports[policy]["generated"]]
            for policy in ("exact", "full")
        ]
        assert read[0] == read[1]


def test_bounds_that_do_not_hold_are_noticed(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bounded.stops
    monkeypatch.setattr(Bounded, "stops", lambda self, hidden, gate_logit: self.rule.stops(hidden, gate_logit))
    for rule in RULES:
        with pytest.raises(AssertionError):
            test_all_commands_stop_at_the_same_loop_and_within_bounds(
                model, rule, (3, 4) if rule != "fixed" else (3, 3)
            )
    monkeypatch.setattr(Bounded, "stops", real)
    test_all_commands_stop_at_the_same_loop_and_within_bounds(model, "gate", (3, 4))


def test_rule_and_bounds_are_told_as_they_were_asked_for(model: pathlib.Path) -> None:
    for (least, most), rule in itertools.product(BOUNDS, RULES):
        told = report_of("inspect", "-m", model, "-p", "abc", *asked(rule, least, most))["exit"]
        assert told == WISHES[rule] + (f", at least {least} loops" if least > 1 else "")
