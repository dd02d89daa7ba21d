"""Tokenizers: nothing is lost, nothing in a text is special, a stream never shows half a character."""

import json

import numpy as np
import pytest
import tokenizers

from looplm import text
from looplm.errors import DataError

ENGLISH = "The loop reads what it wrote, 12 345 times; then it stops.\n\n  Indented\ttext\r\n" * 40
STRANGE = (
    "naïve café 😀👩‍👩‍👧 漢字かな交じり文 \u202e\u0000\u001b[0m \ufeff\ufffd <|endoftext|> don't \n\n\n   \t\u2028 "
    + bytes(range(256)).decode("latin-1")
    + np.random.default_rng(0).integers(0, 256, 3000, np.uint8).tobytes().decode("utf-8", "replace")
    + "".join(map(chr, np.random.default_rng(1).integers(0xE000, 0x110000, 500)))
)


@pytest.fixture(scope="module")
def bpe():
    return text.train_bpe([ENGLISH], 300)


@pytest.fixture(params=["bpe", "bytes"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else text.byte_tokenizer()


@pytest.mark.parametrize("sample", [ENGLISH, STRANGE, "", " ", "\n", "<|endoftext|>"])
def test_round_trip_is_exact(tokenizer, sample):
    ids = tokenizer.encode(sample)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == sample
    assert tokenizer.eos_id not in ids
    assert np.array_equal(tokenizer.encode_long(sample), ids)


def test_stream_is_decode_and_never_half_a_character(tokenizer):
    ids = tokenizer.encode(STRANGE)
    stream = tokenizer.stream()
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) + stream.flush() == STRANGE
    assert sum(part.count("\ufffd") for part in shown) == STRANGE.count("\ufffd")
    assert "" in shown


def test_special_tokens_are_spelled_and_found_again_where_that_is_asked(tokenizer):
    plain, marked = tokenizer.encode("a<|endoftext|>é"), tokenizer.encode_marked("a<|endoftext|>é")
    assert list(tokenizer.special_tokens.items()) == [("<|endoftext|>", 0)]
    assert 0 not in plain
    assert list(marked) == [*tokenizer.encode("a"), 0, *tokenizer.encode("é")]
    assert tokenizer.decode(marked, special=True) == "a<|endoftext|>é"
    assert tokenizer.decode(marked) == "aé"
    stream = tokenizer.stream(special=True)
    assert "".join(stream.push(i) for i in marked) + stream.flush() == "a<|endoftext|>é"
    assert np.array_equal(tokenizer.encode("a<|endoftext|>é"), plain)  # and only then


def test_stream_of_ids_that_are_no_text(tokenizer):
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 4000)
    stream = tokenizer.stream()
    shown = "".join(stream.push(i) for i in ids)
    assert shown + stream.flush() == tokenizer.decode(ids)
    assert "<|endoftext|>" not in shown


def test_stream_holds_an_unfinished_character_back_until_flush(tokenizer):
    ids = text.byte_tokenizer().encode("é漢😀")
    tokenizer = text.byte_tokenizer()
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids[:-1]] == ["", "é", "", "", "漢", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_decode_agrees_with_the_library(tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer.json)
    ids = np.random.default_rng(2).integers(0, tokenizer.vocab_size, 2000).tolist()
    assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=True)


def test_files_open_in_the_library_and_here(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.json, encoding="utf-8")
    assert tokenizers.Tokenizer.from_file(str(path)).get_vocab_size() == tokenizer.vocab_size
    for where in (path, str(path), tmp_path):
        again = text.Tokenizer.from_file(where)
        assert again.json == tokenizer.json
        assert np.array_equal(again.encode(ENGLISH), tokenizer.encode(ENGLISH))
        assert (again.bos_id, again.eos_id) == (0, 0)


def test_bpe_is_ours_in_every_detail(bpe):
    assert bpe.vocab_size == 300
    assert {bpe.decode([i]) for i in range(1, 257)} >= {chr(c) for c in range(128)}
    assert {bpe.token_bytes(i) for i in range(1, 257)} == {bytes([b]) for b in range(256)}
    assert len(bpe.encode("12345")) == 5, "each digit alone"
    assert len(bpe.encode(" the")) < 4, "merges were learnt"
    pre_tokenizer = json.loads(bpe.json)["pre_tokenizer"]["pretokenizers"]
    assert [part["type"] for part in pre_tokenizer] == ["Digits", "ByteLevel"]
    assert pre_tokenizer[0]["individual_digits"] is True
    assert pre_tokenizer[1]["add_prefix_space"] is False
    assert text.train_bpe([ENGLISH], 300).json == bpe.json


def test_bpe_of_too_little_text_is_smaller():
    tokenizer = text.train_bpe(["ab"], 1000)
    assert 257 <= tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("zz 😀")) == "zz 😀"
    with pytest.raises(DataError, match="vocab_size=256 is too small"):
        text.train_bpe(["ab"], 256)


def test_byte_tokenizer_ids_are_bytes_plus_one():
    tokenizer = text.byte_tokenizer()
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("é 1\n").tolist() == [byte + 1 for byte in "é 1\n".encode()]


def test_pieces_do_not_change_the_tokens(bpe, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 50)
    monkeypatch.setattr(text, "PIECES_AT_ONCE", 3)
    blanks = ["\n", "\n\n", " ", "   ", "\t", "\r\n", "\u00a0", "\x1c", "\u2028"]
    words = ["one", "two's", "12", "漢字", "...", " x", "one two", "12\n漢字", "x ...", "...\n1"]
    for seed in range(40):
        groups = np.random.default_rng(seed).choice(blanks + words, (100, 4))
        sample = "".join("".join(group) + "a b" for group in groups)  # so that a safe cut is always near
        parts = list(text.pieces(sample))
        assert "".join(parts) == sample
        assert len(parts) > 5
        assert np.array_equal(bpe.encode_long(sample), bpe.encode(sample))


def test_text_without_a_safe_cut_is_still_exact(bpe, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 50)
    for sample in ("漢" * 333, "\n" * 333, "a" * 100):
        assert max(map(len, text.pieces(sample))) <= 100
        assert bpe.decode(bpe.encode_long(sample)) == sample


def test_letters():
    tokenizer = text.letter_tokenizer("123abc")
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("2abccb").tolist() == [1, 3, 4, 5, 5, 4]
    assert tokenizer.encode_long("2abccb").tolist() == [1, 3, 4, 5, 5, 4]
    assert tokenizer.decode([1, 3, 4, 5]) == "2abc"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    stream = tokenizer.stream()
    assert [stream.push(i) for i in (1, 3, 3)] + [stream.flush()] == ["2", "a", "a", ""]
    backend = tokenizers.Tokenizer.from_str(tokenizer.json)
    assert backend.encode("2abc").ids == [1, 3, 4, 5]
    assert backend.decode([1, 3, 4, 5]) == "2abc"


def test_letters_outside_the_alphabet():
    tokenizer = text.Tokenizer.from_json(text.letter_tokenizer("123abc").json)
    for encode in (tokenizer.encode, tokenizer.encode_long):
        with pytest.raises(DataError) as caught:
            encode("1abz")
        assert str(caught.value) == "the letter 'z' is not in this model's alphabet"
        assert caught.value.hint == "it knows 1 2 3 a b c"


@pytest.mark.parametrize("alphabet", ["", "aa", ["ab", "c"]])
def test_what_is_no_alphabet(alphabet):
    with pytest.raises(DataError, match="is not an alphabet"):
        text.letter_tokenizer(alphabet)


def test_tokens_for_display(bpe):
    ids = {bpe.token_bytes(i): i for i in range(bpe.vocab_size)}
    assert bpe.token_text(ids[b" t"]) == "·t"
    assert bpe.token_text(ids[b"\n"]) == "\\n"
    assert bpe.token_text(ids[b"\t"]) == "\\t"
    assert bpe.token_text(ids[b"\x1b"]) == "\\x1b"
    assert bpe.token_text(ids[b"\xe2"]) == "\\xe2"
    assert bpe.token_text(0) == "<|endoftext|>"
    assert bpe.token_bytes(0) == b""
    assert all(bpe.token_text(i).isprintable() for i in range(bpe.vocab_size))


@pytest.mark.parametrize("bad", [-1, 300, 10**9])
def test_ids_outside_the_vocabulary(bpe, bad):
    letters = text.letter_tokenizer("abc")
    for call in (bpe.token_text, bpe.stream().push, letters.stream().push):
        with pytest.raises(DataError, match=rf"token id {bad} is outside"):
            call(bad)
    for tokenizer in (bpe, letters):
        with pytest.raises(DataError, match=rf"token id {bad} is outside"):
            tokenizer.decode([1, bad])


def test_half_a_surrogate_pair(bpe):
    with pytest.raises(DataError, match=r"'\\udce9' at character 2: half a surrogate pair"):
        bpe.encode("ab\udce9")


def test_added_tokens_padding_and_prefixes_of_a_foreign_tokenizer():
    """A tokenizer.json may ask for padding, truncation and a start token, and have added tokens that are text."""
    backend = tokenizers.Tokenizer.from_str(text.byte_tokenizer().json)
    backend.add_tokens(["<think>"])
    backend.enable_truncation(3)
    backend.enable_padding(length=10, pad_id=0, pad_token="<|endoftext|>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = text.Tokenizer.from_json(backend.to_str())
    assert tokenizer.vocab_size == 258
    ids = tokenizer.encode("abcde<think>")
    assert ids.tolist() == [*(byte + 1 for byte in b"abcde"), 257]
    assert np.array_equal(tokenizer.encode_long("abcde<think>"), ids)
    assert tokenizer.decode(ids) == "abcde<think>"
    assert tokenizer.token_text(257) == "<think>"


def test_a_decoder_that_adds_spaces_streams_them():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = text.Tokenizer.from_json(backend.to_str())
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in (1, 2, 1)) + stream.flush() == tokenizer.decode([1, 2, 1])
    assert tokenizer.decode([1, 2, 1]) == "hello world hello"
    assert tokenizer.encode("hello z").tolist() == [1, 0]


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0", "model": {"type": "Nope"}}'])
def test_files_that_are_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        text.Tokenizer.from_file(path)
    assert str(caught.value).startswith(f"{path} is not a tokenizer: ")
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot read tokenizer .*nope\.json: No such file") as caught:
        text.Tokenizer.from_file(tmp_path / "nope.json")
    assert "auto, bytes" in caught.value.hint
    with pytest.raises(DataError, match=r"cannot read tokenizer .*tokenizer\.json"):
        text.Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        text.Tokenizer.from_file(tmp_path)


def test_vocabulary_grows_with_the_text():
    sizes = [text.choose_vocab_size(n) for n in (0, 50_000, 200_000, 420_000, 1_000_000, 4_000_000, 16_000_000, 10**12)]
    assert sizes == [320, 320, 384, 512, 512, 1024, 2048, 32_768]


def test_tokenizer_config():
    values = json.loads(text.tokenizer_config_json(text.byte_tokenizer(), 1024))
    assert values["eos_token"] == values["bos_token"] == values["pad_token"] == "<|endoftext|>"
    assert values["model_max_length"] == 1024
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "eos_token" not in json.loads(text.tokenizer_config_json(text.letter_tokenizer("ab"), 64))
