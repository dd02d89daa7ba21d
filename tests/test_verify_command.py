"""`looplm verify`: what it says, what it exits with, and that it can fail."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import looplm_fixtures
from in_process import looplm, report_of
from looplm.checkpoint import read_tensors
from looplm.kernels.product.select import PATHS
from looplm.safetensors_file import write_tensors
from looplm_cli import draft_verification, engine_candidate, verification
from looplm_reference import batch_judge, bfloat16, policy_judge, quantized_judge
from looplm_reference.model import LoopLM
from looplm_reference.mutants import MODEL_MUTANTS, OP_MUTANTS, ModelMutant

UNTIED = next(folder for folder in looplm_fixtures.folders() if folder.name == "untied")
CHANGED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def everything() -> tuple[str, dict[str, Any]]:
    """What the command without arguments prints, and its JSON."""
    return looplm("verify", width=200)[0], report_of("verify", "--all")


@pytest.fixture
def copied(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(UNTIED, tmp_path / "copied"))


def change_weight(folder: pathlib.Path) -> None:
    tensors = {name: value.copy() for name, value in read_tensors(folder / "model").items()}
    tensors[CHANGED].flat[5] += 1e-2
    write_tensors(folder / "model" / "model.safetensors", tensors)


def test_everything_passes_and_every_mutant_is_caught_by_name(everything: tuple[str, dict[str, Any]]) -> None:
    text, _ = everything
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "FAIL" not in text
    assert "SURVIVED" not in text
    for mutant in MODEL_MUTANTS:
        assert any(line.startswith(f"CAUGHT {mutant.name} at ") for line in lines), mutant.name
    for op_mutant in OP_MUTANTS:
        assert any(line.startswith(f"CAUGHT {op_mutant.function}: {op_mutant.name} at ") for line in lines)
    for misreading in quantized_judge.MUTANTS:
        assert any(line.startswith(f"CAUGHT {misreading.format}: {misreading.name} at ") for line in lines)
    for mistake in policy_judge.MUTANTS:
        assert any(line.startswith(f"CAUGHT {mistake.policy}: {mistake.name} at ") for line in lines)
    for op in ("attention", "exit_distribution", "cross_entropy", "adamw_update"):
        assert any(line.startswith("PASS") and line.endswith(f" {op}") for line in lines), op
    for part in ("forward, layer by layer", "every prefix", "left-padded", "right-padded", "every gradient"):
        assert any(line.startswith("PASS") and part in line for line in lines), part
    for folder in looplm_fixtures.folders():
        assert any(line.startswith("PASS") and line.endswith(f" {folder.name}") for line in lines)


def test_the_report_holds_every_comparison(everything: tuple[str, dict[str, Any]]) -> None:
    text, report = everything
    assert report["ok"] is True
    assert [section["name"] for section in report["sections"]] == [
        "operations",
        "operation mutants",
        "products",
        "model",
        "model mutants",
        "policies",
        "policy mutants",
        "training",
        "bf16 mutants",
        "quantized",
        "quantized mutants",
        "batches",
        "batch mutants",
        "drafts",
        "draft mutants",
    ]
    checks = [check for section in report["sections"] for check in section.get("checks", [])]
    mutants = [mutant for section in report["sections"] for mutant in section.get("mutants", [])]
    assert all(check["comparisons"] == len(check["rows"]) > 0 for check in checks)
    assert all(mutant["caught"] and mutant["by"] for mutant in mutants)
    assert {check["name"].split()[0] for check in checks} >= set(PATHS)
    assert {pathlib.Path(folder["folder"]).name for folder in report["folders"]} == {
        folder.name for folder in looplm_fixtures.folders()
    }
    compared = sum(check["comparisons"] for check in checks)
    compared += sum(len(folder["rows"]) for folder in report["folders"])
    assert f"{compared} comparisons pass, {len(mutants)} mutants caught" in text
    judged = (bfloat16, quantized_judge, policy_judge, batch_judge, draft_verification)
    every = (OP_MUTANTS, MODEL_MUTANTS, *(module.MUTANTS for module in judged))
    assert len(mutants) == sum(map(len, every))


def test_a_fixture_folder_passes_row_by_row() -> None:
    out, _ = looplm("verify", UNTIED)
    rows = [line.split() for line in out.splitlines() if line.startswith("  PASS")]
    names = [row[4] for row in rows]
    assert "FAIL" not in out
    assert len(rows) == 78 + 8  # those of the file, and states and logits of four loops decoded as stored
    assert names.index("loop1.layer1.q") < names.index("loop1.hidden") < names.index("loop1.logits")
    assert names.index("loop1.logits") < names.index("loop2.hidden") < names.index("exit_prob")
    assert all(float(row[1]) < 3e-5 and float(row[2]) < 1e-7 for row in rows)


def test_a_changed_weight_fails_and_the_first_array_to_diverge_is_named(copied: pathlib.Path) -> None:
    change_weight(copied)
    out, err = looplm("verify", copied, code=1)
    lines = out.splitlines()
    failed = [line.split()[4] for line in lines if line.startswith("  FAIL")]
    passed = [line.split()[4] for line in lines if line.startswith("  PASS")]
    assert failed[0] == "loop1.layer2.mlp_out"
    assert "loop1.layer2.up" in passed
    assert "  first to diverge in forward order: loop1.layer2.mlp_out" in lines
    assert "engine and reference agree with each other" in out
    message, hint = err.splitlines()
    assert message.startswith("error:")
    assert message.endswith("the first in forward order is loop1.layer2.mlp_out")
    assert hint.startswith("hint: engine and reference agree")

    out, _ = looplm("verify", UNTIED, copied, "--json", code=1)
    report = json.loads(out.splitlines()[-1])
    assert report["ok"] is False
    assert [folder["ok"] for folder in report["folders"]] == [True, False]
    assert [folder["first_divergence"] for folder in report["folders"]] == [None, "loop1.layer2.mlp_out"]
    assert report["folders"][1]["engine_leaves_reference"] is None


def test_a_wrong_engine_is_told_from_a_wrong_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine_candidate.model_config_from_json

    def wrong(values: Any, where: str) -> Any:
        return dataclasses.replace(right(values, where), rope_theta=9000.0)

    monkeypatch.setattr(engine_candidate, "model_config_from_json", wrong)
    out, err = looplm("verify", UNTIED, code=1)
    assert "the engine leaves the reference at loop1.layer1.q" in out
    assert "the first in forward order is loop1.layer1.q" in err.splitlines()[0]


def test_a_mutant_that_survives_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Right(LoopLM):
        pass

    monkeypatch.setattr(verification.mutants, "MODEL_MUTANTS", (ModelMutant("no mistake at all", Right, ""),))
    every = verification.sections
    monkeypatch.setattr(verification, "sections", lambda threads: every(threads)[3:])
    out, err = looplm("verify", code=1)
    assert "SURVIVED  no mistake at all" in out
    assert "1 checks failed, the first is model mutants: no mistake at all" in err


def test_a_wrong_kernel_is_shown_with_the_rows_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = verification.kernels.swiglu_forward

    def swiglu_forward(gate: Any, up: Any) -> Any:
        (y,) = right(gate, up)
        return (y * np.float32(1.001),)

    monkeypatch.setattr(verification.kernels, "swiglu_forward", swiglu_forward)
    every = verification.sections
    monkeypatch.setattr(verification, "sections", lambda threads: _only("swiglu", every(threads)[:1]))
    out, err = looplm("verify", code=1)
    assert out.splitlines()[1].startswith("  FAIL")
    assert out.splitlines()[2].split() == ["FAIL", "1.0e-03", "of", "2e-06", "swiglu_forward.y"]
    assert "the first is operations: swiglu" in err


def _only(name: str, sections: list[verification.Section]) -> list[verification.Section]:
    def chosen(checks: Any) -> Iterator[verification.Check]:
        return (check for check in checks if check.name == name)

    return [dataclasses.replace(section, checks=chosen(section.checks)) for section in sections]


def test_a_damaged_shipped_fixture_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "sections", lambda threads: [])
    monkeypatch.setattr(looplm_fixtures, "damaged", lambda: ["tied/expected.npz"])
    _, err = looplm("verify", code=1)
    assert "tied/expected.npz is not the file that MANIFEST.json describes" in err


def test_unknown_arrays_and_settings_are_reported_not_skipped(copied: pathlib.Path) -> None:
    with np.load(UNTIED / "expected.npz") as stored:
        kept = {name: stored[name] for name in ("input_ids", "hidden")}
    np.savez(copied / "expected.npz", **kept, hiden=np.zeros(3))
    (copied / "fixture.yaml").write_text("origin: by hand\ntolerence: 1\n", encoding="utf-8")
    out, err = looplm("verify", copied)
    assert "ignored, names not known: hiden" in out
    assert "warning:" in err
    assert "tolerence is not used" in err
    assert report_of("verify", copied)["folders"][0]["ignored"] == ["hiden"]


BROKEN = {
    "no such folder": ("rm", "", "has no expected.npz"),
    "no answers": ("expected.npz", None, "has no expected.npz"),
    "answers that are no archive": ("expected.npz", "x", "is no fixture folder"),
    "settings that are no YAML": ("fixture.yaml", "a: [", "fixture.yaml cannot be read"),
    "settings that are a list": ("fixture.yaml", "- a\n", "holds list, not `key: value` lines"),
    "a tolerance that is no number": ("fixture.yaml", "tolerance: much\n", "tolerance='much' is not a number"),
    "a damaged model": ("model/model.safetensors", "x", "model.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_fixture_folder_is_an_error_in_two_lines(case: str, copied: pathlib.Path) -> None:
    name, content, said = BROKEN[case]
    if name == "rm":
        shutil.rmtree(copied)
    elif content is None:
        (copied / name).unlink()
    else:
        (copied / name).write_text(content, encoding="utf-8")
    out, err = looplm("verify", copied, width=200, code=1)
    message, hint = err.splitlines()
    assert message.startswith("error: ")
    assert said in message
    assert hint.startswith("hint: ")
    assert out == ""
