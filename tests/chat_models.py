"""A tiny random model in a folder made for chatting: ChatML tokens, a template, bytes."""

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from looplm.checkpoint import save_model
from looplm.config import ModelConfig
from looplm.published import SPECIAL_TOKENS, tokenizer_files
from looplm.settings import InitConfig
from looplm.text import Tokenizer, ouro_pre_tokenizer
from looplm.weights import initialise

SPECIALS = SPECIAL_TOKENS[:5]  # <|endoftext|>, <|im_start|>, <|im_end|>, <think>, </think>
CONTEXT = 256


def template_of(name: str) -> str:
    """The chat template that `looplm init` writes for a published name."""
    return json.loads(tokenizer_files(name)["tokenizer_config.json"])["chat_template"]


def chat_tokenizer() -> Tokenizer:
    """One token per byte behind the special ones."""
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, []))
    backend.add_special_tokens(list(SPECIALS))
    backend.pre_tokenizer = ouro_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return Tokenizer.from_json(backend.to_str())


def chat_model(
    folder: pathlib.Path,
    template: str | None = None,
    eos: int | None = 2,
    context: int = CONTEXT,
    endless: bool = False,
    **more: Any,
) -> pathlib.Path:
    """A folder as the thinking models have it; `more` goes into tokenizer_config.json, `eos` into config.json.

    An endless model never likes <|endoftext|> best, which ends every other one sooner or later.
    """
    tokenizer = chat_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        total_ut_steps=4,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=eos,
    )
    weights = initialise(config, InitConfig(weight_std=0.4, embedding_std=1.0, post_norm=0.5), seed=2)
    if endless:
        weights.head[SPECIALS.index("<|endoftext|>")] = 0.0
    values = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": template_of("ouro-1.4b-thinking") if template is None else template,
        **more,
    }
    save_model(folder, weights, tokenizer.json, json.dumps({k: v for k, v in values.items() if v != "gone"}), {})
    return folder
