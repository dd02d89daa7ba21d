"""A Stage I run in its folder: prepared from settings, saved as it goes, resumed where it was.

The state file is the truth to resume from; the model folder beside it is written from the same weights at the same
moment, for everything else to open.

Of several ranks the first alone reads the corpus and writes into the folder, which all must see; each reads the tokens
there.  batch_size in config.yaml is that of one rank, and meta.json says of how many: a run may go on with another
number of ranks, each then taking more or fewer of the same rows.
"""

import contextlib
import dataclasses
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import __version__
from .atomic import write_text
from .checkpoint import save_model
from .config import ModelConfig
from .corpus import corpus_kind
from .data import TextSource, load_tokens, prepare_text, save_tokens
from .errors import CheckpointError
from .memory import choose_recompute
from .objectives import log_prior
from .ranks import ALONE, Ranks, first_does
from .run_folder import RunFolder
from .settings import RunConfig, from_yaml, to_yaml
from .tasks.hops import HopsSource
from .text import Tokenizer, tokenizer_config_json
from .threads import available_threads
from .training import EvalReport, Progress, Report, StepReport, Trainer, product_path
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

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.trainer.ranks.rank == 0

    def reports(self) -> Iterator[Report]:
        """Train to the end, saving and logging on the way.  Leave the loop to stop; then `save()` what was reached.

        All ranks get the same reports, and must leave the loop at the same one.
        """
        train, saved_at = self.config.train, time.monotonic()
        settled = self.trainer.progress.total_steps > 0
        for report in self.trainer.run():
            if self.first:
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
        """Write state and model folder for the present step, unless that is done already or another rank's to do."""
        trainer = self.trainer
        if not self.first or self.saved_step == trainer.progress.step:
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
def start_run(config: RunConfig, out_dir: pathlib.Path, ranks: Ranks = ALONE) -> Iterator[TrainingRun]:
    """A new run: corpus read, tokenizer trained, weights initialised, and all that a resumed run needs written.

    Other trainings are kept out of the folder while the block runs.

    Raises: LoopLMError for anything wrong with settings, corpus or folder; the first two before a file is written.
    """
    with contextlib.ExitStack() as held:
        yield _on_all(ranks, lambda: _started(config, out_dir, ranks, held))


@contextlib.contextmanager
def resume_run(path: pathlib.Path, threads: int = 0, ranks: Ranks = ALONE) -> Iterator[TrainingRun]:
    """A run as of its last checkpoint, or of its start if it was killed before the first.

    It goes on with the number of threads it had unless another is asked for.  Other trainings are kept out of the
    folder while the block runs.

    Raises: CheckpointError if there is nothing to go on from, or its rows do not divide among the ranks.
    """
    with contextlib.ExitStack() as held:
        yield _on_all(ranks, lambda: _reopened(path, threads, ranks, held))


def _on_all(ranks: Ranks, make: Callable[[], TrainingRun]) -> TrainingRun:
    """The run as rank 0 makes it; the others get settings, weights, moments and progress from there."""
    made: list[TrainingRun] = []

    def outline() -> tuple[pathlib.Path, RunConfig, Progress]:
        run = make()
        made.append(run)
        return run.folder.path, run.config, run.trainer.progress

    path, config, progress = first_does(ranks, outline)
    if made:
        run = made[0]
    else:
        folder = RunFolder(path)
        if not folder.config.exists():
            raise CheckpointError(
                f"rank {ranks.rank} does not see {folder.config}, which rank 0 does",
                "put the run on a file system that all machines share, under one path",
            )
        run = _assemble(folder, config, Weights.zeros(config.model_config()), ranks)
        run.trainer.progress = progress
    optimizer = run.trainer.optimizer
    for buffer in (run.weights.contiguous(), optimizer.first_moment, optimizer.second_moment):
        ranks.broadcast_in_place(buffer)
    return run


def _started(config: RunConfig, out_dir: pathlib.Path, ranks: Ranks, held: contextlib.ExitStack) -> TrainingRun:
    corpus = list(config.data.corpus)
    if corpus_kind(corpus) == "text":
        prepared = prepare_text(config.data, config.train.seq_len)
        tokenizer, origin, bytes_per_token = prepared.tokenizer, prepared.origin, prepared.bytes_per_token
    else:
        tokenizer, origin, bytes_per_token = _hops(config).tokenizer(), [{"source": corpus[0]}], None
    model = config.model_config(**_token_settings(config, tokenizer))
    log_prior(config.train.prior, model.total_ut_steps)
    config = dataclasses.replace(config, model=_shape_settings(model))
    settled = _settled(config, ranks)
    folder = RunFolder.create(out_dir)
    held.enter_context(folder.lock())
    RunFolder.create(out_dir)  # again: another training may have been quicker
    if bytes_per_token is not None:
        save_tokens(folder.data / "train.npy", prepared.train_ids)
        save_tokens(folder.data / "val.npy", prepared.val_ids)
    write_text(folder.data / "tokenizer.json", tokenizer.json)
    folder.write_meta(origin, bytes_per_token, ranks.size)
    write_text(folder.config, to_yaml(config))  # last: a folder that has it can be resumed
    return _assemble(folder, settled, initialise(model, config.init, config.train.seed), ranks)


def _settled(config: RunConfig, ranks: Ranks) -> RunConfig:
    """What the settings leave to this machine, decided: how many threads, who multiplies, what is computed again.

    Raises: ConfigError if the training will not fit into memory.
    """
    train = config.train
    threads, path = train.threads or max(1, available_threads() // ranks.sharing), product_path(train)
    recompute = choose_recompute(config.model_config(), train, threads, path, sharing=ranks.sharing)
    return _with(config, threads=threads, kernels=path.name, recompute=recompute)


def _reopened(path: pathlib.Path, threads: int, ranks: Ranks, held: contextlib.ExitStack) -> TrainingRun:
    folder = RunFolder.open(path)
    held.enter_context(folder.lock())
    config = _split_anew(from_yaml(folder.config), folder.read_meta()["ranks"], ranks.size)
    resume = _resumed if folder.state.exists() else _restarted
    run = resume(folder, config, threads, ranks)
    folder.truncate_log(run.trainer.progress.step)
    return run


def _restarted(folder: RunFolder, config: RunConfig, threads: int, ranks: Ranks) -> TrainingRun:
    config = _settled(_with(config, threads=threads or config.train.threads), ranks)
    return _assemble(folder, config, initialise(config.model_config(), config.init, config.train.seed), ranks)


def _resumed(folder: RunFolder, config: RunConfig, threads: int, ranks: Ranks) -> TrainingRun:
    flat, first_moment, second_moment, meta = folder.load_state()
    try:
        used, among, kernels = int(meta.pop("threads")), int(meta.pop("ranks", 1)), str(meta.pop("kernels", ""))
        progress = Progress(**meta)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder.state} is not the state of a training", "train anew") from error
    model = config.model_config()
    if flat.size != parameter_count(model):
        raise CheckpointError(
            f"{folder.state} holds {flat.size} parameters, config.yaml asks for {parameter_count(model)}",
            "config.yaml was changed: put it back, or train anew",
        )
    config = _with(config, threads=threads or (used if among == ranks.size else 0), kernels=kernels)
    config = _settled(config, ranks)
    run = _assemble(folder, config, Weights.from_flat(model, flat), ranks)
    run.trainer.optimizer.first_moment[:] = first_moment
    run.trainer.optimizer.second_moment[:] = second_moment
    run.trainer.progress = progress
    if folder.step_of_model() == progress.step:
        run.saved_step = progress.step
    return run


def _split_anew(config: RunConfig, began: int, size: int) -> RunConfig:
    """The rows of a step, first shared by `began` ranks, shared by `size`.

    Raises: CheckpointError if they do not divide evenly.
    """
    each = config.train.batch_size
    rows = began * each
    if rows % size:
        fitting = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise CheckpointError(
            f"a step of this run takes {rows} rows ({began} {'rank' if began == 1 else 'ranks'} x {each}), "
            f"which {size} ranks cannot share evenly",
            f"resume it by `mpiexec -n N`, with N one of {fitting}",
        )
    return config if size == began else _with(config, batch_size=rows // size)


def _with(config: RunConfig, **train: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def _assemble(folder: RunFolder, config: RunConfig, weights: Weights, ranks: Ranks) -> TrainingRun:
    meta = folder.read_meta()
    tokenizer = Tokenizer.from_file(folder.data / "tokenizer.json")
    source = _source(folder, _with(config, batch_size=config.train.batch_size * ranks.size), meta["bytes_per_token"])
    trainer = Trainer(weights, source, config.train, ranks)
    return TrainingRun(folder, config, tokenizer, source, trainer, meta["origin"])


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
