"""A training run's folder: settings, tokens, model, the state to resume from, and the log.

config.yaml · data/ · model/ · state.safetensors · log.jsonl

The state is one file, renamed into place: a run killed at any instant has the old one or the new one.  The model folder
is what other commands read; a resumed run reads only the state.
"""

import contextlib
import datetime
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from .arrays import Floats, aligned_empty
from .atomic import cannot_write, make_folder, write_text
from .errors import CheckpointError
from .safetensors_file import TensorFile, write_tensors

STATE_TENSORS = ("weights", "first_moment", "second_moment")


class RunFolder:
    """Paths of a run and what is done to them."""

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self.config = self.path / "config.yaml"
        self.model = self.path / "model"
        self.state = self.path / "state.safetensors"
        self.log = self.path / "log.jsonl"
        self.data = self.path / "data"

    @classmethod
    def create(cls, path: str | pathlib.Path) -> "RunFolder":
        """A new run folder.

        Raises: CheckpointError if something is there already or it cannot be written.  What a run leaves that was
        killed before it wrote its settings is no obstacle.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise CheckpointError(f"{run.path} is a file", "choose another --out-dir")
        if run.config.exists():
            raise CheckpointError(
                f"{run.path} already holds a run", f"go on with it by --resume {run.path}, or choose another --out-dir"
            )
        begun = {".lock", run.data.name, run.config.name + ".unfinished"}
        if run.path.exists() and (names := sorted(path.name for path in run.path.iterdir() if path.name not in begun)):
            raise CheckpointError(f"{run.path} is not empty: it holds {names[0]}", "choose another --out-dir")
        make_folder(run.data)
        return run

    @classmethod
    def open(cls, path: str | pathlib.Path) -> "RunFolder":
        """An existing run, perhaps without a state yet.  Raises: CheckpointError if there is none."""
        run = cls(path)
        if not run.path.exists():
            raise CheckpointError(f"there is no run in {run.path}", "name a folder that `looplm train` has written")
        if not run.config.exists():
            raise CheckpointError(
                f"{run.path} is not a run folder: it has no config.yaml",
                "name a folder that `looplm train` has written",
            )
        return run

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other trainings out while the block runs; a killed process lets go by itself.

        Raises: CheckpointError if another process trains into this folder, or it cannot be written.
        """
        path = self.path / ".lock"
        try:
            file = path.open("a+", encoding="utf-8")  # not "w": the number in it may be another's
        except OSError as error:
            raise cannot_write(path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise CheckpointError(
                    f"another training is writing to {self.path} (process {file.read().strip() or 'unknown'})",
                    "wait for it, stop it, or choose another --out-dir",
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def write_meta(self, origin: list[dict[str, Any]], bytes_per_token: float | None, ranks: int) -> None:
        """Where the tokens come from, and how many ranks the settings' batch_size was meant for, if several."""
        meta: dict[str, Any] = {"origin": origin, "bytes_per_token": bytes_per_token}
        write_text(self.data / "meta.json", json.dumps(meta | ({"ranks": ranks} if ranks > 1 else {})) + "\n")

    def read_meta(self) -> dict[str, Any]:
        """Keys `origin`, `bytes_per_token` and `ranks`.  Raises: CheckpointError if it is missing or damaged."""
        path = self.data / "meta.json"
        try:
            meta = {"ranks": 1, **json.loads(path.read_text(encoding="utf-8"))}
            if meta.keys() >= {"origin", "bytes_per_token"} and type(meta["ranks"]) is int and meta["ranks"] > 0:
                return meta
            raise ValueError("a key is missing, or of another kind")
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is missing or damaged", "train anew") from error

    def step_of_model(self) -> int | None:
        """The step whose weights the model folder holds; None if there is no whole one."""
        try:
            return int(json.loads((self.model / "looplm.json").read_text(encoding="utf-8"))["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save_state(self, weights: Floats, first_moment: Floats, second_moment: Floats, meta: Mapping[str, Any]) -> None:
        """Everything a resumed run needs, in one file: three flat buffers, and what JSON can hold (exactly).

        Raises: CheckpointError if it cannot be written; the state of before is then unchanged.
        """
        tensors = dict(zip(STATE_TENSORS, (weights, first_moment, second_moment), strict=True))
        write_tensors(self.state, tensors, {"meta": json.dumps(meta)})

    def load_state(self) -> tuple[Floats, Floats, Floats, dict[str, Any]]:
        """What `save_state` wrote, in memory of its own.  Raises: CheckpointError if there is none or it is damaged."""
        if not self.state.exists():
            raise CheckpointError(
                f"{self.path} has no checkpoint to go on from", "it stopped before its first: train anew"
            )
        file = TensorFile(self.state)
        try:
            found = [file.floats(name).reshape(-1) for name in STATE_TENSORS]
            meta = json.loads(file.metadata["meta"])
            sizes = {array.size for array in found}
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{self.state} is not the state of a training", "train anew") from error
        if len(sizes) > 1 or not isinstance(meta, dict):
            raise CheckpointError(f"{self.state} is not the state of a training", "train anew")
        copies = [aligned_empty(array.shape) for array in found]
        for copy, array in zip(copies, found, strict=True):
            copy[...] = array
        return copies[0], copies[1], copies[2], meta

    def append_log(self, line: Mapping[str, Any]) -> None:
        """One line of JSON; NaN and infinity, which JSON does not have, become null.

        Raises: CheckpointError if it cannot be written.
        """
        text = json.dumps(_finite(line), allow_nan=False) + "\n"
        try:
            with self.log.open("ab") as file:
                file.write(text.encode())
        except OSError as error:
            raise cannot_write(self.log, error) from error

    def read_log(self) -> list[dict[str, Any]]:
        """The log's lines; what a kill tore is left out.  Raises: CheckpointError if the log cannot be read."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        except OSError as error:
            raise CheckpointError(f"cannot read {self.log}: {error.strerror}", "check its permissions") from error
        lines = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict)]

    def truncate_log(self, step: int) -> None:
        """Drop torn lines and what was logged after `step`, its evaluation included: what a resumed run does again.

        Raises: CheckpointError if the log cannot be written.
        """
        if self.log.exists():
            lines = self.read_log()
            kept = (line for line in lines if line.get("step", 0) + (line.get("kind") == "eval") <= step)
            write_text(self.log, "".join(json.dumps(line) + "\n" for line in kept))


def new_run_path(name: str, runs: str | pathlib.Path = "runs") -> pathlib.Path:
    """A path under `runs` that does not exist yet: name, date and time."""
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    path = pathlib.Path(runs) / f"{name}-{stamp}"
    count = 1
    while path.exists():
        count += 1
        path = pathlib.Path(runs) / f"{name}-{stamp}-{count}"
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
