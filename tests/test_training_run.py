"""A run in its folder: resumed exactly, whenever and however it was stopped, and never damaged."""

import dataclasses
import json
import pathlib
import resource
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tiny_training
from benchmarks import kill_resume
from looplm import training_run
from looplm.checkpoint import load_model, swap_gate
from looplm.errors import CheckpointError, ConfigError, DataError
from looplm.run_folder import RunFolder
from looplm.safetensors_file import write_tensors
from looplm.settings import RunConfig, from_yaml
from looplm.training import EvalReport
from looplm.training_run import TrainingRun, resume_run, start_run

STEPS, CHECKPOINT, EVALUATION = 17, 4, 6  # an evaluation falls on a checkpoint at step 12


def config(story: str, **changes: Any) -> RunConfig:
    train = {"steps": STEPS, "checkpoint_every": CHECKPOINT, "eval_every": EVALUATION, **changes}
    return tiny_training.settings(story, **train)


def finish(folder: pathlib.Path) -> pathlib.Path:
    with resume_run(folder) as run:
        list(run.reports())
    return folder


def stop_after(run: TrainingRun, reports: int) -> None:
    """Leave a run as a kill does: without saving."""
    for _ in zip(range(reports), run.reports(), strict=False):
        pass


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"{n} squared is {n * n}, and cubed {n**3}.\n" for n in range(150)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(story: str) -> pathlib.Path:
    folder = pathlib.Path(story).with_name("undisturbed")
    with start_run(config(story), folder) as run:
        list(run.reports())
    return folder


@pytest.fixture
def calm(undisturbed: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A run that nothing disturbed, for a test to do with as it likes."""
    return shutil.copytree(undisturbed, tmp_path / "calm")


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# ---- resumed in the same process


def test_a_run_logs_every_step_and_evaluation_once(calm: pathlib.Path) -> None:
    steps = [line["step"] for line in kill_resume.read_log(calm) if line["kind"] == "step"]
    evaluations = [(line["step"], line["final"]) for line in kill_resume.read_log(calm) if line["kind"] == "eval"]
    assert steps == list(range(1, STEPS + 1))
    assert evaluations == [(6, False), (12, False), (STEPS, True)]
    assert json.loads((calm / "model" / "looplm.json").read_text())["steps"] == STEPS


@pytest.mark.parametrize("reports", [0, 1, 4, 5, 7, 13, 14, 15, 18, 19, 20])
def test_a_run_left_anywhere_goes_on_bit_for_bit(
    reports: int, story: str, calm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with start_run(config(story), tmp_path / "left") as run:
        stop_after(run, reports)
    assert kill_resume.differences(calm, finish(tmp_path / "left")) == []


def test_a_run_left_again_and_again_goes_on_bit_for_bit(story: str, calm: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with start_run(config(story), tmp_path / "left") as run:
        stop_after(run, 5)
        run.save()  # what Ctrl-C does
    for reports in (1, 9, 0, 6, 2):
        with resume_run(tmp_path / "left") as run:
            stop_after(run, reports)
    assert kill_resume.differences(calm, finish(tmp_path / "left")) == []


def test_weights_and_moments_are_those_of_the_undisturbed_run(
    story: str, calm: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with start_run(config(story), tmp_path / "left") as run:
        stop_after(run, 11)
    states = [RunFolder.open(folder).load_state() for folder in (calm, finish(tmp_path / "left"))]
    for first, second in zip(states[0][:3], states[1][:3], strict=True):
        np.testing.assert_array_equal(first, second)
        assert first.any()
    assert {k: v for k, v in states[0][3].items() if "seconds" not in k} == {
        k: v for k, v in states[1][3].items() if "seconds" not in k
    }


def test_another_seed_is_found_different(story: str, calm: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What the other tests rely on can see a difference."""
    with start_run(config(story, seed=1), tmp_path / "other") as run:
        list(run.reports())
    found = kill_resume.differences(calm, tmp_path / "other")
    assert found == [
        f"{STEPS + 3} lines of log.jsonl differ, the first is line 1",
        "model/model.safetensors differs",
    ]
    with (calm / "log.jsonl").open("a") as log:
        log.write('{"kind": "step", "step": 18}\n')
    assert kill_resume.differences(calm, tmp_path / "other")[0] == "log.jsonl has 21 and 20 lines"


def test_a_kill_between_state_and_model_folder_is_mended(
    story: str, calm: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "left"
    with start_run(config(story, checkpoint_every=10), folder) as run, monkeypatch.context() as patch:
        reports = run.reports()
        while run.trainer.progress.step < STEPS - 1:
            next(reports)

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(training_run, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            next(reports)
    assert json.loads((folder / "model" / "looplm.json").read_text())["steps"] == 10
    assert RunFolder.open(folder).load_state()[3]["step"] == STEPS
    assert kill_resume.differences(calm, finish(folder)) == []


def test_going_on_with_a_finished_run_leaves_a_calibrated_gate_alone(calm: pathlib.Path) -> None:
    before = kill_resume.read_log(calm)
    swap_gate(calm / "model", np.full((1, 32), 0.5, np.float32), np.ones(1, np.float32), {"stage": 2})
    model = files_of(calm / "model")
    finish(calm)
    assert files_of(calm / "model") == model
    assert kill_resume.read_log(calm) == before


def test_the_number_of_threads_is_kept_unless_another_is_asked_for(story: str, tmp_path: pathlib.Path) -> None:
    with start_run(config(story, threads=2), tmp_path / "run") as run:
        stop_after(run, CHECKPOINT)
    for asked, used in ((0, 2), (1, 1)):
        with resume_run(tmp_path / "run", threads=asked) as run:
            assert run.trainer.threads == used
    assert from_yaml(tmp_path / "run" / "config.yaml").train.threads == 2


def test_minutes_are_not_measured_twice(story: str, tmp_path: pathlib.Path) -> None:
    with start_run(config(story, minutes=0.05, checkpoint_every=10**6), tmp_path / "run") as run:
        for _ in run.reports():
            settled = dataclasses.replace(run.trainer.progress)
            if settled.total_steps:
                break
    with resume_run(tmp_path / "run") as run:
        assert run.trainer.progress == settled


def test_the_model_folder_holds_bfloat16_on_request_and_the_state_all_bits(story: str, tmp_path: pathlib.Path) -> None:
    with start_run(config(story, steps=2, dtype="bfloat16"), tmp_path / "run") as run:
        list(run.reports())
        exact = run.weights.copy()
    stored = load_model(run.folder.model).weights.copy().contiguous()
    np.testing.assert_array_equal(run.folder.load_state()[0], exact.contiguous())
    assert not np.array_equal(stored, exact.contiguous())
    np.testing.assert_allclose(stored, exact.contiguous(), rtol=2**-8)


def test_a_task_is_resumed_too(tmp_path: pathlib.Path) -> None:
    settings = config("builtin:hops", steps=6, eval_every=10**6)
    for name, reports in (("calm", 10), ("left", 5)):
        with start_run(settings, tmp_path / name) as run:
            stop_after(run, reports)
    calm, left = tmp_path / "calm", finish(tmp_path / "left")
    assert kill_resume.read_log(calm) == kill_resume.read_log(left)
    assert (calm / "model/model.safetensors").read_bytes() == (left / "model/model.safetensors").read_bytes()


# ---- two trainings, one folder


def test_a_folder_with_a_run_is_not_trained_into(story: str, calm: pathlib.Path) -> None:
    before = files_of(calm)
    with pytest.raises(CheckpointError, match="already holds a run") as caught, start_run(config(story), calm):
        pass
    assert f"--resume {calm}" in caught.value.hint
    assert files_of(calm) == before


def test_a_run_that_has_only_begun_keeps_others_out(
    story: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with folder.lock(), pytest.raises(CheckpointError, match="another training"), start_run(config(story), folder.path):
        pass
    right = RunFolder.lock

    def slow(self: RunFolder) -> Any:
        folder.config.write_text("")  # the other was quicker, and is done
        return right(self)

    monkeypatch.setattr(RunFolder, "lock", slow)
    with pytest.raises(CheckpointError, match="already holds a run"), start_run(config(story), folder.path):
        pass


# ---- nothing lost, nothing left behind


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"prior": "1,2"}, ConfigError),
        ({"prior": "geometrical:0.2"}, ConfigError),
        ({"seq_len": 6000}, DataError),
    ],
)
def test_what_is_wrong_with_settings_or_corpus_is_found_before_anything_is_written(
    changes: dict[str, Any], kind: type[Exception], story: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(kind), start_run(config(story, **changes), tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_killed_while_it_was_prepared_is_no_obstacle(
    story: str, calm: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    written: list[str] = []

    def killed(path: pathlib.Path, text: str) -> None:
        written.append(path.name)
        if path.name == "config.yaml":
            raise KeyboardInterrupt
        path.write_text(text, encoding="utf-8")

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "write_text", killed)
        with pytest.raises(KeyboardInterrupt), start_run(config(story), folder):
            pass
    assert written[-1] == "config.yaml"
    with pytest.raises(CheckpointError, match=r"no config\.yaml"), resume_run(folder):
        pass
    with start_run(config(story), folder) as run:
        list(run.reports())
    assert kill_resume.differences(calm, folder) == []


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow past some size: a disk that is full in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_no_space_in_the_middle_of_a_save_keeps_the_checkpoint_before(
    share: float, story: str, calm: pathlib.Path, tmp_path: pathlib.Path, small_files: Callable[[int], None]
) -> None:
    folder = tmp_path / "run"
    with start_run(config(story), folder) as run:
        reports = run.reports()
        while run.trainer.progress.step < 2 * CHECKPOINT - 1:
            next(reports)
        before = files_of(folder)
        small_files(int(share * (folder / "state.safetensors").stat().st_size))
        with pytest.raises(CheckpointError, match=r"cannot write .*state\.safetensors") as caught:
            next(reports)
    small_files(resource.RLIM_INFINITY)
    assert "what was there is unchanged" in caught.value.hint
    after = files_of(folder)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {"log.jsonl"}
    load_model(folder / "model")
    assert kill_resume.differences(calm, finish(folder)) == []


def test_no_space_for_the_model_keeps_the_model_before(
    story: str,
    calm: pathlib.Path,
    tmp_path: pathlib.Path,
    small_files: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    with start_run(config(story), folder) as run:
        reports = run.reports()
        while run.trainer.progress.step < 2 * CHECKPOINT - 1:
            next(reports)
        before = files_of(folder / "model")
        right = run.folder.save_state

        def save_state(*given: Any) -> None:
            right(*given)
            small_files((folder / "model" / "model.safetensors").stat().st_size // 2)

        monkeypatch.setattr(run.folder, "save_state", save_state)
        with pytest.raises(CheckpointError, match=r"cannot write .*model\.safetensors"):
            next(reports)
    small_files(resource.RLIM_INFINITY)
    assert files_of(folder / "model") == before
    assert kill_resume.differences(calm, finish(folder)) == []


# ---- a folder that was meddled with


def spoil_config(folder: pathlib.Path) -> None:
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("hidden_size: 32", "hidden_size: 64"))


def spoil_state(folder: pathlib.Path) -> None:
    buffers = {name: np.zeros(3, np.float32) for name in ("weights", "first_moment", "second_moment")}
    write_tensors(folder / "state.safetensors", buffers, {"meta": '{"step": 3}'})


def spoil_meta(folder: pathlib.Path) -> None:
    (folder / "data" / "meta.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "parameters, config.yaml asks for"),
        (spoil_state, "is not the state of a training"),
        (spoil_meta, r"meta\.json is missing or damaged"),
        (lambda folder: (folder / "data" / "meta.json").unlink(), r"meta\.json is missing or damaged"),
        (lambda folder: (folder / "data" / "train.npy").unlink(), r"train\.npy"),
        (lambda folder: (folder / "data" / "tokenizer.json").unlink(), r"tokenizer\.json"),
        (lambda folder: (folder / "config.yaml").write_text("train: ["), "is not YAML"),
        (lambda folder: (folder / "config.yaml").unlink(), "is not a run folder"),
        (lambda folder: (folder / "log.jsonl").write_bytes(b"\xff\n"), None),
        (lambda folder: (folder / "log.jsonl").unlink(), None),
    ],
)
def test_a_folder_that_was_meddled_with(
    spoil: Callable[[pathlib.Path], Any], message: str | None, calm: pathlib.Path
) -> None:
    spoil(calm)
    if message is None:
        assert isinstance(next(iter_reports(calm)), EvalReport)
        return
    with pytest.raises((CheckpointError, ConfigError, DataError), match=message) as caught, resume_run(calm):
        pass
    assert caught.value.hint


def iter_reports(folder: pathlib.Path) -> Iterator[Any]:
    with resume_run(folder) as run:
        yield from run.reports()
