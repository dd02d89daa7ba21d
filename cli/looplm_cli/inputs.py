"""What commands are given: prompts, models, threads, loops; each checked here, at the border, once."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from looplm.errors import DataError, UsageError
from looplm_cli.render import print_warning, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from looplm.arrays import Ints
    from looplm.cache import KeyValueType, Policy
    from looplm.config import ModelConfig
    from looplm.model_files import ModelFiles
    from looplm.special_tokens import SpecialTokens
    from looplm.stored import StoredWeights
    from looplm.text import Tokenizer
    from looplm.weights import Weights


W = TypeVar("W")


@dataclasses.dataclass(frozen=True)
class Opened(Generic[W]):
    """A model ready for use, its weights as float32 or as they are stored, and what is known of its past."""

    folder: Path
    config: "ModelConfig"
    weights: W
    tokenizer: "Tokenizer"
    special_tokens: "SpecialTokens"
    provenance: dict[str, Any]

    @property
    def run(self) -> Path | None:
        """The run folder it belongs to, if it lies in one."""
        return self.folder.parent if (self.folder.parent / "config.yaml").is_file() else None

    @property
    def task(self) -> str:
        """ "text", or the synthetic task it was trained on."""
        return str(self.provenance.get("task", "text"))

    @property
    def task_settings(self) -> dict[str, Any]:
        return dict(self.provenance.get("task_settings") or {})

    @property
    def trained_loops(self) -> int:
        return int(self.provenance.get("trained_loops") or self.config.total_ut_steps)

    def hops_alphabet(self) -> dict[str, int]:
        """The `alphabet` and `max_hops` arguments of the functions in looplm.tasks.hops."""
        return {key: int(self.task_settings[key]) for key in ("alphabet", "max_hops") if key in self.task_settings}


def open_model(path: Path | None, accept: "Callable[[ModelFiles], object]" = lambda files: None) -> "Opened[Weights]":
    """Load the model named, or that of the most recent run; its warnings go to stderr.

    `accept` may refuse the folder by an error before its weights are read, which can take a while.

    Raises: CheckpointError, ConfigError or DataError for a folder that is not a whole model.
    """
    from looplm.checkpoint import load_model, resolve_model

    loaded = load_model(resolve_model(None if path is None else str(path)), accept)
    for warning in loaded.warnings:
        print_warning(warning)
    announce_compilation()
    return Opened(
        loaded.folder, loaded.config, loaded.weights, loaded.tokenizer, loaded.special_tokens, loaded.provenance
    )


def open_stored(
    path: Path | None, wanted: str | None, accept: "Callable[[ModelFiles], object]" = lambda files: None
) -> "Opened[StoredWeights]":
    """As `open_model`, but nothing is widened: weights are read as they are stored, or as the format wanted.

    Raises: what `open_model` raises; UsageError for an unknown format.
    """
    from looplm.checkpoint import resolve_model
    from looplm.model_files import open_model as open_files
    from looplm.stored import FORMATS, read_stored

    if wanted is not None and wanted not in FORMATS:
        raise UsageError(f"--weights {wanted!r} is not known", f"use one of {', '.join(FORMATS)}")
    files = open_files(resolve_model(None if path is None else str(path)))
    accept(files)
    for warning in files.warnings:
        print_warning(warning)
    announce_compilation()
    weights = read_stored(files, wanted)
    return Opened(files.folder, files.config, weights, files.tokenizer, files.special_tokens, files.provenance)


def announce_compilation() -> None:
    """Say why the first use of the engine takes longer, where it will (stderr)."""
    from looplm.kernels.jit import cache_folder, kernels_are_cached

    if cache_folder() is None:
        print_warning(
            "no folder for compiled kernels can be written: they are compiled anew in every run, which takes some "
            "fifteen seconds; set NUMBA_CACHE_DIR to a folder you may write to"
        )
    elif not kernels_are_cached():
        say("compiling kernels, once on this machine: some fifteen seconds")


def read_prompt(prompt: str) -> str:
    """The prompt's text; "-" is standard input, whose last newline is the terminal's and goes.

    Raises: DataError if standard input is not UTF-8, or the command line held bytes that are not.
    """
    if prompt != "-":
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError("the prompt is not UTF-8 text", "give it on standard input with -p -") from error
        return prompt
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        seen = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise DataError(f"standard input is not UTF-8: {seen}", "convert it first, e.g. with iconv") from error
    return text.removesuffix("\n")


def encode_prompt(model: Opened, text: str) -> "Ints":
    """Token ids of a prompt as one row.  -> input_ids: BS

    Raises: DataError if it is empty, longer than the context, or holds what the tokenizer or task does not know.
    """
    if model.task == "hops":
        from looplm.tasks import hops

        ids = hops.parse_prompt(text, **model.hops_alphabet())
    else:
        ids = model.tokenizer.encode(text)[None]
    if not ids.size:
        raise DataError("the prompt is empty", "give a text with -p")
    context = model.config.max_position_embeddings
    if ids.shape[1] > context:
        raise DataError(
            f"the prompt has {ids.shape[1]} tokens, more than the model's context of {context}", "shorten the prompt"
        )
    return ids


def refuse_task(model: "Opened | ModelFiles") -> None:
    """Raises: DataError for a model of a synthetic task, which has no language."""
    task = model.provenance.get("task", "text")
    if task != "text":
        raise DataError(
            f"{model.folder} was trained on the task {task!r}: it is not a language model",
            f"look at its answers with: looplm inspect -m {model.folder}",
        )


def key_value_policy(kv: str) -> "Policy":
    """What --kv says.  Raises: UsageError if there is no such policy."""
    from looplm.cache import POLICIES

    for policy in POLICIES:
        if policy == kv:
            return policy
    raise UsageError(f"--kv {kv!r} is not known", "use last-exited or full")


def key_value_type(kv_dtype: str) -> "KeyValueType":
    """What --kv-dtype says.  Raises: UsageError if it is neither type."""
    from looplm.cache import KEY_VALUE_TYPES

    for known in KEY_VALUE_TYPES:
        if known == kv_dtype:
            return known
    raise UsageError(f"--kv-dtype {kv_dtype!r} is not known", "use float32 or bfloat16")


def check_loops(model: Opened, loops: int | None) -> int:
    """How many loops to run: as asked, else the model's own; more than it was trained with draws a warning."""
    if loops is None:
        return model.config.total_ut_steps
    if loops > model.trained_loops:
        print_warning(f"{loops} loops are more than the {model.trained_loops} this model was trained with")
    return loops


def thread_count(threads: int | None) -> int:
    """Threads to use: as asked, else all cores this process may use."""
    from looplm.threads import available_threads

    return available_threads() if threads is None else threads
