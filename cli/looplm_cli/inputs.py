"""What commands are given: prompts, models, threads, loops; each checked here, at the border, once."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from looplm.errors import DataError
from looplm_cli.render import print_warning, say

if TYPE_CHECKING:
    from looplm.arrays import Ints
    from looplm.config import ModelConfig
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


def open_model(path: Path | None) -> "Opened[Weights]":
    """Load the model named, or that of the most recent run; its warnings go to stderr.

    Raises: CheckpointError, ConfigError or DataError for a folder that is not a whole model.
    """
    from looplm.checkpoint import load_model, resolve_model
    from looplm.text import Tokenizer

    loaded = load_model(resolve_model(None if path is None else str(path)))
    for warning in loaded.warnings:
        print_warning(warning)
    announce_compilation()
    tokenizer = Tokenizer.from_file(loaded.folder)
    return Opened(loaded.folder, loaded.config, loaded.weights, tokenizer, loaded.provenance)


def open_stored(path: Path | None, wanted: str | None) -> "Opened[StoredWeights]":
    """As `open_model`, but nothing is widened: weights are read as they are stored, or as the format wanted.

    Raises: what `open_model` raises; UsageError for an unknown format.
    """
    from looplm.checkpoint import resolve_model
    from looplm.errors import UsageError
    from looplm.model_files import open_model as open_files
    from looplm.stored import FORMATS, read_stored
    from looplm.text import Tokenizer

    if wanted is not None and wanted not in FORMATS:
        raise UsageError(f"--weights {wanted!r} is not known", f"use one of {', '.join(FORMATS)}")
    files = open_files(resolve_model(None if path is None else str(path)))
    for warning in files.warnings:
        print_warning(warning)
    announce_compilation()
    weights = read_stored(files, wanted)
    return Opened(files.folder, files.config, weights, Tokenizer.from_file(files.folder), files.provenance)


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
