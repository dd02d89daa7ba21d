"""A model folder: weights mapped in, written whole or not at all, its gate exchanged alone, and found by name.

What is written opens in transformers, vLLM and the MLX ports.  Nothing is downloaded, and files of others in the folder
(chat templates, code) are left alone.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import __version__
from .arrays import Array, Floats, aligned_empty
from .atomic import Content, make_folder, replace_files
from .config import ModelConfig, model_config_to_json
from .errors import CheckpointError
from .kernels.finite import count_not_finite
from .model_files import (
    CONFIG,
    EMBEDDING,
    GATE,
    INDEX,
    PROVENANCE,
    TOKENIZER,
    WEIGHTS,
    ModelFiles,
    find_tensors,
    json_content,
    open_model,
    read_json,
    some,
)
from .quantization import KEY, Quantized, row_blocks, scale_name
from .safetensors_file import TensorFile, tensors_content
from .weights import Weights, parameter_count, parameter_table

PREVIOUS_GATE = "previous_gate.safetensors"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class LoadedModel(ModelFiles):
    """A model ready to run: float32 weights, mapped where the files allow it."""

    weights: Weights


def load_model(folder: str | pathlib.Path, accept: Callable[[ModelFiles], object] = lambda files: None) -> LoadedModel:
    """Open a model folder and map its weights; `accept` may refuse it by an error before they are touched.

    Float32 tensors are not copied: they are one flat buffer if they lie in its order, and mapped one by one otherwise.
    Shorter types and quantized matrices are widened exactly, into one flat buffer.

    Raises: what `open_model` raises.  Weights that are not finite numbers are a warning.
    """
    files = open_model(folder)
    accept(files)
    weights = _read_weights(files)
    known = {field.name: getattr(files, field.name) for field in dataclasses.fields(files)}
    return LoadedModel(**known | {"warnings": files.warnings + finite_warnings(weights.tensors)}, weights=weights)


def read_tensors(folder: str | pathlib.Path) -> dict[str, Floats]:
    """Every tensor of a model folder as float32, under its name in the file; nothing is compared with the config.

    Raises: CheckpointError for damaged or missing files.
    """
    return {name: file.floats(name) for name, file in find_tensors(pathlib.Path(folder)).items()}


def save_model(
    folder: str | pathlib.Path,
    weights: Weights,
    tokenizer_json: str | None,
    tokenizer_config_json: str | None,
    provenance: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """Write a model folder; `dtype` is float32 or bfloat16 (rounded to the nearest).

    Keys of an existing config.json that this project does not know are kept, files that would not change are not
    touched, and a tokenizer that is None is left as it is.

    Raises: CheckpointError if a file cannot be written; the model that was there is then unchanged.
    """
    folder = pathlib.Path(folder)
    config = weights.config
    if (folder / INDEX).exists():
        raise CheckpointError(f"{folder} holds a model in several files", "save into another folder")
    make_folder(folder)
    tokenizer = {TOKENIZER: tokenizer_json, "tokenizer_config.json": tokenizer_config_json}
    contents: dict[str, Content] = {name: text.encode() for name, text in tokenizer.items() if text is not None}
    contents["generation_config.json"] = _generation_config(folder, config)
    contents[WEIGHTS] = tensors_content({p.name: weights.tensors[p.name] for p in parameter_table(config)}, dtype=dtype)
    # After the weights whose steps it counts.
    contents[PROVENANCE] = json_content({"looplm": __version__, **provenance})
    contents[CONFIG] = _config(folder, config, dtype)  # last: only a folder that has it counts as a model
    replace_files({folder / name: content for name, content in contents.items() if _changes(folder / name, content)})


def swap_gate(folder: str | pathlib.Path, weight: Floats, bias: Floats, provenance: Mapping[str, Any]) -> None:
    """Put another exit gate into a model folder; every other byte of its weights stays what it is.

    weight: OD, bias: O.  `provenance` is what is to change in `looplm.json`, None to take a key out.  The gate of
    before is kept beside the model, with its provenance, for `undo_gate`.  The new one is rounded to the type in which
    the folder stores gates.

    Raises: CheckpointError if the folder is damaged or cannot be written; the weights are then unchanged.
    """
    files = open_model(folder)
    _exchange_gate(files, dict(zip(GATE, (weight, bias), strict=True)), _merged(files.provenance, provenance))


def undo_gate(folder: str | pathlib.Path) -> None:
    """Put the previous gate back, bit for bit; the gate that was in use becomes the previous one.

    Raises: CheckpointError if there is no previous gate, or for what `swap_gate` raises.
    """
    files = open_model(folder)
    found = _previous(files)
    if found is None:
        raise CheckpointError(f"{folder} has no previous gate", "there is one after `looplm calibrate` took a new one")
    _exchange_gate(files, *found)


def previous_gate(folder: str | pathlib.Path) -> tuple[Floats, Floats, dict[str, Any]] | None:
    """The gate from before the last calibration and what `looplm.json` said then, if the folder keeps one.

    -> weight: OD, bias: O, provenance.  Raises: CheckpointError if it belongs to another model.
    """
    found = _previous(open_model(folder))
    return None if found is None else (found[0][GATE[0]], found[0][GATE[1]], found[1])


def _previous(files: ModelFiles) -> tuple[dict[str, Floats], dict[str, Any]] | None:
    path = files.folder / PREVIOUS_GATE
    if not path.exists():
        return None
    previous = TensorFile(path)
    shapes = {p.name: p.shape for p in parameter_table(files.config) if p.name in GATE}
    if "looplm" not in previous.metadata or {name: e.shape for name, e in previous.entries.items()} != shapes:
        raise CheckpointError(f"{path} holds the gate of another model", "delete it")
    return {name: previous.floats(name) for name in GATE}, json.loads(previous.metadata["looplm"])


def _exchange_gate(files: ModelFiles, gate: Mapping[str, Floats], provenance: Mapping[str, Any]) -> None:
    before = {name: files.stored_in[name].floats(name) for name in GATE}
    after = {name: np.reshape(gate[name], before[name].shape) for name in GATE}
    note = {"looplm": json.dumps(files.provenance)}
    contents: dict[pathlib.Path, Content] = {files.folder / PREVIOUS_GATE: tensors_content(before, note)}
    for file in {files.stored_in[name] for name in GATE}:  # two, if a border between shards separates weight and bias
        contents[file.path] = file.with_changes({name: after[name] for name in GATE if files.stored_in[name] is file})
    contents[files.folder / PROVENANCE] = json_content(provenance)
    replace_files(contents)


def add_provenance(folder: str | pathlib.Path, provenance: Mapping[str, Any]) -> None:
    """Change what `looplm.json` says, and nothing else in the folder; a value of None takes the key out.

    Raises: CheckpointError if the folder is damaged or cannot be written.
    """
    files = open_model(folder)
    replace_files({files.folder / PROVENANCE: json_content(_merged(files.provenance, provenance))})


def _merged(there: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    gone = {key for key, value in changes.items() if value is None}
    return {key: value for key, value in {**there, **changes}.items() if key not in gone}


def resolve_model(path: str | pathlib.Path | None, runs: str | pathlib.Path = "runs") -> pathlib.Path:
    """The model folder that a user means: a model folder, a run folder's model, or the latest below `runs`.

    Raises: CheckpointError if there is none, saying how to get one.
    """
    if path is None:
        found = [folder for run in pathlib.Path(runs).glob("*/") if _is_model(folder := run / "model")]
        if not found:
            raise CheckpointError(
                f"there is no model yet below {runs}/", "train one with `looplm train`, or name one with --model"
            )
        return max(found, key=lambda folder: ((folder / WEIGHTS).stat().st_mtime_ns, folder))
    path = pathlib.Path(path)
    for folder in (path, path / "model"):
        if _is_model(folder):
            return folder
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "name a model folder or a run folder; nothing is downloaded")
    if path.is_file():
        raise CheckpointError(f"{path} is a file", f"name the folder: {path.parent}")
    if (path / "config.yaml").exists():
        raise CheckpointError(f"the run in {path} has no model yet", f"let it train: looplm train --resume {path}")
    raise CheckpointError(
        f"{path} is neither a model folder nor a run folder", f"a model folder holds {CONFIG} and {WEIGHTS}"
    )


# ---- reading


def _is_model(folder: pathlib.Path) -> bool:
    return (folder / CONFIG).is_file()


def _read_weights(files: ModelFiles) -> Weights:
    config, where = files.config, files.stored_in
    table = parameter_table(config)
    if not all(where[p.name].entries[p.name].dtype == "F32" for p in table):
        weights = Weights.from_flat(config, aligned_empty((parameter_count(config),)))
        for name, out in weights.tensors.items():
            stored = files.stored_matrix(name)
            if isinstance(stored, Quantized):
                stored.dequantize(out=out)
                where[scale_name(name)].release(scale_name(name))
            else:
                for rows in row_blocks(slice(0, len(out)), out.size // len(out)):
                    where[name].floats(name, out[rows], rows)
                    where[name].release(name, rows)
            where[name].release(name)
        return weights
    first = where[EMBEDDING]
    begin = first.entries[EMBEDDING].begin
    in_order = all(where[p.name] is first and first.entries[p.name].begin == begin + 4 * p.offset for p in table)
    if in_order and begin % 4 == 0:
        return Weights.from_flat(config, first.run_of_floats(begin, parameter_count(config)))
    return Weights.from_tensors(config, {p.name: where[p.name].floats(p.name) for p in table})


def finite_warnings(tensors: Mapping[str, Array]) -> list[str]:
    """A warning that names every tensor (float32, or bits of bfloat16) with a NaN or an infinity."""
    counts = {name: count_not_finite(values) for name, values in tensors.items()}
    wrong = [f"{name} ({count} of {tensors[name].size})" for name, count in counts.items() if count]
    return [f"weights that are not finite numbers: {some(wrong)}"] if wrong else []


# ---- writing


def _changes(path: pathlib.Path, content: Content) -> bool:
    try:
        return callable(content) or path.read_bytes() != content
    except OSError:
        return True


def _existing(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _config(folder: pathlib.Path, config: ModelConfig, dtype: str) -> bytes:
    """config.json: what we know as it is now, everything else as it was."""
    ours, there = model_config_to_json(config), _existing(folder / CONFIG)
    known = {"architectures", "model_type", "rope_theta", "rope_parameters", "torch_dtype", "dtype", KEY}
    known |= {field.name for field in dataclasses.fields(ModelConfig)}
    if there.get("num_hidden_layers") != config.num_hidden_layers:
        known |= {"layer_types", "max_window_layers"}
    merged = ours | {key: value for key, value in there.items() if key not in known} | _token_ids(config, there)
    merged["rope_parameters"] = {**(there.get("rope_parameters") or {}), **ours["rope_parameters"]}
    del merged["torch_dtype"]
    spellings = [key for key in ("torch_dtype", "dtype") if key in there] or ["torch_dtype"]
    return json_content(merged | dict.fromkeys(spellings, dtype))


def _token_ids(config: ModelConfig, there: Mapping[str, Any]) -> dict[str, Any]:
    """The special ids; a list, of which this engine reads the first, stays the list it was."""
    ids: dict[str, Any] = {key: getattr(config, key) for key in TOKEN_IDS}
    lists = {key: there[key] for key in TOKEN_IDS if isinstance(there.get(key), list)}
    return ids | {key: value for key, value in lists.items() if value[:1] == [ids[key]]}


def _generation_config(folder: pathlib.Path, config: ModelConfig) -> bytes:
    there = _existing(folder / "generation_config.json")
    return json_content(there | {key: value for key, value in _token_ids(config, there).items() if value is not None})
