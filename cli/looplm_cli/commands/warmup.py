"""`looplm warmup`: compile everything ahead, and measure which matrix products are fastest."""

import typer

from looplm_cli.options import JsonOption, QuietOption


def warmup(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Compile all kernels now, so that no later command has to.

    Kernels are compiled once per machine and version and kept. This runs what training, calibration and generation run,
    on a model of next to nothing, and measures which path of matrix products is fastest here.

    [bold]looplm warmup[/bold] while a container is built keeps the first command in it quick.
    """
    import time

    from looplm.kernels.jit import cache_folder
    from looplm.warmup import compile_everything
    from looplm_cli.render import print_json, print_warning, say

    began, folder = time.perf_counter(), cache_folder()
    if folder is None:
        print_warning("no folder for compiled kernels can be written: set NUMBA_CACHE_DIR, or nothing of this is kept")
    for part in compile_everything():
        if not quiet:
            say(f"{time.perf_counter() - began:5.1f} s  {part}")
    if as_json:
        print_json({"seconds": round(time.perf_counter() - began, 2), "kernel_cache": folder})
    else:
        typer.echo(f"compiled kernels are in {folder}" if folder else "compiled for this process alone")
