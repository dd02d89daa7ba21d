"""The contract: the reference meets it, the compiled kernels meet it, and what is wrong does not."""

import inspect
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from looplm import kernels
from looplm_reference import contract, ops
from looplm_reference.mutants import OP_MUTANTS, OpMutant

PAIRS = [name for name in contract.OPS if len(contract.functions(name)) == 2]
TINY = contract.DIMS[:3]


def name_of(dims: dict[str, int]) -> str:
    return "".join(f"{letter}{dims[letter]}" for letter in "BSR")


# ---- the reference


@pytest.mark.parametrize("dims", contract.DIMS, ids=name_of)
@pytest.mark.parametrize("name", PAIRS)
def test_reference_backward_agrees_with_central_differences(name: str, dims: dict[str, int]) -> None:
    assert contract.gradient_check(name, dims) < 1e-6


@pytest.mark.parametrize("name", PAIRS)
def test_reference_backward_takes_and_gives_by_name(name: str) -> None:
    """Parameters: d + output, inputs, saved outputs, constants.  Results: d + input, in the order of the inputs."""
    forward, backward = (getattr(ops, function) for function in contract.functions(name))
    inputs, outputs = contract.shape_line(forward)
    upstream, gradients = contract.shape_line(backward)
    known = {*(f"d{output}" for output in outputs), *outputs, *inspect.signature(forward).parameters}
    assert set(inspect.signature(backward).parameters) <= known
    assert list(gradients) == [f"d{each}" for each in inputs if f"d{each}" in gradients]
    for letters, twins in ((upstream, outputs), (gradients, inputs)):
        assert letters == {each: twins[each.removeprefix("d")] for each in letters}


def test_every_operation_is_under_contract() -> None:
    covered = {function for name in contract.OPS for function in contract.functions(name)}
    assert covered == set(kernels.__all__)


def test_a_wrong_backward_fails_the_central_differences() -> None:
    def swiglu_backward(dy: Any, gate: Any, up: Any) -> tuple[Any, Any]:
        dgate, dup = ops.swiglu_backward(dy, gate, up)
        return dgate * 1.001, dup

    wrong = types.SimpleNamespace(swiglu_forward=ops.swiglu_forward, swiglu_backward=swiglu_backward)
    assert contract.gradient_check("swiglu", TINY[0], module=wrong) > 1e-4


# ---- the kernels


@pytest.mark.kernels
@pytest.mark.parametrize("dims", contract.DIMS, ids=name_of)
@pytest.mark.parametrize("name", contract.OPS)
def test_kernels_meet_the_contract(name: str, dims: dict[str, int]) -> None:
    rows = contract.check(kernels, name, dims)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.plain_python
@pytest.mark.parametrize("name", contract.OPS)
def test_kernels_meet_the_contract_at_one_tiny_size(name: str) -> None:
    rows = contract.check(kernels, name, TINY[1])
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("name", contract.OPS)
def test_the_reference_meets_its_own_contract_exactly(name: str) -> None:
    for dims in contract.DIMS:
        rows = contract.check(ops, name, dims, dtype=np.float64, tolerance=0.0)
        assert [row for row in rows if not row.ok] == []


ADAMW = {"learning_rate": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SIDES = np.array([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4]).reshape(1, 1, 7)
GATES = SIDES * np.array([1.0, -1.0, 0.5]).reshape(3, 1, 1)
EDGES: dict[str, tuple[str, dict[str, Any]]] = {
    "SwiGLU far out": ("swiglu_forward", {"gate": SIDES, "up": np.ones((1, 1, 7))}),
    "SwiGLU backward far out": ("swiglu_backward", {"dy": np.ones((1, 1, 7)), "gate": SIDES, "up": np.ones((1, 1, 7))}),
    "RMSNorm of nearly nothing": (
        "rmsnorm_forward",
        {"x": np.linspace(-1e-6, 1e-6, 8).reshape(1, 2, 4), "weight": np.ones(4), "eps": 1e-6},
    ),
    "RMSNorm of zero": ("rmsnorm_forward", {"x": np.zeros((1, 2, 4)), "weight": np.ones(4), "eps": 1e-6}),
    "Stage II, certain gates": (
        "stage2_forward",
        {"gate_logit": GATES, "continue_prob": np.full((3, 1, 7), 0.25), "counted": np.array([1.0, 1.0, 0.0])},
    ),
    "Stage II backward, certain gates": (
        "stage2_backward",
        {
            "dobjective": np.ones((1, 7)),
            "gate_logit": GATES,
            "continue_prob": np.full((3, 1, 7), 0.25),
            "counted": np.array([1.0, 1.0, 0.0]),
        },
    ),
    "no target counts": (
        "cross_entropy_forward",
        {"logits": np.ones((1, 2, 3)), "target": np.array([[-1, -1]])},
    ),
    "AdamW late": (
        "adamw_update",
        {
            "weight": np.linspace(-1, 1, 5),
            "grad": np.linspace(1, 2, 5),
            "first_moment": np.linspace(0.5, 1, 5),
            "second_moment": np.linspace(1, 4, 5),
            "step": 100_000,
            **ADAMW,
        },
    ),
    "AdamW without any gradient yet": (
        "adamw_update",
        {
            "weight": np.linspace(-1, 1, 5),
            "grad": np.zeros(5),
            "first_moment": np.zeros(5),
            "second_moment": np.zeros(5),
            "step": 1,
            **ADAMW,
        },
    ),
    "a gradient of nothing": ("gradient_norm", {"grad": np.zeros(5)}),
}


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("edge", EDGES)
def test_kernels_at_the_edges(edge: str) -> None:
    function, values = EDGES[edge]

    def cast(dtype: Any) -> dict[str, Any]:
        return {
            name: value.astype(dtype if value.dtype.kind == "f" else value.dtype)
            if isinstance(value, np.ndarray)
            else value
            for name, value in values.items()
        }

    expected, actual = (
        contract.call(ops, function, cast(np.float64)),
        contract.call(kernels, function, cast(np.float32)),
    )
    for name in expected:
        assert contract.relative_error(expected[name], actual[name]) < 2e-6, name


# ---- the machinery objects to what is wrong


def swiglu(forward: Callable[..., Any]) -> types.SimpleNamespace:
    return types.SimpleNamespace(swiglu_forward=forward, swiglu_backward=ops.swiglu_backward)


def renamed(x: Any, up: Any) -> Any:
    return ops.swiglu_forward(x, up)


def bare(gate: Any, up: Any) -> Any:
    return ops.swiglu_forward(gate, up)[0]


def widened(gate: Any, up: Any) -> Any:
    return (ops.swiglu_forward(gate, up)[0].astype(np.float64),)


def flattened(gate: Any, up: Any) -> Any:
    return (ops.swiglu_forward(gate, up)[0].reshape(-1),)


def in_its_input(gate: Any, up: Any) -> Any:
    y = ops.swiglu_forward(gate, up)
    up *= 2
    return y


def last_element_unwritten(gate: Any, up: Any) -> Any:
    y = np.empty_like(gate)
    y.reshape(-1)[:-1] = ops.swiglu_forward(gate, up)[0].reshape(-1)[:-1]
    return (y,)


def slightly_off(gate: Any, up: Any) -> Any:
    return (ops.swiglu_forward(gate, up)[0] * np.float32(1.00001),)


NOTES = {
    renamed: "parameters (x, up)",
    bare: "not a tuple of 1",
    widened: "float64 is not float32",
    flattened: "shape",
    in_its_input: "input changed",
    last_element_unwritten: "",
    slightly_off: "",
}


@pytest.mark.parametrize("wrong", NOTES, ids=lambda function: function.__name__)
def test_a_wrong_candidate_is_named(wrong: Callable[..., Any]) -> None:
    for dims in contract.DIMS:
        failed = [row for row in contract.check(swiglu(wrong), "swiglu", dims) if not row.ok]
        assert failed[0].name.startswith("swiglu_forward")
        assert NOTES[wrong] in failed[0].note


def test_a_missing_function_is_named() -> None:
    only = types.SimpleNamespace(swiglu_forward=ops.swiglu_forward)
    assert [(row.name, row.note) for row in contract.check(only, "swiglu", TINY[0])] == [("swiglu_backward", "missing")]


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.0], [3.0, 4.5], 0.1),
        ([300.0, 400.0], [300.0, 450.0], 0.1),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], np.inf),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([1.0, 2.0], [1.0, np.inf], np.inf),
        ([1.0, 2.0], [1.0, 2.0, 3.0], np.inf),
    ],
)
def test_the_error_is_scale_free_and_nan_is_infinite(expected: list[float], actual: list[float], error: float) -> None:
    assert contract.relative_error(expected, actual) == pytest.approx(error)


def test_memory_is_poisoned_only_inside() -> None:
    empty = np.empty
    with contract.poisoned_memory():
        assert np.isnan(np.empty(3, np.float32)).all()
        assert np.isnan(np.empty_like(np.ones(2))).all()
        assert (np.empty(2, np.int64) == -1).all()
    assert np.empty is empty


def test_a_shape_line_is_read_as_written() -> None:
    def scale(x: Any, y: Any, weight: Any, eps: Any) -> None:
        """Scale it.

        x, y: BSD, weight: D -> z: BSD, norm: ()
        """

    def silent(x: Any) -> None:
        """Says nothing of shapes."""

    assert contract.shape_line(scale) == ({"x": "BSD", "y": "BSD", "weight": "D"}, {"z": "BSD", "norm": ""})
    with pytest.raises(ValueError, match="silent has no shape line"):
        contract.shape_line(silent)


@pytest.mark.parametrize("dims", contract.DIMS, ids=name_of)
def test_sizes_within_a_case_differ_where_they_are_not_an_edge(dims: dict[str, int]) -> None:
    edges = [("P", "S"), ("H", "G")]  # training without a past, and one key/value head per query head
    for a, b in ((a, b) for a in dims for b in dims if a < b):
        assert dims[a] != dims[b] or 1 in (dims[a], dims[b]) or (b, a) in edges or (a, b) in edges, f"{a} = {b}"


# ---- mutants


def mutant_name(mutant: OpMutant) -> str:
    return f"{mutant.function}: {mutant.name}"


@pytest.mark.kernels
@pytest.mark.parametrize("mutant", OP_MUTANTS, ids=mutant_name)
def test_every_mutant_of_the_kernels_is_caught(mutant: OpMutant) -> None:
    failure = mutant.first_failure(kernels)
    assert failure is not None
    assert failure.name.startswith(mutant.function)


@pytest.mark.parametrize("mutant", OP_MUTANTS, ids=mutant_name)
def test_every_mutant_of_the_reference_is_caught(mutant: OpMutant) -> None:
    failure = mutant.first_failure(ops, np.float64)
    assert failure is not None
    assert failure.name.startswith(mutant.function)


def test_every_operation_has_a_mutant() -> None:
    assert {mutant.op for mutant in OP_MUTANTS} == set(contract.OPS)
