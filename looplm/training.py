"""Stage I: train the whole model on the expected loss over loops.  A generator of reports; nothing is printed.

Every step is a pure function of (state, seed, step): batches are drawn from the step's number, so a run that was
killed and resumed gives the same losses bit for bit, for a fixed number of threads and ranks and the same kernels.

Several ranks share the rows of every batch: N ranks with batch_size B train as one rank with batch_size N * B does, but
for rounding.  Gradients are summed once per step; every rank then does the same update, so weights and moments are
never exchanged and yet the same bits on all.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from .analysis import Evaluation, evaluate
from .arrays import Floats, aligned_empty
from .data import Batch
from .errors import ConfigError, TrainingError
from .gradient import GradientReport, GradientWorkspace, gradient
from .kernels import adamw_update
from .kernels.adamw import NORM_BLOCK, sums_of_squares
from .kernels.product.select import Path, choose
from .memory import choose_recompute, give_back
from .objectives import StageOne, entropy, log_prior
from .ranks import ALONE, Ranks, share
from .settings import TrainConfig
from .threads import available_threads, run_all, shards
from .weights import Weights, parameter_table

MIN_WARMUP_STEPS = 20
MIN_EVAL_STEPS = 50  # an evaluation costs about five steps
MEASURED_SHARE = 0.05  # of the minutes, timed before the number of steps is settled
BUDGET_SHARE = 0.9  # of the minutes that goes into steps; the rest is evaluation and saving
UNSETTLED_STEPS = 200  # what the learning rate takes for the number of steps until it is settled


class Source(Protocol):
    """Where batches come from: a text or a task.  A batch holds the rows of all ranks."""

    @property
    def bytes_per_token(self) -> float | None: ...
    def batch(self, step: int) -> Batch: ...
    def validation(self, max_batches: int | None = None) -> Iterator[Batch]: ...


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One optimizer update, over the rows of all ranks; losses in nats per token, `step` counts updates done."""

    step: int
    total_steps: int
    objective: float
    loss: list[float]  # R
    exit_prob: list[float]  # R, means over the batch
    entropy: float  # of the mean exit distribution, nats
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # counted targets so far
    seconds: float  # spent in steps so far, earlier sessions included
    tokens_per_s: float  # of this step


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """A look at held-out data after `step` updates; the last one takes all of it."""

    step: int
    final: bool
    evaluation: Evaluation


Report = StepReport | EvalReport


@dataclasses.dataclass
class Progress:
    """What a resumed run must know besides weights and moments."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    total_steps: int = 0  # 0: not fixed yet
    starting_seconds: float = 0.0  # of `seconds`, in the first step of each session: kernels are compiled or loaded


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine down to min_lr_ratio of the peak.  `step` counts from 0."""
    warmup = config.warmup_steps or max(MIN_WARMUP_STEPS, total_steps // 20)
    done = min(1.0, step / max(1, total_steps))
    cosine = config.min_lr_ratio + (1.0 - config.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * min(1.0, (step + 1) / warmup) * cosine


def product_path(config: TrainConfig) -> Path:
    """Who multiplies: the path that the settings name, or the fastest here of their precision.

    Raises: ConfigError if there is no such path, or it has another precision.
    """
    try:
        return choose(config.precision, config.kernels)
    except LookupError as error:
        raise ConfigError(f"train.kernels: {error.args[0]}", "leave it out to use the fastest here") from error


class Optimizer:
    """AdamW over the flat buffer: clip by the whole gradient's norm, decay matrices only.

    Threads share the work; their number changes no bit.
    """

    def __init__(self, weights: Weights, config: TrainConfig, threads: int = 1) -> None:
        self.weights, self.config = weights, config
        size = weights.contiguous().size
        self.first_moment, self.second_moment = aligned_empty((size,)), aligned_empty((size,))
        self.first_moment[:], self.second_moment[:] = 0.0, 0.0
        self.parts = shards(size, threads, NORM_BLOCK)
        self._segments = [segments_within(decay_segments(weights), part) for part in self.parts]

    def update(self, grad: Floats, step: int, rate: float) -> float:
        """One update; `step` counts from 1.  Returns the gradient's norm before clipping, to which `grad` is cut.

        Raises: TrainingError if the norm is not finite; nothing is changed then.
        """
        config, weight = self.config, self.weights.contiguous()
        norm = float(np.sqrt(np.concatenate(run_all(lambda part: sums_of_squares(grad[part]), self.parts)).sum()))
        if not math.isfinite(norm):
            raise _diverged("gradient norm", norm, step)

        def update_part(segments: list[tuple[slice, bool]]) -> None:
            for part, decays in segments:
                if config.clip and norm > config.clip:
                    np.multiply(grad[part], np.float32(config.clip / norm), out=grad[part])
                adamw_update(
                    weight[part],
                    grad[part],
                    self.first_moment[part],
                    self.second_moment[part],
                    step,
                    rate,
                    config.beta1,
                    config.beta2,
                    config.adam_eps,
                    config.weight_decay if decays else 0.0,
                )

        run_all(update_part, self._segments)
        return norm


def decay_segments(weights: Weights) -> list[tuple[slice, bool]]:
    """Runs of the flat buffer that decay or don't, as few as possible."""
    segments: list[tuple[slice, bool]] = []
    for parameter in parameter_table(weights.config):
        end = parameter.offset + parameter.size
        if segments and segments[-1][1] == parameter.decays:
            segments[-1] = (slice(segments[-1][0].start, end), parameter.decays)
        else:
            segments.append((slice(parameter.offset, end), parameter.decays))
    return segments


def segments_within(segments: list[tuple[slice, bool]], part: slice) -> list[tuple[slice, bool]]:
    """What of these runs lies in a part of the buffer."""
    cut = [(slice(max(run.start, part.start), min(run.stop, part.stop)), decays) for run, decays in segments]
    return [(run, decays) for run, decays in cut if run.start < run.stop]


class Trainer:
    """Weights, optimizer and progress of one Stage I run; set `progress` and moments to go on from a checkpoint.

    Every rank has a trainer of its own, with the same weights; `source` gives batch_size rows for each of them.
    """

    def __init__(self, weights: Weights, source: Source, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        self.weights, self.source, self.config, self.ranks = weights, source, config, ranks
        self.threads = config.threads or max(1, available_threads() // ranks.sharing)
        self.path = product_path(config)
        held = weights.contiguous().nbytes
        self.recompute = choose_recompute(weights.config, config, self.threads, self.path, held, ranks.sharing)
        self.progress = Progress()
        self.optimizer = Optimizer(weights, config, self.threads)
        loops = weights.config.total_ut_steps
        self._objective = StageOne(config.entropy_weight, log_prior(config.prior, loops))
        self._workspace: GradientWorkspace | None = None
        self._step_seconds: list[float] = []
        self._starting = True

    @property
    def total_steps(self) -> int:
        """Updates in all; with a budget in minutes it is settled after the first MEASURED_SHARE of it."""
        if self.progress.total_steps:
            return self.progress.total_steps
        return UNSETTLED_STEPS if self.config.minutes else self.config.steps

    @property
    def eval_every(self) -> int:
        return self.config.eval_every or max(MIN_EVAL_STEPS, self.total_steps // 10)

    def run(self) -> Iterator[Report]:
        """Update until all steps are done, evaluating now and then.  Stop early by leaving the loop, on every rank.

        Raises: TrainingError when loss or gradient are no longer numbers; weights are those of the step before.
        """
        progress = self.progress
        while progress.step < self.total_steps or (self.config.minutes and not progress.total_steps):
            # before the next step, not after the last: a run resumed here evaluates what the killed one may not have
            if progress.step and progress.step % self.eval_every == 0:
                yield EvalReport(progress.step, False, self.evaluate(self.config.eval_tokens))
            yield self.step()
        yield EvalReport(progress.step, True, self.evaluate())

    def step(self) -> StepReport:
        """One optimizer update."""
        config, progress, began = self.config, self.progress, time.perf_counter()
        batch = self._own_rows(self.source.batch(progress.step))
        if self._workspace is None:
            rows, length = batch.input_ids.shape
            give_back()  # what preparing left; all that is large comes now
            shape = (self.weights.config, rows, length, self.threads)
            self._workspace = GradientWorkspace(*shape, self.recompute, self.path)
        found = gradient(self.weights, self._workspace, batch.input_ids, batch.target, self._objective, batch.start)
        found = self._over_ranks(found, self._workspace.total.contiguous())
        mean = 1.0 / max(1, found.tokens)
        # the losses too: a gate that is no number gives none of them a share in the objective
        if not math.isfinite(total := found.objective + float(found.loss.sum())):
            raise _diverged("loss", total, progress.step + 1)
        rate = learning_rate(config, progress.step, self.total_steps)
        norm = self.optimizer.update(self._workspace.total.contiguous(), progress.step + 1, rate)
        spent = time.perf_counter() - began
        if config.minutes:
            spent = self.ranks.broadcast(spent)  # all must settle on the same number of steps
        progress.step += 1
        progress.tokens += found.tokens
        progress.seconds += spent
        self._settle_total_steps(spent)
        exit_prob = found.exit_prob * mean
        return StepReport(
            step=progress.step,
            total_steps=progress.total_steps or self._steps_that_fit(),
            objective=found.objective * mean,
            loss=[float(value) for value in found.loss * mean],
            exit_prob=[float(value) for value in exit_prob],
            entropy=entropy(exit_prob),
            gradient_norm=norm,
            learning_rate=rate,
            tokens=progress.tokens,
            seconds=progress.seconds,
            tokens_per_s=found.tokens / spent,
        )

    def evaluate(self, max_tokens: int | None = None) -> Evaluation:
        """Held-out losses, exit law and early exits; of all held-out data, or of about `max_tokens` of it."""
        max_batches = None
        if max_tokens is not None:
            rows = self.config.batch_size * self.ranks.size
            max_batches = max(1, max_tokens // (rows * self.config.seq_len))
        batches = map(self._own_rows, self.source.validation(max_batches))
        found = evaluate(
            self.weights,
            (batch for batch in batches if len(batch.input_ids)),
            bytes_per_token=self.source.bytes_per_token,
            threads=self.threads,
        )
        return found if self.ranks.size == 1 else mean_over_ranks(found, self.ranks)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores besides weights and moments."""
        session = {"threads": self.threads, "kernels": self.path.name}
        session |= {"ranks": self.ranks.size} if self.ranks.size > 1 else {}
        return {**dataclasses.asdict(self.progress), **session}

    def _own_rows(self, batch: Batch) -> Batch:
        return batch.rows(share(self.ranks, len(batch.input_ids)))

    def _over_ranks(self, found: GradientReport, grad: Floats) -> GradientReport:
        """The report on the rows of all ranks; `grad` becomes the gradient of the mean over all their positions."""
        if self.ranks.size == 1:
            return found
        sums = self.ranks.sum_small([found.tokens, found.objective, *found.loss, *found.exit_prob])
        loss, exit_prob = np.split(np.array(sums[2:]), 2)
        # each rank has divided by the positions it counts itself: its weight in the mean is its share of them
        np.multiply(grad, np.float32(found.tokens / max(1.0, sums[0])), out=grad)
        self.ranks.sum_in_place(grad)
        return GradientReport(objective=sums[1], loss=loss, exit_prob=exit_prob, tokens=int(sums[0]))

    def _settle_total_steps(self, spent: float) -> None:
        """With a budget in minutes: as many steps as fit, from the first ones timed; stop where that was too many.

        The first step of a session is not charged.
        """
        progress = self.progress
        if not self.config.minutes:
            progress.total_steps = self.config.steps
            return
        if self._starting:
            self._starting = False
            progress.starting_seconds += spent
            return
        self._step_seconds.append(spent)
        budget = self.config.minutes * 60.0
        used = progress.seconds - progress.starting_seconds
        if progress.total_steps:
            if used > budget:  # the machine became slower than it was measured
                progress.total_steps = min(progress.total_steps, progress.step)
        elif used > MEASURED_SHARE * budget:
            progress.total_steps = self._steps_that_fit()

    def _steps_that_fit(self) -> int:
        """Of a budget in minutes, by the steps timed so far."""
        if not self._step_seconds:
            return UNSETTLED_STEPS
        progress = self.progress
        left = BUDGET_SHARE * self.config.minutes * 60.0 - (progress.seconds - progress.starting_seconds)
        return progress.step + max(0, int(left / float(np.median(self._step_seconds))))


def mean_over_ranks(found: Evaluation, ranks: Ranks) -> Evaluation:
    """An evaluation of all ranks' rows from each rank's own; thresholds are not asked for in training."""
    means = (found.loss, found.accuracy, found.exit_prob, found.hazard)
    sums = ranks.sum_small([found.tokens, *(found.tokens * np.concatenate(means))])
    borders = np.cumsum([len(mean) for mean in means])[:-1]
    loss, accuracy, exit_prob, hazard = np.split(np.array(sums[1:]) / max(1.0, sums[0]), borders)
    return dataclasses.replace(
        found, tokens=int(sums[0]), loss=loss, accuracy=accuracy, exit_prob=exit_prob, hazard=hazard
    )


def _diverged(what: str, value: float, step: int) -> TrainingError:
    return TrainingError(
        f"the {what} became {value} at step {step}",
        "the last checkpoint is intact; train anew with a lower --set train.learning_rate, or lower it in the run's "
        "config.yaml and --resume",
    )
