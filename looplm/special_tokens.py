"""What a model folder says about its special tokens and its chat template, and where its files contradict each other.

Three files may each say what ends a text: `config.json` and `generation_config.json` by id, `tokenizer_config.json` by
spelling.  The published folders are not always of one mind, so every id that one of them names ends a text, and a
contradiction is told.  What a chat template ends a turn with is only known once it is rendered (chat_template.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    from .text import Tokenizer

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
AGAIN = "correct the file, or copy it again"


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """What the files say, as far as they say it."""

    claims: dict[str, frozenset[int]]  # file -> the ids that it says end a text
    end_of_text: int | None  # the tokenizer's <|endoftext|>, which ends one without a claim
    texts: dict[str, str]  # bos_token, eos_token, ... of tokenizer_config.json, as a chat template wants them
    chat_template: str | None
    template_file: str  # the file that holds it, or would
    warnings: tuple[str, ...]

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends a text."""
        end = () if self.end_of_text is None else (self.end_of_text,)
        return frozenset(end).union(*self.claims.values())


def special_tokens(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    template_file: str | None,
    tokenizer: "Tokenizer | None",
) -> SpecialTokens:
    """Put together what the files say; a file that is not there is an empty mapping or None.

    Raises: CheckpointError if a file gives a special token in a form that is none.
    """
    texts = {
        key: text
        for key in tokenizer_config
        if key.endswith("_token") and (text := _spelling(key, tokenizer_config[key])) is not None
    }
    ends = {
        name: _ids(name, values.get("eos_token_id"))
        for name, values in ((CONFIG, config), (GENERATION_CONFIG, generation_config))
    }
    unknown = []
    if tokenizer is not None and "eos_token" in texts:
        spelled = tokenizer.id_of(texts["eos_token"])
        if spelled is None:
            unknown = [f"{TOKENIZER_CONFIG} ends a text with {texts['eos_token']!r}, which the tokenizer does not know"]
        else:
            ends[TOKENIZER_CONFIG] = frozenset({spelled})
    ends = {name: ids for name, ids in ends.items() if ids}
    vocab_size = config.get("vocab_size", 0)
    unknown += [
        f"{name} ends a text with token {token_id}, but the vocabulary has {vocab_size}"
        for name, ids in ends.items()
        for token_id in sorted(ids)
        if not 0 <= token_id < vocab_size
    ]
    said = _contradictions(ends, tokenizer)
    template, unusable = _template(tokenizer_config.get("chat_template") if template_file is None else template_file)
    source = TOKENIZER_CONFIG if template_file is None else TEMPLATE_FILE
    end_of_text = None if tokenizer is None else tokenizer.eos_id
    return SpecialTokens(ends, end_of_text, texts, template, source, (*unknown, *said, *unusable))


def named(token_ids: frozenset[int], tokenizer: "Tokenizer | None") -> str:
    """Tokens for a message: `<|im_end|> (2)`, or the ids alone where there is no tokenizer."""
    if tokenizer is None:
        return ", ".join(map(str, sorted(token_ids)))
    spelled = {i: token for token, i in tokenizer.special_tokens.items()}
    return ", ".join(f"{spelled.get(i, 'a token')} ({i})" for i in sorted(token_ids))


def _ids(name: str, value: Any) -> frozenset[int]:
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in listed):
        raise CheckpointError(f"{name}: eos_token_id={value!r} is neither a token id nor a list of them", AGAIN)
    return frozenset(listed)


def _spelling(key: str, value: Any) -> str | None:
    """A special token is spelled out, or is a mapping whose `content` is the spelling; null is none."""
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is None or isinstance(value, bool):  # add_bos_token and its like are switches
        return None
    if not isinstance(text, str):
        raise CheckpointError(f"{TOKENIZER_CONFIG}: {key}={value!r} is not a token's spelling", AGAIN)
    return text


def _template(value: Any) -> tuple[str | None, list[str]]:
    """The chat template, a text, or of several named ones that named "default"; and a warning where it is neither."""
    if value is None or isinstance(value, str):
        return value, []
    entries = value if isinstance(value, list) else []
    by_name = {e.get("name"): e.get("template") for e in entries if isinstance(e, Mapping)}
    chosen = by_name.get("default")
    if isinstance(chosen, str):
        return chosen, []
    names = ", ".join(map(repr, by_name)) or "none"
    return None, [f"{TOKENIZER_CONFIG} has no chat template named 'default' (there are: {names})"]


def _contradictions(ends: Mapping[str, frozenset[int]], tokenizer: "Tokenizer | None") -> list[str]:
    """One line for the first two files that have no end in common."""
    files = list(ends)
    for place, one in enumerate(files):
        for other in files[place + 1 :]:
            if not ends[one] & ends[other]:
                return [
                    f"{one} ends a text with {named(ends[one], tokenizer)}, {other} with "
                    f"{named(ends[other], tokenizer)}: each of them ends one"
                ]
    return []
