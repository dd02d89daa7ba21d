"""Renders chat templates in a process of its own: what a model folder brings along is a program by a stranger.

Started by chat_template.py by the path of this file: it reads one JSON object from file 0 and writes one to file 1.
jinja2's sandbox keeps a template from everything but its variables; the limits set here keep it from memory, and the
parent's patience from time.  What a template may use beyond jinja2 is what transformers gives it: `raise_exception`,
`strftime_now`, `tojson`, `break` and `continue`, and blocks marked `generation`.
"""

import contextlib
import datetime
import json
import resource
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MOST_MEMORY = 1 << 30  # bytes of address space


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is the text inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The rendered text, and the names that the template asks its caller for; or what went wrong."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        variables = jinja2.meta.find_undeclared_variables(environment.parse(request["template"]))
        template = environment.from_string(request["template"])
        text = template.render(**request["context"])
    except MemoryError:
        return {"error": f"it wants more than {MOST_MEMORY >> 20} MiB of memory"}
    except Exception as error:  # a template can fail in any way Python can
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        return {"error": f"{type(error).__name__}: {error}{where}"}
    return {"variables": sorted(variables), "text": text}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which no model has seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def main() -> None:
    with contextlib.suppress(OSError, ValueError):  # a system may refuse; then time is the only limit
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    with open(0, encoding="utf-8") as source:
        request = json.load(source)
    try:
        written = json.dumps(answer(request))
    except MemoryError:
        written = json.dumps({"error": f"it wants more than {MOST_MEMORY >> 20} MiB of memory"})
    with open(1, "w", encoding="utf-8") as target:
        target.write(written)


if __name__ == "__main__":
    main()
