"""Stage I: train the whole model on the expected loss over loops.  A generator of reports; nothing is printed.

Every step is a pure function of (state, seed, step): batches are drawn from the step's number, so a run that was
killed and resumed gives the same losses bit for bit, for a fixed number of threads.
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
from .errors import TrainingError
from .kernels import adamw_update, gradient_norm
from .model import GradientWorkspace, gradient
from .objectives import StageOne, entropy, log_prior
from .settings import TrainConfig
from .threads import available_threads
from .weights import Weights, parameter_table

MIN_WARMUP_STEPS = 20
MIN_EVAL_STEPS = 50  # an evaluation costs about five steps
MEASURED_SHARE = 0.05  # of the minutes, timed before the number of steps is settled
BUDGET_SHARE = 0.9  # of the minutes that goes into steps; the rest is evaluation and saving
UNSETTLED_STEPS = 200  # what the learning rate takes for the number of steps until it is settled


class Source(Protocol):
    """Where batches come from: a text or a task."""

    @property
    def bytes_per_token(self) -> float | None: ...
    def batch(self, step: int) -> Batch: ...
    def validation(self, max_batches: int | None = None) -> Iterator[Batch]: ...


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One optimizer update; losses in nats per token, `step` counts updates done."""

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


class Optimizer:
    """AdamW over the flat buffer: clip by the whole gradient's norm, decay matrices only."""

    def __init__(self, weights: Weights, config: TrainConfig) -> None:
        self.weights, self.config = weights, config
        size = weights.contiguous().size
        self.first_moment, self.second_moment = aligned_empty((size,)), aligned_empty((size,))
        self.first_moment[:], self.second_moment[:] = 0.0, 0.0
        self._segments = decay_segments(weights)

    def update(self, grad: Floats, step: int, rate: float) -> float:
        """One update; `step` counts from 1.  Returns the gradient's norm before clipping.

        Raises: TrainingError if the norm is not finite; nothing is changed then.
        """
        config = self.config
        (norm,) = gradient_norm(grad)
        if not math.isfinite(norm):
            raise _diverged("gradient norm", norm, step)
        if config.clip and norm > config.clip:
            np.multiply(grad, np.float32(config.clip / norm), out=grad)
        flat = self.weights.contiguous()
        for part, decays in self._segments:
            adamw_update(
                flat[part],
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


class Trainer:
    """Weights, optimizer and progress of one Stage I run; set `progress` and moments to go on from a checkpoint."""

    def __init__(self, weights: Weights, source: Source, config: TrainConfig) -> None:
        self.weights, self.source, self.config = weights, source, config
        self.threads = config.threads or available_threads()
        self.progress = Progress()
        self.optimizer = Optimizer(weights, config)
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
        """Update until all steps are done, evaluating now and then.  Stop early by leaving the loop.

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
        batch = self.source.batch(progress.step)
        if self._workspace is None:
            rows, length = batch.input_ids.shape
            self._workspace = GradientWorkspace(self.weights.config, rows, length, self.threads)
        found = gradient(self.weights, self._workspace, batch.input_ids, batch.target, self._objective, batch.start)
        mean = 1.0 / max(1, found.tokens)
        # the losses too: a gate that is no number gives none of them a share in the objective
        if not math.isfinite(total := found.objective + float(found.loss.sum())):
            raise _diverged("loss", total, progress.step + 1)
        rate = learning_rate(config, progress.step, self.total_steps)
        norm = self.optimizer.update(self._workspace.total.contiguous(), progress.step + 1, rate)
        spent = time.perf_counter() - began
        progress.step += 1
        progress.tokens += found.tokens
        progress.seconds += spent
        self._settle_total_steps(spent)
        exit_prob = found.exit_prob * mean
        return StepReport(
            step=progress.step,
            total_steps=self.total_steps,
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
            max_batches = max(1, max_tokens // (self.config.batch_size * self.config.seq_len))
        batches = self.source.validation(max_batches)
        return evaluate(self.weights, batches, bytes_per_token=self.source.bytes_per_token, threads=self.threads)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores besides weights and moments."""
        return {**dataclasses.asdict(self.progress), "threads": self.threads}

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
            left = BUDGET_SHARE * budget - used
            progress.total_steps = progress.step + max(0, int(left / float(np.median(self._step_seconds))))


def _diverged(what: str, value: float, step: int) -> TrainingError:
    return TrainingError(
        f"the {what} became {value} at step {step}",
        "the last checkpoint is intact; train anew with a lower --set train.learning_rate, or lower it in the run's "
        "config.yaml and --resume",
    )
