"""Everything `looplm verify` checks: the engine in the judge's candidate seat, and the checks section by section.

Nothing is decided here: numbers come from the engine, verdicts from looplm_reference.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from looplm import kernels, model
from looplm.arrays import Array, Floats, Ints
from looplm.checkpoint import load_model
from looplm.config import model_config_from_json
from looplm.errors import VerificationError
from looplm.exits import LearnedGate, exit_index
from looplm.generation import Session
from looplm.objectives import StageOne, StageTwo
from looplm.settings import TrainConfig
from looplm.training import Optimizer
from looplm.weights import Weights
from looplm_reference import contract, fixture, fixture_judge, judge, mutants
from looplm_reference.contract import Row

GATE = ("model.early_exit_gate.weight", "model.early_exit_gate.bias")


class EngineCandidate:
    """The engine as the judge sees it: the same code paths as training, decoding and inspection use."""

    name = "engine"

    def __init__(self, threads: int = 1, prefill: int = 0) -> None:
        self.threads = threads
        self.prefill = prefill  # positions that `cached_hidden` feeds at once before it goes on one by one
        self._latest: tuple[Any, Weights] | None = None

    def _weights(self, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> Weights:
        if self._latest is None or self._latest[0] is not tensors:
            floats = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
            self._latest = tensors, Weights.from_tensors(model_config_from_json(config, "the fixture"), floats)
        return self._latest[1]

    def forward(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        input_ids: Ints,
        start: Ints | None = None,
        taps: list[tuple[str, Array]] | None = None,
    ) -> dict[str, Array]:
        weights = self._weights(tensors, config)
        trace = model.forward(weights, input_ids, start=start, threads=self.threads, taps=taps)
        logits = np.stack([trace.logits(r) for r in range(len(trace.hidden))])
        return {
            "hidden": trace.hidden,
            "logits": logits,
            "gate_logit": trace.gate_logit,
            "exit_prob": trace.exit_prob,
        }

    def stage1(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        input_ids: Ints,
        target: Ints,
        entropy_weight: float,
        start: Ints | None = None,
    ) -> dict[str, Any]:
        weights = self._weights(tensors, config)
        workspace = model.GradientWorkspace(weights.config, *input_ids.shape, self.threads)
        report = model.gradient(weights, workspace, input_ids, target, self._stage1(weights, entropy_weight), start)
        loss = model.forward(weights, input_ids, start=start, threads=self.threads).token_loss(target)
        objective = report.objective / max(1, report.tokens)
        return {"loss": loss, "objective": objective, "grads": workspace.total.tensors}

    def _stage1(self, weights: Weights, entropy_weight: float) -> StageOne:
        return StageOne(entropy_weight, np.zeros(weights.config.total_ut_steps, np.float32))

    def stage2(
        self, tensors: Mapping[str, Array], config: Mapping[str, Any], input_ids: Ints, target: Ints
    ) -> dict[str, Any]:
        weights, counted = self._weights(tensors, config), target >= 0
        trace = model.forward(weights, input_ids, threads=self.threads)
        loss, hidden = trace.token_loss(target)[:, counted], trace.hidden[:, counted]
        (gate_logit,) = kernels.gate_forward(hidden, weights.gate_weight, weights.gate_bias)
        value, dgate_logit = StageTwo("paper").value_and_dgate(loss, gate_logit)
        dgate_logit *= np.float32(1.0 / value.size)
        _, dweight, dbias = kernels.gate_backward(dgate_logit, hidden, weights.gate_weight)
        return {
            "objective": float(value.mean(dtype=np.float64)),
            "grads": dict(zip(GATE, (dweight, dbias), strict=True)),
        }

    def cached_hidden(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        input_ids: Ints,
        start: Ints | None = None,
    ) -> Floats:
        weights = self._weights(tensors, config)
        session = Session(weights, batch=len(input_ids), start=start, policy="full")
        states = [session.feed(input_ids[:, : self.prefill]).hidden] if self.prefill else []
        last = np.full(len(input_ids), session.loops - 1, np.int64)
        for s in range(self.prefill, input_ids.shape[1]):
            session.begin(np.ascontiguousarray(input_ids[:, s]))
            for _ in range(session.loops):
                session.next_loop()
            session.finish(last)
            states.append(session.hidden[:, :, None].copy())
        return np.concatenate(states, axis=2)

    def exit_loop(self, exit_prob: Floats, exit_threshold: float) -> Ints:
        return kernels.exit_loop(exit_prob, exit_threshold)[0]

    def greedy(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        input_ids: Ints,
        exit_threshold: float,
        new_tokens: int,
    ) -> Ints:
        """Cached decoding in which all loops run: what decoding computes, without its saving."""
        weights, ids = self._weights(tensors, config), np.ascontiguousarray(input_ids)
        rule = LearnedGate(min(exit_threshold, 1.0))
        session = Session(weights, batch=len(ids), policy="full")
        trace = session.feed(ids)
        states, gate_logit = trace.hidden[:, :, -1], np.ascontiguousarray(trace.gate_logit[:, :, -1])
        exit_at = exit_index(rule, states, gate_logit)
        logits = states[exit_at, np.arange(len(ids))] @ weights.head.T
        for made in range(1, new_tokens + 1):
            token = logits.argmax(-1)
            ids = np.concatenate([ids, token[:, None]], axis=1)
            if made < new_tokens:
                logits = session.logits(session.advance(token, rule))
        return ids

    def adamw(
        self,
        tensors: Mapping[str, Array],
        config: Mapping[str, Any],
        batches: Ints,
        settings: Mapping[str, float],
    ) -> Array:
        weights = self._weights(tensors, config).copy()
        given = {name: settings[name] for name in ("learning_rate", "beta1", "beta2", "weight_decay", "clip")}
        optimizer = Optimizer(weights, TrainConfig(adam_eps=settings["eps"], **given))
        workspace = model.GradientWorkspace(weights.config, *batches.shape[1:], self.threads)
        objective, losses = self._stage1(weights, settings["entropy_weight"]), []
        for step, ids in enumerate(batches, 1):
            report = model.gradient(weights, workspace, ids, fixture.next_token(ids), objective)
            losses.append(report.objective / report.tokens)
            optimizer.update(workspace.total.contiguous(), step, settings["learning_rate"])
        return np.array(losses)


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report; `rows` are the comparisons behind it (for a mutant: the one that caught it, if any)."""

    name: str
    ok: bool
    rows: list[Row]

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    @property
    def worst(self) -> Row:
        """The row nearest to its tolerance, or furthest beyond it."""
        return max(self.rows, key=lambda row: row.error / row.tolerance if row.tolerance else row.error and math.inf)


@dataclasses.dataclass(frozen=True)
class Section:
    """Checks of one kind, made while they are iterated over."""

    name: str
    title: str
    checks: Iterable[Check]
    mutants: bool = False  # a check is that a mistake is caught


def sections(threads: int) -> list[Section]:
    """All that is checked without any fixture."""
    return [
        Section("operations", "compiled kernels against the float64 reference, forward and backward", _operations()),
        Section("operation mutants", "mistakes made in one kernel on purpose", _op_mutants(), mutants=True),
        Section("model", "the whole engine against the reference, array by array", _model(threads)),
        Section("model mutants", "mistakes made in the whole model on purpose", _model_mutants(), mutants=True),
    ]


def _compared(name: str, rows: list[Row]) -> Check:
    return Check(name, bool(rows) and all(row.ok for row in rows), rows)


def _operations() -> Iterator[Check]:
    for name in contract.OPS:
        yield _compared(name, [row for dims in contract.DIMS for row in contract.check(kernels, name, dims)])


def _op_mutants() -> Iterator[Check]:
    for mutant in mutants.OP_MUTANTS:
        caught = mutant.first_failure(kernels)
        yield Check(f"{mutant.function}: {mutant.name}", caught is not None, [caught] if caught else [])


def _model_mutants() -> Iterator[Check]:
    for mutant in mutants.MODEL_MUTANTS:
        caught = mutant.first_failure()
        yield Check(mutant.name, caught is not None, [caught] if caught else [])


# How the judge's row names begin (after the model's name) -> what it compared.
PARTS = (
    ("left padding.", "left-padded batch against single rows"),
    ("right padding.", "right-padded batch against single rows"),
    ("cached.", "cached decode against full forward, every prefix"),
    ("exit_loop@", "exit rule"),
    ("stage1.", "Stage I loss and every gradient"),
    ("", "forward, layer by layer"),
)


def _model(threads: int) -> Iterator[Check]:
    for name in judge.MODELS:
        parts: dict[str, list[Row]] = {}
        for row in judge.compare(EngineCandidate(threads), models=[name]):
            inner = row.name.removeprefix(f"{name}: ")
            parts.setdefault(next(part for begin, part in PARTS if inner.startswith(begin)), []).append(row)
        for part, rows in parts.items():
            yield _compared(f"{name}: {part}", rows)
        yield _compared(f"{name}: prompt of every length, then cached decode", list(_prefilled(name)))


def _prefilled(name: str) -> Iterator[Row]:
    """The judge's candidate starts from an empty cache; here part of the text is there already, fed in one go."""
    config = judge.MODELS[name]
    tensors = judge.random_tensors(config)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 7))
    expected = fixture.LoopLM(tensors, config).forward(ids)["hidden"]
    for prefill in range(1, ids.shape[1] + 1):
        hidden = EngineCandidate(prefill=prefill).cached_hidden(tensors, config, ids)
        error = contract.relative_error(expected, hidden)
        yield Row(f"{name}: cached.after prompt of {prefill}.hidden", error, judge.TOLERANCE)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array of a fixture: what engine and reference are off by."""

    name: str
    engine: Row
    reference: Row

    @property
    def ok(self) -> bool:
        return self.engine.ok and self.reference.ok

    @property
    def note(self) -> str:
        return self.engine.note or self.reference.note


@dataclasses.dataclass(frozen=True)
class FixtureReport:
    """A fixture folder, judged.  `engine_leaves` is where the engine first differs from the reference, if it does."""

    fixture: fixture.Fixture
    rows: list[Comparison]
    warnings: list[str]
    engine_leaves: Row | None

    @property
    def failures(self) -> list[Comparison]:
        """In forward order, so that the first names the place."""
        return [row for row in self.rows if not row.ok]


def verify_folder(folder: pathlib.Path, threads: int) -> FixtureReport:
    """Run engine and reference against a fixture folder.

    Raises: VerificationError if it is not one; CheckpointError or ConfigError for a damaged model.
    """
    if not (folder / "expected.npz").is_file():
        raise _no_fixture(f"{folder} has no expected.npz")
    loaded = load_model(folder / "model")
    settings, warnings = _settings(folder / "fixture.yaml")
    try:
        found = fixture.load(folder, settings)
    except fixture.FixtureError as error:
        raise _no_fixture(str(error)) from error
    engine, tensors = EngineCandidate(threads), loaded.weights.tensors
    theirs = fixture_judge.judge_fixture(engine, found, tensors)
    ours = fixture_judge.judge_fixture(fixture_judge.ReferenceFixtureCandidate(), found)
    rows = [Comparison(row.name, row, other) for row, other in zip(theirs, ours, strict=True)]
    failed = not all(row.ok for row in rows)
    leaves = fixture_judge.first_difference(engine, found, tensors) if failed else None
    return FixtureReport(found, rows, loaded.warnings + warnings, leaves)


def _no_fixture(message: str) -> VerificationError:
    return VerificationError(message, "a fixture folder holds model/ and expected.npz, as docs/formats.md describes")


def _settings(path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """What fixture.yaml says, and a warning for each key that means nothing."""
    import yaml

    if not path.exists():
        return {}, []
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _no_fixture(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise _no_fixture(f"{path} holds {type(values).__name__}, not `key: value` lines")
    known = ("origin", "tolerance", "entropy_weight", "adamw")
    return values, [f"{path}: {key} is not used; known: {', '.join(known)}" for key in values if key not in known]
