"""The shipped fixtures, and the judge that compares a candidate with a fixture folder."""

import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import yaml

import looplm_fixtures
from looplm.checkpoint import load_model, read_tensors
from looplm_cli.engine_candidate import EngineCandidate
from looplm_reference import fixture as fixtures
from looplm_reference import model_folder
from looplm_reference.contract import Row
from looplm_reference.fixture import Fixture, FixtureError
from looplm_reference.fixture_judge import ReferenceFixtureCandidate, first_difference, judge_fixture
from looplm_reference.judge import tensor_shapes
from looplm_reference.model import LoopLM
from looplm_reference.mutants import MODEL_MUTANTS

FOLDERS = {folder.name: folder for folder in looplm_fixtures.folders()}
REFERENCE = ReferenceFixtureCandidate()
# A fixture has no padding, no cache of the candidate's and no exit rule but the gate: these mistakes are for the
# model-level judge to catch.
BEYOND_FIXTURES = {
    "exit rule a loop late",
    "change of the state not relative",
    "KL the other way round",
    "logit taken for its probability",
    "margin of probabilities",
    "stable one loop late",
    "key/value slot of the wrong loop",
    "padding is seen",
    "positions off by one under padding",
}


def opened(name: str) -> Fixture:
    settings = yaml.safe_load((FOLDERS[name] / "fixture.yaml").read_text(encoding="utf-8"))
    return fixtures.load(FOLDERS[name], settings)


def with_arrays(found: Fixture, **arrays: Any) -> Fixture:
    """The fixture with these arrays alone expected; '@' is written as '_at_'."""
    named = {name.replace("_at_", "@"): np.asarray(value) for name, value in arrays.items()}
    return dataclasses.replace(found, expected={"input_ids": found.input_ids, **named})


def failures(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.ok]


# ---- what is shipped


def test_the_manifest_describes_every_file() -> None:
    package = pathlib.Path(looplm_fixtures.__file__).parent
    there = {p.relative_to(package).as_posix() for name in FOLDERS for p in (package / name).rglob("*") if p.is_file()}
    assert there == set(looplm_fixtures.manifest()["sha256"])
    assert looplm_fixtures.damaged() == []
    assert sum((package / name).stat().st_size for name in there) < 600_000


def test_a_changed_and_a_missing_file_are_noticed(tmp_path: pathlib.Path) -> None:
    package = pathlib.Path(looplm_fixtures.__file__).parent
    shutil.copytree(package, tmp_path / "copy")
    with (tmp_path / "copy" / "tied" / "expected.npz").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2\3")
    (tmp_path / "copy" / "one_loop" / "model" / "config.json").unlink()
    assert looplm_fixtures.damaged(tmp_path / "copy") == ["one_loop/model/config.json", "tied/expected.npz"]


def test_the_fixtures_differ_where_it_matters() -> None:
    raw = {name: (folder / "model" / "config.json").read_text(encoding="utf-8") for name, folder in FOLDERS.items()}
    configs = [opened(name).config for name in FOLDERS]
    assert {config["total_ut_steps"] for config in configs} == {1, 2, 4}
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}
    assert any(config["num_key_value_heads"] < config["num_attention_heads"] for config in configs)
    assert any("rope_parameters" in text for text in raw.values())
    assert any('"rope_theta": 10000.0' in text and "rope_parameters" not in text for text in raw.values())
    assert any('"head_dim"' not in text for text in raw.values())
    assert any('"dtype"' in text for text in raw.values())
    assert any('"torch_dtype"' in text for text in raw.values())
    assert any((folder / "model" / "model.safetensors.index.json").exists() for folder in FOLDERS.values())


@pytest.mark.parametrize("name", FOLDERS)
def test_every_array_of_the_format_is_there(name: str) -> None:
    found = opened(name)
    tensors = tensor_shapes(found.config)
    wanted = {"hidden", "logits", "gate_logit", "exit_prob", "expected_logits", "loss", "stage1_loss", "stage2_loss"}
    wanted |= {"exit_logits@0.7", "greedy@0.7", "greedy@1.0", "adamw_loss", "tap/loop1.layer2.mid"}
    wanted |= {f"grad/{tensor}" for tensor in tensors} | {f"stage2_grad/{tensor}" for tensor in fixtures.GATE}
    assert wanted <= found.expected.keys()
    assert found.ignored == []
    assert found.expected["adamw_loss"].shape == (10,)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_judge_reads_a_model_as_the_engine_does(name: str) -> None:
    """Two readers, written apart: float32 and bfloat16, one file and several."""
    ours, theirs = model_folder.read_tensors(FOLDERS[name] / "model"), read_tensors(FOLDERS[name] / "model")
    assert ours.keys() == theirs.keys() == tensor_shapes(opened(name).config).keys()
    for tensor, value in ours.items():
        np.testing.assert_array_equal(value, theirs[tensor])


# ---- verdicts


@pytest.mark.parametrize("name", FOLDERS)
def test_the_reference_agrees_with_pytorch(name: str) -> None:
    """Beyond the fixture's own tolerance: arrays are stored in float32, so only their last digit may differ."""
    rows = judge_fixture(REFERENCE, opened(name))
    assert max(row.error for row in rows) < 1e-7
    assert {"loop1.hidden", "exit_prob", "stage2_loss", "greedy@0.5", "adamw_loss"} <= {row.name for row in rows}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_engine_agrees_with_pytorch(name: str) -> None:
    found = opened(name)
    tensors = load_model(FOLDERS[name] / "model").weights.tensors
    assert failures(judge_fixture(EngineCandidate(threads=2), found, tensors)) == []
    assert first_difference(EngineCandidate(), found, tensors) is None


CHANGES = {  # tensor of the second layer -> where a change of one element must show first
    "self_attn.q_proj": "loop1.layer2.q",
    "self_attn.k_proj": "loop1.layer2.k",
    "self_attn.v_proj": "loop1.layer2.v",
    "self_attn.o_proj": "loop1.layer2.attention_out",
    "mlp.gate_proj": "loop1.layer2.gate",
    "mlp.up_proj": "loop1.layer2.up",
    "mlp.down_proj": "loop1.layer2.mlp_out",
    "input_layernorm": "loop1.layer2.q",
    "input_layernorm_2": "loop1.layer2.mid",
    "post_attention_layernorm": "loop1.layer2.gate",
    "post_attention_layernorm_2": "loop1.layer3.x",
}


@pytest.mark.parametrize("tensor", CHANGES)
def test_a_changed_weight_is_named_where_it_acts(tensor: str) -> None:
    found, name = opened("sharded"), f"model.layers.1.{tensor}.weight"
    changed = found.tensors[name].copy()
    changed.flat[3] += 1e-2
    rows = judge_fixture(REFERENCE, found, {**found.tensors, name: changed})
    assert failures(rows)[0].name == CHANGES[tensor]
    left = first_difference(REFERENCE, found, {**found.tensors, name: changed})
    assert left is not None
    assert left.name == CHANGES[tensor]


@pytest.mark.parametrize("mutant", MODEL_MUTANTS, ids=lambda mutant: mutant.name)
def test_fixtures_catch_a_wrong_model(mutant: Any) -> None:
    with np.errstate(all="ignore"):
        rows = judge_fixture(ReferenceFixtureCandidate(mutant.model), opened("sharded"))
    assert bool(failures(rows)) == (mutant.name not in BEYOND_FIXTURES)


def test_positions_at_the_threshold_are_left_out_and_counted() -> None:
    found = opened("untied")
    cdf = np.cumsum(found.answers["exit_prob"], axis=0)
    q = cdf[1, 0, 4]
    logits = found.answers["logits"]
    index = LoopLM.exit_loop(found.answers["exit_prob"], float(q))
    read = np.take_along_axis(logits, index[None, :, :, None], axis=0)[0]
    other = read.copy()
    other[0, 4] = logits[2, 0, 4]  # what an implementation reads whose sum falls just short of q
    (row,) = judge_fixture(REFERENCE, with_arrays(found, **{f"exit_logits_at_{q:.17f}": other}))
    assert row.ok
    assert row.note == "1 of 18 positions at the threshold left out"
    other[1, 4] = logits[(index[1, 4] + 1) % 4, 1, 4]
    (row,) = judge_fixture(REFERENCE, with_arrays(found, **{f"exit_logits_at_{q:.17f}": other}))
    assert not row.ok


def test_a_near_tie_ends_the_comparison_of_a_row_and_anything_else_fails() -> None:
    found = opened("untied")
    right = found.expected["greedy@1.0"]
    prompt = int(found.expected["greedy_prompt"])
    best = int(right[0, prompt])
    twin = 0 if best else 1
    head = found.tensors["lm_head.weight"].copy()
    head[twin] = head[best]  # two tokens that no rounding may tell apart
    tied = dataclasses.replace(found, tensors={**found.tensors, "lm_head.weight": head})

    def judged(ids: Any) -> Row:
        return judge_fixture(REFERENCE, with_arrays(tied, greedy_at_1=ids, greedy_prompt=prompt))[0]

    actual = REFERENCE.greedy(tied.tensors, tied.config, tied.input_ids[:, :prompt], 1.0, right.shape[1] - prompt)
    assert judged(actual).ok
    assert judged(actual).note == ""
    other = actual.copy()
    other[0, prompt] = twin if actual[0, prompt] == best else best
    other[0, prompt + 1 :] = 40  # what follows another choice is another text
    assert judged(other).ok
    assert judged(other).note == f"near-tie in row 1 at position {prompt + 1}"
    other[0, prompt] = next(token for token in range(41) if token not in (best, twin))
    assert not judged(other).ok
    assert judged(other).error == 0.5


def test_a_candidate_that_lacks_a_gradient_fails() -> None:
    class Forgetful(ReferenceFixtureCandidate):
        def stage1(self, *args: Any, **named: Any) -> dict[str, Any]:
            found = dict(super().stage1(*args, **named))
            return found | {"grads": {k: v for k, v in found["grads"].items() if "k_proj" not in k}}

    wrong = failures(judge_fixture(Forgetful(), opened("one_loop")))
    assert {row.note for row in wrong if row.name.startswith("grad/")} == {"missing"}
    assert "grad/model.layers.0.self_attn.k_proj.weight" in {row.name for row in wrong}


# ---- folders that are none

IDS = np.array([[1, 2, 3], [4, 5, 6]])
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no ids": ({"hidden": np.zeros((4, 2, 3, 20))}, {}, "input_ids (B x S integers) is required"),
    "ids that are no integers": ({"input_ids": IDS * 1.0}, {}, "input_ids (B x S integers) is required"),
    "ids beyond the vocabulary": ({"input_ids": IDS + 36, "stage1_loss": 1.0}, {}, "ids outside the vocabulary of 41"),
    "nothing expected": ({"input_ids": IDS, "greedy_prompt": 2}, {}, "holds nothing to compare"),
    "another shape": ({"input_ids": IDS, "hidden": np.zeros((3, 2, 3, 20))}, {}, "not 4 x 2 x 3 x 20"),
    "a tensor that is none": ({"input_ids": IDS, "grad/model.x": np.zeros(3)}, {}, "grad/model.x is no tensor"),
    "text": ({"input_ids": IDS, "stage1_loss": np.array("low")}, {}, "stage1_loss holds <U3, not numbers"),
    "objects": ({"input_ids": np.array([{}], object)}, {}, "is no fixture folder"),
    "no prompt length": ({"input_ids": IDS, "greedy@0.5": IDS}, {}, "there is greedy@ but no greedy_prompt"),
    "no optimizer settings": (
        {"input_ids": IDS, "adamw_loss": np.zeros(1), "adamw_input_ids": IDS[None]},
        {"adamw": {"clip": 1.0}},
        "adamw must hold learning_rate, beta1",
    ),
    "optimizer settings in one word": ({"input_ids": IDS, "stage1_loss": 1.0}, {"adamw": "yes"}, "adamw='yes' is not"),
    "a tolerance of NaN": ({"input_ids": IDS, "stage1_loss": 1.0}, {"tolerance": "nan"}, "tolerance='nan'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_fixture_is_refused(case: str, tmp_path: pathlib.Path) -> None:
    arrays, settings, said = REFUSED[case]
    shutil.copytree(FOLDERS["untied"] / "model", tmp_path / "model")
    np.savez(tmp_path / "expected.npz", allow_pickle=True, **arrays)
    with pytest.raises(FixtureError) as refused:
        fixtures.load(tmp_path, settings)
    assert said in str(refused.value)


def test_damaged_answers_are_refused(tmp_path: pathlib.Path) -> None:
    shutil.copytree(FOLDERS["untied"], tmp_path / "copy")
    answers = tmp_path / "copy" / "expected.npz"
    whole = answers.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:3000] + bytes(3000) + whole[6000:], b""):
        answers.write_bytes(damaged)
        with pytest.raises(FixtureError, match="is no fixture folder"):
            fixtures.load(tmp_path / "copy")


def test_a_model_that_lacks_a_tensor_is_refused(tmp_path: pathlib.Path) -> None:
    shutil.copytree(FOLDERS["sharded"], tmp_path / "copy")
    index = tmp_path / "copy" / "model" / "model.safetensors.index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("00002-of", "00001-of"), encoding="utf-8")
    with pytest.raises(FixtureError, match="lacks model"):
        fixtures.load(tmp_path / "copy")


def test_unknown_arrays_are_listed_and_text_numbers_read(tmp_path: pathlib.Path) -> None:
    shutil.copytree(FOLDERS["untied"] / "model", tmp_path / "model")
    unknown = {"logit": np.zeros(3), "exit_logits@x": np.zeros(2), "tap/loop9.layer1.q": np.zeros(2)}
    np.savez(tmp_path / "expected.npz", input_ids=IDS, stage1_loss=1.0, **unknown)
    found = fixtures.load(tmp_path, {"tolerance": "1e-3"})
    assert found.ignored == sorted(unknown)
    assert found.tolerance == 1e-3
    assert [row.name for row in judge_fixture(REFERENCE, found)] == ["stage1_loss"]
