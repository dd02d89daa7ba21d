"""Judges a candidate by a fixture folder: one row per array and loop, in forward order.

So the first row that fails names where a model goes wrong: loop, layer and tensor, not only the last logits.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from . import ops
from .contract import Row, first_failure, relative_error
from .fixture import AT_THRESHOLD, GATE, Fixture, next_token, tap_names
from .judge import Candidate, Config, ReferenceCandidate, Tensors, tensor_shapes
from .model import LoopLM, Taps
from .ops import Array


class FixtureCandidate(Candidate, Protocol):
    """A candidate that can also be judged on Stage II, greedy decoding and the optimizer.

    `stage2` gives objective and grads of the gate's two tensors: the paper's target, k = 50, gamma = 0.005.
    `greedy` continues BS to B(S + new): all loops always run, the exit chooses which one's state is read.
    `adamw` takes batches (NBS) and gives N losses, each before the update it causes; decay acts on every matrix but
    the gate's single row, gradients are clipped to settings["clip"] in norm.
    """

    def stage2(self, tensors: Tensors, config: Config, input_ids: Array, target: Array) -> Mapping[str, Any]: ...

    def greedy(
        self, tensors: Tensors, config: Config, input_ids: Array, exit_threshold: float, new_tokens: int
    ) -> Array: ...

    def adamw(self, tensors: Tensors, config: Config, batches: Array, settings: Mapping[str, float]) -> Array: ...


class ReferenceFixtureCandidate(ReferenceCandidate):
    """The reference itself, or a wrong version of it, in the candidate's seat."""

    def stage2(self, tensors: Tensors, config: Config, input_ids: Array, target: Array) -> Mapping[str, Any]:
        return self.model(tensors, config).stage2(input_ids, target)

    def greedy(
        self, tensors: Tensors, config: Config, input_ids: Array, exit_threshold: float, new_tokens: int
    ) -> Array:
        return self.model(tensors, config).greedy(input_ids, exit_threshold, new_tokens)

    def adamw(self, tensors: Tensors, config: Config, batches: Array, settings: Mapping[str, float]) -> Array:
        model, losses = self.model(tensors, config), []
        model.weight = {name: value.copy() for name, value in model.weight.items()}
        moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in model.weight.items()}
        rate, beta1, beta2, eps = (settings[name] for name in ("learning_rate", "beta1", "beta2", "eps"))
        for step, ids in enumerate(batches, 1):
            found = model.stage1(ids, next_token(ids), settings["entropy_weight"])
            losses.append(found["objective"])
            (norm,) = ops.gradient_norm(np.concatenate([grad.ravel() for grad in found["grads"].values()]))
            shrink = settings["clip"] / norm if norm > settings["clip"] else 1.0
            for name, weight in model.weight.items():
                decay = settings["weight_decay"] if weight.ndim == 2 and len(weight) > 1 else 0.0
                grad = shrink * found["grads"][name]
                ops.adamw_update(weight, grad, *moments[name], step, rate, beta1, beta2, eps, decay)
        return np.array(losses)


def judge_fixture(candidate: FixtureCandidate, fixture: Fixture, tensors: Tensors | None = None) -> list[Row]:
    """Compare a candidate with what the fixture expects.

    `tensors` are the candidate's own reading of the model folder; without them it gets the judge's.
    """
    return list(_compare(_Answers(candidate, fixture, fixture.tensors if tensors is None else tensors)))


def first_difference(candidate: Candidate, fixture: Fixture, tensors: Tensors | None = None) -> Row | None:
    """Where a candidate first leaves the reference on the fixture's model and ids, whatever the fixture expects."""
    right: Taps = []
    theirs: Taps = []
    LoopLM(fixture.tensors, fixture.config).forward(fixture.input_ids, taps=right)
    used = fixture.tensors if tensors is None else tensors
    candidate.forward(used, fixture.config, fixture.input_ids, taps=theirs)
    found = dict(theirs)
    return first_failure(_row(name, value, found.get(name), fixture.tolerance) for name, value in right)


class _Answers:
    """What a candidate says about a fixture, computed when first asked for."""

    def __init__(self, candidate: FixtureCandidate, fixture: Fixture, tensors: Tensors) -> None:
        self.candidate, self.fixture = candidate, fixture
        self._given = (tensors, fixture.config)

    @functools.cached_property
    def taps(self) -> Mapping[str, Array]:
        taps: Taps = []
        self.candidate.forward(*self._given, self.fixture.input_ids, taps=taps)
        return dict(taps)

    @functools.cached_property
    def out(self) -> Mapping[str, Array]:
        return self.candidate.forward(*self._given, self.fixture.input_ids)

    @functools.cached_property
    def stage1(self) -> Mapping[str, Any]:
        ids = self.fixture.input_ids
        return self.candidate.stage1(*self._given, ids, next_token(ids), self.fixture.entropy_weight)

    @functools.cached_property
    def stage2(self) -> Mapping[str, Any]:
        ids = self.fixture.input_ids
        return self.candidate.stage2(*self._given, ids, next_token(ids))

    def per_loop(self, name: str) -> Array:
        """hidden, gate_logit, logits or loss, loop axis first."""
        return self.stage1["loss"][:, :, :-1] if name == "loss" else self.out[name]

    def plain(self, name: str) -> Any:
        """An array that is compared as a whole."""
        if name == "adamw_loss":
            batches = self.fixture.expected["adamw_input_ids"]
            return self.candidate.adamw(*self._given, batches, self.fixture.adamw)
        if name == "expected_logits":
            return (self.out["exit_prob"][..., None] * self.out["logits"]).sum(0)
        if name.startswith("stage"):
            return (self.stage1 if name == "stage1_loss" else self.stage2)["objective"]
        return self.out[name]

    def grad(self, name: str) -> Array | None:
        """By the array's name: grad/TENSOR or stage2_grad/TENSOR."""
        kind, _, tensor = name.partition("/")
        found: Mapping[str, Array] = (self.stage1 if kind == "grad" else self.stage2)["grads"]
        return found.get(tensor)

    def exit_logits(self, q: float) -> Array:
        exit_index = self.candidate.exit_loop(self.out["exit_prob"], q)
        return np.take_along_axis(self.out["logits"], exit_index[None, :, :, None], axis=0)[0]

    def greedy(self, q: float, expected: Array) -> Array:
        prompt = int(self.fixture.expected["greedy_prompt"])
        new = expected.shape[1] - prompt
        return self.candidate.greedy(*self._given, self.fixture.input_ids[:, :prompt], q, new)


def _row(name: str, expected: Any, actual: Any, tolerance: float, note: str = "") -> Row:
    if actual is None:
        return Row(name, np.inf, tolerance, "missing")
    return Row(name, relative_error(expected, actual), tolerance, note)


def _compare(answers: _Answers) -> Iterator[Row]:
    fixture = answers.fixture
    expected, allowed, config = fixture.expected, fixture.tolerance, fixture.config
    taps = [name for name in tap_names(config) if f"tap/{name}" in expected]
    for r in range(config["total_ut_steps"]):
        for name in (name for name in taps if name.startswith(f"loop{r + 1}.")):
            yield _row(name, expected[f"tap/{name}"], answers.taps.get(name), allowed)
        for name in ("hidden", "gate_logit", "logits", "loss"):
            if name in expected:
                yield _row(f"loop{r + 1}.{name}", expected[name][r], answers.per_loop(name)[r], allowed)

    at_threshold = {name: match for name in expected if (match := AT_THRESHOLD.fullmatch(name))}
    if "exit_prob" in expected:
        yield _row("exit_prob", expected["exit_prob"], answers.plain("exit_prob"), allowed)
    for name, match in at_threshold.items():
        if match[1] == "exit_logits":
            yield _judge_exit(name, float(match[2]), answers)
    for name in ("expected_logits", "stage1_loss", "stage2_loss"):
        if name in expected:
            yield _row(name, expected[name], answers.plain(name), allowed)
    grads = [f"grad/{name}" for name in tensor_shapes(config)] + [f"stage2_grad/{name}" for name in GATE]
    for name in (name for name in grads if name in expected):
        yield _row(name, expected[name], answers.grad(name), allowed)
    for name, match in at_threshold.items():
        if match[1] == "greedy":
            yield _judge_greedy(name, float(match[2]), answers)
    if "adamw_loss" in expected:
        yield _row("adamw_loss", expected["adamw_loss"], answers.plain("adamw_loss"), allowed)


def _at_threshold(exit_prob: Array, q: float, tolerance: float) -> Array:
    """Loops (all but the last) after which the exit probabilities add up to q within the tolerance.  RBS -> RBS."""
    near = np.abs(np.cumsum(exit_prob, axis=0) - q) <= tolerance
    near[-1] = False
    return near if 0.0 < q < 1.0 else np.zeros_like(near)


def _judge_exit(name: str, q: float, answers: _Answers) -> Row:
    """Positions whose probabilities add up to almost exactly q may be read from either loop: they are left out."""
    fixture = answers.fixture
    clear = ~_at_threshold(fixture.answers["exit_prob"], q, fixture.tolerance).any(0)
    left_out = int((~clear).sum())
    if left_out == clear.size:
        return Row(name, np.inf, fixture.tolerance, "every position is at the threshold")
    note = f"{left_out} of {clear.size} positions at the threshold left out" if left_out else ""
    return _row(name, fixture.expected[name][clear], answers.exit_logits(q)[clear], fixture.tolerance, note)


def _judge_greedy(name: str, q: float, answers: _Answers) -> Row:
    """Share of rows that go another way; a near-tie is no other way, but the row is compared no further."""
    expected = answers.fixture.expected[name]
    actual = answers.greedy(q, expected)
    if actual.shape != expected.shape:
        return Row(name, np.inf, 0.0, f"shape {actual.shape} is not {expected.shape}")
    wrong, ties = 0, []
    for b in range(len(expected)):
        different = np.flatnonzero(actual[b] != expected[b])
        if not different.size:
            continue
        s = int(different[0])
        if _is_near_tie(answers.fixture, q, expected[b, :s], {int(expected[b, s]), int(actual[b, s])}):
            ties.append(f"near-tie in row {b + 1} at position {s + 1}")
        else:
            wrong += 1
    return Row(name, wrong / len(expected), 0.0, "; ".join(ties))


def _is_near_tie(fixture: Fixture, q: float, before: Array, tokens: set[int]) -> bool:
    """Whether rounding may choose any of these tokens: logits (or exit probabilities) within the tolerance."""
    if not before.size:
        return False
    out = LoopLM(fixture.tensors, fixture.config).forward(before[None])
    exit_prob, logits = out["exit_prob"][:, :, -1:], out["logits"][:, 0, -1]
    first = int(LoopLM.exit_loop(exit_prob, q)[0, 0])
    near = np.flatnonzero(_at_threshold(exit_prob, q, fixture.tolerance)[:, 0, 0])
    possible: set[int] = set()
    for r in {first, *near, *(near + 1)}:
        best, size = logits[r].max(), np.sqrt(np.mean(logits[r] ** 2))
        possible |= set(np.flatnonzero(logits[r] >= best - fixture.tolerance * size).tolist())
    return tokens <= possible
