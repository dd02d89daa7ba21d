"""Every way to get `looplm train`, `calibrate` and `quickstart` wrong: two lines, and nothing lost or left behind."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import tiny_models
from benchmarks.kill_resume import read_log
from in_process import looplm
from looplm.run_folder import RunFolder
from looplm.safetensors_file import TensorFile
from tiny_training import ARGUMENTS

TRAIN = ("train", *ARGUMENTS, "--steps", 3, "--out-dir", "run")


@pytest.fixture(autouse=True)
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty folder to work in."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def refused(*arguments: object, said: str, code: int = 1, warnings: int = 0) -> str:
    """A command must answer with two lines (after warnings) and leave everything as it was.  Returns the hint."""
    before = contents()
    out, err = looplm(*arguments, code=code)
    assert out == ""
    *first, error, hint = err.splitlines()
    assert len(first) == warnings, err
    assert all(line.startswith("warning: ") for line in first)
    assert error.startswith("error: ")
    assert said in error
    assert hint.startswith("hint: ")
    assert contents() == before
    return hint


def contents() -> dict[str, bytes]:
    paths = pathlib.Path().rglob("*")
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths if path.name != ".lock"}


# ---- training


def texts(story: str) -> None:
    pathlib.Path("empty.txt").write_text("")
    pathlib.Path("blank.txt").write_text(" \n\n")
    pathlib.Path("binary.txt").write_bytes(b"ab\0\1\2" * 50)
    pathlib.Path("latin.txt").write_bytes("grün und blau\n".encode("latin-1") * 40)
    pathlib.Path("short.txt").write_text("Too short.")
    pathlib.Path("folder").mkdir()
    pathlib.Path("lines.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    pathlib.Path("torn.jsonl").write_text('{"text": "a"}\n{"text": \n')
    pathlib.Path("wrong.yaml").write_text("train: {stpes: 3}")
    pathlib.Path("torn.yaml").write_text("train: [")
    pathlib.Path("list.yaml").write_text("[1, 2]")
    pathlib.Path("null.yaml").write_text("data:\ntrain: {steps: 3}")
    pathlib.Path("preset.yaml").write_text("preset: [nano]")
    pathlib.Path("tokenizer.json").write_text("{}")
    pathlib.Path("file").write_text("in the way")
    pathlib.Path("full").mkdir()
    pathlib.Path("full", "thesis.txt").write_text("precious")
    pathlib.Path("story.txt").write_bytes(pathlib.Path(story).read_bytes())


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        ("missing.txt", "missing.txt does not exist", "builtin:"),
        ("empty.txt", "empty.txt is empty", "text"),
        ("blank.txt", "blank.txt is empty", "text"),
        ("binary.txt", "binary.txt is binary", "text"),
        ("latin.txt", "latin.txt is not utf-8: byte 0xfc at offset 2 (line 1)", "--encoding latin-1"),
        ("story.txt --encoding klingon", "encoding 'klingon' is not known", "utf-8"),
        ("short.txt", "the corpus is too small", "add text"),
        ("folder", "folder holds no .txt", "one by one"),
        ("lines.jsonl", 'lines.jsonl line 2 has no "text" field', '{"text"'),
        ("torn.jsonl", "torn.jsonl line 2 is not JSON", '{"text"'),
        ("builtin:hop", "builtin:hop does not exist", "did you mean builtin:hops?"),
        ("story.txt builtin:hops", "cannot be mixed", "alone"),
        ("builtin:hops --set train.seq_len=2", "has no question", "at least 3"),
        ("story.txt --errors loud", "data.errors='loud' is not known", "strict"),
        ("story.txt --preset nanoo", "preset 'nanoo' is not known", "did you mean nano?"),
        ("story.txt --set train.stpes=3", "train.stpes is not a setting", "did you mean steps?"),
        ("story.txt --set trian.steps=3", "'trian' is not a section", "did you mean train?"),
        ("story.txt --set train.steps", "--set 'train.steps' is not SECTION.KEY=VALUE", "e.g."),
        ("story.txt --set train.batch_size=many", "train.batch_size='many' is str, expected int", ""),
        (
            "story.txt --set model.hidden_size=30 --set model.num_attention_heads=4",
            "hidden_size=30 is not div",
            "e.g. 32",
        ),
        ("story.txt --set model.num_key_value_heads=3", "not divisible by num_key_value_heads=3", ""),
        ("story.txt --set model.total_ut_steps=0", "model.total_ut_steps=0 is not a positive number", "above 0"),
        ("story.txt --set train.learning_rate=.nan", "train.learning_rate=nan is not a finite number", "finite"),
        ("story.txt --set train.learning_rate=-1", "train.learning_rate=-1.0 is not positive", "above 0"),
        ("story.txt --set train.weight_decay=-1", "train.weight_decay=-1.0 is negative", "0 or more"),
        ("story.txt --set model.max_position_embeddings=8", "train.seq_len=16 is longer than", "shorten"),
        ("story.txt --minutes -1", "train.minutes=-1.0 is negative", "0 or more"),
        ("story.txt --entropy-weight -1", "train.entropy_weight=-1.0 is negative", "0 or more"),
        ("story.txt --val-fraction 1.5", "data.val_fraction=1.5 is outside (0, 1)", "0.1"),
        ("story.txt --prior 1,2", "train.prior='1,2' does not give 4 positive weights", "geometric:0.3"),
        ("story.txt --prior unifrm", "train.prior='unifrm' is not a prior", "uniform"),
        ("story.txt --init xavier", "init.scheme='xavier' is not known", "damped or ouro"),
        ("story.txt --tokenizer missing.json", "missing.json", ""),
        ("story.txt --tokenizer tokenizer.json", "tokenizer.json", ""),
        ("story.txt --config missing.yaml", "cannot read settings from missing.yaml", "YAML"),
        ("story.txt --config wrong.yaml", "train.stpes is not a setting", "did you mean steps?"),
        ("story.txt --config torn.yaml", "torn.yaml is not YAML", ""),
        ("story.txt --config list.yaml", "list.yaml holds list, not sections", "model, init, data, train"),
        ("story.txt --config null.yaml", "section 'data' is NoneType", "key: value"),
        ("story.txt --config preset.yaml", "preset ['nano'] is not known", "nano"),
        ("story.txt --out-dir full", "full is not empty: it holds thesis.txt", "--out-dir"),
        ("story.txt --out-dir file", "file is a file", "--out-dir"),
        ("story.txt --out-dir file/run", "cannot write file/run", "choose a folder"),
        ("story.txt --out-dir /proc/run", "cannot write /proc/run", "choose a folder"),
    ],
)
def test_wrong_input_is_two_lines_and_nothing_is_left_behind(arguments: str, said: str, hint: str, story: str) -> None:
    texts(story)
    assert hint in refused("train", *ARGUMENTS, "--out-dir", "run", *arguments.split(), said=said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--steps 0", "0 is not in the range x>=1"),
        ("--steps ten", "'ten' is not a valid int"),
        ("--loops 0", "0 is not in the range x>=1"),
        ("--loops -1", "-1 is not in the range x>=1"),
        ("--minutes nan", "nan is not a finite number"),
        ("--minutes inf", "inf is not a finite number"),
        ("--entropy-weight nan", "nan is not a finite number"),
        ("--val-fraction nan", "nan is not a finite number"),
        ("--seed -1", "-1 is not in the range x>=0"),
        ("--threads 0", "0 is not in the range x>=1"),
        ("--stpes 3", "no such option: --stpes"),
        ("--out-dir", "requires an argument"),
        ("--resume run --steps 5", "--resume takes corpus and settings from the run folder"),
        ("--resume run --set train.steps=5", "--resume takes corpus and settings"),
        ("--resume run --loops 2", "--resume takes corpus and settings"),
        ("--resume run other.txt", "--resume takes corpus and settings"),
        ("--resume run --show-config", "--resume takes corpus and settings"),
    ],
)
def test_wrong_usage_is_two_lines_and_code_2(arguments: str, said: str) -> None:
    refused("train", *arguments.split(), said=said, code=2)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "standard input is empty"), (b"\xff\xfe\n" * 9, "standard input is")]
)
def test_standard_input_that_is_no_text(content: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, content)
    refused(*TRAIN, "-", said=said)


def test_a_folder_that_holds_a_run_is_protected(story: str) -> None:
    looplm(*TRAIN, story, "--quiet")
    assert "--resume run" in refused(*TRAIN, story, said="run already holds a run")


def test_what_cannot_be_resumed(story: str) -> None:
    pathlib.Path("notes").mkdir()
    refused("train", "--resume", "missing", said="there is no run in missing")
    refused("train", "--resume", "notes", said="notes is not a run folder")
    looplm(*TRAIN, story, "--quiet")
    state = pathlib.Path("run", "state.safetensors")
    state.write_bytes(state.read_bytes()[:-9])
    refused("train", "--resume", "run", said="ends inside tensor second_moment")


def test_two_trainings_into_one_folder(story: str) -> None:
    looplm(*TRAIN, story, "--quiet")
    with RunFolder.open("run").lock():
        refused("train", "--resume", "run", said=f"another training is writing to run (process {os.getpid()})")


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(story: str) -> None:
    wild = ("--set", "train.learning_rate=1e30", "--set", "train.checkpoint_every=1")
    with np.errstate(all="ignore"):
        out, err = looplm(*TRAIN[:-3], 50, "--out-dir", "run", *wild, story, "--quiet", code=1)
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith("error: the ")
    step = int(error.rpartition(" ")[2])
    assert " became nan at step" in error or " became inf at step" in error
    assert "last checkpoint is intact" in hint
    assert RunFolder.open("run").load_state()[3]["step"] == step - 1
    assert json.loads(pathlib.Path("run/model/looplm.json").read_text())["steps"] == step - 1
    assert [line["step"] for line in read_log(pathlib.Path("run"))] == list(range(1, step))


def test_no_writable_folder_for_kernels_is_no_obstacle(story: str) -> None:
    program = (
        "import numpy as np\n"
        "from looplm.kernels import jit, gradient_norm\n"
        "print(jit.cache_folder(), gradient_norm(np.array([3.0, 4.0], np.float32))[0])\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": story}  # a file, in which no folder can be made
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert found.stdout == "None 5.0\n", found.stderr


# ---- calibration


@pytest.fixture
def model(place: pathlib.Path) -> pathlib.Path:
    """A run folder `given` with a model; returns the model folder."""
    return tiny_models.text_run(pathlib.Path("given"))


@pytest.mark.parametrize(
    ("arguments", "said", "hint", "code"),
    [
        ("-m missing", "missing does not exist", "", 1),
        ("-m full", "full is neither a model folder nor a run folder", "config.json", 1),
        ("", "there is no model yet below runs/", "looplm train", 1),
        ("-m given --target ahead", "target 'ahead' is not known", "paper, look-ahead or best-later", 1),
        ("-m given --accept maybe", "--accept 'maybe' is not known", "better, always or never", 2),
        ("-m given --steps 0", "0 is not in the range x>=1", "--help", 2),
        ("-m given --learning-rate nan", "nan is not a finite number", "--help", 2),
        ("-m given --learning-rate 0", "0.0 is not in the range", "--help", 2),
        ("-m given --learning-rate 1e38", "the gate is no longer a number", "lower learning rate", 1),
        ("-m given --seed -1", "-1 is not in the range x>=0", "--help", 2),
        ("-m given missing.txt", "missing.txt does not exist", "", 1),
        ("-m given empty.txt", "empty.txt is empty", "", 1),
        ("-m given binary.txt", "binary.txt is binary", "", 1),
        ("-m given latin.txt", "latin.txt is not utf-8", "--encoding", 1),
        ("-m given short.txt", "short.txt is too short", "longer", 1),
        ("-m given --undo", "given/model has no previous gate", "looplm calibrate", 1),
    ],
)
def test_wrong_input_to_calibrate(
    arguments: str, said: str, hint: str, code: int, model: pathlib.Path, story: str
) -> None:
    texts(story)
    with np.errstate(all="ignore"):
        assert hint in refused("calibrate", *arguments.split(), said=said, code=code)


def test_one_loop_has_no_exit_to_learn() -> None:
    tiny_models.text_run(pathlib.Path("one"), loops=1)
    refused("calibrate", "-m", "one", said="one/model has one loop", code=2)


def test_weights_that_are_no_numbers_are_named_and_not_calibrated(model: pathlib.Path) -> None:
    path = model / "model.safetensors"
    file = TensorFile(path)
    norm = file.floats("model.norm.weight").copy()
    norm[3] = np.nan
    content = io.BytesIO()
    file.with_changes({"model.norm.weight": norm})(content)
    path.write_bytes(content.getvalue())
    assert "train anew" in refused("calibrate", "-m", "given", said="loss is not a number", warnings=1)
    _, err = looplm("calibrate", "-m", "given", code=1)
    assert err.splitlines()[0].endswith("model.norm.weight (1 of 16)")


def test_a_damaged_model_is_not_calibrated(model: pathlib.Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused("calibrate", "-m", "given", said="model.safetensors")
    path.unlink()
    refused("calibrate", "-m", "given", said="model.safetensors")


# ---- quickstart


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        ("--minutes 0.01", "0.01 is not in the range x>=0.05", 2),
        ("--minutes nan", "nan is not a finite number", 2),
        ("--threads 0", "0 is not in the range x>=1", 2),
        ("surprise", "unexpected extra argument", 2),
    ],
)
def test_wrong_usage_of_quickstart(arguments: str, said: str, code: int) -> None:
    refused("quickstart", *arguments.split(), said=said, code=code)


def test_quickstart_does_not_train_into_a_folder_that_is_taken(story: str) -> None:
    texts(story)
    before = contents()
    out, err = looplm("quickstart", "--out-dir", "full", code=1)
    assert err.splitlines() == ["error: full is not empty: it holds thesis.txt", "hint: choose another --out-dir"]
    assert "$ looplm train --minutes 1 --out-dir full" in out
    assert contents() == before
