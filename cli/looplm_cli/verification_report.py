"""What `looplm verify` prints, and the same as JSON.

Numbers stand before names, so that lines align at any width however long a tensor's name is.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from looplm_cli.render import finite, stdout
from looplm_cli.stored_verification import PREFIX
from looplm_cli.verification import Check, Comparison, FixtureReport, Section

if TYPE_CHECKING:
    from looplm_reference.contract import Row


def run_section(section: Section, show: bool, every: bool) -> list[Check]:
    """Make a section's checks, with a line as each is done."""
    checks = []
    if show:
        _print(f"{section.name}: {section.title}")
    for check in section.checks:
        checks.append(check)
        if show:
            _print_check(section, check, every)
    if show:
        _print("")
    return checks


def _print_check(section: Section, check: Check, every: bool) -> None:
    if section.mutants:
        place = f"at {check.rows[0].name}" if check.ok else ""
        _print(f"  {'CAUGHT' if check.ok else 'SURVIVED':8}  {check.name:58}  {place}".rstrip())
        return
    worst = check.worst
    numbers = f"{len(check.rows):3} comparisons, worst {worst.error:.1e} of {_allowed(worst.tolerance)}"
    _print(f"  {_verdict(check.ok)}  {numbers}  {check.name}")
    for row in check.rows if every else check.failures:
        numbers = f"{row.error:.1e} of {_allowed(row.tolerance)}"
        _print(f"        {_verdict(row.ok)}  {numbers}  {row.name}{_in_brackets(row.note)}")


def section_json(section: Section, checks: Sequence[Check], every: bool) -> dict[str, Any]:
    """One object per check; of its comparisons those that fail, or all."""
    if section.mutants:
        mutants = [{"name": c.name, "caught": c.ok, "by": c.rows[0].name if c.ok else None} for c in checks]
        return {"name": section.name, "ok": all(check.ok for check in checks), "mutants": mutants}
    made = [
        {
            "name": check.name,
            "ok": check.ok,
            "comparisons": len(check.rows),
            "worst_error": finite(check.worst.error),
            "tolerance": finite(check.worst.tolerance),
            "rows": [_row_json(row) for row in (check.rows if every else check.failures)],
        }
        for check in checks
    ]
    return {"name": section.name, "ok": all(check.ok for check in checks), "checks": made}


def _row_json(row: "Row") -> dict[str, Any]:
    return {
        "name": row.name,
        "error": finite(row.error),
        "tolerance": finite(row.tolerance),
        "ok": row.ok,
        "note": row.note,
    }


def print_folder(report: FixtureReport) -> None:
    """One line per array, what was ignored, and where it first goes wrong."""
    found = report.fixture
    _print(f"{found.folder}{_in_brackets(found.origin)}")
    _print("        engine   reference  tolerance  array")
    _print_comparisons(report.rows)
    _print_verdict(report)
    if not report.failures:
        _print(f"  all {len(report.rows)} arrays within tolerance")
    _print("")


def print_folder_line(report: FixtureReport, every: bool) -> None:
    """One line for the whole folder, and its failures."""
    engine, reference = (max(errors) for errors in zip(*_errors(report), strict=True))
    numbers = f"{len(report.rows):3} arrays, worst engine {engine:.1e}, reference {reference:.1e}"
    allowed = f"of {report.fixture.tolerance:.0e}"
    _print(f"  {_verdict(not report.failures)}  {numbers} {allowed}  {report.fixture.folder.name}")
    _print_comparisons(report.rows if every else report.failures)
    if report.failures:
        _print_verdict(report)


def _errors(report: FixtureReport) -> Iterable[tuple[float, float]]:
    return ((row.engine.error, row.reference.error) for row in report.rows)


def _print_comparisons(rows: Iterable[Comparison]) -> None:
    for row in rows:
        numbers = f"{row.engine.error:<7.1e}  {row.reference.error:<9.1e}  {_allowed(row.engine.tolerance):9}"
        _print(f"  {_verdict(row.ok)}  {numbers}  {row.name}{_in_brackets(row.note)}")


def _print_verdict(report: FixtureReport) -> None:
    if report.fixture.ignored:
        _print(f"  ignored, names not known: {', '.join(report.fixture.ignored)}")
    if report.failures:
        first = report.failures[0]
        _print(f"  first to diverge in forward order: {first.name}")
        _print(f"  {conclusion(report)}")


def conclusion(report: FixtureReport) -> str:
    """What a failure means: who disagrees with whom."""
    leaves = report.engine_leaves
    if leaves is not None:
        return f"the engine leaves the reference at {leaves.name} (error {leaves.error:.1e}): the engine is wrong there"
    if report.failures[0].name.startswith(PREFIX):
        return "widened to float32 the weights are right; read as they are stored they are not: decoding is wrong"
    if report.failures[0].reference.ok:
        return "the engine alone differs, though its states agree with the reference's"
    return "engine and reference agree with each other: expected.npz is of another model, or of another definition"


def folder_json(report: FixtureReport) -> dict[str, Any]:
    found = report.fixture
    return {
        "folder": str(found.folder),
        "ok": not report.failures,
        "origin": found.origin,
        "tolerance": found.tolerance,
        "entropy_weight": found.entropy_weight,
        "rows": [
            {
                "name": row.name,
                "engine_error": finite(row.engine.error),
                "reference_error": finite(row.reference.error),
                "tolerance": row.engine.tolerance,
                "ok": row.ok,
                "note": row.note,
            }
            for row in report.rows
        ],
        "ignored": found.ignored,
        "first_divergence": report.failures[0].name if report.failures else None,
        "engine_leaves_reference": report.engine_leaves.name if report.engine_leaves else None,
    }


def print_line(text: str) -> None:
    """A line of its own between the tables."""
    _print(text)


def _allowed(tolerance: float) -> str:
    return f"{tolerance:.0e}" if tolerance else "exact"


def _verdict(ok: bool) -> str:
    return "PASS" if ok else "FAIL"


def _in_brackets(text: str) -> str:
    return f"  ({text})" if text else ""


def _print(line: str) -> None:
    stdout().print(line, markup=False, soft_wrap=True)
