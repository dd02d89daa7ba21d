"""Stage I step by step: schedule, optimizer, what stops it, how long it goes on."""

import dataclasses
import itertools
import math
import types
from typing import Any

import numpy as np
import pytest

from looplm import training
from looplm.config import ModelConfig
from looplm.data import Batch, TextSource
from looplm.errors import ConfigError, TrainingError
from looplm.settings import InitConfig, TrainConfig
from looplm.training import EvalReport, Optimizer, StepReport, Trainer, decay_segments, learning_rate
from looplm.weights import Weights, initialise, parameter_table
from looplm_reference import ops

MODEL = ModelConfig(
    vocab_size=20,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    total_ut_steps=2,
)
TEXT = np.tile(np.arange(20), 40).astype(np.uint16)  # the next id is the one above: easily learned


def trainer(seed: int = 0, **changes: Any) -> Trainer:
    settings = {"batch_size": 4, "seq_len": 16, "threads": 1, "steps": 30, "eval_tokens": 64, **changes}
    config = TrainConfig(**settings)
    source = TextSource(TEXT, TEXT[:193], config.batch_size, config.seq_len, seed, 1.0, 20)
    return Trainer(initialise(MODEL, InitConfig(), seed), source, config)


def steps_of(reports: Any) -> list[StepReport]:
    return [report for report in reports if isinstance(report, StepReport)]


def evaluations_of(reports: Any) -> list[EvalReport]:
    return [report for report in reports if isinstance(report, EvalReport)]


# ---- schedule


def test_the_learning_rate_warms_up_and_falls_like_a_cosine() -> None:
    config = TrainConfig(learning_rate=2.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    for step in range(10):
        cosine = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * step / 100))
        assert rates[step] == pytest.approx(2.0 * (step + 1) / 10 * cosine)
    assert rates[50] == pytest.approx(2.0 * 0.55)
    assert rates[100] == pytest.approx(2.0 * 0.1)
    assert max(rates) == rates[9]
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize(("total", "warmup"), [(100, 20), (400, 20), (1000, 50)])
def test_warm_up_is_a_twentieth_and_at_least_twenty_steps(total: int, warmup: int) -> None:
    config = TrainConfig(learning_rate=1.0, min_lr_ratio=1.0)
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert rates.index(1.0) == warmup - 1


# ---- optimizer


def test_decay_segments_are_the_matrices_and_as_few_as_possible() -> None:
    weights = Weights.zeros(MODEL)
    segments = decay_segments(weights)
    assert segments[0][0].start == 0
    assert segments[-1][0].stop == weights.contiguous().size
    for (part, decays), (after, then) in itertools.pairwise(segments):
        assert part.stop == after.start
        assert decays != then
    decaying = np.zeros(weights.contiguous().size, bool)
    for part, decays in segments:
        decaying[part] = decays
    for parameter in parameter_table(MODEL):
        matrix = len(parameter.shape) == 2 and "early_exit_gate" not in parameter.name
        assert (decaying[parameter.offset : parameter.offset + parameter.size] == matrix).all(), parameter.name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [0.01, 3.0])
def test_an_update_is_adamw_with_clipping_and_decay_on_matrices(size: float, threads: int) -> None:
    rng = np.random.default_rng(2)
    config = TrainConfig(beta1=0.8, beta2=0.9, adam_eps=1e-2, weight_decay=0.3, clip=1.0)
    weights = initialise(MODEL, InitConfig(), 1)
    optimizer = Optimizer(weights, config, threads)
    assert len(optimizer.parts) == threads
    flat = weights.contiguous().astype(np.float64)
    first, second = np.zeros_like(flat), np.zeros_like(flat)
    matrix = np.concatenate([np.full(p.size, p.decays) for p in parameter_table(MODEL)])
    for step in (1, 2, 3):
        grad = rng.standard_normal(flat.size)
        grad *= size / np.linalg.norm(grad)
        norm = optimizer.update(grad.astype(np.float32), step, 0.05)
        assert norm == pytest.approx(size, rel=1e-5)  # that before clipping
        grad *= min(1.0, 1.0 / size)
        for where, decay in ((matrix, 0.3), (~matrix, 0.0)):
            parts = [x[where] for x in (flat, grad, first, second)]
            ops.adamw_update(*parts, step, 0.05, 0.8, 0.9, 1e-2, decay)
            flat[where], first[where], second[where] = parts[0], parts[2], parts[3]
    np.testing.assert_allclose(weights.contiguous(), flat, atol=1e-6)
    np.testing.assert_allclose(optimizer.first_moment, first, atol=1e-6 * size)


def test_an_update_has_the_same_bits_whoever_shares_it() -> None:
    found = []
    for threads in (1, 2, 3):
        optimizer = Optimizer(initialise(MODEL, InitConfig(), 1), TrainConfig(clip=1.0), threads)
        grad = np.random.default_rng(5).standard_normal(optimizer.first_moment.size, np.float32)
        norm = optimizer.update(grad, 1, 1e-3)
        found.append((norm, optimizer.weights.contiguous().tobytes(), optimizer.second_moment.tobytes()))
    assert found[0] == found[1] == found[2]


def test_without_a_clip_a_large_gradient_stays() -> None:
    moments = []
    for clip in (0.0, 1.0):
        optimizer = Optimizer(Weights.zeros(MODEL), TrainConfig(clip=clip))
        optimizer.update(np.full(optimizer.first_moment.size, 2.0, np.float32), 1, 1e-3)
        moments.append(optimizer.first_moment.copy())
    np.testing.assert_allclose(moments[0], 0.2, rtol=1e-6)
    assert np.linalg.norm(moments[1]) == pytest.approx(0.1, rel=1e-5)


# ---- training


def test_the_loss_goes_down() -> None:
    reports = list(trainer(learning_rate=1e-2, steps=60).run())
    steps = steps_of(reports)
    assert [report.step for report in steps] == list(range(1, 61))
    assert steps[0].loss[-1] == pytest.approx(math.log(20), abs=0.5)
    assert max(steps[-1].loss) < 0.5
    assert max(reports[-1].evaluation.loss) < 0.5
    for report in steps:
        assert sum(report.exit_prob) == pytest.approx(1.0, abs=1e-5)
        assert report.tokens == 64 * report.step
        assert report.total_steps == 60
        expected = sum(p * loss for p, loss in zip(report.exit_prob, report.loss, strict=True))
        assert report.objective == pytest.approx(expected, abs=0.3)  # means of products, and an entropy of at most ln 2


def test_a_seed_is_one_run() -> None:
    first, again, other = ([r.loss for r in steps_of(trainer(seed, steps=5).run())] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_it_evaluates_now_and_then_and_at_the_end_on_everything() -> None:
    found = evaluations_of(trainer(steps=20, eval_every=6).run())
    seen = [(report.step, report.final, report.evaluation.tokens) for report in found]
    assert seen == [(6, False, 64), (12, False, 64), (18, False, 64), (20, True, 192)]
    assert trainer(steps=2000).eval_every == 200
    assert [report.step for report in evaluations_of(trainer(steps=60).run())] == [50, 60]


def test_a_run_that_goes_on_evaluates_what_was_due_when_it_stopped() -> None:
    going = trainer(steps=12, eval_every=6)
    for report in going.run():
        if report.step == 6:
            break
    found = next(going.run())
    assert isinstance(found, EvalReport)
    assert (found.step, found.final) == (6, False)


def test_a_finished_run_only_evaluates() -> None:
    done = trainer(steps=3)
    list(done.run())
    before = done.weights.contiguous().copy()
    assert [type(report) for report in done.run()] == [EvalReport]
    np.testing.assert_array_equal(done.weights.contiguous(), before)


def test_targets_of_minus_one_are_not_counted() -> None:
    class Sparse(TextSource):
        def batch(self, step: int) -> Batch:
            batch = super().batch(step)
            return dataclasses.replace(batch, target=np.where(batch.target % 2 == 0, batch.target, -1))

    sparse = trainer(steps=2)
    sparse.source = Sparse(TEXT, TEXT[:193], 4, 16, 0, 1.0, 20)
    assert sparse.step().tokens == 32


def test_an_impossible_prior_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"train\.prior='1,2,3' does not give 2"):
        trainer(prior="1,2,3")


# ---- divergence


@pytest.mark.parametrize(
    ("tensor", "value", "seen"),
    [
        ("model.norm.weight", math.nan, "the loss became nan at step 4"),
        ("lm_head.weight", 3e38, r"the (loss|gradient norm) became (nan|inf) at step 4"),
    ],
)
def test_a_loss_that_is_no_number_stops_with_everything_as_it_was(tensor: str, value: float, seen: str) -> None:
    sick = trainer()
    for _ in range(3):
        sick.step()
    sick.weights.tensors[tensor].reshape(-1)[:5] = value
    kept = [x.copy() for x in (sick.weights.contiguous(), sick.optimizer.first_moment, sick.optimizer.second_moment)]
    progress = dataclasses.replace(sick.progress)
    with np.errstate(all="ignore"), pytest.raises(TrainingError, match=seen) as caught:
        list(sick.run())
    assert "last checkpoint is intact" in caught.value.hint
    after = (sick.weights.contiguous(), sick.optimizer.first_moment, sick.optimizer.second_moment)
    for before, now in zip(kept, after, strict=True):
        np.testing.assert_array_equal(before, now)
    assert sick.progress == progress


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_refused(value: float) -> None:
    optimizer = Optimizer(Weights.zeros(MODEL), TrainConfig())
    grad = np.zeros(optimizer.first_moment.size, np.float32)
    grad[7] = value
    with pytest.raises(TrainingError, match=f"gradient norm became {value} at step 9"):
        optimizer.update(grad, 9, 1e-3)
    assert not optimizer.first_moment.any()
    assert not optimizer.weights.contiguous().any()


# ---- a budget of minutes


class Clock:
    """Stands still but for the length of a step, `before` or `after` the first steps, once between two looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lengths: float) -> None:
        self.lengths, self.now, self.looks = [*lengths], 0.0, 0
        monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=self.look))

    def look(self) -> float:
        self.looks += 1
        if self.looks % 2 == 0:
            self.now += self.lengths.pop(0) if len(self.lengths) > 1 else self.lengths[0]
        return self.now


def budgeted(minutes: float) -> Trainer:
    return trainer(minutes=minutes, steps=1200, eval_every=10**6)


@pytest.mark.parametrize("compiling", [0.5, 15.0])
def test_minutes_settle_the_number_of_steps_once(compiling: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of half-second steps: 54 s are for steps, after 3.5 s of which their length is known."""
    Clock(monkeypatch, compiling, 0.5)
    run = budgeted(1.0)
    steps = steps_of(run.run())
    settled = 8 + int((54.0 - 3.5) / 0.5)
    assert steps[0].total_steps == 200  # not charged, and nothing known yet
    assert {report.total_steps for report in steps[1:]} == {settled}  # reported from the first step timed
    assert steps[6].learning_rate == learning_rate(run.config, 6, 200)  # but 6 x 0.5 s is not a twentieth yet
    assert len(steps) == run.progress.total_steps == settled
    assert steps[-1].learning_rate == learning_rate(run.config, settled - 1, settled)


def test_a_run_much_slower_than_measured_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, *[0.5] * 10, 2.0)
    steps = steps_of(budgeted(1.0).run())
    assert steps[-1].seconds - 0.5 == pytest.approx(60.5)  # the first step that ends after a minute
    assert steps[-1].total_steps == steps[-1].step


def test_minutes_shorter_than_a_step_train_one_step_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, 0.5)
    assert len(steps_of(budgeted(1e-4).run())) == 2


def test_what_starting_costs_is_not_charged_in_any_session(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, 15.0, *[0.5] * 30, 40.0, 0.5)
    first = budgeted(1.0)
    for _ in range(31):
        first.step()
    second = budgeted(1.0)
    second.progress = dataclasses.replace(first.progress)
    settled = first.progress.total_steps
    reports = steps_of(second.run())
    assert reports[-1].step == reports[-1].total_steps == settled


def test_steps_alone_are_fixed_at_once() -> None:
    assert trainer(steps=7).step().total_steps == 7
