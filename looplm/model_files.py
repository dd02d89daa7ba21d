"""What a model folder holds, checked without reading its weights.

The layout is Hugging Face's for Ouro; `looplm.json`, which says where a model comes from, is this project's addition.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Array
from .config import ModelConfig, model_config_from_json
from .errors import CheckpointError
from .quantization import FORMATS, Quantization, Quantized, quantization_from_json, row_blocks, scale_name
from .safetensors_file import READABLE, TensorFile
from .special_tokens import GENERATION_CONFIG, TEMPLATE_FILE, TOKENIZER_CONFIG, SpecialTokens, special_tokens
from .weights import parameter_table

if TYPE_CHECKING:  # importing the tokenizer library costs 40 ms
    from .text import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER, PROVENANCE = "config.json", "tokenizer.json", "looplm.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE = ("model.early_exit_gate.weight", "model.early_exit_gate.bias")
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.npz")
COMPANIONS = (  # what belongs to a model besides weights and config: texts for people and programs
    TOKENIZER,
    TOKENIZER_CONFIG,
    GENERATION_CONFIG,
    TEMPLATE_FILE,
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
OTHER_MODEL = "config.json and the weights belong to different models: copy the folder again"


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model folder whose config and headers have been checked."""

    folder: pathlib.Path
    config: ModelConfig
    stored_in: dict[str, TensorFile]  # tensor name -> the file that holds it
    own_tokenizer: "Tokenizer | None"
    special_tokens: SpecialTokens
    provenance: dict[str, Any]  # looplm.json; empty for a model from elsewhere
    warnings: list[str]
    quantization: Quantization | None  # how its matrices are stored, if not as floats

    @property
    def tokenizer(self) -> "Tokenizer":
        """The folder's tokenizer.  Raises: CheckpointError if it has none."""
        if self.own_tokenizer is None:
            raise CheckpointError(f"{self.folder} has no {TOKENIZER}", "copy it from where the model comes from")
        return self.own_tokenizer

    @property
    def trained_loops(self) -> int:
        """R of its training."""
        return int(self.provenance.get("trained_loops") or self.config.total_ut_steps)

    @property
    def weight_files(self) -> list[TensorFile]:
        return sorted(set(self.stored_in.values()), key=lambda file: file.path)

    def stored_matrix(self, name: str) -> Quantized | Array:
        """A tensor as it lies in the file, mapped: quantized, or an array of its floats (bfloat16 as bits, in uint16).

        This is what kernels that read weights in a shorter form are given.
        """
        kind = self.quantization.format_of(name) if self.quantization else None
        if kind is None:
            return self.stored_in[name].stored(name)
        shape = next(p.shape for p in parameter_table(self.config) if p.name == name)
        codes, scales = self.stored_in[name].codes(name), self.stored_in[scale_name(name)].stored(scale_name(name))
        return Quantized(kind, (shape[0], shape[1]), codes, scales)


def open_model(folder: str | pathlib.Path) -> ModelFiles:
    """Check a model folder: config, headers, names and shapes of all tensors, size of the vocabulary.

    Raises: CheckpointError for damaged files, missing, extra or misshapen tensors, a tokenizer with more tokens than
    the model, or special tokens that are none; ConfigError for another architecture; DataError for a damaged tokenizer.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", f"name a model folder, with {CONFIG} and {WEIGHTS}")
    values, where = read_json(folder / CONFIG), str(folder / CONFIG)
    config = model_config_from_json(values, where)
    quantization = quantization_from_json(values, config, where)
    stored_in = find_tensors(folder)
    _check_tensors(folder, config, quantization, stored_in)
    tokenizer = _read_tokenizer(folder)
    warnings = check_vocabulary(folder / TOKENIZER, tokenizer, config) if tokenizer else []
    special = read_special_tokens(folder, values, tokenizer)
    warnings += special.warnings
    provenance: dict[str, Any] = {}
    try:
        if (folder / PROVENANCE).exists():
            provenance = read_json(folder / PROVENANCE)
    except CheckpointError as error:
        warnings.append(f"the model's origin is unknown: {error}")
    return ModelFiles(folder, config, stored_in, tokenizer, special, provenance, warnings, quantization)


def read_special_tokens(
    folder: pathlib.Path, config_json: Mapping[str, Any], tokenizer: "Tokenizer | None"
) -> SpecialTokens:
    """What all files of the folder say about special tokens and the chat template.

    Raises: CheckpointError if one of them is damaged.
    """
    others = [
        read_json(folder / name) if (folder / name).exists() else {} for name in (GENERATION_CONFIG, TOKENIZER_CONFIG)
    ]
    template = _read_text(folder / TEMPLATE_FILE) if (folder / TEMPLATE_FILE).exists() else None
    try:
        return special_tokens(config_json, others[0], others[1], template, tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}", error.hint) from error


def check_vocabulary(where: pathlib.Path, tokenizer: "Tokenizer", config: ModelConfig) -> list[str]:
    """Warnings about a tokenizer that fits loosely.  Raises: CheckpointError if it has more tokens than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{where} has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}",
            "the tokenizer belongs to another model",
        )
    if tokenizer.vocab_size < config.vocab_size:
        return [f"the model has {config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}: the rest has no text"]
    return []


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The mapping in a JSON file.  Raises: CheckpointError if it is missing, not JSON, or not a mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}", "name a model folder that is complete") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "copy or download the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not named values", "copy the file again")
    return values


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "copy or download the file again") from error


def read_companions(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of COMPANIONS that a folder has, by name.  Raises: CheckpointError if one cannot be read."""
    found = {}
    for name in COMPANIONS:
        try:
            found[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            cure = "check the path and its permissions"
            raise CheckpointError(f"cannot read {folder / name}: {error.strerror}", cure) from error
    return found


def json_content(values: Mapping[str, Any]) -> bytes:
    """The content of a JSON file of a model folder."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def find_tensors(folder: pathlib.Path) -> dict[str, TensorFile]:
    """Tensor name -> file.  A single file goes before an index, as in transformers.

    Raises: CheckpointError if there are no weights, or a file or the index does not say the truth.
    """
    if (folder / WEIGHTS).exists():
        file = TensorFile(folder / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    if not (folder / INDEX).exists():
        other = next((path.name for pattern in OTHER_FORMATS for path in folder.glob(pattern)), None)
        seen = f", only {other}" if other else ""
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}{seen}", f"weights are read from it, or from shards and {INDEX}"
        )
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map", "copy or download the file again")
    shards: dict[str, TensorFile] = {}
    for name in sorted(set(listed.values())):
        if pathlib.PurePath(name).name != name:
            raise CheckpointError(
                f"{folder / INDEX} names {name!r}, which is not a file beside it", "correct its weight_map"
            )
        shards[name] = TensorFile(folder / name)
    found: dict[str, TensorFile] = {}
    for file in shards.values():
        for tensor in file.entries:
            if tensor in found:
                raise CheckpointError(f"tensor {tensor} is in {found[tensor].path} and in {file.path}", OTHER_MODEL)
            found[tensor] = file
    for tensor, name in listed.items():
        if found.get(tensor) is not shards[name]:
            raise CheckpointError(f"{folder / name} lacks tensor {tensor}, which {INDEX} puts there", OTHER_MODEL)
    return found


def some(names: list[str]) -> str:
    """At most three of them, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest}"


def _read_tokenizer(folder: pathlib.Path) -> "Tokenizer | None":
    if not (folder / TOKENIZER).exists():
        return None
    from .text import Tokenizer

    return Tokenizer.from_file(folder / TOKENIZER)


def stored_tensors(config: ModelConfig, quantization: Quantization | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape of every tensor in the files, in order; the type is "" where any float will do."""
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for parameter in parameter_table(config):
        kind = quantization.format_of(parameter.name) if quantization else None
        if kind is None:
            wanted[parameter.name] = ("", parameter.shape)
        else:
            layout, shape = FORMATS[kind], (parameter.shape[0], parameter.shape[1])
            wanted[parameter.name] = ("U8", layout.codes_shape(shape))
            wanted[scale_name(parameter.name)] = ("BF16", layout.scales_shape(shape))
    return wanted


def _check_tensors(
    folder: pathlib.Path, config: ModelConfig, quantization: Quantization | None, found: dict[str, TensorFile]
) -> None:
    wanted = stored_tensors(config, quantization)
    missing = [name for name in wanted if name not in found]
    if missing:
        cure = OTHER_MODEL
        if all(".early_exit_gate." in name for name in missing):
            cure = "some converters drop the exit gate: use the folder from before the conversion"
        elif missing == [HEAD]:
            cure = "if the head is the embedding, set tie_word_embeddings to true in config.json"
        raise CheckpointError(f"{folder} lacks {some(missing)}", cure)
    extra = [name for name in found if name not in wanted and not (config.tie_word_embeddings and name == HEAD)]
    if extra:
        layers = f"config.json says {config.num_hidden_layers} layers"
        cure = OTHER_MODEL
        if all(name.endswith("_scale") for name in extra):
            cure = "the weights are quantized, and config.json does not say how: copy it again"
        raise CheckpointError(f"{folder} has tensors that the model does not: {some(extra)} ({layers})", cure)
    for name, (dtype, shape) in wanted.items():
        entry = found[name].entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{found[name].path}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}",
                OTHER_MODEL,
            )
        if dtype and entry.dtype != dtype:
            raise CheckpointError(
                f"{found[name].path}: tensor {name} is stored as {entry.dtype}, config.json asks for {dtype}",
                OTHER_MODEL,
            )
        if not dtype and entry.dtype not in READABLE:
            found[name].stored(name)  # which says so
    if config.tie_word_embeddings and HEAD in found:
        _check_tied(found[HEAD], found[EMBEDDING])


def _check_tied(head: TensorFile, embedding: TensorFile) -> None:
    """A tied model may repeat its embedding under the head's name; a head of its own would silently be ignored."""
    own, tied = head.stored(HEAD), embedding.stored(EMBEDDING)
    same = own.dtype == tied.dtype
    for rows in row_blocks(slice(0, len(own)), own.shape[1]) if same else ():
        same = same and np.array_equal(own[rows].view(np.uint8), tied[rows].view(np.uint8))
        head.release(HEAD, rows)
        embedding.release(EMBEDDING, rows)
    if not same:
        raise CheckpointError(
            f"{head.path}: {HEAD} differs from {EMBEDDING}, but config.json ties them",
            "set tie_word_embeddings to false in config.json",
        )
