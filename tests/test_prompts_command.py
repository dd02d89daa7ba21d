"""`looplm generate --prompts`: every answer that of the prompt alone, lines in order, files whole, mistakes by line."""

import io
import json
import pathlib
import sys

import pytest

from in_process import looplm, report_of
from looplm.batching import Batch
from looplm.memory import resident
from tiny_models import text_run

PROMPTS = ["It was the best", "of times", "x", "It was the worst of times, it was the age of wisdom", "y = 3", "The"]
ALONE = ("text", "finish", "tokens", "mean_loops", "loops_saved", "exits", "prompt_tokens", "prompt", "seed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return text_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return tmp_path / "prompts.txt"


def answers(*arguments: object) -> list[dict]:
    out, _ = looplm("generate", *arguments, "--quiet")
    return [json.loads(line) for line in out.splitlines()]


def alone(model: pathlib.Path, prompt: str, seed: int, *settings: object) -> dict:
    report = report_of("generate", "-m", model, "-p", prompt, "--seed", seed, *settings)
    return {key: report[key] for key in ALONE} | {
        "logprob": pytest.approx(sum(token["logprob"] for token in report["generated"]), abs=1e-3)
    }


@pytest.mark.parametrize(
    "settings",
    [
        ["--q", 0.5, "-n", 12],
        ["--exit", "kl:0.5", "--min-loops", 2, "--temperature", 1.1, "--top-k", 40, "--repetition-penalty", 1.2],
        ["--q", 0.4, "--cache", "full", "--kv-dtype", "bfloat16", "--threads", 2, "--top-p", 0.9, "--min-p", 0.01],
        ["--loops", 2, "--weights", "int8", "--stop", "e", "--stop", "\n", "-t", 0],
    ],
    ids=str,
)
def test_every_answer_is_that_of_the_prompt_alone(
    model: pathlib.Path, file: pathlib.Path, settings: list[object]
) -> None:
    found = answers("-m", model, "--prompts", file, "--batch", 2, "--seed", 7, *settings)
    assert [answer["index"] for answer in found] == [1, 2, 3, 4, 5, 6]
    for number, (prompt, answer) in enumerate(zip(PROMPTS, found, strict=True)):
        assert {key: answer[key] for key in (*ALONE, "logprob")} == alone(model, prompt, 7 + number, *settings)
    assert len({answer["text"] for answer in found}) > 1


def test_objects_may_have_settings_of_their_own(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lines = [
        {"prompt": "It was", "id": "first"},
        {"prompt": "", "max_new_tokens": 3, "seed": 40},
        {"prompt": "a\u2028b\r", "id": 9, "max_new_tokens": 5},
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = answers("-m", model, "--prompts", tmp_path / "p.jsonl", "-n", 8, "--seed", 2)
    assert [answer["id"] for answer in found] == ["first", None, 9]
    for line, answer, seed, most in zip(lines, found, (2, 40, 4), (8, 3, 5), strict=True):
        expected = alone(model, line["prompt"], seed, "-n", most)
        assert {key: answer[key] for key in expected} == expected


def test_prompts_may_come_from_standard_input(
    model: pathlib.Path, file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert answers("-m", model, "--prompts", "-", "-n", 5) == answers("-m", model, "--prompts", file, "-n", 5)


def test_answers_come_in_order_or_as_they_are_done(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lines = [{"prompt": "It was", "max_new_tokens": most} for most in (30, 2, 9, 1)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = ["-m", model, "--prompts", tmp_path / "p.jsonl", "--q", 1, "-t", 0]
    ordered, unordered = answers(*arguments), answers(*arguments, "--unordered")
    assert [answer["index"] for answer in ordered] == [1, 2, 3, 4]
    assert [answer["index"] for answer in unordered] == [4, 2, 3, 1]
    assert sorted(unordered, key=lambda answer: answer["index"]) == ordered


def test_a_file_of_answers_is_written_whole(model: pathlib.Path, file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out, _ = looplm("generate", "-m", model, "--prompts", file, "-n", 5)
    assert looplm("generate", "-m", model, "--prompts", file, "-n", 5, "--out", tmp_path / "new" / "a.jsonl")[0] == ""
    assert (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8") == out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.jsonl"]


def test_an_interrupt_leaves_whole_lines_and_no_half_file(
    model: pathlib.Path, file: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Batch._run_pass

    def interrupted(batch: Batch):  # type: ignore[no-untyped-def]
        if batch.passes == 60:
            raise KeyboardInterrupt
        return real(batch)

    monkeypatch.setattr(Batch, "_run_pass", interrupted)
    arguments = ["generate", "-m", model, "--prompts", file, "-n", 10, "--batch", 2, "--q", 1]
    out, err = looplm(*arguments, code=130)
    whole = [json.loads(line)["index"] for line in out.splitlines()]
    assert whole == list(range(1, len(whole) + 1))
    assert 0 < len(whole) < len(PROMPTS)
    assert f"{len(whole)} of 6 prompts, " in err
    (tmp_path / "a.jsonl").write_text("before", encoding="utf-8")
    looplm(*arguments, "--out", tmp_path / "a.jsonl", code=130)
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == "before"


def test_progress_and_account_go_to_stderr(model: pathlib.Path, file: pathlib.Path) -> None:
    out, err = looplm("generate", "-m", model, "--prompts", file, "-n", 8, "--q", 0.5, width=200)
    found = [json.loads(line) for line in out.splitlines()]
    first, *_, total, loops = err.splitlines()
    assert first.startswith("prompt ")
    tokens = sum(answer["tokens"] for answer in found)
    assert total.startswith(f"6 of 6 prompts, {tokens} tokens in ")
    assert "tokens/s; " in total
    assert total.endswith("rows in flight on average")
    mean = sum(answer["mean_loops"] * answer["tokens"] for answer in found) / tokens
    assert loops.startswith(f"loops {mean:.2f} of 4 on average, ")
    assert looplm("generate", "-m", model, "--prompts", file, "-n", 8, "--q", 0.5, "--quiet") == (out, "")


# ---- refusals


def refused(*arguments: object, code: int) -> tuple[str, str]:
    out, err = looplm("generate", *arguments, code=code, width=300)
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error, hint


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--batch", "0"], 2, "0 is not in the range"),
        (["--batch", "25"], 2, "25 prompts cannot be in flight at once"),
        (["--batch", "many"], 2, "'many' is not a valid int"),
        (["--prompt", "x"], 2, "--prompts and --prompt exclude each other"),
        (["--json"], 2, "--prompts and --json exclude each other"),
        (["--cache", "shared"], 2, "--cache 'shared' is not known"),
        (["--out", "."], 2, "--out . is a folder"),
        (["--out", "/dev/null/a.jsonl"], 1, "cannot write /dev/null: "),
        (["--stop", ""], 2, "a stop string is empty"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used(
    model: pathlib.Path, file: pathlib.Path, arguments: list[str], code: int, message: str
) -> None:
    error, _ = refused("-m", model, "--prompts", file, *arguments, code=code)
    assert message in error


@pytest.mark.parametrize("option", [["--batch", "2"], ["--out", "a.jsonl"], ["--unordered"]], ids=str)
def test_options_about_many_prompts_want_many(model: pathlib.Path, option: list[str]) -> None:
    error, hint = refused("-m", model, "-p", "x", *option, code=2)
    assert f"{option[0]} is about many prompts" in error
    assert "--prompts" in hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"one\n\nthree\n", "line 2 is empty"),
        (b"one\ncaf\xe9\n", "line 2 is not UTF-8: byte 0xe9 at offset 7"),
        (b"one\n" + b"a" * 70, "line 2: the prompt has 70 tokens, but the model's context is 64"),
    ],
    ids=str,
)
def test_lines_that_are_no_prompts(model: pathlib.Path, tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    error, _ = refused("-m", model, "--prompts", tmp_path / "p.txt", code=1)
    assert f"{tmp_path / 'p.txt'} {message}" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON: "),
        ("", "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        ('["x"]', "is a JSON list, not an object"),
        ('{"text": "x"}', 'has no "prompt"'),
        ('{"prompt": 3}', ": prompt is 3"),
        ('{"prompt": "x", "max_tokens": 3}', ": 'max_tokens' is not known"),
        ('{"prompt": "x", "max_new_tokens": 0}', ": max_new_tokens is 0"),
        ('{"prompt": "x", "max_new_tokens": true}', ": max_new_tokens is true"),
        ('{"prompt": "x", "max_new_tokens": null}', ": max_new_tokens is null"),
        ('{"prompt": "x", "seed": -1}', ": seed is -1"),
        ('{"prompt": "x", "seed": 1.5}', ": seed is 1.5"),
        ('{"prompt": "x", "id": [1]}', ": id is [1]"),
        ('{"prompt": "\\ud83d"}', ": prompt holds half a surrogate pair"),
    ],
    ids=lambda value: value[:40],
)
def test_objects_that_are_no_prompts(model: pathlib.Path, tmp_path: pathlib.Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    error, _ = refused("-m", model, "--prompts", tmp_path / "p.jsonl", code=1)
    assert f"{tmp_path / 'p.jsonl'} line 2{message if message.startswith(':') else ' ' + message}" in error


def test_a_file_that_is_not_there(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    error, _ = refused("-m", model, "--prompts", tmp_path / "none.txt", code=1)
    assert f"cannot read {tmp_path / 'none.txt'}: No such file or directory" in error
    assert "Is a directory" in refused("-m", model, "--prompts", tmp_path, code=1)[0]


def test_keys_and_values_that_cannot_fit_are_refused(
    model: pathlib.Path, file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("looplm.generation.available_memory", lambda: (resident() or 0) + 10_000)
    error, hint = refused("-m", model, "--prompts", file, code=1)
    assert "states, keys and values of 7 x 64 tokens in 4 loops take 0.0 GiB in float32, more than 80%" in error
    assert hint == "hint: ask for fewer tokens or loops, or fewer rows at once, or keep them in bfloat16"
