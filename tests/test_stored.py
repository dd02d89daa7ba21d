"""Weights as they are stored: products in every format, decoding from them, and what must not change a result."""

import dataclasses
import pathlib

import numpy as np
import pytest

from looplm.batching import Batch, Request
from looplm.cache import KEY_VALUE_TYPES, KeyValueType
from looplm.checkpoint import save_model
from looplm.conversion import quantize_folder
from looplm.errors import CheckpointError
from looplm.exits import LearnedGate
from looplm.generation import Session, generate
from looplm.kernels import amx
from looplm.kernels.product.stored import FEW_ROWS
from looplm.model import forward
from looplm.model_files import open_model
from looplm.sampling import GREEDY
from looplm.sizes import key_value_bytes
from looplm.stored import FORMATS, Format, StoredMatrix, StoredWeights, convert, read_stored
from looplm.weights import Weights
from random_models import CONFIG, random_ids, random_weights, relative_error
from stored_models import in_format, wrong

# Float formats differ by the order of sums; in the integer ones x is rounded to 16 bits, to a scale per group.
PRODUCT_TOLERANCE: dict[Format, float] = {"float32": 1e-6, "bfloat16": 1e-6, "int8": 1e-4, "int4": 1e-4}
MODEL_TOLERANCE: dict[Format, float] = {"float32": 1e-5, "bfloat16": 1e-5, "int8": 1e-3, "int4": 1e-3}
SHAPES = [(1, 1), (3, 2), (5, 63), (16, 64), (17, 65), (33, 200), (70, 401)]
ALL_LOOPS = LearnedGate(1.0)
every_format = pytest.mark.parametrize("name", FORMATS)


def random_matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.uniform(0.1, 3.0, (shape[0], 1))).astype(np.float32)


# ---- products


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("rows", [1, 2, 3, FEW_ROWS, FEW_ROWS + 1, 90])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_format
def test_products_in_every_format(name: Format, shape: tuple[int, int], rows: int) -> None:
    matrix, x = convert(random_matrix(shape), name), random_matrix((rows, shape[1]), seed=1)
    weight = matrix.rows(np.arange(shape[0])).astype(np.float64)
    assert relative_error(matrix.multiply(x), x @ weight.T) < PRODUCT_TOLERANCE[name]


@every_format
def test_codes_stand_for_what_the_format_says(name: Format) -> None:
    values = random_matrix((5, 130))
    found = convert(values, name).rows(np.arange(5))
    assert relative_error(found, values) < {"float32": 0.0, "bfloat16": 3e-3, "int8": 1e-2, "int4": 0.15}[name] + 1e-12
    if name in ("int8", "int4"):  # the layout once more, number by number
        matrix = convert(values, name)
        row, column = 3, 97
        scale = (
            matrix.scales[0, column // (64 if name == "int8" else 32), row].astype(np.uint32) << np.uint32(16)
        ).view(np.float32)
        if name == "int8":
            code = int(matrix.codes[0, column // 4, 4 * row + column % 4]) - 128
        else:
            both = int(matrix.codes[0, column // 8, 4 * row + column % 4])
            code = (both >> 4 if column % 8 >= 4 else both & 15) - 8
        assert found[row, column] == np.float32(code) * scale


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("int8", "scale of the neighbouring group"),
        ("int8", "unsigned read as signed"),
        ("int4", "scale of the neighbouring group"),
        ("int4", "swapped nibbles"),
        ("int4", "zero point of the other sign"),
    ],
)
def test_wrong_layouts_are_noticed(name: Format, mistake: str) -> None:
    matrix, x = convert(random_matrix((9, 200)), name), random_matrix((1, 200), seed=1)
    expected = x @ matrix.rows(np.arange(9)).astype(np.float64).T
    assert relative_error(wrong(matrix, mistake).multiply(x), expected) > 1e-2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@every_format
def test_what_is_no_number_stays_none(name: Format, bad: float) -> None:
    matrix, x = convert(random_matrix((9, 200)), name), random_matrix((2, 200), seed=1)
    x[1, 70] = bad
    y = matrix.multiply(x)
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


@pytest.mark.kernels
@pytest.mark.parametrize("columns", [12, 64, 200])
@every_format
def test_a_row_does_not_depend_on_other_rows_or_threads(name: Format, columns: int) -> None:
    matrix, x = convert(random_matrix((70, columns)), name), random_matrix((16, columns), seed=1)
    alone = np.concatenate([matrix.multiply(row[None]) for row in x])
    for rows in (2, 3, 4, 5, 6, 7, 8, 13, 16):
        np.testing.assert_array_equal(matrix.multiply(x[:rows], threads=1), alone[:rows])
        np.testing.assert_array_equal(matrix.multiply(x[:rows], threads=3), alone[:rows])
    if name in ("int8", "int4") and amx.NATIVE_BYTES:  # then not even on whether they are few
        np.testing.assert_array_equal(matrix.multiply(np.concatenate([x, x]))[16:], alone)
    many = random_matrix((100, columns), seed=2)
    np.testing.assert_array_equal(matrix.multiply(many, threads=2), matrix.multiply(many))
    np.testing.assert_array_equal(matrix.multiply(many[:50]), matrix.multiply(many)[:50])


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [1, 7, 15, 17, 31, 63])
def test_nothing_is_read_beyond_a_row(name: Format, columns: int) -> None:
    matrix, x = convert(random_matrix((6, columns)), name), random_matrix((FEW_ROWS, columns), seed=1)
    poisoned = (
        np.full((7, columns), np.nan, np.float32) if name == "float32" else np.full((7, columns), 0x7FC0, np.uint16)
    )
    poisoned[:6] = matrix.codes
    beside_poison = dataclasses.replace(matrix, codes=poisoned[:6])
    for rows in (1, FEW_ROWS):
        np.testing.assert_array_equal(beside_poison.multiply(x[:rows]), matrix.multiply(x[:rows]))


# ---- decoding


def decoded(weights: StoredWeights, input_ids: np.ndarray, prefix: int, **settings) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Part of the rows fed, the rest one by one -> hidden: RBSD"""
    session = Session(weights, batch=len(input_ids), capacity=1, **settings)
    states = [session.feed(input_ids[:, :prefix]).hidden] if prefix else []
    for column in np.ascontiguousarray(input_ids[:, prefix:].T):
        session.advance(column, ALL_LOOPS)
        states.append(session.hidden[:, :, None].copy())
    return np.concatenate(states, axis=2)


@pytest.mark.kernels
@every_format
@pytest.mark.parametrize("prefix", [0, 1, 5, 9])
def test_decoding_is_the_forward_pass_with_the_numbers_stored(name: Format, prefix: int) -> None:
    weights, widened = in_format(name)
    ids = random_ids(2, 9)
    assert relative_error(decoded(weights, ids, prefix), forward(widened, ids).hidden) < MODEL_TOLERANCE[name]


@every_format
def test_a_long_prompt_goes_through_wide_products(name: Format) -> None:
    config = dataclasses.replace(CONFIG, max_position_embeddings=400)
    weights, widened = in_format(name, random_weights(config))
    ids = random_ids(1, 300)
    tolerance = 1e-5  # float32's rounding; where registers multiply bytes, x is rounded as it is for a few rows
    if name in ("int8", "int4") and amx.NATIVE_BYTES:
        tolerance = MODEL_TOLERANCE[name]
    assert relative_error(decoded(weights, ids, 300), forward(widened, ids).hidden) < tolerance
    start = np.array([3, 0])
    ids = random_ids(2, 40, seed=3)
    session = Session(weights, batch=2, start=start)
    found, expected = session.feed(ids), forward(widened, ids, start=start)
    assert relative_error(found.hidden[:, 0, 3:], expected.hidden[:, 0, 3:]) < tolerance
    assert relative_error(found.logits(4)[1], expected.logits(4)[1]) < 10 * tolerance


@pytest.mark.kernels
@every_format
def test_threads_and_batch_change_no_bit(name: Format) -> None:
    weights, _ = in_format(name)
    ids = random_ids(3, 7)
    alone = decoded(weights, ids, 0)
    np.testing.assert_array_equal(decoded(weights, ids, 0, threads=2), alone)
    np.testing.assert_array_equal(decoded(weights, ids, 0, threads=3), alone)
    np.testing.assert_array_equal(decoded(weights, ids[1:2], 0, threads=2), alone[:, 1:2])
    np.testing.assert_array_equal(decoded(weights, ids, 4, threads=2), decoded(weights, ids, 4))


def text(weights: StoredWeights | Weights, prompt: np.ndarray, **settings) -> list[int]:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    tokens = generate(weights, prompt, rule=ALL_LOOPS, rng=rng, sampling=GREEDY, max_new_tokens=20, **settings)
    return [token.token_id for token in tokens]


def in_a_batch(weights: StoredWeights, prompts: list[np.ndarray], **settings) -> list[list[int]]:  # type: ignore[no-untyped-def]
    requests = [Request(prompt, np.random.default_rng(0), 20) for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    for number, token in Batch(weights, requests, rule=ALL_LOOPS, sampling=GREEDY, **settings):
        texts[number].append(token.token_id)
    return texts


@pytest.mark.parametrize("kv_dtype", KEY_VALUE_TYPES)
@every_format
def test_greedy_text_does_not_depend_on_how_it_was_made(
    name: Format, kv_dtype: KeyValueType, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, widened = in_format(name, random_weights(dataclasses.replace(CONFIG, max_position_embeddings=100)))
    prompt = random_ids(60, seed=4)
    expected = text(weights, prompt, kv_dtype=kv_dtype)
    assert len(set(expected)) > 3
    for threads in (2, 3):
        assert text(weights, prompt, kv_dtype=kv_dtype, threads=threads) == expected
    others = [random_ids(size, seed=size) for size in (3, 60, 17)]
    for rows in (2, 4):
        together = in_a_batch(weights, [others[0], prompt, *others[1:]], kv_dtype=kv_dtype, rows=rows, threads=2)
        assert together[1] == expected
        assert together[0] != together[2] != together[3]
    for rows in (1, 7, 30):
        monkeypatch.setattr("looplm.generation.PREFILL_ROWS", rows)
        assert text(weights, prompt, kv_dtype=kv_dtype) == expected
    if kv_dtype == "bfloat16":
        return  # what it rounds, recomputing does not
    ids = list(prompt)
    for token in expected:
        assert int(forward(widened, np.array(ids)[None]).logits(4)[0, -1].argmax()) == token
        ids.append(token)


@pytest.mark.parametrize("channels", [6, 40])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_the_cache_may_hold_bfloat16(channels: int, kv_dtype: KeyValueType) -> None:
    weights, widened = in_format("float32", random_weights(dataclasses.replace(CONFIG, head_dim=channels)))
    ids = random_ids(2, 30)
    expected = forward(widened, ids).hidden
    least, most = {"float32": (0.0, 1e-5), "bfloat16": (1e-5, 3e-2)}[kv_dtype]
    for prefix in (0, 26, 30):
        assert least < relative_error(decoded(weights, ids, prefix, kv_dtype=kv_dtype), expected) < most
    session = Session(weights, kv_dtype=kv_dtype)
    positions = session.cache.keys.nbytes + session.cache.values.nbytes
    assert positions == session.cache.capacity * key_value_bytes(weights.config, CONFIG.total_ut_steps, kv_dtype)


# ---- folders


def folder_in(name: Format, folder: pathlib.Path) -> pathlib.Path:
    if name not in ("int8", "int4"):
        save_model(folder, random_weights(), None, None, {}, dtype=name)
        return folder
    save_model(folder / "floats", random_weights(), None, None, {})
    return quantize_folder(open_model(folder / "floats"), folder / name, name)


@pytest.mark.parametrize("kv_dtype", KEY_VALUE_TYPES)
@every_format
def test_weights_are_mapped_and_a_copy_makes_the_same_text(
    name: Format, kv_dtype: KeyValueType, tmp_path: pathlib.Path
) -> None:
    files = open_model(folder_in(name, tmp_path))
    weights = read_stored(files)
    for tensor, matrix in weights.matrices.items():
        file = files.stored_in[tensor]
        there = file.stored(tensor) if matrix.scales is None else file.codes(tensor)
        assert np.shares_memory(matrix.codes, there), tensor
    assert {matrix.format for tensor, matrix in weights.matrices.items() if ".layers." in tensor} == {name}

    def copy(matrix: StoredMatrix) -> StoredMatrix:
        scales = None if matrix.scales is None else matrix.scales.copy()
        return dataclasses.replace(matrix, codes=matrix.codes.copy(), scales=scales)

    copies = {tensor: copy(matrix) for tensor, matrix in weights.matrices.items()}
    copied = StoredWeights(weights.config, copies, {tensor: value.copy() for tensor, value in weights.floats.items()})
    for prompt in (random_ids(6), random_ids(30, seed=1)):
        expected = text(weights, prompt, kv_dtype=kv_dtype)
        assert text(copied, prompt, kv_dtype=kv_dtype) == expected
        if name == "bfloat16":
            assert text(read_stored(files, "float32"), prompt, kv_dtype=kv_dtype) == expected


def test_a_folder_may_be_read_in_another_format(tmp_path: pathlib.Path) -> None:
    weights = random_weights()
    save_model(tmp_path, weights, None, None, {})
    files = open_model(tmp_path)
    for name in FORMATS:
        found = read_stored(files, name)
        formats = {tensor: matrix.format for tensor, matrix in found.matrices.items()}
        head, embedding = formats.pop("lm_head.weight"), formats.pop("model.embed_tokens.weight")
        assert set(formats.values()) == {name}
        assert head == ("int8" if name == "int4" else name)
        assert embedding == ("float32" if name == "float32" else "bfloat16")
        for tensor, matrix in found.matrices.items():
            values = weights.tensors[tensor]
            assert relative_error(matrix.rows(np.arange(len(values))), values) < 0.2


def test_a_quantized_folder_is_mapped_and_stays_what_it_is(tmp_path: pathlib.Path) -> None:
    save_model(tmp_path / "floats", random_weights(), None, None, {})
    quantize_folder(open_model(tmp_path / "floats"), tmp_path / "int4", "int4")
    files = open_model(tmp_path / "int4")
    found, converted = read_stored(files), read_stored(open_model(tmp_path / "floats"), "int4")
    for name, matrix in found.matrices.items():
        assert matrix.codes.base is not None
        np.testing.assert_array_equal(matrix.codes, converted.matrices[name].codes)
    assert text(found, random_ids(6)) == text(converted, random_ids(6))
    with pytest.raises(CheckpointError, match="int4 weights, which cannot become bfloat16"):
        read_stored(files, "bfloat16")
