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
    from looplm.exits import ExitRule
    from looplm.model_files import ModelFiles
    from looplm.special_tokens import SpecialTokens
    from looplm.stored import PromptPrecision, StoredWeights
    from looplm.text import Tokenizer
    from looplm.weights import Weights


W = TypeVar("W")
Choice = TypeVar("Choice", bound=str)


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

    @property
    def calibrated(self) -> dict[str, Any]:
        """What `looplm calibrate` solved for, in `looplm.json`; empty if it did not, or it is not whole."""
        found = self.provenance.get("exit")
        thresholds = found.get("thresholds") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(thresholds, dict):
            return {}
        whole = all(isinstance(threshold, int | float) for threshold in thresholds.values())
        return found if whole and found.get("rule") in thresholds else {}

    def loss_at_depth(self, loops: int) -> float | None:
        """The held-out loss measured at a depth, if some command stored it in `looplm.json`."""
        losses = self.provenance.get("loss_by_depth")
        found = losses.get(str(loops)) if isinstance(losses, dict) else None
        return float(found) if isinstance(found, int | float) else None

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
    path: Path | None,
    wanted: str | None,
    accept: "Callable[[ModelFiles], object]" = lambda files: None,
    threads: int | None = None,
) -> "Opened[StoredWeights]":
    """As `open_model`, but nothing is widened: weights are read as they are stored, or as the format wanted.

    `threads`, default all cores, convert them then.

    Raises: what `open_model` raises; UsageError for an unknown format.
    """
    from looplm.checkpoint import finite_warnings, resolve_model
    from looplm.model_files import open_model as open_files
    from looplm.stored import FORMATS, read_stored

    if wanted is not None and wanted not in FORMATS:
        raise UsageError(f"--weights {wanted!r} is not known", f"use one of {', '.join(FORMATS)}")
    files = open_files(resolve_model(None if path is None else str(path)))
    accept(files)
    announce_compilation()
    weights = read_stored(files, wanted, thread_count(threads))
    for warning in files.warnings + finite_warnings(weights.float_arrays):
        print_warning(warning)
    return Opened(files.folder, files.config, weights, files.tokenizer, files.special_tokens, files.provenance)


def announce_compilation() -> None:
    """Say why the first use of the engine takes longer, where it will (stderr)."""
    from looplm.kernels.jit import cache_folder, kernels_are_cached

    if cache_folder() is None:
        print_warning(
            "no folder for compiled kernels can be written: they are compiled anew in every run, which takes up to "
            "half a minute; set NUMBA_CACHE_DIR to a folder you may write to"
        )
    elif not kernels_are_cached():
        say("compiling kernels, once on this machine: up to half a minute")


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


def prompt_ids(model: Opened, text: str) -> "Ints":
    """Token ids of a text to continue; of an empty one, the token that begins a document.  -> S

    Raises: DataError if the model has no such token.
    """
    import numpy as np

    if text:
        return model.tokenizer.encode(text)
    begin = model.config.bos_token_id if model.tokenizer.bos_id is None else model.tokenizer.bos_id
    if begin is None:
        raise DataError("this model has no token that begins a document", "give it a text to continue with -p")
    return np.array([begin], np.int64)


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


def key_value_policy(name: str) -> "Policy":
    """What --cache says.  Raises: UsageError if there is no such policy."""
    from looplm.cache import POLICIES

    return _one_of(POLICIES, "--cache", name)


def deferred_bound(policy: "Policy", number: int | None) -> int:
    """What --max-deferred says.  Raises: UsageError if nothing is deferred, or the bound is out of range."""
    from looplm.deferral import MAX_DEFERRED, check_max_deferred

    if number is None:
        return MAX_DEFERRED
    if policy != "exact":
        raise UsageError(f"--max-deferred {number}: nothing waits under --cache {policy}", "use it with --cache exact")
    check_max_deferred(number)
    return number


def key_value_type(kv_dtype: str) -> "KeyValueType":
    """What --kv-dtype says.  Raises: UsageError if it is neither type."""
    from looplm.cache import KEY_VALUE_TYPES

    return _one_of(KEY_VALUE_TYPES, "--kv-dtype", kv_dtype)


def prompt_products(precision: str) -> "PromptPrecision":
    """What --prompt-precision says.  Raises: UsageError if it is neither."""
    from looplm.stored import PROMPT_PRECISIONS

    return _one_of(PROMPT_PRECISIONS, "--prompt-precision", precision)


def _one_of(known: tuple[Choice, ...], option: str, given: str) -> Choice:
    for choice in known:
        if choice == given:
            return choice
    listed = " or ".join(known) if len(known) == 2 else f"one of {', '.join(known)}"
    raise UsageError(f"{option} {given!r} is not known", f"use {listed}")


def check_loops(model: Opened, loops: int | None) -> int:
    """How many loops to run: as asked, else the model's own; more than it was trained with draws a warning."""
    if loops is None:
        return model.config.total_ut_steps
    if loops > model.trained_loops:
        print_warning(
            f"{loops} loops are more than the {model.trained_loops} this model was trained with" + _known(model, loops)
        )
    return loops


def _known(model: Opened, loops: int) -> str:
    there, trained = model.loss_at_depth(loops), model.loss_at_depth(model.trained_loops)
    if there is None or trained is None:
        return f"; what they do is not known: looplm eval --max-loops {loops} --remember measures it"
    verdict = "no better" if there >= trained else "better"
    return (
        f"; measured on held-out data they are {verdict}: loss {there:.4f}, after {model.trained_loops} {trained:.4f}"
    )


def exit_rule(
    model: Opened, q: float | None, wish: str | None, *, loops: int | None, min_loops: int, depth: int | None = None
) -> "ExitRule | None":
    """The rule that --q, --exit, --min-loops and --loops (the most loops) ask for; None if they ask for nothing.

    `depth` is how many loops will run, where the rule has no say in that.

    Raises: UsageError for --q beside --exit, bounds that exclude each other, a rule that no such loop can satisfy, or
    one named without a threshold where the model has none calibrated.
    """
    from looplm.errors import UsageError
    from looplm.exits import LearnedGate, bind, choose_rule

    if q is not None and wish is not None:
        raise UsageError(
            f"--q {q:g} and --exit {wish} both say when to stop", f"use one: --exit gate:{q:g} is --q {q:g}"
        )
    if loops is None:
        check_min_loops(min_loops, depth or model.config.total_ut_steps)
    rule = LearnedGate(q) if q is not None else None if wish is None else named_rule(model, wish)
    if rule is None and loops is None and min_loops == 1:
        return None
    default = default_rule(model)[0] or LearnedGate(model.config.early_exit_threshold)
    chosen = choose_rule(rule, loops, default, min_loops)
    if depth is not None:
        _check_reach(chosen, depth)
    return bind(chosen, model.weights)


DEFAULT_THRESHOLDS = (0.3, 0.5, 0.7, 0.9)


def exit_rules(model: Opened, q: list[float], wishes: list[str], min_loops: int = 1, *, depth: int) -> "list[ExitRule]":
    """The rules that several --q and --exit ask for, in that order; the usual thresholds if they ask for nothing.

    They share what they read; `depth` loops will run.  Raises: UsageError as `exit_rule`.
    """
    from looplm.exits import LearnedGate, Readout, bind, choose_rule

    asked = [LearnedGate(value) for value in q or (() if wishes else DEFAULT_THRESHOLDS)]
    found = [*asked, *(named_rule(model, wish) for wish in wishes)]
    check_min_loops(min_loops, depth)
    for rule in found:
        _check_reach(rule, depth)
    readout = Readout(model.weights.head)
    return [bind(choose_rule(rule, None, rule, min_loops), readout) for rule in found]


def check_min_loops(min_loops: int, most: int) -> None:
    """Raises: UsageError if so many loops never run."""
    if min_loops > most:
        raise UsageError(
            f"--min-loops {min_loops} is more than the model's {most} loops",
            f"use at most {most}, or more --loops where the command has it",
        )


def _check_reach(rule: "ExitRule", most: int) -> None:
    """A depth that does not run would be shown under the name of another."""
    if rule.deepest(most) > most:
        raise UsageError(
            f"--exit {rule} lies beyond the {most} loops that a token may stop after",
            f"use at most {most}, or more --loops where the command has it",
        )


def named_rule(model: Opened, wish: str) -> "ExitRule":
    """The rule of one `--exit`; a name alone means the threshold calibrated for the model.

    Raises: UsageError if there is none.
    """
    from looplm.errors import UsageError
    from looplm.exits import bind, make_rule

    name, colon, number = wish.partition(":")
    if colon:
        return bind(make_rule(name, float(number)), model.weights)
    stored = model.calibrated.get("thresholds", {}).get(name)
    if stored is None:
        raise UsageError(
            f"--exit {wish} names no threshold, and none is calibrated for {model.folder}",
            f"write --exit {wish}:NUMBER, or calibrate: looplm calibrate --target-loops 2.5",
        )
    return bind(make_rule(name, float(stored)), model.weights)


def default_rule(model: Opened) -> "tuple[ExitRule | None, str]":
    """What calibration stored with the model as the way to stop, and a line that says so; None if it did not."""
    if not model.calibrated:
        return None, ""
    rule = named_rule(model, str(model.calibrated["rule"]))
    return rule, f"stopping by {rule}, calibrated for {model.calibrated.get('goal')}; --q 1 runs all loops"


def chosen_rule(
    model: Opened, q: float | None, wish: str | None, *, loops: int | None, min_loops: int
) -> "tuple[ExitRule, str]":
    """The rule asked for as in `exit_rule`, else the calibrated one and a line that says so, else the model's own q."""
    from looplm.exits import LearnedGate

    rule, told = exit_rule(model, q, wish, loops=loops, min_loops=min_loops), ""
    if rule is None:
        rule, told = default_rule(model)
    return rule or LearnedGate(model.config.early_exit_threshold), told


def check_file(option: str, path: Path | None) -> None:
    """Raises: UsageError or CheckpointError if no file can be written there; better now than after all the work."""
    from looplm.atomic import check_writable

    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder", f"name a file in it, e.g. {path / option.lstrip('-')}")
    check_writable(path)


def thread_count(threads: int | None) -> int:
    """Threads to use: as asked, else all cores this process may use."""
    from looplm.threads import available_threads

    return available_threads() if threads is None else threads
