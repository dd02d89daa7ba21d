"""`looplm info`: what a model folder holds, or what this machine offers."""

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from looplm_cli.options import JsonOption, ModelOption

if TYPE_CHECKING:
    from looplm.model_files import ModelFiles

# Of all that a processor reports, what the kernels and matrix products make use of.
NOTABLE = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512bf16", "avx512vnni", "amx-bf16", "amx-int8", "neon", "sve")


def info(model: ModelOption = None, as_json: JsonOption = False) -> None:
    """Show what a model is made of, or what this machine offers.

    With --model: parameters by part, shapes, memory, key/value bytes, where the model comes from and with how many
    loops it was trained. Only headers are read, so this is instant for a model of any size.

    Without: versions, processor, threads, the library of matrix products, where compiled kernels are kept, and the
    model that other commands take when none is named.
    """
    from looplm_cli.render import print_json, print_warning

    if model is None:
        report = _machine()
        show = _print_machine
    else:
        from looplm.checkpoint import resolve_model
        from looplm.model_files import open_model

        files = open_model(resolve_model(model))
        for warning in files.warnings:
            print_warning(warning)
        report = _model(files)
        show = _print_model
    if as_json:
        print_json(report)
    else:
        show(report)


def _model(files: "ModelFiles") -> dict[str, Any]:
    import dataclasses

    from looplm import sizes

    entries = {name: file.entries[name] for name, file in files.stored_in.items()}
    return {
        "model": str(files.folder),
        "config": dataclasses.asdict(files.config),
        "trained_loops": files.trained_loops,
        "parameters": sizes.parameters_by_part(files.config),
        "memory": sizes.memory(files.config),
        "tensors": [{"name": name, "shape": list(e.shape), "dtype": e.dtype} for name, e in entries.items()],
        "files": [
            {"name": file.path.name, "bytes": file.size, "tensors": len(file.entries)} for file in files.weight_files
        ],
        "tokenizer_vocab_size": files.own_tokenizer.vocab_size if files.own_tokenizer else None,
        "origin": files.provenance,
        "warnings": files.warnings,
    }


def _print_model(report: dict[str, Any]) -> None:
    from looplm_cli.render import print_table, stdout

    config, memory = report["config"], report["memory"]
    loops, context = config["total_ut_steps"], config["max_position_embeddings"]
    parts = dict(report["parameters"])
    total, unrolled = parts.pop("total"), parts.pop("unrolled")
    say = stdout().print
    say(f"{report['model']}", markup=False, soft_wrap=True)
    say(
        f"{config['num_hidden_layers']} layers x {loops} loops (trained with {report['trained_loops']}), "
        f"width {config['hidden_size']}, vocabulary {config['vocab_size']}, context {context}\n",
        soft_wrap=True,
    )
    rows = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in parts.items() if count]
    rows.append(("total", f"{total:,}", ""))
    rows.append(
        (f"as {loops * config['num_hidden_layers']} separate layers", f"{unrolled:,}", f"x {unrolled / total:.2f}")
    )
    print_table(["parameters", "number", "share"], rows)
    print_table(
        ["memory (float32)", "size"],
        [
            ("weights", _bytes(memory["weights"])),
            ("training, without activations", _bytes(memory["training"])),
            ("keys and values, one token", _bytes(memory["key_value_per_token"])),
            (f"keys and values, context of {context}", _bytes(memory["key_value_context"])),
        ],
    )
    print_table(["tensor", "n", "shape", "dtype"], _shapes(report["tensors"]))
    print_table(["file", "size", "tensors"], [(f["name"], _bytes(f["bytes"]), f["tensors"]) for f in report["files"]])
    say("origin: " + (_origin(report["origin"]) or "unknown (no looplm.json)"), markup=False, soft_wrap=True)


def _shapes(tensors: list[dict[str, Any]]) -> list[tuple[str, int, str, str]]:
    """One row for what all layers have alike."""
    kinds = Counter(
        (re.sub(r"\.\d+\.", ".*.", e["name"]), " x ".join(map(str, e["shape"])), e["dtype"]) for e in tensors
    )
    return [(name, number, shape, dtype) for (name, shape, dtype), number in kinds.items()]


def _origin(origin: dict[str, Any]) -> str:
    texts = [f"{key} {value}" for key, value in origin.items() if isinstance(value, str | int | float)]
    sources = origin.get("corpus")
    if isinstance(sources, list):
        texts += [f"corpus {s.get('source')}" for s in sources if isinstance(s, dict)]
    return ", ".join(texts)


def _bytes(number: int) -> str:
    """A size in the largest binary unit that leaves at least 1."""
    size = float(number)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def _machine() -> dict[str, Any]:
    import importlib.metadata
    import platform

    import numpy as np

    from looplm import __version__
    from looplm.kernels.jit import cache_folder, kernels_are_cached, processor
    from looplm.threads import available_threads, limit_blas_threads

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "looplm": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in ("numpy", "numba", "llvmlite", "tokenizers")},
        "system": platform.platform(),
        "processor": processor(),
        "threads": available_threads(),
        "threading": "Python threads; compiled kernels and matrix products release the interpreter lock",
        "blas": {"name": blas["name"], "version": blas["version"], "held_to_one_thread": limit_blas_threads()},
        "kernel_cache": cache_folder(),
        "kernels_compiled": kernels_are_cached(),
        "latest_model": _latest_model(),
    }


def _latest_model() -> str | None:
    from looplm.checkpoint import resolve_model
    from looplm.errors import CheckpointError

    try:
        return str(resolve_model(None))
    except CheckpointError:
        return None


def _print_machine(report: dict[str, Any]) -> None:
    from looplm_cli.render import stdout

    has = set(report["processor"]["features"])
    blas = report["blas"]
    held = "one thread each" if blas["held_to_one_thread"] else "its own threads: set OMP_NUM_THREADS=1"
    compiled = (
        "compiled already" if report["kernels_compiled"] else "empty: the first command compiles, about 15 seconds"
    )
    cache = f"{report['kernel_cache']} ({compiled})"
    lines = {
        "looplm": report["looplm"],
        "python": f"{report['python']}, {', '.join(f'{n} {v}' for n, v in report['packages'].items())}",
        "system": report["system"],
        "processor": f"{report['processor']['name']}: {' '.join(name for name in NOTABLE if name in has)}",
        "threads": f"{report['threads']} ({report['threading']})",
        "blas": f"{blas['name']} {blas['version']}, {held}",
        "kernels": cache if report["kernel_cache"] else "no folder is writable: compiled anew in every process",
        "model": report["latest_model"] or "none yet: looplm train, or looplm quickstart",
    }
    for name, text in lines.items():
        stdout().print(f"{name:<10} {text}", markup=False, soft_wrap=True)
