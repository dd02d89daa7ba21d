"""Matrix products: every path is right, and the one that is used is the one that was measured fastest."""

import json
import pathlib
import sys
import types
from typing import Any

import numpy as np
import pytest

from in_process import looplm, report_of
from looplm.kernels import jit
from looplm.kernels.linear import linear_on
from looplm.kernels.product import proof, select, tiles
from looplm.kernels.product.pairs import packed_pairs
from looplm.kernels.product.panels import Packed, PanelProducts
from looplm.kernels.product.select import PATHS, choose
from looplm.kernels.vectors import TILE_COLUMNS, TILE_ROWS, bfloat_bits
from looplm.memory import nbytes
from looplm_cli import verification
from looplm_reference import bfloat16, contract, ops


def dims_of(*shapes: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"B": 1, "S": rows, "D": depth, "F": columns} for rows, depth, columns in shapes]


# Rows and columns that end inside a tile and on its border, sums of every length, one of everything.
SHAPES = dims_of(
    (1, 1, 1),
    (TILE_ROWS, 16, TILE_COLUMNS),
    (TILE_ROWS + 1, 17, TILE_COLUMNS + 1),
    (tiles.BLOCK, 2 * tiles.SIDE, tiles.BLOCK),
    (tiles.BLOCK + 1, 2 * tiles.SIDE + 1, tiles.BLOCK + 1),
    (5, 800, 3),
    (1100, 9, 50),
)
# Sums longer than what is multiplied at once, on several tiles and inside one; more of everything than a block has.
LARGE = dims_of((70, 1100, 67), (1030, 67, 300))


def on(path: str) -> types.SimpleNamespace:
    forward, backward = linear_on(PATHS[path])
    return types.SimpleNamespace(linear_forward=forward, linear_backward=backward)


def first_failure(path: str, dims: dict[str, int]) -> contract.Row | None:
    truth = bfloat16.products if PATHS[path].precision == "bf16" else ops
    return contract.first_failure(contract.check(on(path), "linear", dims, truth=truth))


def name_of(dims: dict[str, int]) -> str:
    return f"{dims['S']}x{dims['D']}x{dims['F']}"


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("dims", SHAPES, ids=name_of)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_multiplies(path: str, dims: dict[str, int]) -> None:
    assert first_failure(path, dims) is None


@pytest.mark.kernels
@pytest.mark.parametrize("dims", LARGE, ids=name_of)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_multiplies_in_blocks(path: str, dims: dict[str, int]) -> None:
    assert first_failure(path, dims) is None


def test_a_bfloat16_path_is_told_from_a_float32_one() -> None:
    assert (
        contract.first_failure(contract.check(on("panels"), "linear", SHAPES[2], truth=bfloat16.products)) is not None
    )
    assert contract.first_failure(contract.check(on("pairs"), "linear", SHAPES[2])) is not None
    assert contract.first_failure(contract.check(on("tiles"), "linear", SHAPES[2])) is not None


@pytest.mark.parametrize("name", bfloat16.MUTANTS)
def test_wrong_rounding_is_caught(name: str) -> None:
    mutant = bfloat16.MUTANTS[name]
    found = bfloat16.first_failures(mutant)
    assert len(found) == len(mutant.shown_by) + mutant.in_model > 0
    assert None not in found


def test_weight_gradients_replace_what_is_there_or_add_to_it() -> None:
    rng = np.random.default_rng(0)
    dy, x = rng.standard_normal((300, 21), np.float32), rng.standard_normal((300, 18), np.float32)
    for path in PATHS.values():
        products, total = path.products([(21, 18)]), np.full((21, 18), np.nan, np.float32)
        for times, add in ((1, False), (2, True), (1, False)):
            products.dweight_into(total, dy, x, add)
            assert contract.relative_error(times * dy.T.astype(np.float64) @ x, total) < 5e-3


@pytest.mark.kernels
@pytest.mark.plain_python
@pytest.mark.parametrize("dims", SHAPES, ids=name_of)
@pytest.mark.parametrize("name", ["pairs", "tiles"])
def test_operands_may_be_rounded_already(name: str, dims: dict[str, int]) -> None:
    path, rng, (m, n, k) = PATHS[name], np.random.default_rng(0), (dims["S"], dims["F"], dims["D"])
    x, dy, weight = (rng.standard_normal(shape, np.float32) for shape in ((m, k), (m, n), (n, k)))
    products, packed = path.products([weight.shape]), path.pack(weight, path.room(weight.shape))
    assert products.operand == np.uint16
    found = []
    for left, right in ((dy, x), tuple(bfloat_bits(array).astype(np.uint16) for array in (dy, x))):
        y, dx, dweight = np.empty_like(dy), np.empty_like(x), np.empty_like(weight)
        products.forward_into(y, right, packed)
        products.dx_into(dx, left, packed)
        products.dweight_into(dweight, left, right, False)
        found.append((y, dx, dweight))
    for from_floats, from_bits in zip(*found, strict=True):
        np.testing.assert_array_equal(from_floats, from_bits)


def test_rounding_keeps_what_is_no_number() -> None:
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38, 1e-40], np.float32)
    bits = (bfloat_bits(special) << np.uint32(16)).view(np.float32)
    assert np.isnan(bits[:2]).all()
    np.testing.assert_array_equal(bits[2:6], special[2:6])
    assert np.isinf(bits[6])  # rounds beyond the largest
    packed = packed_pairs((1, 8))
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


@pytest.mark.parametrize("path", [PATHS[name] for name in ("panels", "pairs", "tiles")], ids=lambda path: path.name)
def test_both_arrangements_of_a_weight_may_take_turns_in_one_room(path: select.Path) -> None:
    """Half the memory; each is what it is in a room of its own, and what is overwritten can no longer be read."""
    shape = (48, 35)
    weight = np.random.default_rng(2).standard_normal(shape, np.float32)
    together, apart = path.pack(weight, path.room(shape)), path.room(shape, False)
    room = max(together.plain.nbytes, together.transposed.nbytes)
    assert nbytes([apart.plain, apart.transposed]) == room < nbytes([together.plain, together.transposed])
    for use, there, missing in (("forward", "transposed", "plain"), ("backward", "plain", "transposed")) * 2:
        packed, expected = path.pack(weight, apart, use), getattr(together, there)
        np.testing.assert_array_equal(getattr(packed, there)[: expected.size], expected)
        assert getattr(packed, missing) is None
    with pytest.raises(AssertionError, match="one arrangement would overwrite the other"):
        path.pack(weight, apart)


@pytest.fixture
def rates(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Rates as if they had been measured; the file they are kept in is an empty folder's."""
    found = {"blas": 80.0, "panels": 90.0, "pairs": 0.0, "tiles": 0.0}
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
    with pytest.raises(LookupError, match="no kernel path 'amd', only panels, blas, pairs, tiles"):
        choose("auto", "amd")
    with pytest.raises(LookupError, match="panels is fp32, not bf16"):
        choose("bf16", "panels")


def test_rates_are_measured_once(rates: dict[str, float], tmp_path: pathlib.Path) -> None:
    first = select.measured().rates
    rates.update(panels=1.0)
    assert select.measured().rates == first
    (stored,) = json.loads((tmp_path / "rates.json").read_text()).values()
    assert stored == {"rates": first, "faults": {}}
    (tmp_path / "rates.json").write_text("{damaged")
    assert select.measured().rates["panels"] == 1.0
    (key,) = json.loads((tmp_path / "rates.json").read_text())
    (tmp_path / "rates.json").write_text(json.dumps({key: {"panels": 2.0}}))
    assert select.measured().rates["panels"] == 1.0


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


# ---- what is wrong is not chosen


class CarelessProducts(PanelProducts):
    """Leaves a result's last row to chance."""

    def dx_into(self, dx: Any, dy: Any, weight: Any) -> None:
        super().dx_into(dx[:-1], dy[:-1], weight)


class UnroundedProducts(PanelProducts):
    """Right in float32, which is wrong where bfloat16 is promised."""


@pytest.fixture
def wrong(rates: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Paths that would be fastest, were they not wrong; what is said of them."""
    paths = (
        select.Path("careless", "fp32", "for tests", Packed.empty, CarelessProducts),
        select.Path("unrounded", "bf16", "for tests", Packed.empty, UnroundedProducts),
    )
    monkeypatch.setattr(select, "PATHS", PATHS | {path.name: path for path in paths})
    rates.update(careless=900.0, unrounded=900.0)
    monkeypatch.setattr(select, "_measure", lambda among: {path.name: rates[path.name] for path in among})
    return {"careless": "dx_into is off by nan, 1e-05 allowed", "unrounded": "forward_into is off by 0.00"}


def test_a_path_that_multiplies_wrong_is_not_chosen(wrong: dict[str, str]) -> None:
    assert [choose(precision).name for precision in ("auto", "fp32", "bf16")] == ["panels", "panels", "pairs"]
    assert "careless" not in select.measured().rates
    for name, said in wrong.items():
        assert select.measured().faults[name].startswith(said)
        with pytest.raises(LookupError, match=f"kernel path {name} is not right on this machine: {said[:20]}"):
            choose("auto", name)


def test_where_every_path_is_wrong_none_is_chosen(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "PATHS", {name: select.PATHS[name] for name in ("panels", "unrounded")})
    assert choose().name == "panels"
    with pytest.raises(LookupError, match=r"no bf16 kernel path is right on this machine: .*unrounded.*forward_into"):
        choose("bf16")


def test_what_is_wrong_is_said(wrong: dict[str, str]) -> None:
    out, _ = looplm("info", "--machine", width=200)
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "careless" in lines["careless"]
    assert f"wrong on this machine and never used: {wrong['careless']}" in lines["careless"]
    assert "used for --precision" in lines["panels"]
    paths = {path["name"]: path for path in report_of("info", "--machine")["paths"]}
    assert paths["careless"]["fault"] == wrong["careless"]
    assert paths["panels"]["fault"] is None
    if PATHS["tiles"].missing():
        assert f"tile registers (AMX), bf16: not available: {PATHS['tiles'].obstacle()}" in lines["tiles"]
        assert paths["tiles"]["obstacle"] == PATHS["tiles"].obstacle()


def test_verify_does_not_run_what_is_wrong_but_fails(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "PATHS", {"careless": select.PATHS["careless"]})
    (check,) = verification._products()
    assert (check.ok, check.worst.error, check.worst.note) == (False, np.inf, wrong["careless"])
    assert list(verification._training(1)) == []


@pytest.mark.parametrize("path", PATHS)
def test_every_path_proves_itself(path: str) -> None:
    assert proof.fault(PATHS[path]) == ""


def test_a_path_of_special_instructions_is_tried_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []
    monkeypatch.setattr(proof, "outcome", lambda command: tried.append(command) or "it ended")
    assert proof.fault_here(PATHS["tiles"]) == "it ended"
    assert tried[0][-1] == "tiles"
    assert proof.fault_here(PATHS["panels"]) == ""
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "a trial of it was ended by SIGILL"),
        ("import os; os.abort()", "a trial of it was ended by SIGABRT"),
        ("import time; time.sleep(60)", "a trial of it came to no end"),
        ("import no_such_module", "a trial of it failed with exit code 1"),
        ("import looplm.kernels.jit", ""),
        ("raise SystemExit(10)", ""),
    ],
)
def test_a_trial_that_ends_badly_says_how(source: str, said: str) -> None:
    found = proof.outcome([sys.executable, "-c", source], seconds=2.0 if "sleep" in source else 60.0)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_the_trial_is_the_proof() -> None:
    command = [sys.executable, "-c", proof.TRIAL, "blas"]
    assert proof.outcome(command) == ""
    assert proof.outcome([*command[:-1], "no such path"]) == "a trial of it failed with exit code 1"
