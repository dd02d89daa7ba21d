"""Stage II: the gate learns what is known to be right, the contest is fair, and nothing but the gate changes."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import tiny_models
from in_process import looplm, report_of
from looplm.calibration import (
    THRESHOLDS,
    CalibrateConfig,
    Gate,
    Observations,
    at_threshold,
    contest,
    fit_gate,
    measure,
    observe,
)
from looplm.checkpoint import load_model
from looplm.data import Batch
from looplm.errors import DataError, TrainingError
from looplm.model import forward
from looplm.objectives import StageTwo
from looplm.safetensors_file import TensorFile
from looplm_cli.held_out import halves

WIDTH = 6
FLAT = Gate(np.zeros((1, WIDTH), np.float32), np.zeros(1, np.float32))
GATE_NAMES = ("model.early_exit_gate.weight", "model.early_exit_gate.bias")


def observations(improves: np.ndarray, seed: int = 0) -> Observations:
    """Loop r + 1 lowers the loss by half a nat where improves[r] (RN - 1), and the state says so in channel 0."""
    rng = np.random.default_rng(seed)
    loops, rows = len(improves) + 1, improves.shape[1]
    hidden = rng.normal(0.0, 0.3, (loops, rows, WIDTH)).astype(np.float32)
    hidden[:-1, :, 0] = np.where(improves, 1.0, -1.0)
    hidden[-1, :, 0] = 0.0
    loss = np.concatenate([np.full((1, rows), 3.0), 3.0 - 0.5 * improves.cumsum(0)]).astype(np.float32)
    return Observations(hidden, loss)


def hazard(gate: Gate, seen: Observations) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-(seen.hidden @ gate.weight[0] + gate.bias[0])))


# ---- fitting


def test_the_gate_learns_to_go_on_exactly_where_the_next_loop_helps() -> None:
    improves = np.random.default_rng(1).random((3, 4000)) < 0.5
    seen = observations(improves)
    objective = StageTwo("look-ahead", improvement_threshold=0.25)  # half a nat is plenty, nothing is not enough
    gate = fit_gate(FLAT, seen, objective, CalibrateConfig(steps=400, learning_rate=0.1))
    stop = hazard(gate, seen)[:-1]
    assert (stop[improves] < 0.1).all()
    assert (stop[~improves] > 0.9).all()
    assert abs(gate.weight[0, 1:]).max() < 0.1 * abs(gate.weight[0, 0])  # the other channels say nothing
    loops, loss = measure(gate, seen).thresholds[0.5]
    best = 1.0 + np.cumprod(improves, axis=0).sum(0).mean()
    assert loops == pytest.approx(best, abs=0.02)
    assert loss == pytest.approx(float((3.0 - 0.5 * np.cumprod(improves, axis=0).sum(0)).mean()), abs=0.02)


@pytest.mark.parametrize(("target", "told"), [("paper", (1, 2)), ("look-ahead", (0, 1))])
def test_the_target_says_which_gate_learns_from_an_improvement(target: str, told: tuple[int, int]) -> None:
    """Loop 2 always helps and loop 3 never; a channel per loop lets each gate learn for itself."""
    seen = observations(np.repeat([[True], [False]], 500, axis=1))
    seen.hidden[...] = np.eye(3, WIDTH, dtype=np.float32)[:, None]
    gate = fit_gate(FLAT, seen, StageTwo(target), CalibrateConfig(steps=600, learning_rate=0.1))
    stop = hazard(gate, seen).mean(1)
    assert stop[told[0]] < 0.05
    assert stop[told[1]] == pytest.approx(
        1.0 / (1.0 + np.exp(-50 * 0.005)), abs=0.01
    )  # no improvement is worth this much


def test_fitting_is_reproducible_and_leaves_the_old_gate_alone() -> None:
    seen = observations(np.random.default_rng(1).random((2, 300)) < 0.5)
    config = CalibrateConfig(steps=20, batch_tokens=64)
    first, again = (fit_gate(FLAT, seen, StageTwo(), config) for _ in range(2))
    other = fit_gate(FLAT, seen, StageTwo(), dataclasses.replace(config, seed=1))
    np.testing.assert_array_equal(first.weight, again.weight)
    assert (first.weight != other.weight).any()
    assert not FLAT.weight.any()


def test_a_gate_that_leaves_the_numbers_is_refused() -> None:
    seen = observations(np.random.default_rng(1).random((2, 50)) < 0.5)
    with np.errstate(all="ignore"), pytest.raises(TrainingError, match="no longer a number") as caught:
        fit_gate(FLAT, seen, StageTwo(), CalibrateConfig(steps=3, learning_rate=1e38))
    assert "lower learning rate" in caught.value.hint


# ---- observing


def test_observations_are_counted_positions_only(tmp_path: pathlib.Path) -> None:
    weights = load_model(tiny_models.text_run(tmp_path / "run", loops=3)).weights
    rng = np.random.default_rng(0)
    ids, target = rng.integers(0, 256, (2, 3, 8))
    target[0, ::2] = target[2] = -1
    batches = [Batch(ids, target)] * 2
    seen = observe(weights, batches, 10**6, threads=2)
    trace, counted = forward(weights, ids, threads=2), target >= 0
    assert seen.loss.shape == (3, 24)
    np.testing.assert_array_equal(seen.loss[:, :12], trace.token_loss(target)[:, counted])
    np.testing.assert_array_equal(seen.hidden[:, 12:], trace.hidden[:, counted])
    assert observe(weights, batches, 5).hidden.shape == (3, 5, 16)
    with pytest.raises(DataError, match="no position"):
        observe(weights, [Batch(ids, np.full_like(target, -1))], 5)


# ---- the contest


def noisy(improves: np.ndarray, noise: float, seed: int) -> Gate:
    """A gate that reads the right channel more or less well."""
    weight = np.random.default_rng(seed).normal(0.0, noise, (1, WIDTH)).astype(np.float32)
    weight[0, 0] = -2.0
    return Gate(weight, np.zeros(1, np.float32))


def test_swapping_sides_flips_the_sign() -> None:
    seen = observations(np.random.default_rng(1).random((3, 3000)) < 0.5)
    good, bad = noisy(seen.loss, 0.0, 0), noisy(seen.loss, 8.0, 1)
    found, swapped = contest(bad, good, seen), contest(good, bad, seen)
    assert found.advantage > 0.01
    assert swapped.advantage == pytest.approx(-found.advantage, rel=1e-9)
    assert swapped.shared == found.shared
    assert (found.new_wins, swapped.new_wins) == (True, False)
    assert (found.old, found.new) == (swapped.new, swapped.old)


def test_equal_gates_draw_and_a_draw_is_no_win() -> None:
    seen = observations(np.random.default_rng(1).random((3, 500)) < 0.5)
    gate = noisy(seen.loss, 1.0, 2)
    found = contest(gate, gate, seen)
    assert found.advantage == 0.0
    assert not found.new_wins


def test_the_contest_is_at_equal_mean_loops_not_at_equal_thresholds() -> None:
    """A gate that merely loops longer loses less at every threshold, and gains nothing by it."""
    seen = observations(np.random.default_rng(1).random((3, 3000)) < 0.8)
    gate = noisy(seen.loss, 1.0, 3)
    longer = Gate(gate.weight, gate.bias - np.float32(0.7))
    found = contest(gate, longer, seen)
    assert all(found.new.thresholds[q][1] <= found.old.thresholds[q][1] for q in THRESHOLDS)
    assert found.new.thresholds[0.5][1] < found.old.thresholds[0.5][1] - 0.05
    assert abs(found.advantage) < 0.01


def test_gates_that_never_loop_alike_cannot_be_compared() -> None:
    seen = observations(np.random.default_rng(1).random((2, 100)) < 0.5)
    never, always = (Gate(FLAT.weight, np.full(1, bias, np.float32)) for bias in (-50.0, 50.0))
    found = contest(never, always, seen)
    assert found.shared is None
    assert not found.new_wins
    assert not contest(always, never, seen).new_wins


def test_a_measure_is_what_stopping_costs() -> None:
    seen = Observations(np.zeros((3, 2, WIDTH), np.float32), np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]], np.float32))
    exit_prob = np.array([[0.6, 0.1], [0.3, 0.3], [0.1, 0.6]], np.float32)
    assert at_threshold(exit_prob, seen.loss, 0.5) == (pytest.approx(2.0), pytest.approx((3.0 + 3.0) / 2))
    assert at_threshold(exit_prob, seen.loss, 0.35) == (pytest.approx(1.5), pytest.approx((3.0 + 2.0) / 2))
    found = measure(FLAT, seen)
    np.testing.assert_allclose(found.exit_prob, [0.5, 0.25, 0.25])
    assert set(found.thresholds) == {0.3, 0.5, 0.7, 0.9}
    assert found.thresholds[0.5] == (1.0, 2.0)
    assert found.curve == sorted(found.curve)


# ---- the command


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return tiny_models.text_run(tmp_path / "run")


def tensors(folder: pathlib.Path) -> dict[str, bytes]:
    file = TensorFile(folder / "model.safetensors")
    return {name: file.floats(name).tobytes() for name in file.entries}


def judged(monkeypatch: pytest.MonkeyPatch, advantage: float) -> None:
    """Let the contest end as a test needs it; what it measured stays."""
    from looplm import calibration

    right = calibration.contest
    monkeypatch.setattr(
        calibration,
        "contest",
        lambda *given: dataclasses.replace(right(*given), advantage=advantage, shared=(1.0, 3.0)),
    )


def test_nothing_but_the_gate_changes(model: pathlib.Path) -> None:
    before, size = tensors(model), (model / "model.safetensors").stat().st_size
    others = {p.name: p.read_bytes() for p in model.iterdir() if p.name not in ("model.safetensors", "looplm.json")}
    report = report_of("calibrate", "--model", model, "--steps", 20, "--accept", "always")
    after = tensors(model)
    assert report["kept"] == "new"
    assert {name for name in before if before[name] != after[name]} == set(GATE_NAMES)
    assert before.keys() == after.keys()
    assert (model / "model.safetensors").stat().st_size == size
    assert {name: (model / name).read_bytes() for name in others} == others
    provenance = json.loads((model / "looplm.json").read_text())
    assert (provenance["stage"], provenance["gate"]) == (2, "Stage II, target look-ahead")
    assert provenance["task"] == "text"


@pytest.mark.parametrize(
    ("advantage", "accept", "kept", "verdict"),
    [
        (
            0.01,
            "better",
            "new",
            "keeping the new gate: between 1.00 and 3.00 mean loops the new gate loses 0.0100 nats less",
        ),
        (
            -0.01,
            "better",
            "old",
            "keeping the old gate: between 1.00 and 3.00 mean loops the new gate loses 0.0100 nats more",
        ),
        (0.0, "better", "old", "keeping the old gate"),
        (-0.01, "always", "new", "taking the new gate as asked (--accept always), although between"),
        (0.01, "always", "new", "keeping the new gate: between"),
    ],
)
def test_the_better_gate_stays_unless_told_otherwise(
    advantage: float, accept: str, kept: str, verdict: str, model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(monkeypatch, advantage)
    before = (model / "model.safetensors").read_bytes()
    out, err = looplm("calibrate", "-m", model, "--steps", 5, "--accept", accept, "--json")
    report = json.loads(out.splitlines()[-1])
    assert (report["kept"], report["advantage"]) == (kept, advantage)
    assert ((model / "model.safetensors").read_bytes() != before) == (kept == "new")
    assert (model / "previous_gate.safetensors").exists() == (kept == "new")
    assert verdict in err


def test_what_the_contest_finds_is_what_is_kept(model: pathlib.Path) -> None:
    """Without a hand on the scales: the verdict follows the measured advantage."""
    for target in ("paper", "look-ahead"):
        report = report_of("calibrate", "-m", model, "--target", target, "--steps", 50, "--learning-rate", 0.05)
        assert report["kept"] == ("new" if report["advantage"] > 0.0 else "old")
        assert report["target"] == target


def test_undo_brings_every_byte_back(model: pathlib.Path) -> None:
    before = {name: (model / name).read_bytes() for name in ("model.safetensors", "looplm.json")}
    looplm("calibrate", "-m", model, "--steps", 5, "--accept", "always")
    after = {name: (model / name).read_bytes() for name in before}
    assert all(before[name] != after[name] for name in before)
    _, said = looplm("calibrate", "-m", model, "--undo")
    assert said == f"the previous gate of {model} is back\n"
    assert {name: (model / name).read_bytes() for name in before} == before
    assert report_of("calibrate", "-m", model, "--undo") == {"model": str(model), "kept": "previous"}
    assert {name: (model / name).read_bytes() for name in before} == after


def test_the_report_has_every_promised_key(model: pathlib.Path) -> None:
    report = report_of("calibrate", "-m", model, "--steps", 5)
    assert set(report) == {
        *("model", "data", "target", "before", "after", "advantage", "shared_mean_loops", "kept"),
    }
    for side in ("before", "after"):
        assert sum(report[side]["exit_prob"]) == pytest.approx(1.0, abs=1e-5)
        assert [row["q"] for row in report[side]["thresholds"]] == [0.3, 0.5, 0.7, 0.9]
        assert all(set(row) == {"q", "mean_loops", "loss"} for row in report[side]["thresholds"])
        loops = [row["mean_loops"] for row in report[side]["thresholds"]]
        assert loops == sorted(loops)
        assert 1.0 <= loops[0] <= loops[-1] <= 4.0


def test_the_tables_are_for_reading(model: pathlib.Path) -> None:
    out, _ = looplm("calibrate", "-m", model, "--steps", 5)
    for text in ("judged on one half of held-out text", "exit distribution, old gate", "q = 0.3", "q = 0.9"):
        assert text in out
    quiet, _ = looplm("calibrate", "-m", model, "--steps", 5, "--quiet")
    assert quiet == ""


def test_a_task_is_calibrated_by_hop(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm.tasks import hops, scores

    monkeypatch.setattr(hops, "VALIDATION_BATCHES", 4)
    monkeypatch.setattr(scores, "SCORED_BATCHES", 2)
    folder = tiny_models.hops_model(tmp_path / "model")
    out, _ = looplm("calibrate", "-m", folder, "--steps", 5, "--json", "--accept", "always")
    report = json.loads(out.splitlines()[-1])
    for name in ("hops_before", "hops_after"):
        assert [row["q"] for row in report[name]] == [0.3, 0.5, 0.7, 0.9]
        assert all(len(row["mean_loops"]) == len(row["accuracy"]) == 2 for row in report[name])
    shown, _ = looplm("calibrate", "-m", folder, "--steps", 5)
    assert "q = 0.3, 2 hops" in shown


def test_it_teaches_on_one_half_and_judges_on_the_other(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm import calibration

    seen: list[Any] = []
    right = calibration.observe
    monkeypatch.setattr(
        calibration, "observe", lambda weights, part, *more: (seen.append(part), right(weights, part, *more))[1]
    )
    looplm("calibrate", "-m", model, "--steps", 2)
    teach, judge = ([batch.input_ids.tobytes() for batch in part] for part in seen)
    assert teach
    assert judge
    assert not set(teach) & set(judge)


def test_the_windows_are_halved_in_order_even_within_a_batch() -> None:
    ids = np.arange(9 * 2).reshape(9, 2)
    batches = [Batch(ids[:5], ids[:5] + 100), Batch(ids[5:], ids[5:] + 100)]
    first, second = halves(batches)
    assert [len(batch.input_ids) for batch in first] == [4]
    assert [len(batch.input_ids) for batch in second] == [1, 4]
    np.testing.assert_array_equal(np.concatenate([batch.input_ids for batch in first + second]), ids)
    np.testing.assert_array_equal(np.concatenate([batch.target for batch in first + second]), ids + 100)
    assert halves(batches[:0]) == ([], [])
