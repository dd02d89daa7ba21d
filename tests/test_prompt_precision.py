"""Long prompts in bfloat16 products: what they compute, what they leave alone."""

import numpy as np
import pytest

from looplm.arrays import aligned_empty
from looplm.config import model_config_to_json
from looplm.generation import Session
from looplm.kernels.product.stored import FEW_ROWS
from looplm.kernels.product.widened import multiply_wide_pairs, wide_scratch_size
from looplm.safetensors_file import round_to_bfloat16, widen_bfloat16
from looplm.stored import FORMATS, Format, StoredWeights, convert
from looplm_reference.bfloat16 import PROMPT_TOLERANCE, Bfloat16PromptLM
from random_models import random_ids, random_weights, relative_error
from stored_models import in_format

SHAPES = [(1, 1), (3, 2), (16, 64), (33, 200), (70, 401), (300, 900)]
every_format = pytest.mark.parametrize("name", FORMATS)


def rounded(x: np.ndarray) -> np.ndarray:
    return widen_bfloat16(round_to_bfloat16(np.ascontiguousarray(x, np.float32)))


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("rows", [1, 26, 90])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_format
def test_both_operands_are_rounded_and_sums_are_not(name: Format, shape: tuple[int, int], rows: int) -> None:
    """A part of the outputs, rows of x and y longer than what is multiplied: nothing else is read or written."""
    rng, (outputs, columns) = np.random.default_rng(rows), shape
    matrix = convert(rng.standard_normal(shape).astype(np.float32), name)
    x = rng.standard_normal((rows, columns + 3)).astype(np.float32)
    x[:, columns:] = np.nan
    first, y = outputs // 4, np.full((rows, outputs + 5), 7.0, np.float32)
    scratch = aligned_empty((wide_scratch_size(columns),))
    numbers = (columns, first, outputs, x.ctypes.data, columns + 3, rows, y.ctypes.data, outputs + 5)
    multiply_wide_pairs.call(*matrix.plan, *numbers, scratch.ctypes.data)
    weight = rounded(matrix.rows(np.arange(first, outputs))).astype(np.float64)
    expected = rounded(x[:, :columns]).astype(np.float64) @ weight.T
    np.testing.assert_allclose(y[:, : outputs - first], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert (y[:, outputs - first :] == 7.0).all()


@pytest.mark.kernels
@every_format
def test_a_long_prompt_is_that_of_a_model_that_rounds_operands(name: Format) -> None:
    """After the first loop: where an operand is rounded the other way, later loops make much of it."""
    for seed in range(3):
        weights, widened = in_format(name)
        ids = random_ids(2, 1 + FEW_ROWS // 2, seed=seed)
        exact = Session(weights, batch=2).feed(ids).hidden[0]
        weights.prompt_precision = "bf16"
        found = Session(weights, batch=2).feed(ids).hidden[0]
        expected = Bfloat16PromptLM(widened.tensors, model_config_to_json(widened.config)).forward(ids)["hidden"][0]
        assert relative_error(found, expected) < PROMPT_TOLERANCE < relative_error(exact, expected)


def test_few_positions_and_new_tokens_are_computed_as_ever() -> None:
    weights, ids = StoredWeights.of(random_weights()), random_ids(1, FEW_ROWS)
    exact = Session(weights).feed(ids).hidden
    weights.prompt_precision = "bf16"
    np.testing.assert_array_equal(Session(weights).feed(ids).hidden, exact)


def test_threads_change_no_bit() -> None:
    weights, ids = StoredWeights.of(random_weights()), random_ids(1, 30)
    weights.prompt_precision = "bf16"
    alone = Session(weights, threads=1).feed(ids).hidden
    np.testing.assert_array_equal(Session(weights, threads=2).feed(ids).hidden, alone)
