"""`looplm verify`: the engine proved right, or shown where it is not."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from looplm_cli.options import OUTPUT, JsonOption, ThreadsOption


def verify(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            show_default=False,
            help="Fixture folders, a model and the answers expected of it; or model folders.",
        ),
    ] = None,
    all_rows: Annotated[
        bool, typer.Option("--all", help="Show every comparison, not only those that fail.", rich_help_panel=OUTPUT)
    ] = False,
    json: JsonOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Prove the engine right: reference, mutants, fixtures.

    Without a folder: every compiled kernel and the whole engine against the plain float64 reference, cached decoding
    and padded batches against full passes over single rows, and both against answers that PyTorch gave. Mistakes made
    on purpose (no norm between loops, an exit off by one, ...) must all be caught: a check that cannot fail proves
    nothing.

    With folders: one line per array of each folder's expected.npz, with the error of engine and reference. The first
    that diverges in forward order is named, so a port in another framework can be debugged this way too. A model
    folder alone is judged by the reference's answers. Either way the weights are read twice: widened to float32, and
    decoded as they are stored, where int8 and int4 may be off by 1e-3 from what their integers stand for.

    Exit code 1 if anything fails. [bold]looplm verify my-port/[/bold] checks the answers of your own implementation.
    """
    from looplm.errors import VerificationError
    from looplm_cli.inputs import thread_count
    from looplm_cli.render import print_json

    begin = time.perf_counter()
    count = thread_count(threads)
    report, trouble = _given(folders, count, json) if folders else _everything(count, json, all_rows)
    report = {"ok": not trouble, **report, "seconds": round(time.perf_counter() - begin, 2)}
    if json:
        print_json(report)
    if trouble:
        raise VerificationError(*trouble)


Trouble = tuple[str, str]  # message and hint of the error that ends a failed verification


def _given(folders: list[Path], threads: int, json: bool) -> tuple[dict[str, Any], Trouble | None]:
    """The folders on the command line; what cannot be judged stops everything."""
    from looplm_cli.render import print_warning
    from looplm_cli.verification import verify_folder
    from looplm_cli.verification_report import conclusion, folder_json, print_folder

    reports = []
    for folder in folders:
        report = verify_folder(folder, threads)
        reports.append(report)
        for warning in report.warnings:
            print_warning(warning)
        if not json:
            print_folder(report)
    failed = [report for report in reports if report.failures]
    trouble = None
    if failed:
        first = failed[0]
        message = (
            f"{first.fixture.folder}: {len(first.failures)} of {len(first.rows)} arrays diverge, "
            f"the first in forward order is {first.failures[0].name}"
        )
        trouble = message, conclusion(first)
    return {"folders": [folder_json(report) for report in reports]}, trouble


def _everything(threads: int, json: bool, every: bool) -> tuple[dict[str, Any], Trouble | None]:
    import looplm_fixtures
    from looplm_cli import verification, verification_report

    made, failures, comparisons, mutants = [], [], 0, 0
    for section in verification.sections(threads):
        checks = verification_report.run_section(section, not json, every)
        made.append(verification_report.section_json(section, checks, every))
        failures += [f"{section.name}: {check.name}" for check in checks if not check.ok]
        comparisons += 0 if section.mutants else sum(len(check.rows) for check in checks)
        mutants += len(checks) if section.mutants else 0

    damaged = looplm_fixtures.damaged()
    failures += [f"fixtures: {name} is not the file that MANIFEST.json describes" for name in damaged]
    if not json:
        verification_report.print_line("fixtures: what PyTorch answered for tiny random models")
    reports = []
    for folder in looplm_fixtures.folders():
        report = verification.verify_folder(folder, threads)
        reports.append(report)
        failures += [f"fixture {folder.name}: {row.name}" for row in report.failures[:1]]
        comparisons += len(report.rows)
        if not json:
            verification_report.print_folder_line(report, every)

    trouble = None
    if failures:
        trouble = f"{len(failures)} checks failed, the first is {failures[0]}", "--all shows every comparison"
    elif not json:
        verification_report.print_line(f"\n{comparisons} comparisons pass, {mutants} mutants caught")
    folders = [verification_report.folder_json(report) for report in reports]
    return {"sections": made, "folders": folders, "damaged_fixtures": damaged}, trouble
