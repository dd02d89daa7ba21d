"""Matrix products: every path is right, and the one that is used is the one that was measured fastest."""

import json
import pathlib
import types

import numpy as np
import pytest

from looplm.kernels import jit
from looplm.kernels.linear import linear_on
from looplm.kernels.product import select
from looplm.kernels.product.pairs import PackedPairs
from looplm.kernels.product.panels import Packed, PanelProducts
from looplm.kernels.product.select import PATHS, choose
from looplm.kernels.vectors import TILE_COLUMNS, TILE_ROWS, bfloat_bits
from looplm_reference import bfloat16, contract, ops

# Rows and columns that end inside a tile and on its border, sums of every length, one of everything.
SHAPES = [
    {"B": 1, "S": rows, "D": depth, "F": columns}
    for rows, depth, columns in (
        (1, 1, 1),
        (TILE_ROWS, 16, TILE_COLUMNS),
        (TILE_ROWS + 1, 17, TILE_COLUMNS + 1),
        (5, 800, 3),
        (1100, 9, 50),
    )
]


def on(path: str) -> types.SimpleNamespace:
    forward, backward = linear_on(PATHS[path])
    return types.SimpleNamespace(linear_forward=forward, linear_backward=backward)


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("dims", SHAPES, ids=lambda dims: f"{dims['S']}x{dims['D']}x{dims['F']}")
@pytest.mark.parametrize("path", PATHS)
def test_every_path_multiplies(path: str, dims: dict[str, int]) -> None:
    truth = bfloat16.linear if PATHS[path].precision == "bf16" else ops
    assert contract.first_failure(contract.check(on(path), "linear", dims, truth=truth)) is None


def test_a_bfloat16_path_is_told_from_a_float32_one() -> None:
    assert contract.first_failure(contract.check(on("panels"), "linear", SHAPES[2], truth=bfloat16.linear)) is not None
    assert contract.first_failure(contract.check(on("pairs"), "linear", SHAPES[2])) is not None


@pytest.mark.parametrize("name", bfloat16.MUTANTS)
def test_wrong_rounding_is_caught(name: str) -> None:
    products, in_model = bfloat16.MUTANTS[name]
    found = bfloat16.first_failures(products, in_model)
    assert len(found) == 1 + in_model
    assert None not in found


def test_weight_gradients_add_to_what_is_there() -> None:
    rng = np.random.default_rng(0)
    dy, x = rng.standard_normal((300, 21), np.float32), rng.standard_normal((300, 18), np.float32)
    for path in PATHS.values():
        total = np.full((21, 18), 7.0, np.float32)
        path.products([(21, 18)]).accumulate_dweight(total, dy, x)
        assert contract.relative_error(7.0 + dy.T.astype(np.float64) @ x, total) < 5e-3


def test_rounding_keeps_what_is_no_number() -> None:
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38, 1e-40], np.float32)
    bits = (bfloat_bits(special) << np.uint32(16)).view(np.float32)
    assert np.isnan(bits[:2]).all()
    np.testing.assert_array_equal(bits[2:6], special[2:6])
    assert np.isinf(bits[6])  # rounds beyond the largest
    packed = PackedPairs.empty((1, 8))
    packed.fill(special[None])
    words = packed.transposed.reshape(-1, TILE_COLUMNS)[:, 0]
    np.testing.assert_array_equal(words, bfloat_bits(special)[::2] | (bfloat_bits(special)[1::2] << np.uint32(16)))


def test_a_packed_weight_may_be_filled_again() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((4, 30), np.float32), np.empty((4, 33), np.float32)
    packed, products = Packed.empty((33, 30)), PanelProducts([(33, 30)])
    for _ in range(2):
        weight = rng.standard_normal((33, 30), np.float32)
        packed.fill(weight)
        products.forward_into(y, x, packed)
        assert contract.relative_error(x.astype(np.float64) @ weight.T, y) < 1e-6


@pytest.fixture
def rates(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Rates as if they had been measured; the file they are kept in is an empty folder's."""
    found = {"blas": 80.0, "panels": 90.0, "pairs": 0.0}
    monkeypatch.setattr(select, "_measure", lambda paths: dict(found))
    monkeypatch.setattr(select, "cache_folder", lambda: str(tmp_path))
    return found


def test_the_fastest_path_is_used(rates: dict[str, float]) -> None:
    assert choose().name == "panels"
    assert choose("bf16").name == "pairs"


@pytest.mark.parametrize(("blas", "chosen"), [(95.0, "panels"), (110.0, "blas")])
def test_another_machine_chooses_otherwise_if_it_is_no_tie(rates: dict[str, float], blas: float, chosen: str) -> None:
    rates.update(blas=blas)
    assert choose("fp32").name == chosen


@pytest.mark.parametrize(("pairs", "chosen"), [(100.0, "panels"), (180.0, "pairs")])
def test_bfloat16_is_chosen_by_itself_only_where_it_pays(rates: dict[str, float], pairs: float, chosen: str) -> None:
    rates.update(pairs=pairs)
    assert choose().name == chosen
    assert choose("fp32").name == "panels"


def test_a_path_may_be_named(rates: dict[str, float]) -> None:
    assert choose("auto", "blas").name == "blas"
    with pytest.raises(LookupError, match="no kernel path 'amd', only panels, blas, pairs"):
        choose("auto", "amd")
    with pytest.raises(LookupError, match="panels is fp32, not bf16"):
        choose("bf16", "panels")


def test_rates_are_measured_once(rates: dict[str, float], tmp_path: pathlib.Path) -> None:
    first = select.measured_rates()
    rates.update(panels=1.0)
    assert select.measured_rates() == first
    (stored,) = json.loads((tmp_path / "rates.json").read_text()).values()
    assert stored == first
    (tmp_path / "rates.json").write_text("{damaged")
    assert select.measured_rates()["panels"] == 1.0


def test_measured_rates_are_rates() -> None:
    found = select._measure([PATHS["blas"], PATHS["panels"]])
    assert set(found) == {"blas", "panels"}
    assert min(found.values()) > 0.0


def test_features_may_be_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    jit.features.cache_clear()
    monkeypatch.setattr(jit._CONFIG, "CPU_NAME", "generic")
    monkeypatch.setattr(jit._CONFIG, "CPU_FEATURES", "+sse2,-avx,+sse3")
    try:
        assert jit.features() == {"sse2", "sse3"}
    finally:
        jit.features.cache_clear()
