"""A Stage I run in its folder: prepared from settings, saved as it goes, resumed where it was.

The state file is the truth to resume from; the model folder beside it is written from the same weights at the same
moment, for everything else to open.
"""

import contextlib
import dataclasses
import json
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import __version__
from .atomic import write_text
from .checkpoint import save_model
from .config import ModelConfig
from .corpus import corpus_kind
from .data import TextSource, load_tokens, prepare_text, save_tokens
from .errors import CheckpointError
from .objectives import log_prior
from .run_folder import RunFolder
from .settings import RunConfig, from_yaml, to_yaml
from .tasks.hops import HopsSource
from .text import Tokenizer, tokenizer_config_json
from .training import EvalReport, Progress, Report, StepReport, Trainer
from .weights import Weights, initialise, parameter_count

Source = TextSource | HopsSource


@dataclasses.dataclass
class TrainingRun:
    """One run: its folder, settings, tokenizer, source of batches and trainer."""

    folder: RunFolder
    config: RunConfig
    tokenizer: Tokenizer
    source: Source
    trainer: Trainer
    origin: list[dict[str, Any]]
    saved_step: int = -1  # what the model folder holds; -1: nothing

    @property
    def weights(self) -> Weights:
        return self.trainer.weights

    def reports(self) -> Iterator[Report]:
        """Train to the end, saving and logging on the way.  Leave the loop to stop; then `save()` what was reached."""
        train, saved_at = self.config.train, time.monotonic()
        settled = self.trainer.progress.total_steps > 0
        for report in self.trainer.run():
            self.folder.append_log(_log_line(report))
            if isinstance(report, EvalReport):
                if report.final:
                    self.save()  # a run that was killed between its last state and its model folder
            else:
                due = (
                    report.step % train.checkpoint_every == 0
                    if train.checkpoint_every
                    else time.monotonic() - saved_at >= train.checkpoint_seconds
                )
                if train.minutes and not settled and self.trainer.progress.total_steps:
                    settled = due = True  # how many steps fit was measured: a resumed run must not measure again
                if due or report.step == report.total_steps:
                    self.save()
                    saved_at = time.monotonic()
            yield report

    def save(self) -> None:
        """Write state and model folder for the present step, unless that is done already."""
        trainer = self.trainer
        if self.saved_step == trainer.progress.step:
            return
        optimizer = trainer.optimizer
        self.folder.save_state(
            self.weights.contiguous(), optimizer.first_moment, optimizer.second_moment, trainer.state()
        )
        save_model(
            self.folder.model,
            self.weights,
            self.tokenizer.json,
            tokenizer_config_json(self.tokenizer, self.weights.config.max_position_embeddings),
            self.provenance(),
            self.config.train.dtype,
        )
        self.saved_step = trainer.progress.step

    def provenance(self) -> dict[str, Any]:
        """Where the model comes from: `looplm.json` of its folder."""
        progress = self.trainer.progress
        return {
            "looplm": __version__,
            "task": self.source.kind,
            "task_settings": self.source.settings if isinstance(self.source, HopsSource) else {},
            "corpus": self.origin,
            "preset": self.config.preset,
            "stage": 1,
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "trained_loops": self.weights.config.total_ut_steps,
            "entropy_weight": self.config.train.entropy_weight,
            "prior": self.config.train.prior,
            "seed": self.config.train.seed,
            "python": platform.python_version(),
        }


@contextlib.contextmanager
def start_run(config: RunConfig, out_dir: pathlib.Path) -> Iterator[TrainingRun]:
    """A new run: corpus read, tokenizer trained, weights initialised, and all that a resumed run needs written.

    Other trainings are kept out of the folder while the block runs.

    Raises: LoopLMError for anything wrong with settings, corpus or folder; the first two before a file is written.
    """
    corpus = list(config.data.corpus)
    if corpus_kind(corpus) == "text":
        prepared = prepare_text(config.data, config.train.seq_len)
        tokenizer, origin, bytes_per_token = prepared.tokenizer, prepared.origin, prepared.bytes_per_token
    else:
        tokenizer, origin, bytes_per_token = _hops(config).tokenizer(), [{"source": corpus[0]}], None
    model = config.model_config(**_token_settings(config, tokenizer))
    log_prior(config.train.prior, model.total_ut_steps)
    config = dataclasses.replace(config, model=_shape_settings(model))
    folder = RunFolder.create(out_dir)
    with folder.lock():
        RunFolder.create(out_dir)  # again: another training may have been quicker
        if bytes_per_token is not None:
            save_tokens(folder.data / "train.npy", prepared.train_ids)
            save_tokens(folder.data / "val.npy", prepared.val_ids)
        write_text(folder.data / "tokenizer.json", tokenizer.json)
        write_text(folder.data / "meta.json", json.dumps({"origin": origin, "bytes_per_token": bytes_per_token}) + "\n")
        write_text(folder.config, to_yaml(config))  # last: a folder that has it can be resumed
        yield _assemble(folder, config, initialise(model, config.init, config.train.seed))


@contextlib.contextmanager
def resume_run(path: pathlib.Path, threads: int = 0) -> Iterator[TrainingRun]:
    """A run as of its last checkpoint, or of its start if it was killed before the first.

    It goes on with the number of threads it had unless another is asked for.  Other trainings are kept out of the
    folder while the block runs.

    Raises: CheckpointError if there is nothing to go on from.
    """
    folder = RunFolder.open(path)
    with folder.lock():
        config = from_yaml(folder.config)
        run = _resumed(folder, config, threads) if folder.state.exists() else _restarted(folder, config, threads)
        folder.truncate_log(run.trainer.progress.step)
        yield run


def _restarted(folder: RunFolder, config: RunConfig, threads: int) -> TrainingRun:
    config = _with_threads(config, threads or config.train.threads)
    return _assemble(folder, config, initialise(config.model_config(), config.init, config.train.seed))


def _resumed(folder: RunFolder, config: RunConfig, threads: int) -> TrainingRun:
    flat, first_moment, second_moment, meta = folder.load_state()
    try:
        used = int(meta.pop("threads"))
        progress = Progress(**meta)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder.state} is not the state of a training", "train anew") from error
    model = config.model_config()
    if flat.size != parameter_count(model):
        raise CheckpointError(
            f"{folder.state} holds {flat.size} parameters, config.yaml asks for {parameter_count(model)}",
            "config.yaml was changed: put it back, or train anew",
        )
    run = _assemble(folder, _with_threads(config, threads or used), Weights.from_flat(model, flat))
    run.trainer.optimizer.first_moment[:] = first_moment
    run.trainer.optimizer.second_moment[:] = second_moment
    run.trainer.progress = progress
    if _step_of_model(folder) == progress.step:
        run.saved_step = progress.step
    return run


def _with_threads(config: RunConfig, threads: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, threads=threads))


def _step_of_model(folder: RunFolder) -> int | None:
    """The step whose weights the model folder holds; None if there is no whole one."""
    try:
        return int(json.loads((folder.model / "looplm.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _assemble(folder: RunFolder, config: RunConfig, weights: Weights) -> TrainingRun:
    path = folder.data / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        origin, bytes_per_token = meta["origin"], meta["bytes_per_token"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or damaged", "train anew") from error
    tokenizer = Tokenizer.from_file(folder.data / "tokenizer.json")
    source = _source(folder, config, bytes_per_token)
    return TrainingRun(folder, config, tokenizer, source, Trainer(weights, source, config.train), origin)


def _source(folder: RunFolder, config: RunConfig, bytes_per_token: float) -> Source:
    if corpus_kind(list(config.data.corpus)) != "text":
        return _hops(config)
    return TextSource(
        load_tokens(folder.data / "train.npy"),
        load_tokens(folder.data / "val.npy"),
        config.train.batch_size,
        config.train.seq_len,
        config.train.seed,
        bytes_per_token,
        config.model["vocab_size"],
    )


def _hops(config: RunConfig) -> HopsSource:
    return HopsSource(config.train.batch_size, config.train.seq_len, config.train.seed)


def _token_settings(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    given = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    return {**given, "vocab_size": max(tokenizer.vocab_size, config.model.get("vocab_size", 0))}


def _shape_settings(model: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(model).items() if value is not None}


def _log_line(report: Report) -> dict[str, Any]:
    """A line of log.jsonl; floats keep enough digits to tell two runs apart bit for bit."""
    if isinstance(report, StepReport):
        return {"kind": "step", **dataclasses.asdict(report)}
    return {"kind": "eval", "step": report.step, "final": report.final, **evaluation_json(report)}


def evaluation_json(report: EvalReport) -> dict[str, Any]:
    """Held-out figures by loop, as the log and `--json` give them."""
    found = report.evaluation
    bits = [found.bits_per_byte(loss) for loss in found.loss]
    return {
        "val_loss": [float(loss) for loss in found.loss],
        "val_bits_per_byte": None if bits[0] is None else [float(b) for b in bits if b is not None],
        "val_accuracy": [float(a) for a in found.accuracy],
        "exit_prob": [float(p) for p in found.exit_prob],
        "hazard": [float(h) for h in found.hazard],
        "val_tokens": int(np.asarray(found.tokens)),
    }
