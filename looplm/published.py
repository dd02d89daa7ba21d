"""The published Ouro models without their weights: config.json, and a tokenizer and chat template to the same recipe.

The config is that of the folders.  The tokenizer is not theirs, whose merges come from their training text: it has the
same kind, size, pre-tokenizer and special tokens, and merges of letters into syllables, so that it loads, cuts and
streams as theirs does.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from .config import ModelConfig, model_config_to_json
from .errors import UsageError
from .text import END_OF_TEXT, ouro_pre_tokenizer

LAYERS = {"ouro-1.4b": 24, "ouro-2.6b": 48}
THINKING = "-thinking"
NAMES = tuple(f"{size}{kind}" for size in LAYERS for kind in ("", THINKING))

VOCAB_SIZE = 49_152
TURN_BEGIN, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (  # their ids are their places
    END_OF_TEXT,
    TURN_BEGIN,
    TURN_END,
    "<think>",
    "</think>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
    "<empty_output>",
)
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # by how often English has them

TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
THINK
{%- endif %}
"""
THINK = """\
    {%- if enable_thinking is defined and enable_thinking %}
        {{- '<think>\\n' }}
    {%- endif %}"""


def published_config(name: str) -> dict[str, Any]:
    """The mapping of a published model's `config.json`.  Raises: UsageError if there is no model of that name."""
    if name not in NAMES:
        raise UsageError(f"{name!r} is not a published shape", f"there are {', '.join(NAMES)}")
    thinks = name.endswith(THINKING)
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=LAYERS[name.removesuffix(THINKING)],
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        total_ut_steps=4,
        max_position_embeddings=65_536,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        early_exit_threshold=1.0,
        initializer_range=0.02,
        bos_token_id=1 if thinks else 0,
        eos_token_id=2 if thinks else 0,
        pad_token_id=2 if thinks else None,
    )
    return {**model_config_to_json(config), "torch_dtype": "bfloat16"}


def tokenizer_files(name: str) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`, with its chat template, as such a folder has them.

    The base models end a text with a token that their chat template does not use, the thinking ones agree with theirs;
    only the template of the thinking ones knows `enable_thinking`.
    """
    thinks = name.endswith(THINKING)
    begin, end = (TURN_BEGIN, TURN_END) if thinks else (END_OF_TEXT, END_OF_TEXT)
    values = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,
        "unk_token": END_OF_TEXT,
        "model_max_length": 131_072,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE.replace("THINK\n", THINK + "\n" if thinks else ""),
    }
    return {
        "tokenizer.json": _syllable_tokenizer().to_str().encode(),
        "tokenizer_config.json": (json.dumps(values, indent=2) + "\n").encode(),
    }


def _syllable_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE: the special tokens, all bytes, then ever longer rows of letters until the vocabulary is full."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = VOCAB_SIZE - len(SPECIAL_TOKENS) - len(alphabet)
    merges = list(itertools.islice(_merges(), room))
    tokens = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    backend = tokenizers.Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.pre_tokenizer = ouro_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges() -> Iterator[tuple[str, str]]:
    """A token and a letter behind it, shorter tokens first, without end; "Ġ" is how byte-level BPE spells a space."""
    tokens = ["Ġ", *LETTERS]
    while True:
        yield from itertools.product(tokens, LETTERS)
        tokens = [token + letter for token in tokens for letter in LETTERS]
