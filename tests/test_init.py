"""`looplm init`: the published shapes to the number, random weights in a stream, whole or not at all."""

import errno
import json
import pathlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from chat_models import chat_model
from in_process import looplm, report_of
from looplm.checkpoint import load_model, read_tensors
from looplm.config import model_config_from_json
from looplm.errors import CheckpointError, ConfigError, UsageError
from looplm.model_files import open_model
from looplm.published import NAMES, published_config, tokenizer_files
from looplm.random_model import BLOCK, write_random_model
from looplm.safetensors_file import round_to_bfloat16, widen_bfloat16
from looplm.text import Tokenizer
from looplm.weights import parameter_count, parameter_table

SMALL = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "vocab_size": 30_000}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_window_layers": 2}
TINY = [f"--set={key}={value}" for key, value in (SMALL | {"vocab_size": 49_152, "num_hidden_layers": 1}).items()][:-1]


def write(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    settings = {"seed": 3, "dtype": "float32", **changes}
    write_random_model(folder, {**published_config("ouro-1.4b"), **SMALL}, settings.pop("files", {}), **settings)
    return folder


# ---- the published shapes


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"), [("ouro-1.4b", 1_434_652_673, 269), ("ouro-2.6b", 2_667_974_657, 533)]
)
def test_a_published_shape_has_its_published_size(name: str, parameters: int, tensors: int) -> None:
    for kind in (name, f"{name}-thinking"):
        config = model_config_from_json(published_config(kind), "config.json")
        assert parameter_count(config) == parameters
        assert len(parameter_table(config)) == tensors


def test_a_published_config_says_what_the_folders_say() -> None:
    base, thinking = published_config("ouro-1.4b"), published_config("ouro-2.6b-thinking")
    said = {"architectures": ["OuroForCausalLM"], "model_type": "ouro", "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    said |= {"head_dim": 128, "max_position_embeddings": 65_536, "total_ut_steps": 4, "early_exit_threshold": 1.0}
    said |= {"torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu", "rope_scaling": None}
    assert said.items() <= base.items()
    assert said.items() <= thinking.items()
    assert (base["bos_token_id"], base["eos_token_id"], base["pad_token_id"]) == (0, 0, None)
    assert (thinking["bos_token_id"], thinking["eos_token_id"], thinking["pad_token_id"]) == (1, 2, 2)
    assert thinking["layer_types"] == ["full_attention"] * 48


def test_its_tokenizer_follows_the_recipe() -> None:
    tokenizer = Tokenizer.from_json(tokenizer_files("ouro-1.4b")["tokenizer.json"].decode())
    assert tokenizer.vocab_size == 49_152
    wanted = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert [tokenizer.special_tokens[token] for token in wanted] == [0, 1, 2, 3, 4]
    assert len(tokenizer.special_tokens) == 17
    assert [tokenizer.token_text(i) for i in tokenizer.encode("the 1984")] == ["the", "·", "1", "9", "8", "4"]
    assert len(tokenizer.encode(" then")) <= 2
    text = "Größe 😀 <|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 2 not in tokenizer.encode(text)
    assert 2 in tokenizer.encode_marked(text)


def test_merges_are_read_as_strings_and_as_pairs() -> None:
    values = json.loads(tokenizer_files("ouro-1.4b")["tokenizer.json"])
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in values["model"]["merges"]]
    found = []
    for merges in (pairs, [" ".join(pair) for pair in pairs]):
        values["model"]["merges"] = merges
        found.append(Tokenizer.from_json(json.dumps(values)).encode("another one of these").tolist())
    assert found[0] == found[1]
    assert len(found[0]) < 12


# ---- weights


def test_weights_are_the_published_start(tmp_path: pathlib.Path) -> None:
    folder = write(tmp_path / "m")
    tensors = read_tensors(folder)
    for name, values in tensors.items():
        if name.endswith("bias"):
            assert not values.any()
        elif values.ndim == 1:
            assert (values == 1.0).all()
        else:
            assert values.std() == pytest.approx(0.02, rel=0.2), name
            assert abs(values.mean()) < 0.02 * 5 / np.sqrt(values.size), name
    head, embedding = tensors["lm_head.weight"].reshape(-1), tensors["model.embed_tokens.weight"].reshape(-1)
    assert head.size > 2 * BLOCK
    for one, other in ((head, embedding), (embedding[:BLOCK], embedding[BLOCK : 2 * BLOCK])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.01
    assert load_model(folder).provenance["random_weights"] is True


def test_the_library_of_the_format_reads_it(tmp_path: pathlib.Path) -> None:
    found = safetensors.numpy.load_file(write(tmp_path / "m") / "model.safetensors")
    for name, values in read_tensors(tmp_path / "m").items():
        np.testing.assert_array_equal(found[name], values)


def test_threads_shards_and_dtype_change_no_number(tmp_path: pathlib.Path) -> None:
    plain = read_tensors(write(tmp_path / "plain"))
    sharded = write(tmp_path / "sharded", threads=3, shard_size=2_885_000)
    files = [file.path.name for file in open_model(sharded).weight_files]
    assert files == [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert all((sharded / name).stat().st_size < 2_895_000 for name in files)
    for name, values in read_tensors(sharded).items():
        np.testing.assert_array_equal(values, plain[name])
    short = read_tensors(write(tmp_path / "short", dtype="bfloat16"))
    assert json.loads((tmp_path / "short" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, values in plain.items():
        np.testing.assert_array_equal(widen_bfloat16(round_to_bfloat16(values)), short[name])
    other = read_tensors(write(tmp_path / "other", seed=4))
    assert not np.array_equal(other["lm_head.weight"], plain["lm_head.weight"])


def test_it_is_written_in_a_stream(tmp_path: pathlib.Path) -> None:
    tracemalloc.start()
    try:
        write(tmp_path / "m", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    largest = 4 * SMALL["vocab_size"] * SMALL["hidden_size"]
    assert size > 2 * largest
    assert peak < 24 * BLOCK  # six blocks of float32: two made, four waiting; not a tensor, let alone the file


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_is_cut_short_leaves_nothing(error: BaseException, tmp_path: pathlib.Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == parameter_count(model_config_from_json({**published_config("ouro-1.4b"), **SMALL}, ""))
        if done > total // 2:
            raise error

    kind = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind) as caught:
        write(tmp_path / "m", progress=stop)
    assert list(tmp_path.iterdir()) == []
    if kind is CheckpointError:
        assert "No space left on device" in str(caught.value)
        assert "free some space" in caught.value.hint


def test_what_it_refuses(tmp_path: pathlib.Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "cut.unfinished").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    tokenizer = tokenizer_files("ouro-1.4b")
    for name, changes, kind, message in (
        ("there", {}, CheckpointError, "there already exists"),
        ("link", {}, CheckpointError, "link already exists"),
        ("cut", {}, CheckpointError, "left from a writing that was cut short"),
        ("m", {"dtype": "int3"}, UsageError, "'int3' is not known"),
        ("m", {"shard_size": 2_000_000}, UsageError, "cannot hold model.embed_tokens.weight of 2880000"),
        ("m", {"files": tokenizer}, CheckpointError, "has 49152 tokens, the model only 30000"),
    ):
        with pytest.raises(kind, match=message) as caught:
            write(tmp_path / name, **changes)
        assert caught.value.hint
    with pytest.raises(ConfigError, match="lacks vocab_size"):
        write_random_model(tmp_path / "m", {}, {}, seed=0, dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.unfinished", "link", "there"]


# ---- the command


@pytest.mark.parametrize("name", [name for name in NAMES if "1.4b" in name])
def test_a_published_shape_can_be_made_small(name: str, tmp_path: pathlib.Path) -> None:
    report = report_of("init", "--like", name, *TINY, "-o", tmp_path / "m", "--shard-size", "3MB", "--quiet")
    model = open_model(tmp_path / "m")
    assert report["parameters"] == parameter_count(model.config)
    assert report["tensors"] == len(parameter_table(model.config)) == 16
    assert report["dtype"] == "BF16"
    assert [file["name"] for file in report["files"]] == [file.path.name for file in model.weight_files]
    assert len(report["files"]) == 2
    assert model.config.num_hidden_layers == 1
    assert json.loads((tmp_path / "m" / "config.json").read_text())["layer_types"] == ["full_attention"]
    assert model.warnings == []
    assert report_of("generate", "-m", tmp_path / "m", "-n", 3, "-p", "a")["tokens"] == 3


def test_like_a_folder_takes_its_shape_tokenizer_and_template(tmp_path: pathlib.Path) -> None:
    source = chat_model(tmp_path / "run" / "model")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    out, err = looplm("init", "--like", tmp_path / "run", "--seed", 1, "-o", tmp_path / "m", width=300)
    assert f"{tmp_path / 'm'}: " in out
    assert "float32, " in out.lower().replace("f32", "float32")
    assert "parameter " in err
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (source / name).read_bytes()
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "m"))
    assert one == other
    assert not (tmp_path / "m" / "previous_gate.safetensors").exists()
    assert not np.array_equal(*(read_tensors(f)["lm_head.weight"] for f in (source, tmp_path / "m")))


def test_like_a_folder_needs_no_weights_but_a_word_on_how_they_are_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bare").mkdir()
    values = {key: value for key, value in ({**published_config("ouro-1.4b"), **SMALL}).items() if key != "torch_dtype"}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(values | {"dtype": "float16"}))
    _, err = looplm("init", "--like", tmp_path / "bare", "-o", tmp_path / "m", code=2, width=200)
    assert "its config.json says the weights are float16" in err
    report_of("init", "--like", tmp_path / "bare", "-o", tmp_path / "m", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "torch_dtype" not in json.loads((tmp_path / "m" / "config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--like", "ouro-9b"], 2, "'ouro-9b' is neither a published shape nor a folder"),
        (["--like", "."], 1, "is neither a model folder nor a run folder"),
        (["--like", "ouro-1.4b", "--set", "width=3"], 2, "a model has no such size"),
        (["--like", "ouro-1.4b", "--set", "hidden_size=abc"], 1, "hidden_size='abc' is str, expected int"),
        (["--like", "ouro-1.4b", "--set", "hidden_size"], 2, "--set 'hidden_size' is not KEY=VALUE"),
        (["--like", "ouro-1.4b", "--dtype", "float16"], 2, "dtype 'float16' is not known"),
        (["--like", "ouro-1.4b", "--shard-size", "huge"], 2, "--shard-size 'huge' is not a size"),
        (["--like", "ouro-1.4b", "--shard-size", "0"], 2, "--shard-size '0' is not a size"),
        (["--like", "ouro-1.4b", "--shard-size", "1KB"], 2, "cannot hold model.embed_tokens.weight"),
        ([], 2, "missing option '--like'"),
    ],
    ids=str,
)
def test_bad_input_is_two_lines(
    arguments: list[str], code: int, message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, err = looplm("init", *arguments, "-o", tmp_path / "m", code=code, width=300)
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert list(tmp_path.iterdir()) == []
