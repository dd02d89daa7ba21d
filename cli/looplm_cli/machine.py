"""What this machine offers: what `looplm info` without a model reports."""

from typing import Any

# Of all that a processor reports, what the kernels and matrix products make use of.
NOTABLE = (
    *("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512bf16", "avx512vnni"),
    *("amx-tile", "amx-bf16", "amx-int8", "neon", "sve"),
)


def machine_report(measure: bool) -> dict[str, Any]:
    """Versions, processor, threads, caches; with `measure` also the paths of matrix products and their rates."""
    import importlib.metadata
    import platform

    import numpy as np

    from looplm import __version__
    from looplm.kernels.jit import cache_folder, kernels_are_cached, processor
    from looplm.kernels.product.blas import limit_blas_threads
    from looplm.threads import available_threads

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    report = {
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
    return report | _products() if measure else report


def _products() -> dict[str, Any]:
    """Every path of matrix products: its rate on one thread, or what speaks against it; and which one is used."""
    from looplm.kernels.product.select import PATHS, choose, measured
    from looplm.settings import PRECISIONS

    found = measured()
    paths = [
        {
            "name": path.name,
            "precision": path.precision,
            "summary": path.summary,
            "gflops_per_thread": found.rates.get(path.name),
            "missing": path.missing(),
            "obstacle": path.obstacle() or None,
            "fault": found.faults.get(path.name),
        }
        for path in PATHS.values()
    ]

    def used(precision: str) -> str | None:
        try:
            return choose(precision).name
        except LookupError:  # none is right here, as `fault` says of each
            return None

    return {"paths": paths, "used": {precision: used(precision) for precision in PRECISIONS}}


def _latest_model() -> str | None:
    from looplm.checkpoint import resolve_model
    from looplm.errors import CheckpointError

    try:
        return str(resolve_model(None))
    except CheckpointError:
        return None


def print_machine(report: dict[str, Any]) -> None:
    """One line per thing, and one per path of matrix products if they were measured."""
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
    for path in report.get("paths", []):
        used = [precision for precision, name in report["used"].items() if name == path["name"]]
        for_which = f", used for --precision {' and '.join(used)}" if used else ""
        text = f"{path['summary']}, {path['precision']}: {_rate(path)}{for_which}"
        stdout().print(f"{path['name']:<10} {text}", markup=False, soft_wrap=True)


def _rate(path: dict[str, Any]) -> str:
    if path["fault"]:
        return f"wrong on this machine and never used: {path['fault']}"
    if path["obstacle"]:
        return f"not available: {path['obstacle']}"
    return f"{path['gflops_per_thread']:.0f} GFLOP/s a thread"
