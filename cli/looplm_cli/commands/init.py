"""`looplm init`: a model folder of a given shape, with random weights."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from looplm_cli.options import JsonOption, QuietOption, SeedOption, ThreadsOption

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def init(
    like: Annotated[
        str,
        typer.Option(
            "--like",
            metavar="NAME|FOLDER",
            show_default=False,
            help="ouro-1.4b or ouro-2.6b, with -thinking for their second kind, or a folder with a config.json.",
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out-dir", "-o", show_default=False, help="The folder to write.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            show_default=False,
            help="Change a size of config.json, e.g. num_hidden_layers=2; may be repeated.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="bfloat16|float32", show_default="as in its config", help="Of the weights."),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size", metavar="SIZE", show_default="a single file", help="The most of one file, e.g. 2GB."
        ),
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a model with random weights, in the shape of a published one or of a folder.

    The folder has the published layout, so everything that opens a published model opens it: for measuring speed and
    memory, for trying other programs, for tests. It has learned nothing. Like a folder: its config.json, and copies of
    its tokenizer and chat template. Like a published model: a tokenizer of the same kind and size with made-up merges.

    [bold]looplm init --like ouro-1.4b --set num_hidden_layers=2 --out-dir small[/bold]
    """
    import time

    from looplm.random_model import write_random_model
    from looplm_cli.inputs import thread_count
    from looplm_cli.render import Progress, print_json

    began, most = time.perf_counter(), None if shard_size is None else _bytes_of(shard_size)
    config, files = _shape(like)
    _change(config, setting or [])
    with Progress(0, "parameter", quiet=quiet) as progress:

        def told(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        write_random_model(
            out_dir,
            config,
            files,
            seed=seed,
            dtype=_dtype(config, dtype),
            shard_size=most,
            threads=thread_count(threads),
            progress=told,
        )
    report = _report(out_dir)
    if as_json:
        print_json({**report, "like": like, "seed": seed, "seconds": round(time.perf_counter() - began, 2)})
    else:
        size, number = sum(file["bytes"] for file in report["files"]), len(report["files"])
        typer.echo(
            f"{out_dir}: {report['parameters']:,} random parameters in {report['tensors']} tensors, "
            f"{report['dtype']}, {size:,} bytes in {number} {'file' if number == 1 else 'files'}"
        )


def _shape(like: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of config.json, and of the files for text beside it."""
    from looplm.checkpoint import resolve_model
    from looplm.errors import UsageError
    from looplm.published import NAMES, published_config, tokenizer_files
    from looplm.random_model import like_folder

    if like in NAMES:
        return published_config(like), tokenizer_files(like)
    if not Path(like).exists():
        raise UsageError(f"--like {like!r} is neither a published shape nor a folder", f"shapes are {', '.join(NAMES)}")
    return like_folder(resolve_model(like))


def _change(config: dict[str, Any], settings: list[str]) -> None:
    """Apply --set to the content of config.json."""
    from looplm.config import ModelConfig
    from looplm.errors import UsageError
    from looplm.settings import parse_settings

    for setting in settings:
        if "=" not in setting:
            raise UsageError(f"--set {setting!r} is not KEY=VALUE", "write e.g. --set num_hidden_layers=2")
    known = ModelConfig.__dataclass_fields__
    for key, value in parse_settings(f"model.{setting}" for setting in settings).get("model", {}).items():
        if key not in known:
            raise UsageError(f"--set {key}: a model has no such size", f"it has {', '.join(known)}")
        config[key] = value
        if key == "rope_theta" and isinstance(config.get("rope_parameters"), dict):
            config["rope_parameters"] = {**config["rope_parameters"], key: value}
        if key == "num_hidden_layers" and isinstance(value, int):
            config |= {"layer_types": ["full_attention"] * value, "max_window_layers": value}


def _dtype(config: dict[str, Any], asked: str | None) -> str:
    """How weights are to be kept: as asked, else as config.json says."""
    from looplm.errors import UsageError
    from looplm.safetensors_file import STORABLE

    said = config.get("dtype") or config.get("torch_dtype")
    if asked is None and said not in STORABLE:
        raise UsageError(f"its config.json says the weights are {said}", f"give --dtype {' or '.join(STORABLE)}")
    return asked or str(said)


def _bytes_of(text: str) -> int:
    """A size as `500MB`, `2GB` or a plain number of bytes; powers of ten, as others count shards."""
    from looplm.errors import UsageError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise UsageError(f"--shard-size {text!r} is not a size", "write e.g. 500MB or 2GB")
    return size


def _report(folder: Path) -> dict[str, Any]:
    """What was written, read back from its headers."""
    from looplm.model_files import open_model
    from looplm.weights import parameter_count

    written = open_model(folder)
    files = written.weight_files
    return {
        "model": str(folder),
        "parameters": parameter_count(written.config),
        "tensors": len(written.stored_in),
        "dtype": next(iter(files[0].entries.values())).dtype,
        "files": [{"name": file.path.name, "bytes": file.size, "tensors": len(file.entries)} for file in files],
    }
