"""Text to token ids and back: trained, byte and letter tokenizers, and decoding one token at a time.

Every tokenizer here is a `tokenizer.json` that the `tokenizers` library opens.  Text is never special: a text that
contains "<|endoftext|>" is encoded as those characters, so that only this program decides where a document starts.  The
one exception is `encode_marked`, for what a chat template made.  Chat templates are not here.
"""

import codecs
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .arrays import Ints
from .errors import DataError

END_OF_TEXT = "<|endoftext|>"

# Characters per call of the library: one 100 MB string would keep gigabytes of its bookkeeping alive.
PIECE = 1 << 16
PIECES_AT_ONCE = 16

# Where cutting a text cannot change its tokens: GPT-2's pattern never joins a word to the single newline before it, nor
# to the word before its own leading space.  (Inside a run of white space it looks ahead, so there it would.)
_SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")


class Tokenizer:
    """A tokenizer and the exact JSON text it came from."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.json = source
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)  # ids may have holes: len() could be too small
        end = vocabulary.get(END_OF_TEXT)
        self.bos_id: int | None = end
        self.eos_id: int | None = end
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = frozenset(added)  # spelled as they are, not byte by byte
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        by_letter = isinstance(backend.model, models.WordLevel) and all(len(token) == 1 for token in vocabulary)
        self.alphabet = "".join(sorted(vocabulary, key=vocabulary.__getitem__)) if by_letter else ""
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_json(cls, source: str, where: str = "tokenizer.json") -> "Tokenizer":
        """Open the text of a `tokenizer.json`; `where` names it in messages.  Raises: DataError if it is not one."""
        try:
            backend = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            seen = " ".join(str(error).split())
            raise DataError(f"{where} is not a tokenizer: {seen}", "give a tokenizer.json") from error
        return cls(backend, source)

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Open a `tokenizer.json`, or the one in a folder.  Raises: DataError if there is none or it is not one."""
        path = pathlib.Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"cannot read tokenizer {path}: {error.strerror}", "use auto, bytes, or the path of a tokenizer.json"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not a tokenizer: not UTF-8 text", "give a tokenizer.json") from error
        return cls.from_json(source, str(path))

    def encode(self, text: str) -> Ints:
        """Token ids of a text, no special tokens added.

        Raises: DataError if the text has a letter outside a letter tokenizer's alphabet, or a lone surrogate.
        """
        self._check(text)
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_marked(self, text: str) -> Ints:
        """Token ids of a text in which the spelling of a special token is that token.  Raises: as `encode`."""
        self._check(text)
        self._backend.encode_special_tokens = False
        try:
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int64)
        finally:
            self._backend.encode_special_tokens = True

    def encode_long(self, text: str) -> Ints:
        """The same ids as `encode`, piece by piece, several at a time on the library's threads."""
        self._check(text)
        found: list[Ints] = []
        waiting: list[str] = []
        for piece in pieces(text):
            waiting.append(piece)
            if len(waiting) == PIECES_AT_ONCE:
                found += self._encode_batch(waiting)
                waiting = []
        found += self._encode_batch(waiting)
        return np.concatenate(found)

    def _encode_batch(self, texts: list[str]) -> list[Ints]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of token ids; bytes that are no character become U+FFFD.

        Special tokens are left out, or with `special` spelled, so that `encode_marked` finds them again.

        Raises: DataError if an id is outside the vocabulary (the library would drop it silently).
        """
        listed = [int(i) for i in ids]
        if self._byte_level:
            spell = self._raw_bytes if special else self.token_bytes
            spelled = {i: spell(i) for i in set(listed)}  # a corpus has many times more tokens than there are kinds
            return b"".join(map(spelled.__getitem__, listed)).decode("utf-8", "replace")
        for i in listed:
            self._token(i)
        return self._backend.decode(listed, skip_special_tokens=not special)

    def stream(self, special: bool = False) -> "TextStream":
        """A decoder that is fed one id at a time; `special` as in `decode`."""
        return TextStream(self, special)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens by their spelling."""
        return {self._token(i): i for i in sorted(self._special)}

    def id_of(self, token: str) -> int | None:
        """The id of the token that is spelled so, None if there is none."""
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text: none for a special token, perhaps part of a character otherwise."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = b"" if token_id in self._special else self._raw_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """A token for display on one line: "·the" for " the", "\\n" for a newline, "\\xe2" for part of a character."""
        text = self._raw_bytes(token_id).decode("utf-8", "backslashreplace")
        visible = text.replace(" ", "·")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in visible)

    def _raw_bytes(self, token_id: int) -> bytes:
        token = self._token(token_id)
        table = _byte_of_character()
        if token_id in self._added or not self._byte_level or not table.keys() >= set(token):
            return token.encode()
        return bytes(table[c] for c in token)

    def _token(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise DataError(
                f"token id {token_id} is outside the tokenizer's vocabulary of {self.vocab_size}",
                "the tokenizer belongs to another model",
            )
        return token

    def _check(self, text: str) -> None:
        if self.alphabet:
            known = set(self.alphabet)
            strange = next((c for c in text if c not in known), None)
            if strange is not None:
                raise DataError(
                    f"the letter {strange!r} is not in this model's alphabet",
                    f"it knows {' '.join(self.alphabet)}",
                )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds {text[error.start]!r} at character {error.start}: half a surrogate pair, no character",
                "give the text as UTF-8",
            ) from error


class TextStream:
    """Decodes ids one by one; what it returns, joined, is `Tokenizer.decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = tokenizer._raw_bytes if special else tokenizer.token_bytes
        self._pending = codecs.getincrementaldecoder("utf-8")("replace")
        # A decoder that is not byte by byte (one that adds spaces between words, say) needs its left neighbours.
        self._neighbours = None if tokenizer._byte_level else decoders.DecodeStream(skip_special_tokens=not special)

    def push(self, token_id: int) -> str:
        """The characters that this token completes, "" while one is still missing bytes."""
        if self._neighbours is None:
            return self._pending.decode(self._bytes_of(int(token_id)))
        self._tokenizer._token(int(token_id))
        return self._neighbours.step(self._tokenizer._backend, int(token_id)) or ""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._pending.decode(b"", final=True)


def pieces(text: str) -> Iterator[str]:
    """Cut a text into parts of about 64 thousand characters whose tokens are those of the whole, where that can be."""
    start = 0
    while len(text) - start > PIECE:
        cut = _SAFE_CUT.search(text, start + PIECE, start + 2 * PIECE)
        end = cut.start() if cut else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Ouro's pre-tokenizer (each digit alone): <|endoftext|> is 0, then every byte, then merges.

    A text too small for that many merges gives a smaller vocabulary.  Raises: DataError if vocab_size is below 257.
    """
    if vocab_size < 257:
        raise DataError(f"vocab_size={vocab_size} is too small", "256 bytes and one special token need at least 257")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = ouro_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return Tokenizer.from_json(backend.to_str(pretty=True))


def byte_tokenizer() -> Tokenizer:
    """One token per byte: <|endoftext|> is 0, byte b is b + 1."""
    vocabulary = {END_OF_TEXT: 0} | {character: byte + 1 for character, byte in _byte_of_character().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens([END_OF_TEXT])
    backend.pre_tokenizer = ouro_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return Tokenizer.from_json(backend.to_str(pretty=True))


def letter_tokenizer(alphabet: Sequence[str]) -> Tokenizer:
    """One token per character of `alphabet`, its id the place there; no special tokens.

    Raises: DataError if something in the alphabet is not one character, or is there twice.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet) or any(len(letter) != 1 for letter in alphabet):
        raise DataError(f"{''.join(alphabet)!r} is not an alphabet", "give different single characters")
    # The library wants an unknown-token's name; one that is not in the vocabulary makes it refuse unknown letters.
    backend = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer.from_json(backend.to_str(pretty=True))


def choose_vocab_size(number_of_bytes: int) -> int:
    """A vocabulary for a text of this size: 512 around a megabyte, twice that for four times the text.

    A merge has to be seen often before its embedding is worth having; the head, which is read once per loop, grows
    with every one.
    """
    for limit, size in ((64_000, 320), (256_000, 384)):
        if number_of_bytes < limit:
            return size
    size = 512
    while size < 32_768 and number_of_bytes >= 4_000_000 * (size // 512) ** 2:
        size *= 2
    return size


def tokenizer_config_json(tokenizer: Tokenizer, model_max_length: int) -> str:
    """The text of the `tokenizer_config.json` beside a tokenizer; without it transformers knows no end token."""
    values: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eos_id is not None:
        values |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return json.dumps(values, indent=2) + "\n"


def ouro_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Each digit alone, then GPT-2's pattern, as in the published tokenizer."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the others for U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return {spelled[byte]: byte for byte in range(256)}
