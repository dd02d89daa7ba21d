"""`looplm sweep`: what it reports, prints, draws and refuses; the model it measures stays as it is."""

import json
import pathlib
import shutil
from typing import Any

import pytest

import tiny_models
from in_process import looplm, report_of
from looplm_cli import page as pages

QUICK = ("--turns", 2, "--decode-tokens", 3, "--steps", 3, "--points", 3, "--chunks", 3)
ENTRIES = ["fixed", "change", "kl", "top", "margin", "stable"]
GATES = ["gate, Stage I", "gate, paper", "gate, look-ahead", "gate, best-later"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.text_run(tmp_path_factory.mktemp("sweep") / "run")


@pytest.fixture(scope="module")
def report(model: pathlib.Path) -> dict[str, Any]:
    return report_of("sweep", "-m", model, *QUICK, "--quiet")


def test_every_rule_and_every_gate_competes(report: dict[str, Any]) -> None:
    assert [entry["entry"] for entry in report["entries"]] == [*ENTRIES, *GATES]
    for entry in report["entries"]:
        loops = [p["mean_loops"] for p in entry["points"]]
        assert max(loops) == 4.0
        assert min(loops) == (2.0 if entry["entry"] in ("change", "kl") else 1.0)
        for p in entry["points"]:
            assert sum(p["exits"]) == pytest.approx(1.0, abs=1e-4)
            assert p["loops_quantiles"] == sorted(p["loops_quantiles"])
            assert p["ms_range"][0] <= p["ms_per_token"] <= p["ms_range"][1]
            assert 1.0 <= p["decode_loops"] <= 4.0
            assert p["intervals"].keys() == {"mean_loops", "loss", "accuracy", "agreement"}


def test_all_loops_are_the_same_whoever_asks_for_them(report: dict[str, Any]) -> None:
    deepest = [max(entry["points"], key=lambda p: p["mean_loops"]) for entry in report["entries"]]
    assert {p["loss"] for p in deepest} == {report["full"]["loss"]}
    assert {p["agreement"] for p in deepest} == {1.0}


def test_the_front_and_the_winners_follow_from_the_points(report: dict[str, Any]) -> None:
    points = [p for entry in report["entries"] for p in entry["points"]]
    for p in points:
        beaten = any(
            o["mean_loops"] <= p["mean_loops"]
            and o["loss"] <= p["loss"]
            and (o["mean_loops"] < p["mean_loops"] or o["loss"] < p["loss"])
            for o in points
        )
        assert p["best_by_loops"] == (not beaten)
    assert [(b["cost"], b["amount"]) for b in report["budgets"][:3]] == [
        ("loops", 1.75),
        ("loops", 2.5),
        ("loops", 3.25),
    ]
    for budget in report["budgets"]:
        losses = [s["loss"] for s in budget["ranking"]]
        assert losses == sorted(losses)
        assert budget["winner"] == budget["ranking"][0]["entry"]
    assert report["figure5"]["mean_loops"] == 2.5
    assert len(report["figure5"]["claims"]) == 4


def test_the_model_folder_is_not_touched(model: pathlib.Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    looplm("sweep", "-m", model, *QUICK)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_gets_tables_a_plot_and_verdicts(model: pathlib.Path, width: int) -> None:
    out, err = looplm("sweep", "-m", model, *QUICK, width=width)
    tables = out.split("the paper's Figure 5")[0]
    assert max(map(len, tables.splitlines()[1:])) <= width
    for text in ("rule", "ms", "mean loops", "g gate, Stage I", "winner", "ahead by", "the paper's Figure 5 here"):
        assert text in out
    assert out.count("holds:") + out.count("does not hold:") == 4
    assert "±" in out
    assert "part 5/5" in err
    assert looplm("sweep", "-m", model, *QUICK, "--quiet")[1] == ""


def test_after_a_calibration_the_first_gate_still_competes(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(model.parent, folder)
    note = json.loads((folder / "model" / "looplm.json").read_text())
    (folder / "model" / "looplm.json").write_text(json.dumps(note | {"stage": 1}))
    looplm("calibrate", "-m", folder, "--steps", 5, "--accept", "always")
    found = report_of("sweep", "-m", folder, *QUICK)
    names = [entry["entry"] for entry in found["entries"]]
    assert names == [*ENTRIES, "gate, Stage I", "gate, stored", *GATES[1:]]
    (folder / "model" / "previous_gate.safetensors").unlink()
    _, err = looplm("sweep", "-m", folder, *QUICK)
    assert "no longer has the gate of Stage I" in err


def test_a_task_is_also_told_by_hops(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm.tasks import hops

    monkeypatch.setattr(hops, "VALIDATION_BATCHES", 4)
    folder = tiny_models.hops_model(tmp_path / "model")
    out, _ = looplm("sweep", "-m", folder, *QUICK, "--json")
    found = json.loads(out.splitlines()[-1])
    for entry in found["entries"]:
        for p in entry["points"]:
            assert [hop["hops"] for hop in p["hops"]] == [1, 2]
            assert p["decode_loss"] is None
            assert all(1.0 <= hop["mean_loops"] <= 3.0 for hop in p["hops"])
    shown, _ = looplm("sweep", "-m", folder, *QUICK)
    assert "near 2 loops" in shown
    assert "2 hops" in shown


def test_what_cannot_be_compared_is_refused(tmp_path: pathlib.Path) -> None:
    one = tiny_models.text_run(tmp_path / "one", loops=1)
    _, err = looplm("sweep", "-m", one, code=2, width=300)
    assert "has one loop: there is no exit to compare" in err
    short = tmp_path / "short.txt"
    short.write_text("ab")
    two = tiny_models.text_run(tmp_path / "two")
    _, err = looplm("sweep", short, "-m", two, code=1, width=300)
    assert "too short" in err


# ---- the page


def test_the_page_holds_the_report_and_cannot_be_broken_by_it(report: dict[str, Any]) -> None:
    marked = report | {"data": "</script><!--", "model": "</title>{{script}}"}
    built = pages.build_sweep(marked)
    assert built.count("</script>") == 2
    assert "<!--" not in built
    assert json.loads(built.split('id="report">')[1].split("</script>")[0]) == marked
    assert "http" not in built.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
