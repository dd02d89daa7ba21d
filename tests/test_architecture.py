"""The house rules a reader relies on, read off the source itself.

Each rule is a function from a source tree to the list of what breaks it, so that the rule is applied to this project
and, one test further down, to a small wrong tree that it must object to.
"""

import ast
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MOST_LINES = 400
ROOMS = {  # room -> what its files may import besides the standard library
    "looplm/kernels": {"numpy", "looplm"},
    "looplm": {"numpy", "tokenizers", "yaml", "jinja2", "looplm"},
    "reference/looplm_reference": {"numpy", "looplm_reference"},
    "fixtures/looplm_fixtures": {"numpy", "looplm_fixtures"},
    "cli/looplm_cli": {"typer", "rich", "numpy", "yaml", "looplm", "looplm_reference", "looplm_fixtures", "looplm_cli"},
}
OPTIONAL = {"looplm/template_worker.py": "chat"}  # file -> the extra that it may import from, alone
COMPILERS = {"numba", "llvmlite"}
_SPELLED = "addresses amx cache_streams emission integer_lines intrinsics jit parts softmax streams vectors"
MAY_COMPILE = {f"looplm/kernels/{name}.py" for name in [*_SPELLED.split(), "integer_streams"]}
BELOW = {  # module of the engine -> the only other modules of the engine it may import
    "errors": set(),
    "arrays": set(),
    "kernels": {"arrays"},
    "config": {"errors"},
    "settings": {"config", "errors"},
    "weights": {"arrays", "config", "errors", "settings"},
}
ABOVE_MODEL = {"training", "generation", "analysis", "checkpoint", "data", "text", "tasks"}
_KINDS = "default_rng|Generator|SeedSequence|PCG64|Philox|BitGenerator"
SEEDED = re.compile(rf"^(np|numpy)\.random\.(?!{_KINDS})\w+|^random\.\w+")
WORDS = {
    "an unfinished mark": re.compile(r"\b(TO[D]O|FIX[M]E|XX[X]|HAC[K])\b|NotImplemented[E]rror"),
    "a path of one machine": re.compile(r"(?<![\w.])/(?:home|root|work|farm)/\w"),
    "a path out of the project": re.compile(r"\.\./+sha[r]ed"),
    "a number of some tracker": re.compile(r"\b(?:issue|ticket|pull request|PR) #?\d+\b"),
}


# ---- the tree


def files(root: pathlib.Path) -> list[str]:
    """What git tracks or would track."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in set(listed) if (root / name).is_file())


def sources(root: pathlib.Path) -> Iterator[tuple[str, ast.Module]]:
    for name in files(root):
        if name.endswith(".py"):
            yield name, ast.parse((root / name).read_text(encoding="utf-8"))


def room_of(name: str) -> str | None:
    return next((room for room in ROOMS if name.startswith(room + "/")), None)


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a file imports, relative imports resolved inside its package."""
    room = next((r for r in ("cli", "reference", "fixtures") if name.startswith(r + "/")), "")
    package = pathlib.PurePosixPath(name).parent.relative_to(room).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


# ---- the rules


def foreign_imports(root: pathlib.Path) -> list[str]:
    """Who may import whom, from room to room."""
    wrong = []
    for name, tree in sources(root):
        room = room_of(name)
        if room is None:
            continue
        allowed = ROOMS[room] | (COMPILERS if name in MAY_COMPILE else set()) | set(sys.stdlib_module_names)
        wrong += [f"{name} imports {top}" for top in sorted({i.split(".")[0] for i in imports(name, tree)} - allowed)]
    return wrong


def undeclared_dependencies(root: pathlib.Path) -> list[str]:
    """What an installation brings is what its packages import, no less and no more."""
    if not (root / "pyproject.toml").exists():
        return []
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: _packages(lines) for name, lines in project.get("optional-dependencies", {}).items()}
    declared = _packages(project["dependencies"])
    rooms = {room.split("/")[-1] for room in ROOMS} | {"llvmlite"}  # which comes with numba, version for version
    used: set[str] = set()
    for name, tree in sources(root):
        if room_of(name):
            used |= {i.split(".")[0] for i in imports(name, tree)} - extras.get(OPTIONAL.get(name, ""), set())
    used -= rooms | set(sys.stdlib_module_names)
    wrong = [f"{package} is imported but not a dependency" for package in sorted(used - declared)]
    return wrong + [f"{package} is a dependency but not imported" for package in sorted(declared - used)]


def _packages(lines: list[str]) -> set[str]:
    return {re.split(r"[<>=~! ]", line)[0].replace("pyyaml", "yaml") for line in lines}


def compiler_imports(root: pathlib.Path) -> list[str]:
    """Few files know the compiler; everything else gets its `njit` and intrinsics from them."""
    return [
        f"{name} imports {module}"
        for name, tree in sources(root)
        if name not in MAY_COMPILE
        for module in sorted({i.split(".")[0] for i in imports(name, tree)} & COMPILERS)
    ]


def engine_graph(root: pathlib.Path) -> dict[str, set[str]]:
    """Module of the engine -> the modules of the engine it imports; a subpackage counts as one module."""
    parsed = [(name, tree) for name, tree in sources(root) if name.startswith("looplm/")]
    module = {name: name.split("/")[1].removesuffix(".py") for name, _ in parsed}
    graph: dict[str, set[str]] = {}
    for name, tree in parsed:
        dotted = {i.split(".")[1] for i in imports(name, tree) if i.startswith("looplm.")}
        graph.setdefault(module[name], set()).update(dotted & set(module.values()) - {module[name]})
    return graph


def wrong_directions(root: pathlib.Path) -> list[str]:
    """Inside the engine imports point one way, and never in a circle."""
    graph = engine_graph(root)
    wrong = [f"{a} imports {b}" for a, allowed in BELOW.items() for b in sorted(graph.get(a, set()) - allowed)]
    wrong += [f"model imports {b}" for b in sorted(graph.get("model", set()) & ABOVE_MODEL)]
    placed: set[str] = set()
    while ready := {a for a in graph if a not in placed and graph[a] <= placed}:
        placed |= ready
    return wrong + ([f"a circle among {', '.join(sorted(graph.keys() - placed))}"] if graph.keys() - placed else [])


def engine_manners(root: pathlib.Path) -> list[str]:
    """The engine does not print, does not read arguments or a terminal, and seeds nothing global."""
    wrong = []
    for name, tree in sources(root):
        if not name.startswith(("looplm/", "reference/looplm_reference/")):
            continue
        wrong += [
            f"{name} imports {i}" for i in imports(name, tree) if i in ("argparse", "logging", "getpass", "random")
        ]
        for node in ast.walk(tree):
            said = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            if said in ("print", "input", "sys.argv", "sys.stdout", "sys.stderr") or SEEDED.match(said):
                wrong.append(f"{name}:{node.lineno} uses {said}")
    return wrong


def loop_letters(root: pathlib.Path) -> list[str]:
    """The paper's letter for the loop is everyone else's for the position: neither `t` nor `T` names anything."""
    wrong = []
    for name, tree in sources(root):
        for node in ast.walk(tree):
            named = [getattr(node, field, None) for field in ("id", "arg", "name", "asname")]
            if {"t", "T"} & {n for n in named if isinstance(n, str)}:
                wrong.append(f"{name}:{getattr(node, 'lineno', 0)}")
    return wrong


def long_files(root: pathlib.Path) -> list[str]:
    counted = {n: len((root / n).read_text(encoding="utf-8").splitlines()) for n in files(root) if n.endswith(".py")}
    return [f"{name} has {lines} lines" for name, lines in counted.items() if lines > MOST_LINES]


def forbidden_words(root: pathlib.Path) -> list[str]:
    """The project speaks of itself alone, and nothing in it is half done."""
    wrong = []
    for name in files(root):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            wrong += [f"{name}:{number} holds {kind}" for kind, pattern in WORDS.items() if pattern.search(line)]
    return wrong


def tree_of_readme(root: pathlib.Path) -> dict[str, str]:
    """Path -> caption, from the README's tree: two spaces per level, a folder ends in /, then the caption."""
    block = re.search(
        r"^## The tree\n.*?^```\n(.*?)^```$", (root / "README.md").read_text(encoding="utf-8"), re.S | re.M
    )
    captions: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines() if block else []:
        match = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line)
        if match is None:
            continue
        indent, name, caption = match.groups()
        folders[len(indent) // 2 :] = [name] if name.endswith("/") else []
        captions["".join(folders) + ("" if name.endswith("/") else name)] = caption or ""
    return captions


def stale_tree(root: pathlib.Path) -> list[str]:
    """The README's tree is the real tree: every source and every top-level file stands in it, and nothing else does."""
    drawn, real = tree_of_readme(root), files(root)
    listed = {n for n in real if "/" not in n or n.endswith(".py")}
    listed -= {n for n in listed if n.endswith("__init__.py") and only_a_docstring(root / n)}
    folders = {parent.as_posix() + "/" for name in real for parent in pathlib.PurePosixPath(name).parents}
    wrong = [f"{name} is not in the tree" for name in sorted(listed - drawn.keys())]
    wrong += [f"{name} is in the tree but does not exist" for name in drawn if name not in folders | set(real)]
    return wrong + [f"{name} has no caption" for name, caption in drawn.items() if not caption]


def only_a_docstring(path: pathlib.Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def broken_links(root: pathlib.Path) -> list[str]:
    """Relative links of the documents lead to files of the project."""
    wrong = []
    for name in (n for n in files(root) if n.endswith(".md")):
        text = re.sub(r"```.*?```", "", (root / name).read_text(encoding="utf-8"), flags=re.S)
        targets = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target]
        wrong += [
            f"{name} links to {target}" for target in targets if not (root / name).parent.joinpath(target).exists()
        ]
    return wrong


def missing_twins(engine: types.ModuleType, reference: types.ModuleType) -> list[str]:
    """Every public operation has a twin in the reference: same name, parameters and order, and a shape line."""
    from looplm_reference import contract

    wrong = []
    for name in engine.__all__:
        twin = getattr(reference, name, None)
        if twin is None:
            wrong.append(f"{name} has no twin")
            continue
        ours, theirs = (list(inspect.signature(f).parameters) for f in (getattr(engine, name), twin))
        if ours != theirs:
            wrong.append(f"{name}({', '.join(ours)}) but its twin ({', '.join(theirs)})")
        try:
            contract.shape_line(twin)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    return wrong


# ---- the rules applied to this project

RULES = [
    foreign_imports,
    undeclared_dependencies,
    compiler_imports,
    wrong_directions,
    engine_manners,
    loop_letters,
    long_files,
    forbidden_words,
    stale_tree,
    broken_links,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule: Callable[[pathlib.Path], list[str]]) -> None:
    assert rule(ROOT) == []


def test_every_operation_has_its_twin() -> None:
    from looplm import kernels
    from looplm_reference import ops

    assert len(kernels.__all__) > 20
    assert missing_twins(kernels, ops) == []


# ---- the rules applied to wrong trees

TREE = "# x\n\n## The tree\n\n```\nREADME.md  this page\n{lines}```\n"
WRONG = {
    "the engine imports the reference": (foreign_imports, {"looplm/model.py": "from looplm_reference import ops\n"}),
    "the reference imports the engine": (
        foreign_imports,
        {"reference/looplm_reference/model.py": "def f():\n    import looplm.model\n"},
    ),
    "the engine imports the command line": (foreign_imports, {"looplm/training.py": "import rich.table\n"}),
    "the fixtures import PyTorch": (foreign_imports, {"fixtures/looplm_fixtures/__init__.py": "import torch\n"}),
    "a package that nothing brings": (
        undeclared_dependencies,
        {"pyproject.toml": "[project]\ndependencies = []\n", "looplm/text.py": "import yaml\n"},
    ),
    "an extra's package where it is not optional": (
        undeclared_dependencies,
        {
            "pyproject.toml": "[project]\ndependencies = []\noptional-dependencies.chat = ['jinja2>=3.1']\n",
            "looplm/template_worker.py": "import jinja2\n",
            "looplm/chat.py": "import jinja2\n",
        },
    ),
    "a package that nothing needs": (
        undeclared_dependencies,
        {"pyproject.toml": "[project]\ndependencies = ['numpy>=2', 'pyyaml']\n", "looplm/text.py": "import yaml\n"},
    ),
    "a kernel imports numba": (compiler_imports, {"looplm/kernels/rope.py": "from numba import njit\n"}),
    "a command imports llvmlite": (compiler_imports, {"cli/looplm_cli/app.py": "import llvmlite.binding\n"}),
    "kernels import the errors": (
        wrong_directions,
        {"looplm/errors.py": "", "looplm/kernels/rope.py": "from ..errors import LoopLMError\n"},
    ),
    "the model imports training": (
        wrong_directions,
        {"looplm/training.py": "", "looplm/model.py": "from . import training\n"},
    ),
    "two modules import each other": (
        wrong_directions,
        {"looplm/a.py": "from .b import x\n", "looplm/b.py": "def f():\n    from looplm.a import y\n"},
    ),
    "the engine prints": (engine_manners, {"looplm/model.py": "print(1)\n"}),
    "the engine writes to stderr": (engine_manners, {"looplm/model.py": "import sys\nsys.stderr.write('x')\n"}),
    "the engine parses arguments": (engine_manners, {"looplm/model.py": "import argparse\n"}),
    "the engine seeds NumPy": (engine_manners, {"looplm/data.py": "import numpy as np\nnp.random.seed(0)\n"}),
    "the engine draws from a global": (engine_manners, {"looplm/data.py": "import numpy as np\nnp.random.rand(3)\n"}),
    "a loop variable called t": (loop_letters, {"looplm/model.py": "for t in range(4):\n    pass\n"}),
    "a parameter called T": (loop_letters, {"tests/test_x.py": "def f(T):\n    return 1\n"}),
    "a file beyond the limit": (long_files, {"looplm/model.py": "x = 1\n" * (MOST_LINES + 1)}),
    "an unfinished mark": (forbidden_words, {"looplm/model.py": "# TO{}: later\n".format("DO")}),
    "a path of one machine": (forbidden_words, {"docs/x.md": "see /{}/someone/model\n".format("home")}),
    "a tracker's number": (forbidden_words, {"docs/x.md": "as asked in {} #12\n".format("issue")}),
    "a source the tree lacks": (stale_tree, {"README.md": TREE.format(lines=""), "looplm/model.py": "x = 1\n"}),
    "a top-level file the tree lacks": (stale_tree, {"README.md": TREE.format(lines=""), "LICENSE": "x\n"}),
    "a file that is gone": (stale_tree, {"README.md": TREE.format(lines="model.py  forward\n")}),
    "a file without caption": (
        stale_tree,
        {"README.md": TREE.format(lines="looplm/  engine\n  model.py\n"), "looplm/model.py": "x = 1\n"},
    ),
    "a link to nowhere": (broken_links, {"docs/x.md": "[there](nowhere.md)\n"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tree_is_objected_to(case: str, tmp_path: pathlib.Path) -> None:
    rule, tree = WRONG[case]
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert len(rule(tmp_path)) == 1


def test_a_right_tree_is_left_alone(tmp_path: pathlib.Path) -> None:
    tree = {
        "README.md": TREE.format(lines="looplm/  the engine\n  model.py  forward, see [it](looplm/model.py)\n"),
        "looplm/__init__.py": '"""Nothing but words."""\n',
        "looplm/model.py": "import numpy as np\n\nrng = np.random.default_rng(0)\nx = np.ones((2, 3)).T\n",
    }
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert [rule(tmp_path) for rule in RULES] == [[]] * len(RULES)


def test_a_missing_or_different_twin_is_objected_to() -> None:
    def scale(x, factor):
        """Multiply.

        x: BS -> y: BS
        """

    def reordered(factor, x):
        """Multiply.

        x: BS -> y: BS
        """

    def shapeless(x, factor):
        """Multiply."""

    engine = types.SimpleNamespace(__all__=["scale"], scale=scale)
    assert missing_twins(engine, types.SimpleNamespace(scale=scale)) == []
    assert missing_twins(engine, types.SimpleNamespace()) == ["scale has no twin"]
    assert missing_twins(engine, types.SimpleNamespace(scale=reordered)) == [
        "scale(x, factor) but its twin (factor, x)"
    ]
    assert missing_twins(engine, types.SimpleNamespace(scale=shapeless)) == ["scale: shapeless has no shape line"]
