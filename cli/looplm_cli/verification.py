"""Everything `looplm verify` checks: section by section, and fixture folders.

Nothing is decided here: numbers come from the engine, verdicts from looplm_reference.
"""

import dataclasses
import math
import pathlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from looplm import kernels
from looplm.arrays import Array
from looplm.checkpoint import load_model
from looplm.config import ModelConfig, model_config_from_json
from looplm.errors import VerificationError
from looplm.generation import Session
from looplm.kernels.attention import attention_with
from looplm.kernels.linear import linear_on
from looplm.kernels.product.select import PATHS, Path, measured
from looplm.kernels.product.stored import FEW_ROWS
from looplm.settings import RECOMPUTE
from looplm.stored import StoredWeights, convert, is_matrix
from looplm.weights import Weights
from looplm_cli.batch_verification import batch_checks, batch_mutants
from looplm_cli.draft_verification import draft_checks, draft_mutants
from looplm_cli.engine_candidate import EngineCandidate
from looplm_cli.policy_engine import policy_checks, policy_mutants
from looplm_cli.quantized_engine import CANDIDATES, decoded, engine_rounding
from looplm_cli.stored_verification import check_size, stored_rows
from looplm_reference import bfloat16, contract, fixture, fixture_judge, judge, mutants, ops, quantized_judge
from looplm_reference.contract import Row
from looplm_reference.model import LoopLM


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
        Section("operation mutants", "mistakes made in one kernel on purpose", _catches(_op_mutants()), mutants=True),
        Section("products", "matrix products on every path, forward and backward", _products()),
        Section("model", "the whole engine against the reference, array by array", _model(threads)),
        Section(
            "model mutants", "mistakes made in the whole model on purpose", _catches(_model_mutants()), mutants=True
        ),
        Section("policies", "what early exits leave behind, under every cache policy", _verdicts(policy_checks())),
        Section("policy mutants", "mistakes made in one policy on purpose", _catches(policy_mutants()), mutants=True),
        Section("training", "every gradient, on every path, with and without recomputation", _training(threads)),
        Section("bf16 mutants", "mistakes made in rounding on purpose", _bfloat16_mutants(), mutants=True),
        Section("quantized", "int8 and int4 weights, against what they stand for", _quantized()),
        Section("quantized mutants", "mistakes made in reading such weights", _quantized_mutants(), mutants=True),
        Section(
            "batches",
            "rows that come and go, against the reference's texts one by one",
            _verdicts(batch_checks(threads)),
        ),
        Section("batch mutants", "mistakes made in a batch on purpose", _catches(batch_mutants()), mutants=True),
        Section("drafts", "drafted text against greedy decoding by recomputation", _verdicts(draft_checks())),
        Section("draft mutants", "mistakes made in drafting on purpose", _catches(draft_mutants()), mutants=True),
    ]


def _compared(name: str, rows: list[Row]) -> Check:
    return Check(name, bool(rows) and all(row.ok for row in rows), rows)


def _operations() -> Iterator[Check]:
    for name in contract.OPS:
        yield _compared(name, [row for dims in contract.DIMS for row in contract.check(kernels, name, dims)])


# More rows, and longer sums, than any block of a product holds; none of them a multiple of a tile.
LARGE_PRODUCT = {"B": 2, "S": 550, "D": 805, "F": 53}


def _products() -> Iterator[Check]:
    faults = measured().faults
    for path in PATHS.values():
        if path.name in faults:
            yield _found_wrong(path, faults[path.name])
            continue
        truth = bfloat16.products if path.precision == "bf16" else ops
        every = (*contract.DIMS, LARGE_PRODUCT)
        rows = [row for dims in every for row in contract.check(candidate_on(path), "linear", dims, truth=truth)]
        yield _compared(path_name(path), rows)
        if path.precision == "bf16":  # the other's attention is checked as an operation
            yield _compared(f"{path_name(path)}: attention", _rounded_attention(path))


def candidate_on(path: Path) -> types.SimpleNamespace:
    """The operations that are products, as this path has them."""
    linear, attention = linear_on(path), attention_with(path.products([(1, 1)]).attention)
    return types.SimpleNamespace(
        linear_forward=linear[0],
        linear_backward=linear[1],
        attention_forward=attention[0],
        attention_backward=attention[1],
    )


def _rounded_attention(path: Path) -> list[Row]:
    candidate, tolerance = candidate_on(path), bfloat16.ATTENTION_TOLERANCE
    return [
        row
        for dims in contract.DIMS
        for row in contract.check(candidate, "attention", dims, tolerance=tolerance, truth=bfloat16.products)
    ]


def path_name(path: Path) -> str:
    """A path as the report calls it, with the instructions that others have to stand in for."""
    without = f", emulated without {', '.join(path.missing())}" if path.missing() else ""
    return f"{path.name} ({path.precision}{without})"


def _found_wrong(path: Path, fault: str) -> Check:
    """The check of a path that this machine has shown to be wrong; it is not run, it might end the process."""
    return Check(path_name(path), False, [Row(path.name, math.inf, 0.0, fault)])


def _training(threads: int) -> Iterator[Check]:
    faults = measured().faults  # which `_products` reports
    for path in (path for path in PATHS.values() if path.name not in faults):
        rounding = path.precision == "bf16"
        tolerance, truth = (bfloat16.TOLERANCE, bfloat16.Bfloat16LoopLM) if rounding else (judge.TOLERANCE, LoopLM)
        for recompute in RECOMPUTE:
            candidate = EngineCandidate(threads, path=path, recompute=recompute)
            rows = list(judge.compare_gradients(candidate, tolerance, truth))
            yield _compared(f"{path_name(path)}, recompute {recompute}", rows)


def _bfloat16_mutants() -> Iterator[Check]:
    for name, mutant in bfloat16.MUTANTS.items():
        found = bfloat16.first_failures(mutant)
        if mutant.in_model and "linear" in mutant.shown_by:  # a long prompt shows it too
            wrong = _long_prompt("grouped", bfloat16.prompt_model_of(mutant.products))
            found.append(contract.first_failure(wrong))
        yield Check(name, None not in found, [row for row in found if row is not None])


def _quantized() -> Iterator[Check]:
    for fmt in quantized_judge.FORMATS:
        yield _compared(f"{fmt}: rounding", list(quantized_judge.compare_rounding(engine_rounding, fmt)))
        for candidate in CANDIDATES:
            yield _compared(f"{fmt}: {candidate.name}", list(quantized_judge.compare(candidate, fmt)))


def _quantized_mutants() -> Iterator[Check]:
    for mutant in quantized_judge.MUTANTS:
        rows = quantized_judge.first_failures(mutant)
        yield Check(f"{mutant.format}: {mutant.name}", len(rows) == 2, rows)  # by products, and by a whole model


def _op_mutants() -> Iterator[tuple[str, Row | None]]:
    for mutant in mutants.OP_MUTANTS:
        yield f"{mutant.function}: {mutant.name}", mutant.first_failure(kernels)


def _model_mutants() -> Iterator[tuple[str, Row | None]]:
    for mutant in mutants.MODEL_MUTANTS:
        yield mutant.name, mutant.first_failure()


def _verdicts(found: Iterable[tuple[str, list[Row]]]) -> Iterator[Check]:
    return (_compared(name, rows) for name, rows in found)


def _catches(found: Iterable[tuple[str, Row | None]]) -> Iterator[Check]:
    return (Check(name, caught is not None, [caught] if caught else []) for name, caught in found)


# How the judge's row names begin (after the model's name) -> what it compared.
PARTS = (
    ("left padding.", "left-padded batch against single rows"),
    ("right padding.", "right-padded batch against single rows"),
    ("cached.", "cached decode against full forward, every prefix"),
    ("exit_loop@", "exit rule of the gate"),
    ("exit_rule.", "exit rules by change, KL, probability, margin, stability"),
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
        yield _compared(f"{name}: cached decode from bfloat16 weights", list(_in_bfloat16(name)))
        yield _compared(f"{name}: long prompt in bfloat16 products", list(_long_prompt(name)))


def _prefilled(name: str) -> Iterator[Row]:
    """The judge's candidate starts from an empty cache; here part of the text is there already, fed in one go."""
    config = judge.MODELS[name]
    tensors = judge.random_tensors(config)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 7))
    expected = LoopLM(tensors, config).forward(ids)["hidden"]
    for prefill in range(1, ids.shape[1] + 1):
        hidden = EngineCandidate(prefill=prefill).cached_hidden(tensors, config, ids)
        error = contract.relative_error(expected, hidden)
        yield Row(f"{name}: cached.after prompt of {prefill}.hidden", error, judge.TOLERANCE)


def _in_bfloat16(name: str) -> Iterator[Row]:
    """Against the reference with the same numbers: what bfloat16 stands for is exact in float64."""
    config = judge.MODELS[name]
    tensors = {key: np.asarray(value, np.float32) for key, value in judge.random_tensors(config).items()}
    matrices = {key: convert(value, "bfloat16") for key, value in tensors.items() if is_matrix(key)}
    weights = StoredWeights(model_config_from_json(config, "the judge's model"), matrices, tensors)
    rounded = tensors | {key: matrix.rows(np.arange(matrix.shape[0])) for key, matrix in matrices.items()}
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 7))
    expected, found = LoopLM(rounded, config).forward(ids), decoded(weights, ids)
    for what, array in found.items():
        yield Row(f"{name}: bfloat16.{what}", contract.relative_error(expected[what], array), judge.TOLERANCE)


def _long_prompt(name: str, truth: type[LoopLM] = bfloat16.Bfloat16PromptLM) -> Iterator[Row]:
    """More positions than are decoded as few, what meets a weight rounded to bfloat16, against a model that rounds it.

    After one loop: further ones make much of an operand that fell the other way.
    """
    config = judge.MODELS[name]
    tensors = {key: np.asarray(value, np.float32) for key, value in judge.random_tensors(config).items()}
    weights = StoredWeights.of(Weights.from_tensors(model_config_from_json(config, "the judge's model"), tensors))
    weights.prompt_precision = "bf16"
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 1 + FEW_ROWS // 2))
    expected, found = truth(tensors, config).forward(ids)["hidden"][0], Session(weights, batch=2).feed(ids).hidden[0]
    error = contract.relative_error(expected, found)
    yield Row(f"{name}: long prompt.loop1.hidden", error, bfloat16.PROMPT_TOLERANCE)


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
    """Run engine and reference against a fixture folder, or the engine against the reference's answers for a model.

    Raises: VerificationError if it is neither, or too large; CheckpointError or ConfigError for a damaged model.
    """
    alone = (folder / "config.json").is_file()
    model = folder if alone else folder / "model"
    if not alone and not (folder / "expected.npz").is_file():
        raise _no_fixture(f"{folder} has no expected.npz")
    loaded = load_model(model, check_size)
    settings, warnings = ({}, []) if alone else _settings(folder / "fixture.yaml")
    try:
        found = fixture.of_model(model, _ids(loaded.config)) if alone else fixture.load(folder, settings)
    except fixture.FixtureError as error:
        raise _no_fixture(str(error)) from error
    engine, tensors = EngineCandidate(threads), loaded.weights.tensors
    theirs = fixture_judge.judge_fixture(engine, found, tensors)
    ours = fixture_judge.judge_fixture(fixture_judge.ReferenceFixtureCandidate(), found)
    rows = [Comparison(row.name, row, other) for row, other in zip(theirs, ours, strict=True)]
    failed = not all(row.ok for row in rows)
    leaves = fixture_judge.first_difference(engine, found, tensors) if failed else None
    as_stored = stored_rows(found, model)  # of which the reference is the measure
    rows += [Comparison(row.name, row, dataclasses.replace(row, error=0.0)) for row in as_stored]
    return FixtureReport(found, rows, loaded.warnings + warnings, leaves)


def _ids(config: ModelConfig) -> Array:
    """Random text for a model that brings none.  -> BS"""
    length = min(9, config.max_position_embeddings)
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, length))


def _no_fixture(message: str) -> VerificationError:
    hint = "name a model folder, or a fixture folder with model/ and expected.npz, as docs/formats.md describes"
    return VerificationError(message, hint)


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
