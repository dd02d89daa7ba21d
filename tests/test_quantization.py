"""Int8 and int4 weights: rounded as defined, laid out as documented, and every misreading caught."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from looplm.analysis import evaluate
from looplm.comparison import compare
from looplm.data import Batch
from looplm.errors import CheckpointError
from looplm.model import forward
from looplm.quantization import FORMATS, Quantized, pack, quantize_matrix, unpack
from looplm.safetensors_file import widen_bfloat16
from looplm_cli.quantized_engine import CANDIDATES, engine_rounding
from looplm_reference import quantize as reference
from looplm_reference import quantized_judge as judge
from looplm_reference.quantize import Stored
from random_models import random_ids, random_weights, relative_error

BOTH = pytest.mark.parametrize("fmt", FORMATS)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- against the reference


@pytest.mark.kernels
@BOTH
def test_codes_and_scales_are_those_of_the_definition_to_the_bit(fmt: str) -> None:
    rows = list(judge.compare_rounding(engine_rounding, fmt))
    assert len(rows) == 2 * len(judge.matrices())
    assert [row for row in rows if not row.ok] == []


@pytest.mark.plain_python
@BOTH
def test_a_small_matrix_is_rounded_as_defined(fmt: str) -> None:
    weight = normal(2, 70)
    expected, found = reference.quantize(weight, fmt), engine_rounding(weight, fmt)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
@BOTH
def test_products_and_a_whole_model_stay_within_the_bound(fmt: str, candidate: judge.Candidate) -> None:
    rows = list(judge.compare(candidate, fmt))
    assert [row for row in rows if not row.ok] == []
    # who widens the weights has only float32's rounding; decoding rounds the other operand to 16 bits
    assert max(row.error for row in rows) < (3e-4 if candidate.name == "decoded as they are stored" else 1e-5)


def test_the_reference_agrees_with_itself_exactly() -> None:
    assert max(row.error for fmt in FORMATS for row in judge.compare(judge.ReadingCandidate(), fmt)) == 0.0


@pytest.mark.parametrize("mutant", judge.MUTANTS, ids=lambda mutant: f"{mutant.format}: {mutant.name}")
def test_every_misreading_is_caught_by_products_and_by_a_model(mutant: reference.ReadingMutant) -> None:
    product, model = judge.first_failures(mutant)
    assert product.name.startswith(f"{mutant.format}: ")
    assert "batch of 1" in product.name
    assert model.name == f"{mutant.format}: model.loop1.hidden"


def unrounded_scale(weight: np.ndarray, fmt: str) -> Stored:
    """Codes of the exact scale, which is not the one that is stored."""
    right = reference.quantize(weight, fmt)
    layout = reference.FORMATS[fmt]
    exact = right.scales * 1.002
    by_row = exact.swapaxes(1, 2).reshape(-1, exact.shape[1])
    padded = np.zeros((len(by_row), by_row.shape[1] * layout.group))
    padded[: len(weight), : weight.shape[1]] = weight
    codes = reference.integers(padded.reshape(*by_row.shape, layout.group), by_row, layout).reshape(padded.shape)
    return dataclasses.replace(right, codes=reference.pack(codes, fmt))


def largest_alone(weight: np.ndarray, fmt: str) -> Stored:
    """The largest weight decides the scale, instead of the error."""
    alone = dataclasses.replace(reference.FORMATS[fmt], divisors=(float(reference.FORMATS[fmt].high) - 0.5,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reference.FORMATS, fmt, alone)
        return reference.quantize(weight, fmt)


@pytest.mark.parametrize("wrong", [unrounded_scale, largest_alone], ids=lambda function: function.__name__)
@BOTH
def test_wrong_rounding_is_caught(fmt: str, wrong: Callable[[np.ndarray, str], Stored]) -> None:
    assert not all(row.ok for row in judge.compare_rounding(wrong, fmt))


# ---- the layout, by hand


@BOTH
def test_sixteen_rows_lie_side_by_side(fmt: str) -> None:
    layout = FORMATS[fmt]
    codes = np.random.default_rng(0).integers(layout.low, layout.high, (21, 256), np.int8, endpoint=True)
    packed = pack(codes, layout)
    assert packed.shape == (2, 64 if fmt == "int8" else 32, 64)
    for row in range(21):
        place = 4 * (row % 16) + np.arange(256) % 4
        if fmt == "int8":
            found = packed[row // 16, np.arange(256) // 4, place].astype(int) - 128
        else:
            both = packed[row // 16, np.arange(256) // 8, place].astype(int)
            found = np.where(np.arange(256) % 8 < 4, both & 15, both >> 4) - 8
        np.testing.assert_array_equal(found, codes[row])
    unpacked = unpack(packed, layout)
    np.testing.assert_array_equal(unpacked[:21], codes)
    assert (unpacked[21:] == 0).all()


def test_sizes_and_padding_are_as_documented() -> None:
    eight, four = (quantize_matrix(normal(5, 70), fmt) for fmt in FORMATS)
    assert (eight.codes.shape, eight.scales.shape) == ((1, 32, 64), (1, 2, 16))
    assert (four.codes.shape, four.scales.shape) == ((1, 12, 64), (1, 3, 16))
    assert eight.codes.dtype == four.codes.dtype == np.uint8
    assert eight.scales.dtype == four.scales.dtype == np.uint16
    for made in (eight, four):
        whole = unpack(made.codes, made.layout)
        assert (whole[:, 70:] == 0).all()
        assert (whole[5:] == 0).all()
        assert (made.scales[:, :, 5:] == 0).all()
    assert eight.nbytes == 32 * 64 + 2 * 2 * 16


def test_int8_is_off_by_half_a_step_at_most_and_zeros_stay_zeros() -> None:
    weight = normal(6, 192)
    weight[2, 64:128] = 0.0
    made = quantize_matrix(weight, "int8")
    step = np.repeat(widen_bfloat16(made.scales[0]).T[:6], 64, axis=1)
    assert (np.abs(made.dequantize() - weight) <= 0.5001 * step + 1e-3 * np.abs(weight)).all()
    assert made.scales[0, 1, 2] == 0
    assert (made.dequantize()[2, 64:128] == 0.0).all()


def test_int4_scales_lose_less_than_those_of_the_largest_weight() -> None:
    weight = normal(64, 1024)
    plain = reference.dequantize(largest_alone(weight, "int4"))
    assert relative_error(quantize_matrix(weight, "int4").dequantize(), weight) < 0.93 * relative_error(plain, weight)


@BOTH
def test_some_rows_are_dequantized_alone_and_in_place(fmt: str) -> None:
    made = quantize_matrix(normal(39, 100), fmt)
    whole = made.dequantize()
    for rows in (slice(3, 7), slice(13, 20), slice(16, 32), slice(30, 39)):
        np.testing.assert_array_equal(made.dequantize(rows), whole[rows])
    out = np.full((4, 100), np.nan, np.float32)
    assert made.dequantize(slice(3, 7), out) is out
    np.testing.assert_array_equal(out, whole[3:7])


@BOTH
def test_rounding_what_is_rounded_changes_nothing(fmt: str) -> None:
    """Int8 finds its own scale again; int4 cannot do worse than the scale that gives no error at all."""
    once = quantize_matrix(normal(8, 128), fmt)
    again = quantize_matrix(once.dequantize(), fmt)
    assert relative_error(again.dequantize(), once.dequantize()) < (3e-3 if fmt == "int8" else 5e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@BOTH
def test_weights_that_are_no_numbers_are_refused_by_name(fmt: str, bad: float) -> None:
    weight = normal(3, 40)
    weight[1, 7] = bad
    with pytest.raises(CheckpointError, match="down_proj has 1 weights that are not finite") as refused:
        quantize_matrix(weight, fmt, "down_proj")
    assert refused.value.hint


# ---- two models side by side


def test_a_comparison_is_what_it_says() -> None:
    before, after = random_weights(), random_weights()
    quantized: list[Quantized] = []
    for name, tensor in after.tensors.items():
        if name.endswith("_proj.weight"):
            quantized.append(quantize_matrix(tensor, "int4"))
            tensor[...] = quantized[-1].dequantize()
    assert len(quantized) == 7 * before.config.num_hidden_layers
    ids = random_ids(3, 9)
    target = np.roll(ids, -1, axis=1)
    target[:, -1] = -1
    target[0, 2] = -1
    batches = [Batch(ids[:2], target[:2]), Batch(ids[2:], target[2:])]
    found = compare(before, after, batches, threads=2)
    counted = target >= 0
    assert found.tokens == counted.sum() == 23
    old, new = (forward(weights, ids) for weights in (before, after))
    for r in range(before.config.total_ut_steps):
        hidden = relative_error(new.hidden[r][counted], old.hidden[r][counted])
        logits = relative_error(new.logits(r)[counted], old.logits(r)[counted])
        same = (new.logits(r).argmax(-1) == old.logits(r).argmax(-1))[counted].mean()
        assert found.hidden_error[r] == pytest.approx(hidden, rel=1e-4)
        assert found.logits_error[r] == pytest.approx(logits, rel=1e-4)
        assert found.same_best[r] == pytest.approx(same)
    for weights, loss in ((before, found.loss_before), (after, found.loss_after)):
        np.testing.assert_allclose(loss, evaluate(weights, batches).loss, rtol=1e-6)
    np.testing.assert_allclose(found.loss_change, found.loss_after / found.loss_before - 1.0)
    itself = compare(before, before, batches)
    assert not itself.hidden_error.any()
    assert (itself.same_best == 1.0).all()
