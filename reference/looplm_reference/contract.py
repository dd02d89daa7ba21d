"""What an implementation of the operations must satisfy, and the machinery that checks one.

A candidate is anything with the functions of `ops` under the same names: a module, or a namespace.  It is called with
inputs rounded to its dtype; the reference computes from the very same numbers in float64.  Shapes come from the shape
lines of the reference's docstrings, so they exist once.  The whole model is the business of `judge`.
"""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np

from . import ops as reference
from .cases import DIMS, DRAWS, OPS, Dims
from .ops import Array

__all__ = [
    "DIMS",
    "OPS",
    "Row",
    "call",
    "check",
    "draw",
    "first_failure",
    "functions",
    "gradient_check",
    "poisoned_memory",
    "relative_error",
    "shape",
    "shape_line",
]


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: what was compared, how far off it is, how far it may be."""

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


def first_failure(rows: Iterable[Row]) -> Row | None:
    """Rows come in the order of the computation, so this one names where it goes wrong."""
    return next((row for row in rows if not row.ok), None)


_SHAPE_LINE = re.compile(r"^(?P<given>\w[\w ,:]*) -> (?P<result>\w[\w ,:()]*)$", re.M)


def shape_line(function: Callable[..., Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Read `x: BSD, weight: D -> y: BSD` off a docstring: {"x": "BSD", "weight": "D"}, {"y": "BSD"}.

    "k, v: BPGK" gives both the same letters; "()" is a number.

    Raises: ValueError if there is no such line.
    """
    match = _SHAPE_LINE.search(inspect.getdoc(function) or "")
    if match is None:
        raise ValueError(f"{function.__name__} has no shape line")
    return _letters(match["given"]), _letters(match["result"])


def _letters(side: str) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting: list[str] = []
    for part in side.split(","):
        name, _, letters = (word.strip() for word in part.partition(":"))
        waiting.append(name)
        if letters:
            found |= dict.fromkeys(waiting, letters.strip("()"))
            waiting = []
    if waiting:
        raise ValueError(f"no letters for {', '.join(waiting)} in {side!r}")
    return found


def functions(name: str) -> tuple[str, ...]:
    """The functions of an operation: forward and backward, or itself."""
    pair = (f"{name}_forward", f"{name}_backward")
    return pair if hasattr(reference, pair[0]) else (name,)


def shape(letters: str, dims: Dims) -> tuple[int, ...]:
    return tuple(dims[letter] for letter in letters)


def relative_error(expected: Any, actual: Any) -> float:
    """Root-mean-square of the difference over that of what is expected; NaN is infinite, 0 must be met exactly."""
    wanted, got = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if wanted.shape != got.shape:
        return np.inf
    if not wanted.size:
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        off, size = np.sqrt(np.mean((got - wanted) ** 2)), np.sqrt(np.mean(wanted**2))
    if off == 0.0:
        return 0.0
    error = float(off / size) if size > 0.0 else np.inf
    return error if np.isfinite(error) else np.inf


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, np.empty and np.empty_like give NaN, or integers with every bit set: what is not written shows."""
    empty, empty_like = np.empty, np.empty_like

    def poison(array: Array) -> Array:
        if array.dtype.kind in "fc":
            array.fill(np.nan)
        elif array.dtype.kind in "iu":
            array.fill(-1 if array.dtype.kind == "i" else np.iinfo(array.dtype).max)
        return array

    def poisoned_empty(*args: Any, **named: Any) -> Array:
        return poison(empty(*args, **named))

    def poisoned_empty_like(*args: Any, **named: Any) -> Array:
        return poison(empty_like(*args, **named))

    with mock.patch.multiple(np, empty=poisoned_empty, empty_like=poisoned_empty_like):
        yield


def draw(name: str, dims: Dims, case: int = 0, seed: int = 0) -> dict[str, Any]:
    """Inputs and constants of one case, float64 but exact in float32."""
    rng = np.random.default_rng([seed, case])
    given, _ = shape_line(getattr(reference, functions(name)[0]))
    chosen = OPS[name][case].values
    env = {k: v for k, v in chosen.items() if k not in given}
    for parameter, letters in given.items():
        how = chosen.get(parameter) or DRAWS.get(parameter)
        env[parameter] = _rounded(how(rng, dims) if how else rng.standard_normal(shape(letters, dims)))
    return env


def _rounded(value: Array) -> Array:
    return value.astype(np.float32).astype(np.float64) if value.dtype.kind == "f" else value


def _as(dtype: Any, env: Mapping[str, Any]) -> dict[str, Any]:
    """Fresh copies of all arrays, the real ones in this dtype."""
    arrays = {k: v for k, v in env.items() if isinstance(v, np.ndarray)}
    return dict(env) | {k: v.astype(dtype if v.dtype.kind == "f" else v.dtype) for k, v in arrays.items()}


def call(module: Any, function: str, env: Mapping[str, Any]) -> dict[str, Any]:
    """Run one function on what it needs of `env`; outputs by name, also those of an update in place.

    Raises: ValueError if it does not return a tuple with one value per name of the shape line.
    """
    twin = getattr(reference, function)
    names = shape_line(twin)[1]
    given = {name: env[name] for name in inspect.signature(twin).parameters}
    result = getattr(module, function)(**given)
    wanted = 0 if function.endswith("_update") else len(names)
    if not isinstance(result, tuple) or len(result) != wanted:
        raise ValueError(f"not a tuple of {wanted}")
    return dict(zip(names, result, strict=True)) if wanted else {name: given[name] for name in names}


def _signature(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _wrong_signature(candidate: Any, function: str) -> str:
    twin, theirs = getattr(reference, function), getattr(candidate, function, None)
    if theirs is None:
        return "missing"
    if _signature(theirs) != _signature(twin):
        return f"parameters ({', '.join(inspect.signature(theirs).parameters)})"
    return ""


def check(
    candidate: Any,
    name: str,
    dims: Dims,
    seed: int = 0,
    dtype: Any = np.float32,
    tolerance: float | None = None,
    truth: Any = reference,
) -> list[Row]:
    """Judge one operation of a candidate, forward and backward, in all its cases: one row per output.

    `truth` answers in the place of the reference: for operations that round on purpose.

    Checked: parameters as in the reference; a tuple out; shapes as in the shape line; the dtype kept; the numbers, with
    output memory poisoned; inputs left as they were.
    """
    wrong = {function: _wrong_signature(candidate, function) for function in functions(name)}
    if any(wrong.values()):
        return [Row(function, np.inf, 0.0, note) for function, note in wrong.items() if note]
    rows: list[Row] = []
    for case, chosen in enumerate(OPS[name]):
        allowed = chosen.tolerance if tolerance is None else tolerance
        rows += _check_case(candidate, truth, name, dims, case, seed, dtype, allowed)
    return rows


def _check_case(
    candidate: Any, truth: Any, name: str, dims: Dims, case: int, seed: int, dtype: Any, tolerance: float
) -> Iterator[Row]:
    rng = np.random.default_rng([seed, case, 1])
    env = draw(name, dims, case, seed)
    low = _as(dtype, env)
    label = f"[{case}]" if len(OPS[name]) > 1 else ""
    for function in functions(name):
        given, result = shape_line(getattr(reference, function))
        upstream = {k: _rounded(rng.standard_normal(shape(given[k], dims))) for k in given if k not in env}
        env, low = env | upstream, low | _as(dtype, upstream)
        expected = call(truth, function, _as(np.float64, env))
        before = _as(dtype, low)
        try:
            # A first call lets a just-in-time compiler see the real np.empty.
            call(candidate, function, _as(dtype, low))
            with poisoned_memory():
                actual = call(candidate, function, low)
        except ValueError as wrong:
            yield Row(f"{function}{label}", np.inf, tolerance, str(wrong))
            return
        for output, letters in result.items():
            note = _wrong_form(actual[output], expected[output], shape(letters, dims), dtype)
            error = np.inf if note else relative_error(expected[output], actual[output])
            yield Row(f"{function}{label}.{output}", error, tolerance, note)
        for k, v in before.items():
            if isinstance(v, np.ndarray) and k not in result and not np.array_equal(v, low[k], equal_nan=True):
                yield Row(f"{function}{label}.{k}", np.inf, tolerance, "input changed")
        env, low = env | expected, low | actual


def _wrong_form(actual: Any, expected: Any, wanted: tuple[int, ...], dtype: Any) -> str:
    if not isinstance(expected, np.ndarray):
        return "" if type(actual) is type(expected) else f"a {type(actual).__name__}"
    if not isinstance(actual, np.ndarray) or actual.shape != wanted:
        return f"shape {np.shape(actual)} is not {wanted}"
    kept = np.dtype(dtype) if expected.dtype.kind == "f" else expected.dtype
    return "" if actual.dtype == kept else f"{actual.dtype} is not {kept}"


def gradient_check(name: str, dims: Dims, seed: int = 0, h: float = 1e-6, module: Any = reference) -> float:
    """Central differences of a float64 forward against its own backward, along random directions.

    Gives the worst error over cases and inputs, relative to the length of the gradient.
    """
    forward, backward = functions(name)
    (upstream,) = shape_line(getattr(reference, backward))[0]
    output = upstream.removeprefix("d")
    worst = 0.0
    for case in range(len(OPS[name])):
        rng = np.random.default_rng([seed, case, 2])
        env = draw(name, dims, case, seed)
        env |= call(module, forward, env)
        env[upstream] = rng.standard_normal(env[output].shape)
        for dname, gradient in call(module, backward, env).items():
            inward = dname.removeprefix("d")
            direction = rng.standard_normal(gradient.shape)
            ends = []
            for sign in (1.0, -1.0):
                moved = env | {inward: env[inward] + sign * h * direction}
                ends.append(float((call(module, forward, moved)[output] * env[upstream]).sum()))
            slope, length = (ends[0] - ends[1]) / (2 * h), float(np.sqrt((gradient**2).sum()))
            off = abs(slope - float((gradient * direction).sum()))
            worst = max(worst, off / length if length > 0.0 else off)
    return worst
