"""Splits, token files and windows: from documents to batches, and what is refused on the way."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from looplm import data, text
from looplm.corpus import Corpus, split
from looplm.settings import DataConfig
from refusals import refused

# Splitting and encoding


@pytest.mark.parametrize("val_fraction", [0.001, 0.1, 0.37, 0.999])
@pytest.mark.parametrize("lengths", [[2], [3], [1, 1], [100], [500, 1, 700], [1000] * 3])
def test_split_is_a_cut_at_a_character(lengths, val_fraction):
    documents = ["".join(map(chr, range(0x4E00, 0x4E00 + n))) for n in lengths]
    train, val = split(Corpus(documents, []), val_fraction)
    assert "".join(train + val) == "".join(documents)
    assert all(train)
    assert all(val)
    total, held = sum(lengths), sum(map(len, val))
    assert held == max(int(total * val_fraction), min(64, total // 2))
    if len(train) + len(val) == len(documents):
        assert train + val == documents
    else:
        assert [*train[:-1], train[-1] + val[0], *val[1:]] == documents


def test_documents_are_marked_unless_they_go_on():
    tokenizer = text.byte_tokenizer()
    assert data.encode_corpus(tokenizer, ["a", "bc"]).tolist() == [0, 98, 0, 99, 100]
    assert data.encode_corpus(tokenizer, ["a", "bc"], continued=True).tolist() == [98, 0, 99, 100]
    assert data.encode_corpus(tokenizer, []).shape == (0,)
    assert data.encode_corpus(text.letter_tokenizer("abc"), ["a", "bc"]).tolist() == [0, 1, 2]


def test_prepare_text_holds_the_end_out_of_everything(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcd efgh\n" * 900 + "QZ QZ QZ.\n" * 100, encoding="utf-8")
    prepared = data.prepare_text(DataConfig(corpus=(str(path),), vocab_size=270), seq_len=16)
    tokenizer = prepared.tokenizer
    assert tokenizer.decode(prepared.train_ids) == "abcd efgh\n" * 900
    assert tokenizer.decode(prepared.val_ids) == "QZ QZ QZ.\n" * 100
    assert prepared.train_ids[0] == tokenizer.eos_id
    assert tokenizer.eos_id not in prepared.val_ids, "it goes on where training stopped"
    assert prepared.bytes_per_token == 1000 / len(prepared.val_ids)
    assert tokenizer.vocab_size == 257 + 3 + 4, "all merges of two words"
    assert len(tokenizer.encode("QZ")) == 2, "the tokenizer was not trained on what was held out"
    assert prepared.origin[0]["bytes"] == 10_000
    again = data.prepare_text(DataConfig(corpus=(str(path),), vocab_size=270), seq_len=16)
    assert again.tokenizer.json == tokenizer.json
    assert np.array_equal(again.train_ids, prepared.train_ids)


def test_prepare_text_marks_held_out_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": letter * 100}) + "\n" for letter in "abcdefghij"))
    prepared = data.prepare_text(DataConfig(corpus=(str(path),), tokenizer="bytes", val_fraction=0.2), seq_len=16)
    assert prepared.val_ids.tolist() == [0, *[ord("i") + 1] * 100, 0, *[ord("j") + 1] * 100]
    prepared = data.prepare_text(DataConfig(corpus=(str(path),), tokenizer="bytes", val_fraction=0.15), seq_len=16)
    assert prepared.val_ids.tolist() == [*[ord("i") + 1] * 50, 0, *[ord("j") + 1] * 100]
    assert prepared.bytes_per_token == 150 / 151


def test_prepare_text_takes_the_tokenizer_asked_for(story, tmp_path):
    own = text.train_bpe(["something else entirely"], 270)
    (tmp_path / "tokenizer.json").write_text(own.json, encoding="utf-8")
    whole = pathlib.Path(story).read_text()
    trained_on = whole[: len(whole) - len(whole) // 10]
    for config, expected in (
        (DataConfig(corpus=(story,)), text.train_bpe([trained_on], text.choose_vocab_size(len(trained_on)))),
        (DataConfig(corpus=(story,), vocab_size=300), text.train_bpe([trained_on], 300)),
        (DataConfig(corpus=(story,), tokenizer="bytes"), text.byte_tokenizer()),
        (DataConfig(corpus=(story,), tokenizer=str(tmp_path / "tokenizer.json")), own),
    ):
        prepared = data.prepare_text(config, seq_len=32)
        assert prepared.tokenizer.json == expected.json
        ids = np.concatenate([prepared.train_ids, prepared.val_ids])
        assert prepared.tokenizer.decode(ids) == whole
    assert data.prepare_text(DataConfig(corpus=(story,)), 32, tokenizer=own).tokenizer is own
    missing = DataConfig(corpus=(story,), tokenizer="nope.json")
    assert "cannot read tokenizer nope.json" in refused(data.prepare_text, missing, seq_len=32)[0]


def test_a_tokenizer_that_loses_text_is_refused(story, tmp_path):
    values = json.loads(text.byte_tokenizer().json)
    values["normalizer"] = {"type": "Lowercase"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    config = DataConfig(corpus=(story,), tokenizer=str(path))
    message, hint = refused(data.prepare_text, config, seq_len=32)
    assert message == f"tokenizer {path} does not give the text back: it differs at character 0 ('O')"
    assert "auto or bytes" in hint
    assert data.prepare_text(config, 32, tokenizer=text.Tokenizer.from_file(path)), "a model's own is taken as it is"


def test_too_small_a_corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 140)
    config = DataConfig(corpus=(str(path),), tokenizer="bytes")
    message, hint = refused(data.prepare_text, config, seq_len=128)
    assert message == ("the corpus is too small: 77 tokens (76 bytes) to train on, 129 needed for train.seq_len=128")
    assert "--set train.seq_len=76" in hint
    prepared = data.prepare_text(config, seq_len=76)
    assert len(prepared.train_ids) == 77
    assert source_of(prepared, seq_len=76).batch(0).input_ids.shape == (4, 76)
    path.write_text("x")
    assert "too small: 2 tokens" in refused(data.prepare_text, config, seq_len=2)[0]


def test_too_little_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(("x" * 64 + "\n") * 50 + "x" * 64)
    config = DataConfig(corpus=(str(path),), val_fraction=0.0001, vocab_size=300)
    message, hint = refused(data.prepare_text, config, seq_len=2)
    assert message == "the held-out part has 1 token, 2 needed"
    assert "--val-fraction" in hint


# Token files


@pytest.mark.parametrize(
    ("ids", "dtype"), [([], np.uint16), ([0, 65535], np.uint16), ([1, 65536], np.uint32), ([2**32 - 1], np.uint32)]
)
def test_token_files(tmp_path, ids, dtype):
    path = tmp_path / "train.npy"
    data.save_tokens(path, np.array(ids, np.int64))
    loaded = data.load_tokens(path)
    assert loaded.dtype == dtype
    assert loaded.tolist() == ids
    assert not ids or isinstance(loaded, np.memmap)
    assert [file.name for file in tmp_path.iterdir()] == ["train.npy"]


def test_a_token_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "train.npy"
    data.save_tokens(path, np.arange(5))

    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    message, _ = refused(data.save_tokens, path, np.arange(9))
    assert message == f"cannot write {path}: No space left on device"
    assert data.load_tokens(path).tolist() == [0, 1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["train.npy"]
    assert "No such file" in refused(data.save_tokens, tmp_path / "nowhere" / "a.npy", np.arange(9))[0]


def test_damaged_token_files(tmp_path):
    path = tmp_path / "train.npy"
    assert "cannot read token file" in refused(data.load_tokens, path)[0]
    data.save_tokens(path, np.arange(1000))
    whole = path.read_bytes()
    for damaged in (b"", b"nonsense", whole[:50], whole[:-10]):
        path.write_bytes(damaged)
        assert "cannot read token file" in refused(data.load_tokens, path)[0]
    for array in (np.zeros((2, 2), np.uint16), np.zeros(3, np.float32)):
        np.save(path, array)
        assert "does not hold one row of token ids" in refused(data.load_tokens, path)[0]


# Batches


def source_of(prepared, batch_size=4, seq_len=16, seed=0):
    return data.TextSource(
        prepared.train_ids,
        prepared.val_ids,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        bytes_per_token=prepared.bytes_per_token,
        vocab_size=prepared.tokenizer.vocab_size,
    )


def numbered(train=1000, val=100):
    """Ids that say where they are, so that a window can be read off."""
    return types.SimpleNamespace(
        train_ids=np.arange(train, dtype=np.uint16),
        val_ids=np.arange(10_000, 10_000 + val),
        bytes_per_token=2.5,
        tokenizer=types.SimpleNamespace(vocab_size=20_000),
    )


def test_batches_are_windows_and_depend_on_seed_and_step_alone():
    source = source_of(numbered(), seed=7)
    first = source.batch(3)
    source.batch(4)
    again = source_of(numbered(), seed=7).batch(3)
    assert np.array_equal(first.input_ids, again.input_ids)
    assert np.array_equal(first.target, first.input_ids + 1)
    assert np.all(np.diff(first.input_ids, axis=1) == 1)
    assert first.input_ids.dtype == first.target.dtype == np.int64
    assert first.start is None
    assert not np.array_equal(first.input_ids, source.batch(4).input_ids)
    assert not np.array_equal(first.input_ids, source_of(numbered(), seed=8).batch(3).input_ids)


def test_every_window_can_be_drawn():
    source = source_of(numbered(train=20), batch_size=64, seq_len=16)
    starts = np.concatenate([source.batch(step).input_ids[:, 0] for step in range(10)])
    assert set(starts) == {0, 1, 2, 3}
    assert {row[-1] for row in source.batch(0).target} <= set(range(16, 20))


@pytest.mark.parametrize("val", [2, 3, 16, 17, 18, 64, 65, 66, 100])
def test_validation_counts_every_id_once(val):
    source = source_of(numbered(val=val))
    batches = list(source.validation())
    target = np.concatenate([batch.target for batch in batches])
    input_ids = np.concatenate([batch.input_ids for batch in batches])
    counted = target >= 0
    assert target[counted].tolist() == list(range(10_001, 10_000 + val))
    assert np.array_equal(input_ids[counted] + 1, target[counted])
    assert counted.sum() == source.val_tokens == val - 1
    assert np.all(np.diff(counted.astype(int), axis=1) <= 0), "padding is on the right"
    assert counted.any(axis=1).all()
    assert all(len(batch.input_ids) <= 4 for batch in batches)
    assert all(batch.input_ids.shape[1] == 16 for batch in batches)
    assert input_ids.min() >= 0
    assert input_ids.max() < 20_000


def test_a_shorter_validation_is_spread_over_the_text():
    source = source_of(numbered(val=1000))
    batches = list(source.validation(2))
    starts = np.concatenate([batch.input_ids[:, 0] for batch in batches])
    assert starts.tolist() == [10_000 + 16 * n for n in (0, 8, 17, 26, 35, 44, 53, 62)]
    again = np.concatenate([batch.input_ids[:, 0] for batch in source.validation(2)])
    assert np.array_equal(starts, again)
    assert len(list(source.validation(1000))) == len(list(source.validation())) == 16
    assert list(source.validation(0)) == []


def test_a_source_says_what_it_is():
    source = source_of(numbered())
    assert (source.kind, source.vocab_size, source.bytes_per_token, source.val_tokens) == ("text", 20_000, 2.5, 99)


def test_batches_from_mapped_files(tmp_path):
    prepared = numbered()
    data.save_tokens(tmp_path / "train.npy", prepared.train_ids)
    mapped = types.SimpleNamespace(**{**vars(prepared), "train_ids": data.load_tokens(tmp_path / "train.npy")})
    assert np.array_equal(source_of(mapped).batch(1).target, source_of(prepared).batch(1).target)


def test_importing_loads_no_tokenizer_library():
    code = (
        "import sys, looplm.data, looplm.tasks.hops; print(*{'tokenizers', 'numba', 'yaml'}.intersection(sys.modules))"
    )
    root = pathlib.Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout.strip() == ""
