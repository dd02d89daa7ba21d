"""Run a command in the test's own process, where the engine is loaded and compiled already."""

import contextlib
import io
import json
from typing import Any

import pytest

from looplm_cli import app, render


def looplm(*arguments: object, width: int = 80, code: int = 0) -> tuple[str, str]:
    """Run `looplm` and expect an exit code.  Returns what it wrote to stdout and stderr, as on a pipe."""
    out, err = io.StringIO(), io.StringIO()
    _forget_consoles()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("COLUMNS", str(width))
        patch.delenv("FORCE_COLOR", raising=False)
        with pytest.raises(SystemExit) as stopped:
            app.main([str(argument) for argument in arguments])
    _forget_consoles()
    assert stopped.value.code == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def report_of(*arguments: object) -> dict[str, Any]:
    """The object a command prints with --json."""
    out, _ = looplm(*arguments, "--json")
    return json.loads(out.splitlines()[-1])


def _forget_consoles() -> None:
    """Consoles remember the stream they were made for."""
    render.stdout.cache_clear()
    render.stderr.cache_clear()
