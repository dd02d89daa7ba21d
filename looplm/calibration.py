"""Stage II: the frozen model's gate learns when another loop helps, and must beat the gate it replaces.

The states and losses of all loops are computed once; the gate alone (D + 1 numbers) is then fitted to them.

Source: Section 3.4; neither steps nor learning rate of this stage are published.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from .arrays import Array, Floats
from .data import Batch
from .errors import DataError, TrainingError
from .kernels import adamw_update, exit_distribution_forward, exit_loop, gate_backward, gate_forward
from .model import forward
from .objectives import StageTwo
from .weights import Weights

THRESHOLDS = (0.3, 0.5, 0.7, 0.9)  # exit thresholds shown before and after
SWEEP = np.round(np.linspace(0.02, 0.98, 49), 2)  # exit thresholds that draw a gate's curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How the gate is fitted."""

    steps: int = 400
    learning_rate: float = 1e-2
    batch_tokens: int = 2048
    teaching_tokens: int = 65536  # at most; states of all loops are kept in memory
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Observations:
    """What the frozen model says about counted positions.  hidden: RND, loss: RN (nats)."""

    hidden: Floats
    loss: Floats


@dataclasses.dataclass(frozen=True)
class Gate:
    """weight: 1 x D, bias: 1."""

    weight: Floats
    bias: Floats

    def exit_prob(self, hidden: Floats) -> Floats:
        """RND -> RN."""
        return exit_distribution_forward(gate_forward(hidden, self.weight, self.bias)[0])[0]


@dataclasses.dataclass(frozen=True)
class GateMeasure:
    """What a gate does on data it was not fitted to."""

    exit_prob: list[float]  # R, means
    thresholds: dict[float, tuple[float, float]]  # q -> mean loops, loss
    curve: list[tuple[float, float]]  # (mean loops, loss) over SWEEP, by mean loops


@dataclasses.dataclass(frozen=True)
class Contest:
    """Two gates on the same data.  `advantage`: mean over shared mean loops of old loss - new loss, in nats."""

    old: GateMeasure
    new: GateMeasure
    advantage: float
    shared: tuple[float, float] | None  # range of mean loops both gates reach

    @property
    def new_wins(self) -> bool:
        return self.advantage > 0.0


def observe(weights: Weights, batches: Iterable[Batch], max_tokens: int, threads: int = 1) -> Observations:
    """Run the model once over up to `max_tokens` counted positions.

    Raises: DataError if there are none, or the model's loss on them is no number.
    """
    hidden, loss, seen = [], [], 0
    for batch in batches:
        trace = forward(weights, batch.input_ids, start=batch.start, threads=threads)
        counted = batch.target >= 0
        loss.append(trace.token_loss(batch.target)[:, counted])
        hidden.append(trace.hidden[:, counted])
        seen += int(counted.sum())
        if seen >= max_tokens:
            break
    if not seen:
        raise DataError("there is no position to calibrate on", "give a longer text")
    losses = np.concatenate(loss, axis=1)[:, :max_tokens]
    if not np.isfinite(losses).all():
        raise DataError("the model's loss is not a number", "its weights are damaged: train anew, or resume its run")
    return Observations(np.concatenate(hidden, axis=1)[:, :max_tokens], losses)


def gate_gradient(gate: Gate, hidden: Floats, loss: Floats, objective: StageTwo) -> tuple[float, Floats, Floats]:
    """Stage II's mean objective over positions and its gradient.  hidden: RND, loss: RN -> value, dweight, dbias."""
    (gate_logit,) = gate_forward(hidden, gate.weight, gate.bias)
    value, dgate_logit = objective.value_and_dgate(loss, gate_logit)
    dgate_logit *= np.float32(1.0 / value.size)
    _, dweight, dbias = gate_backward(dgate_logit, hidden, gate.weight)
    return float(value.mean(dtype=np.float64)), dweight, dbias


def fit_gate(gate: Gate, seen: Observations, objective: StageTwo, config: CalibrateConfig) -> Gate:
    """Adam from the present gate on random positions; the model is not touched.

    Raises: TrainingError if the gate grows beyond what numbers can hold.
    """
    rng = np.random.default_rng([config.seed, 2])
    weight, bias = gate.weight.copy(), gate.bias.copy()
    moments = [(np.zeros_like(x), np.zeros_like(x)) for x in (weight, bias)]
    rows = seen.loss.shape[1]
    for step in range(1, config.steps + 1):
        part = rng.integers(0, rows, min(config.batch_tokens, rows))
        _, dweight, dbias = gate_gradient(Gate(weight, bias), seen.hidden[:, part], seen.loss[:, part], objective)
        rate = config.learning_rate * (1.0 - (step - 1) / config.steps)  # down to 0, so the end does not jitter
        for x, dx, (first, second) in ((weight, dweight, moments[0]), (bias, dbias, moments[1])):
            adamw_update(x, np.ascontiguousarray(dx), first, second, step, rate, 0.9, 0.999, 1e-8, 0.0)
    (gate_logit,) = gate_forward(seen.hidden, weight, bias)
    if not np.isfinite(gate_logit).all():
        raise TrainingError("the gate is no longer a number", "use a lower learning rate")
    return Gate(weight, bias)


def at_threshold(exit_prob: Floats, loss: Floats, q: float) -> tuple[float, float]:
    """Mean loops and mean loss when every position stops by threshold q.  exit_prob, loss: RN."""
    (stop,) = exit_loop(exit_prob, q)
    return float(stop.mean()) + 1.0, float(np.take_along_axis(loss, stop[None], axis=0).mean())


def measure(gate: Gate, seen: Observations) -> GateMeasure:
    exit_prob = gate.exit_prob(seen.hidden)
    return GateMeasure(
        exit_prob=[float(p) for p in exit_prob.mean(1)],
        thresholds={q: at_threshold(exit_prob, seen.loss, q) for q in THRESHOLDS},
        curve=sorted(at_threshold(exit_prob, seen.loss, q) for q in SWEEP),
    )


def contest(old: Gate, new: Gate, seen: Observations) -> Contest:
    """Compare two gates at the same mean loops: their curves over all thresholds, where both have one."""
    first, second = measure(old, seen), measure(new, seen)
    low = max(first.curve[0][0], second.curve[0][0])
    high = min(first.curve[-1][0], second.curve[-1][0])
    if not low < high:
        return Contest(first, second, 0.0, None)
    grid = np.linspace(low, high, 101)
    losses = [np.interp(grid, *_strictly_rising(measured.curve)) for measured in (first, second)]
    return Contest(first, second, float((losses[0] - losses[1]).mean()), (low, high))


def _strictly_rising(curve: list[tuple[float, float]]) -> tuple[Array, Array]:
    """The curve's loops and losses, thresholds with the same mean loops averaged."""
    loops, losses = np.array(curve).T
    unique, group = np.unique(loops, return_inverse=True)
    return unique, np.bincount(group, losses) / np.bincount(group)
