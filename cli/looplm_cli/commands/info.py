"""`looplm info`: what a model folder holds, what this machine offers, or what a training would take."""

import re
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from looplm_cli.options import TRAINING, ConfigOption, JsonOption, ModelOption, SetOption, ThreadsOption

if TYPE_CHECKING:
    from looplm.model_files import ModelFiles
    from looplm.settings import RunConfig


def info(
    model: ModelOption = None,
    machine: Annotated[
        bool, typer.Option("--machine", help="Processor, threads, and how fast each kernel path multiplies here.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="The memory a training would take.", rich_help_panel=TRAINING)
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", show_default="nano", help="Size: nano, tiny, small or medium.", rich_help_panel=TRAINING
        ),
    ] = None,
    config: ConfigOption = None,
    setting: SetOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a model is made of, what this machine offers, or what a training would take.

    With --model: parameters by part, shapes, memory, key/value bytes, where the model comes from and with how many
    loops it was trained. Only headers are read, so this is instant for a model of any size.

    With --train, instead: the memory that `looplm train` with the same settings would hold at most, by part and for
    each way to compute again instead of keeping, what is available, and what `train.recompute=auto` would choose.

    Without any of them, or with --machine: versions, processor, threads, where compiled kernels are kept, and the model
    that other commands take when none is named. --machine also measures how fast each path of matrix products is here
    (once; the result is kept) and says which are used.
    """
    from looplm.errors import UsageError
    from looplm_cli.render import print_json, print_warning

    if not train and (preset or config or setting or threads):
        raise UsageError("--preset, --config, --set and --threads describe a training", "add --train")
    if machine and model is not None:
        raise UsageError("--model and --machine are about different things", "give one of them")
    if train:
        from looplm_cli.commands.train import effective_settings

        if model is not None or machine:
            raise UsageError("--train, --model and --machine are about different things", "give one of them")
        report = _training(effective_settings(preset, config, setting or [], {"train": {"threads": threads}}))
        show = _print_training
    elif model is None:
        from looplm_cli.machine import machine_report, print_machine

        report = machine_report(measure=machine)
        show = print_machine
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
        "key_value_per_token": sizes.key_value_bytes_by_policy(files.config, files.config.total_ut_steps),
        "tensors": [{"name": name, "shape": list(e.shape), "dtype": e.dtype} for name, e in entries.items()],
        "files": [
            {"name": file.path.name, "bytes": file.size, "tensors": len(file.entries)} for file in files.weight_files
        ],
        "quantization": files.quantization.json(files.config) if files.quantization else None,
        "tokenizer_vocab_size": files.own_tokenizer.vocab_size if files.own_tokenizer else None,
        "ends": {name: sorted(ids) for name, ids in files.special_tokens.claims.items()},
        "chat_template": files.special_tokens.template_file if files.special_tokens.chat_template else None,
        "origin": files.provenance,
        "warnings": files.warnings,
    }


def _print_model(report: dict[str, Any]) -> None:
    from looplm_cli.render import print_table, stdout

    config, memory = report["config"], report["memory"]
    loops, context = config["total_ut_steps"], config["max_position_embeddings"]
    parts = dict(report["parameters"])
    total, unrolled = parts.pop("total"), parts.pop("unrolled")
    stored = f", weights in {report['quantization']['format']}" if report["quantization"] else ""
    say = stdout().print
    say(f"{report['model']}", markup=False, soft_wrap=True)
    say(
        f"{config['num_hidden_layers']} layers x {loops} loops (trained with {report['trained_loops']}), "
        f"width {config['hidden_size']}, vocabulary {config['vocab_size']}, context {context}"
        f"{stored}\n",
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
            ("the same in bfloat16 (--kv-dtype), one token", _bytes(memory["key_value_per_token_bfloat16"])),
            (f"the same, context of {context}", _bytes(memory["key_value_per_token_bfloat16"] * context)),
        ],
    )
    by_size: dict[int, list[str]] = {}
    for policy, size in report["key_value_per_token"].items():
        by_size.setdefault(size, []).append(policy)
    rows = [(", ".join(names), _bytes(size), _bytes(size // 2)) for size, names in by_size.items()]
    print_table(["keys and values of one token (--cache)", "float32", "bfloat16"], rows)
    print_table(["tensor", "n", "shape", "dtype"], _shapes(report["tensors"]))
    print_table(["file", "size", "tensors"], [(f["name"], _bytes(f["bytes"]), f["tensors"]) for f in report["files"]])
    ends = ", ".join(f"{name} {' '.join(map(str, ids))}" for name, ids in report["ends"].items())
    say(f"token that ends a text: {ends or 'no file says'}", markup=False, soft_wrap=True)
    say(f"chat template: {report['chat_template'] or 'none'}", markup=False, soft_wrap=True)
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


def _training(settings: "RunConfig") -> dict[str, Any]:
    from looplm.memory import available_memory, first_that_fits, predicted_peak
    from looplm.settings import RECOMPUTE
    from looplm.threads import available_threads
    from looplm.training import product_path
    from looplm.weights import parameter_count

    how, vocab_size = settings.train, _vocabulary(settings)
    model = settings.model_config(vocab_size=vocab_size)
    threads, available = how.threads or available_threads(), available_memory()
    path = product_path(how)
    parts = {mode: predicted_peak(model, how.batch_size, how.seq_len, threads, mode, path) for mode in RECOMPUTE}
    peaks = {mode: sum(by_part.values()) for mode, by_part in parts.items()}
    return {
        "preset": settings.preset,
        "parameters": parameter_count(model),
        "vocab_size": vocab_size,
        "layers": model.num_hidden_layers,
        "loops": model.total_ut_steps,
        "batch_size": how.batch_size,
        "seq_len": how.seq_len,
        "threads": threads,
        "kernels": path.name,
        "parts": parts,
        "peak": peaks,
        "available": available,
        "recompute": how.recompute,
        "auto": first_that_fits(peaks, available),
    }


def _vocabulary(settings: "RunConfig") -> int:
    """As far as it is known without reading the corpus; else that of a text of a megabyte."""
    from looplm.corpus import corpus_kind
    from looplm.tasks.hops import HopsSource
    from looplm.text import byte_tokenizer, choose_vocab_size

    data = settings.data
    if corpus_kind(list(data.corpus)) != "text":
        least = HopsSource(settings.train.batch_size, settings.train.seq_len, settings.train.seed).vocab_size
    elif data.tokenizer == "bytes":
        least = byte_tokenizer().vocab_size
    else:
        least = data.vocab_size or choose_vocab_size(1_000_000)
    return max(least, settings.model.get("vocab_size", 0))


def _print_training(report: dict[str, Any]) -> None:
    from looplm.memory import SHARE
    from looplm_cli.render import print_table, stdout

    say, parts, peaks = stdout().print, report["parts"], report["peak"]
    say(
        f"{report['preset']}: {report['parameters']:,} parameters, {report['layers']} layers x {report['loops']} "
        f"loops, vocabulary {report['vocab_size']}, batches of {report['batch_size']} x {report['seq_len']} tokens, "
        f"{report['threads']} threads, kernels {report['kernels']}\n",
        markup=False,
        soft_wrap=True,
    )
    rows = [(part, *(_bytes(parts[mode][part]) for mode in parts)) for part in next(iter(parts.values()))]
    print_table(["recompute", *parts], [*rows, ("peak", *(_bytes(peak) for peak in peaks.values()))])
    free, auto = report["available"], report["auto"]
    say("available " + ("unknown" if free is None else f"{_bytes(free)}, of which training may take {SHARE:.0%}"))
    say(f"train.recompute=auto: {auto or 'too large; lower train.batch_size or train.seq_len'}", soft_wrap=True)
