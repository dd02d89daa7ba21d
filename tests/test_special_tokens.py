"""What ends a text: read from every file that says it, and told where the files are not of one mind."""

import hashlib
import pathlib
from typing import Any

import pytest

from chat_models import chat_model, chat_tokenizer, template_of
from in_process import looplm, report_of
from looplm.chat_template import stop_ids
from looplm.errors import CheckpointError
from looplm.model_files import ModelFiles, open_model
from model_folders import edit
from tiny_models import text_run


def stops(files: ModelFiles) -> tuple[list[int], list[str]]:
    found, warnings = stop_ids(files.folder, files.special_tokens, files.tokenizer)
    return sorted(found), files.warnings + warnings


def test_a_folder_of_one_mind_stops_at_its_turns_end_and_says_nothing(tmp_path: pathlib.Path) -> None:
    files = open_model(chat_model(tmp_path))
    assert stops(files) == ([0, 2], [])
    assert files.special_tokens.claims == dict.fromkeys(
        ("config.json", "generation_config.json", "tokenizer_config.json"), frozenset({2})
    )
    assert files.special_tokens.end_of_text == 0


def test_a_base_model_whose_template_ends_turns_otherwise_stops_at_both_and_says_so(tmp_path: pathlib.Path) -> None:
    folder = chat_model(tmp_path, template_of("ouro-1.4b"), eos=0, eos_token="<|endoftext|>")
    assert stops(open_model(folder)) == (
        [0, 2],
        [
            f"{folder}: config.json ends a text with <|endoftext|> (0), but the chat template ends a turn with "
            "<|im_end|> (2): either ends an answer"
        ],
    )


def test_a_folder_that_says_nothing_is_not_contradicted_by_its_template(tmp_path: pathlib.Path) -> None:
    assert stops(open_model(chat_model(tmp_path, eos=None, eos_token="gone"))) == ([0, 2], [])


def test_files_that_contradict_each_other_are_told_and_all_believed(tmp_path: pathlib.Path) -> None:
    folder = chat_model(tmp_path, eos=0)
    found, (warning,) = stops(open_model(folder))
    assert found == [0, 2]
    assert warning == (
        "config.json ends a text with <|endoftext|> (0), "
        "tokenizer_config.json with <|im_end|> (2): each of them ends one"
    )
    edit(folder, "generation_config.json", eos_token_id=[4, 3])
    assert stops(open_model(folder))[0] == [0, 2, 3, 4]


def test_a_list_of_ids_is_read_whole_and_contradicts_nothing_it_holds(tmp_path: pathlib.Path) -> None:
    folder = chat_model(tmp_path)
    edit(folder, "generation_config.json", eos_token_id=[4, 2])
    edit(folder, eos_token_id=[2, 3])
    assert stops(open_model(folder)) == ([0, 2, 3, 4], [])


def test_a_token_may_be_spelled_as_a_mapping_or_be_null(tmp_path: pathlib.Path) -> None:
    folder = chat_model(
        tmp_path, eos_token={"content": "<|im_end|>", "special": True}, pad_token=None, add_bos_token=True
    )
    special = open_model(folder).special_tokens
    assert special.texts == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}, "ends a text with '</s>', which the tokenizer does not know"),
        (
            "generation_config.json",
            {"eos_token_id": [2, 999]},
            "ends a text with token 999, but the vocabulary has 261",
        ),
        ("tokenizer_config.json", {"chat_template": 5}, "no chat template named 'default' (there are: none)"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": "x"}]},
            "no chat template named 'default' (there are: 'rag')",
        ),
    ],
)
def test_what_cannot_be_used_is_a_warning(
    name: str, changes: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    edit(chat_model(tmp_path), name, **changes)
    (warning,) = open_model(tmp_path).warnings
    assert message in warning


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("generation_config.json", {"eos_token_id": "two"}, "eos_token_id='two' is neither a token id nor a list"),
        ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id=[True] is neither"),
        ("tokenizer_config.json", {"eos_token": 2}, "eos_token=2 is not a token's spelling"),
    ],
    ids=str,
)
def test_what_is_no_token_is_refused(name: str, changes: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    edit(chat_model(tmp_path), name, **changes)
    with pytest.raises(CheckpointError) as caught:
        open_model(tmp_path)
    assert f"{tmp_path}: {name}: {message}" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_damaged_file_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    (chat_model(tmp_path) / name).write_bytes(b"{\xff")
    with pytest.raises(CheckpointError, match=name):
        open_model(tmp_path)


def test_generating_stops_at_what_chatting_stops_at(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm import generation

    folder, asked = chat_model(tmp_path, eos=0, eos_token="<|endoftext|>"), []
    real = generation.generate

    def watched(*arguments: Any, **settings: Any) -> Any:
        asked.append(settings["stop_ids"])
        return real(*arguments, **settings)

    monkeypatch.setattr(generation, "generate", watched)
    _, err = looplm("generate", "-m", folder, "-p", "a", "-n", 2, width=300)
    assert asked == [{0, 2}]
    assert "the chat template ends a turn with <|im_end|> (2): either ends an answer" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, err = looplm("generate", "-m", folder, "-p", "a", "-n", 2, width=300)
    assert asked[1] == {0}
    assert err.startswith("warning: what its chat template ends a turn with stays unknown: chat templates need jinja2")


def test_every_kind_of_end_ends_a_text(tmp_path: pathlib.Path) -> None:
    """The model is made to write one token only; whichever file names it, the text ends there."""
    folder = chat_model(tmp_path, "gone", eos=None, eos_token="gone")
    whole = report_of("generate", "-m", folder, "-p", "a", "-n", 8, "-t", 0)
    assert whole["finish"] == "max_new_tokens"
    last = whole["generated"][3]
    first = [token["id"] for token in whole["generated"]].index(last["id"]) + 1
    spelled = chat_tokenizer()._token(last["id"])
    for name, changes in (
        ("config.json", {"eos_token_id": [0, last["id"]]}),
        ("generation_config.json", {"eos_token_id": last["id"]}),
        ("tokenizer_config.json", {"eos_token": spelled}),
    ):
        before = (folder / name).read_bytes()
        edit(folder, name, **changes)
        report = report_of("generate", "-m", folder, "-p", "a", "-n", 8, "-t", 0)
        assert (report["finish"], report["tokens"]) == ("stop token", first), name
        (folder / name).write_bytes(before)


def test_info_tells_what_ends_a_text(tmp_path: pathlib.Path) -> None:
    folder = chat_model(tmp_path, eos=0)
    report = report_of("info", "-m", folder)
    assert report["ends"] == {"config.json": [0], "generation_config.json": [0], "tokenizer_config.json": [2]}
    assert report["chat_template"] == "tokenizer_config.json"
    assert len(report["warnings"]) == 1
    out, _ = looplm("info", "-m", folder, width=200)
    assert "ends a text: config.json 0, generation_config.json 0, tokenizer_config.json 2\n" in out
    assert "chat template: tokenizer_config.json\n" in out


# ---- reading leaves no trace


def snapshot(folder: pathlib.Path) -> dict[str, tuple[str, int, int]]:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_mode)
        for path in [folder, *folder.iterdir()]
        if path.is_file()
    } | {".": ("", folder.stat().st_mtime_ns, folder.stat().st_mode)}


def test_reading_a_model_folder_does_not_change_it(tmp_path: pathlib.Path, lines: Any) -> None:
    for folder in (chat_model(tmp_path / "chat"), text_run(tmp_path / "run")):
        before = snapshot(folder)
        looplm("info", "-m", folder)
        looplm("generate", "-m", folder, "-p", "ab", "-n", 3)
        looplm("generate", "-m", folder, "-p", "ab", "-n", 3, "--weights", "int4")
        looplm("inspect", "-m", folder, "-p", "ab")
        looplm("quantize", "-m", folder, "--to", "int8", "-o", tmp_path / f"{folder.name}-int8", "--no-report")
        looplm("verify", folder)
        if folder.name == "model":
            looplm("eval", "-m", folder, "--quiet")
        else:
            lines("hello", "/inspect")
            looplm("chat", "-m", folder, "-n", 3)
            looplm("init", "--like", folder, "-o", tmp_path / "copy")
        assert snapshot(folder) == before


# ---- broken folders, as every command meets them


def flipped(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[12] ^= 0xFF
    path.write_bytes(bytes(content))


def truncated(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def gateless(folder: pathlib.Path) -> None:
    from looplm.checkpoint import read_tensors
    from looplm.safetensors_file import write_tensors

    kept = {name: values for name, values in read_tensors(folder).items() if "early_exit_gate" not in name}
    write_tensors(folder / "model.safetensors", kept)


BROKEN = {
    "header damaged": (flipped, "the header is not JSON"),
    "truncated": (truncated, "ends inside tensor lm_head.weight"),
    "gate-less": (gateless, "lacks model.early_exit_gate.weight, model.early_exit_gate.bias"),
    "another architecture": (
        lambda folder: edit(folder, architectures=["LlamaForCausalLM"], model_type="llama"),
        "architecture 'LlamaForCausalLM' (model_type 'llama') is not a LoopLM",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "tokenizer damaged": (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not a tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_two_lines_whatever_is_asked_of_it(case: str, tmp_path: pathlib.Path) -> None:
    source = chat_model(tmp_path / "source")
    looplm("init", "--like", source, "-o", tmp_path / "m", "--quiet")
    damage, message = BROKEN[case]
    damage(tmp_path / "m")
    new = tmp_path / "new"
    quantize = ["quantize", "--to", "int4", "--no-report", "--quiet", "-o", new]
    for arguments in (["info"], ["generate", "-p", "a"], ["inspect", "-p", "a"], ["chat"], quantize, ["verify"]):
        if case == "no tokenizer" and arguments[0] in ("info", "quantize", "verify"):
            continue  # which need none
        model = [] if arguments == ["verify"] else ["-m"]
        _, err = looplm(*arguments, *model, tmp_path / "m", code=1, width=300)
        error, hint = err.splitlines()[-2:]
        assert message in error, arguments
        assert hint.startswith("hint: ")
        assert len(err.splitlines()) == 2
    assert not new.exists()
