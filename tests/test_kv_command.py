"""`looplm kv`: what it reports and prints of every cache policy, and what it refuses."""

import pathlib
from typing import Any

import numpy as np
import pytest

import tiny_models
from in_process import looplm, report_of
from looplm.cache import POLICIES, SHARED
from looplm.checkpoint import load_model
from looplm.data import windows
from looplm.model import forward
from looplm.tasks.hops import HopsSource
from looplm_cli.held_out import pieces

QUICK = ("--windows", 4, "--seq-len", 24, "--q", 0.4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_models.text_run(tmp_path_factory.mktemp("kv") / "run")


@pytest.fixture(scope="module")
def report(model: pathlib.Path) -> dict[str, Any]:
    return report_of("kv", "-m", model, *QUICK, "--quiet")


def test_every_policy_is_held_against_full(report: dict[str, Any]) -> None:
    assert (report["windows"], report["prompt_tokens"], report["tokens"]) == (4, 6, 4 * 18)
    assert (report["exit"], report["loops"], report["max_deferred"], report["kv_dtype"]) == (
        "gate:0.4",
        4,
        16,
        "float32",
    )
    found = {each["policy"]: each for each in report["policies"]}
    assert list(found) == list(POLICIES)
    assert (found["full"]["loss_change"], found["full"]["agreement"], found["full"]["mean_loops"]) == (0.0, 1.0, 4.0)
    assert (found["exact"]["loss"], found["exact"]["agreement"]) == (found["full"]["loss"], 1.0)
    assert 1.0 < found["exact"]["mean_loops"] <= found["exact"]["passes"] < 4.0
    for each in found.values():
        assert each["memory_reduction"] == (4.0 if each["policy"] in SHARED else 1.0)
        assert each["bytes_per_token"] * each["memory_reduction"] == found["full"]["bytes_per_token"]
        assert each["tokens_per_s"] > 0
        assert each["speed"] > 0
        assert each["loss_change"] == pytest.approx(each["loss"] - found["full"]["loss"], abs=1e-9)
    for name in ("last-exited", *SHARED):
        assert found[name]["loss_change"] != 0.0
        assert found[name]["loss_interval"] > 0.0


def test_options_reach_the_decoding(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_models.HELD_OUT, encoding="utf-8")
    more = (
        "--windows",
        1,
        "--prompt-tokens",
        20,
        "--max-deferred",
        1,
        "--kv-dtype",
        "bfloat16",
        "--weights",
        "bfloat16",
    )
    found = report_of("kv", text, "-m", model, "--seq-len", 24, "--exit", "fixed:1", "--min-loops", 1, *more)
    assert found["data"] == str(text)
    assert (found["tokens"], found["exit"], found["loops"]) == (4, "fixed:1", 1)
    assert {each["agreement"] for each in found["policies"]} == {1.0}  # one loop: nothing to share, nothing to defer
    assert {each["loss_interval"] for each in found["policies"]} == {None}
    whole = report_of("kv", text, "-m", model, *QUICK)["policies"][0]["bytes_per_token"]
    assert {each["bytes_per_token"] for each in found["policies"]} == {whole // 8}
    waits = report_of("kv", text, "-m", model, *QUICK, "--max-deferred", 1)["policies"]
    exact = next(each for each in waits if each["policy"] == "exact")
    assert exact["passes"] == 4.0
    assert exact["mean_loops"] < 4.0


@pytest.mark.parametrize("size", [1, 2, 9, 17, 40, 65])
def test_pieces_are_whole_windows_without_padding(size: int) -> None:
    ids = np.arange(1, size + 2)
    batches = list(windows(ids, 2, 16))
    found = pieces(batches, 3)
    assert {piece.input_ids.shape for piece in found} == {(1, min(16, size))}
    for piece in found:
        (row,), (target,) = piece.input_ids, piece.target
        np.testing.assert_array_equal(row, ids[row[0] - 1 :][: len(row)])
        np.testing.assert_array_equal(target, row + 1)
    assert len(found) == max(1, min(3, size // 16))


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_gets_a_table(model: pathlib.Path, report: dict[str, Any], width: int) -> None:
    out, err = looplm("kv", "-m", model, *QUICK, width=width)
    assert f"{report['tokens']} tokens decoded in 4 windows after 6 of prompt, gate:0.4" in out
    assert max(map(len, out.splitlines()[1:])) <= width
    for policy in (*POLICIES, f"{report['policies'][0]['loss']:.4f}"):
        assert policy in out
    assert ("±" in out) == (width >= 100)
    assert "window 4/4" in err


def test_of_a_task_answers_count(tmp_path: pathlib.Path) -> None:
    folder = tiny_models.hops_model(tmp_path / "hops")
    found = report_of("kv", "-m", folder, "--windows", 3)
    assert found["data"] == "builtin:hops, new sequences"
    batches = list(HopsSource(16, 20, seed=0, alphabet=5, max_hops=2).validation())
    ids, target = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("input_ids", "target"))
    whole = np.flatnonzero(target[:, -1] >= 0)
    chosen = whole[np.unique(np.linspace(0, len(whole) - 1, 3).astype(int))]
    logits = forward(load_model(folder).weights, ids[chosen]).logits(-1)[:, 5:]
    answers = zip(logits.argmax(-1), target[chosen, 5:], strict=True)
    right = np.mean([(best == wanted)[wanted >= 0].mean() for best, wanted in answers])
    full = next(each for each in found["policies"] if each["policy"] == "full")
    assert full["accuracy"] == pytest.approx(right)
    assert 0.0 < right < 1.0
    out, _ = looplm("kv", "-m", folder, "--windows", 3, width=80)
    assert "right: share of answers" in out
    assert f"{100 * right:.1f} %" in out


def test_a_text_too_short_is_refused(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a", encoding="utf-8")
    error, hint = looplm("kv", text, "-m", model, code=2, width=300)[1].splitlines()
    assert "leaves none to decode of pieces of" in error
    assert hint == "hint: give a longer text"
