"""Every option of the commands about exits, with values it cannot have: two lines, an exit code, nothing written."""

import pathlib

import pytest

import tiny_models
from in_process import looplm
from looplm_cli import app

COMMANDS = ("generate", "kv", "sweep", "calibrate", "eval", "inspect")
Case = tuple[str, int, str]  # the words on the command line, the exit code, what is said

SEED: list[Case] = [("--seed -1", 2, "-1 is not in the range"), ("--seed 1.5", 2, "'1.5' is not a valid int")]
THREADS: list[Case] = [("--threads 0", 2, "0 is not in the range"), ("--threads all", 2, "'all' is not a valid int")]
MODEL: list[Case] = [("--model nowhere", 1, "nowhere does not exist"), ("--model text.txt", 1, "text.txt")]
CORPUS: list[Case] = [("nowhere.txt", 1, "nowhere.txt does not exist"), ("latin.txt", 1, "latin.txt")]
ENCODING: list[Case] = [("text.txt --encoding utf-9", 1, "encoding 'utf-9' is not known")]
ERRORS: list[Case] = [("text.txt --errors never", 2, "--errors 'never' is not known")]
KV_DTYPE: list[Case] = [("--kv-dtype int8", 2, "--kv-dtype 'int8' is not known")]
WEIGHTS: list[Case] = [("--weights int3", 2, "--weights 'int3' is not known")]
PROMPT: list[Case] = [("--prompt {broken}", 1, "the prompt is not UTF-8")]
LOOPS: list[Case] = [("--loops 0", 2, "0 is not in the range"), ("--loops 2.5", 2, "'2.5' is not a valid int")]
Q: list[Case] = [
    ("--q 1.5", 2, "1.5 is not in the range"),
    ("--q -0.1", 2, "-0.1 is not in the range"),
    ("--q nan", 2, "nan is not a finite number"),
    ("--q half", 2, "'half' is not a valid float"),
]
EXIT: list[Case] = [
    ("--exit sure:1", 2, "'sure' is not an exit rule"),
    ("--exit kl:x", 2, "--exit 'kl:x': 'x' is not a number"),
    ("--exit kl:inf", 2, "kl:inf: the threshold is not between 0 and infinity"),
    ("--exit change:-1", 2, "change:-1: the threshold is not between 0 and infinity"),
    ("--exit margin:nan", 2, "margin:nan: the threshold is not between 0 and infinity"),
    ("--exit top:1.1", 2, "top:1.1: the threshold is not between 0 and 1"),
    ("--exit gate:2", 2, "q=2.0 is outside [0, 1]"),
    ("--exit stable:0", 2, "stable:0: a number of loops is whole and at least 1"),
    ("--exit fixed:1.5", 2, "fixed:1.5: a number of loops is whole and at least 1"),
    ("--exit kl", 2, "--exit kl names no threshold, and none is calibrated"),
]
MIN_LOOPS: list[Case] = [
    ("--min-loops 0", 2, "0 is not in the range"),
    ("--min-loops 5", 2, "--min-loops 5 is more than the model's 4 loops"),
]
MAX_DEFERRED: list[Case] = [("--max-deferred many", 2, "'many' is not a valid int")]
HTML: list[Case] = [
    ("--html nowhere/page.html", 1, "cannot write nowhere/page.html"),
    ("--html .", 2, "--html . is a folder"),
]

CASES: dict[str, dict[str, list[Case]]] = {
    "generate": {
        "--model": MODEL,
        "--prompt": PROMPT,
        "--q": Q,
        "--exit": EXIT,
        "--min-loops": MIN_LOOPS,
        "--loops": LOOPS,
        "--temperature": [("-t -1", 2, "-1.0 is not in the range"), ("-t nan", 2, "nan is not a finite number")],
        "--top-k": [("--top-k -1", 2, "-1 is not in the range")],
        "--top-p": [("--top-p 1.5", 2, "1.5 is not in the range"), ("--top-p nan", 2, "nan is not a finite number")],
        "--min-p": [("--min-p -1", 2, "-1.0 is not in the range"), ("--min-p nan", 2, "nan is not a finite number")],
        "--repetition-penalty": [("--repetition-penalty 0", 2, "0.0 is not in the range")],
        "--seed": SEED,
        "--max-new-tokens": [("-n 0", 2, "0 is not in the range")],
        "--stop": [("--stop {empty}", 2, "a stop string is empty")],
        "--cache": [("--cache shared", 2, "--cache 'shared' is not known")],
        "--max-deferred": [
            *MAX_DEFERRED,
            ("--cache exact --max-deferred 0", 2, "0 tokens cannot wait for their deeper loops"),
            ("--cache exact --max-deferred 24", 2, "24 tokens cannot wait for their deeper loops"),
        ],
        "--draft-loops": [
            ("--draft-loops 0", 2, "'0' is no number above 0; write a number or auto"),
            ("--draft-loops flow", 2, "'flow' is no number above 0"),
            ("--draft-loops two", 2, "'two' is no number above 0"),
            ("--draft-loops 4", 2, "drafts of 4 loops cannot be checked by a full depth of 4"),
        ],
        "--draft-tokens": [
            ("--draft-tokens -1", 2, "'-1' is no number above 0; write a number or flow or auto"),
            ("--draft-tokens 1.5", 2, "'1.5' is no number above 0"),
            ("--draft-tokens 24", 2, "24 drafted tokens cannot be checked together"),
        ],
        "--budget-loops-per-token": [
            ("--budget-loops-per-token 0.5", 2, "0.5 is not in the range"),
            ("--budget-loops-per-token inf", 2, "inf is not a finite number"),
        ],
        "--max-ms-per-token": [
            ("--max-ms-per-token 0", 2, "0.0 is not in the range"),
            ("--max-ms-per-token nan", 2, "nan is not a finite number"),
        ],
        "--exit-trace": [
            ("--exit-trace nowhere", 1, "the exit trace nowhere cannot be read: No such file"),
            ("--exit-trace .", 1, "the exit trace . cannot be read: Is a directory"),
            ("--exit-trace latin.txt", 1, "the exit trace latin.txt cannot be read: not UTF-8 text"),
            ("--exit-trace text.txt", 1, "the exit trace text.txt is not a list of numbers"),
            ("--exit-trace trace -n 5", 1, "the exit trace trace has 4 exits, fewer than the 5 tokens"),
        ],
        "--weights": WEIGHTS,
        "--kv-dtype": KV_DTYPE,
        "--prompt-precision": [("--prompt-precision bfloat16", 2, "'bfloat16' is not known")],
        "--threads": THREADS,
        "--prompts": [("--prompts nowhere", 1, "cannot read nowhere"), ("--prompts latin.txt", 1, "is not UTF-8")],
        "--batch": [
            ("--prompts prompts --batch 0", 2, "0 is not in the range"),
            ("--prompts prompts --batch 25", 2, "25 prompts cannot be in flight at once"),
        ],
        "--out": [
            ("--prompts prompts --out .", 2, "--out . is a folder"),
            ("--prompts prompts --out text.txt/answers", 1, "cannot write text.txt"),
        ],
    },
    "kv": {
        "corpus": CORPUS,
        "--model": MODEL,
        "--q": Q,
        "--exit": EXIT,
        "--min-loops": MIN_LOOPS,
        "--loops": LOOPS,
        "--max-deferred": [
            *MAX_DEFERRED,
            ("--max-deferred 0", 2, "0 tokens cannot wait for their deeper loops"),
            ("--max-deferred 24", 2, "24 tokens cannot wait for their deeper loops"),
        ],
        "--windows": [("--windows 0", 2, "0 is not in the range")],
        "--seq-len": [
            ("--seq-len 3", 2, "3 is not in the range"),
            ("--seq-len 65", 2, "--seq-len 65 is more than the model's context of 64"),
        ],
        "--prompt-tokens": [
            ("--prompt-tokens 0", 2, "0 is not in the range"),
            ("--prompt-tokens 16", 2, "a prompt of 16 tokens leaves none to decode of pieces of 16"),
        ],
        "--encoding": ENCODING,
        "--errors": ERRORS,
        "--weights": WEIGHTS,
        "--kv-dtype": KV_DTYPE,
        "--threads": THREADS,
    },
    "sweep": {
        "corpus": CORPUS,
        "--model": MODEL,
        "--points": [("--points 1", 2, "1 is not in the range")],
        "--chunks": [("--chunks 1", 2, "1 is not in the range")],
        "--tokens": [("--tokens 63", 2, "63 is not in the range")],
        "--turns": [("--turns 0", 2, "0 is not in the range")],
        "--decode-tokens": [("--decode-tokens 0", 2, "0 is not in the range")],
        "--steps": [("--steps 0", 2, "0 is not in the range")],
        "--seed": SEED,
        "--html": HTML,
        "--encoding": ENCODING,
        "--errors": ERRORS,
        "--threads": THREADS,
    },
    "calibrate": {
        "corpus": CORPUS,
        "--model": MODEL,
        "--target": [("--target later", 1, "target 'later' is not known")],
        "--accept": [("--accept maybe", 2, "--accept 'maybe' is not known")],
        "--target-loops": [
            ("--target-loops 0.5", 2, "--target-loops 0.5 is not between 1 and the model's 4 loops"),
            ("--target-loops 4.1", 2, "--target-loops 4.1 is not between 1 and the model's 4 loops"),
            ("--target-loops nan", 2, "nan is not a finite number"),
        ],
        "--max-loss-increase": [
            ("--max-loss-increase -1%", 2, "--max-loss-increase '-1%' is not a share of the loss"),
            ("--max-loss-increase nan", 2, "--max-loss-increase 'nan' is not a share of the loss"),
            ("--max-loss-increase much", 2, "--max-loss-increase 'much' is not a share of the loss"),
        ],
        "--steps": [("--steps 0", 2, "0 is not in the range")],
        "--learning-rate": [
            ("--learning-rate 0", 2, "0.0 is not in the range"),
            ("--learning-rate inf", 2, "inf is not a finite number"),
        ],
        "--seed": SEED,
        "--encoding": ENCODING,
        "--errors": ERRORS,
        "--threads": THREADS,
    },
    "eval": {
        "corpus": CORPUS,
        "--model": MODEL,
        "--max-loops": [("--max-loops 0", 2, "0 is not in the range")],
        "--q": [
            ("--q 0.5,x", 2, "'x' is not a number"),
            ("--q 0.5 --q 1.5", 2, "1.5 is not in the range"),
            ("--q nan", 2, "nan is not in the range"),
        ],
        "--exit": [
            *EXIT,
            ("--exit kl:0.1,kl:x", 2, "'x' is not a number"),
            ("--exit fixed:6", 2, "beyond the 4 loops"),
        ],
        "--min-loops": MIN_LOOPS,
        "--seq-len": [
            ("--seq-len 1", 2, "1 is not in the range"),
            ("--seq-len 65", 2, "--seq-len 65 is more than the model's context of 64"),
        ],
        "--batch-size": [("--batch-size 0", 2, "0 is not in the range")],
        "--encoding": ENCODING,
        "--errors": ERRORS,
        "--threads": THREADS,
    },
    "inspect": {
        "--model": MODEL,
        "--prompt": PROMPT,
        "--q": Q,
        "--exit": [*EXIT, ("--exit fixed:6", 2, "--exit fixed:6 lies beyond the 4 loops that a token may stop after")],
        "--min-loops": MIN_LOOPS,
        "--loops": LOOPS,
        "--top-k": [("--top-k 0", 2, "0 is not in the range")],
        "--html": HTML,
        "--npz": [("--npz nowhere/a.npz", 1, "cannot write nowhere/a.npz"), ("--npz .", 2, "--npz . is a folder")],
        "--threads": THREADS,
    },
}

OF_ONE = ("--draft-loops 2", "--draft-tokens 2", "--budget-loops-per-token 2", "--max-ms-per-token 5")
MANY = "--prompts prompts"

# Options that are right alone and mean nothing together.
TOGETHER: dict[str, list[Case]] = {
    "generate": [
        ("--q 0.5 --exit kl:0.1", 2, "--q 0.5 and --exit kl:0.1 both say when to stop"),
        ("--loops 2 --min-loops 3", 2, "a position cannot stop between loop 3 and loop 2"),
        *((f"{MANY} {option}", 2, f"--prompts and {option.split()[0]} exclude each other") for option in OF_ONE),
        (f"{MANY} --exit-trace trace", 2, "--prompts and --exit-trace exclude each other"),
        (f"{MANY} --prompt x", 2, "--prompts and --prompt exclude each other"),
        (f"{MANY} --json", 2, "--prompts and --json exclude each other"),
        *(
            (f"{MANY} --cache {policy}", 2, f"the cache policy {policy} works on one prompt at a time")
            for policy in ("exact", "shared-last", "average", "first")
        ),
        (f"{MANY} --cache exact --max-deferred 3", 2, "the cache policy exact works on one prompt at a time"),
        (f"{MANY} --max-deferred 3", 2, "--max-deferred 3: nothing waits under --cache last-exited"),
        (f"{MANY} --min-loops 5", 2, "--min-loops 5 is more than the model's 4 loops"),
        (f"{MANY} --loops 2 --min-loops 3", 2, "a position cannot stop between loop 3 and loop 2"),
        ("--prompts nowhere --out new/answers", 1, "cannot read nowhere"),
        ("--prompts long.txt --out new/answers", 1, "long.txt line 1: the prompt has 70 tokens"),
        (f"{MANY} --model nowhere --out new/answers", 1, "nowhere does not exist"),
        ("--batch 2", 2, "--batch is about many prompts"),
        ("--out answers", 2, "--out is about many prompts"),
        ("--unordered", 2, "--unordered is about many prompts"),
        *(
            (f"{option} --cache {policy}", 2, f"{option} and --cache {policy} exclude each other")
            for option in OF_ONE[:2]
            for policy in ("exact", "shared-last", "average", "first")
        ),
        *(
            (f"{option} --cache {policy}", 2, f"{option} cannot be kept with --cache {policy}")
            for option in OF_ONE[2:]
            for policy in ("full", "exact")
        ),
        *(
            (f"{option} {other}", 2, f"{option} and {other} exclude each other: drafts are checked against")
            for option in OF_ONE[:2]
            for other in ("--q 0.5", "--exit kl:0.1", "--exit-trace trace", *OF_ONE[2:])
        ),
        *(
            (f"--exit-trace trace {other}", 2, f"--exit-trace trace and {other} both say when to stop")
            for other in ("--q 1", "--exit kl:0.1", *OF_ONE[2:])
        ),
        *(
            (f"{option} --min-loops 5", 2, "--min-loops 5 is more than the model's 4 loops")
            for option in (*OF_ONE[:2], "--budget-loops-per-token 9", "--max-ms-per-token 5", "--exit-trace trace -n 4")
        ),
        ("--draft-loops 2 --loops 2", 2, "drafts of 2 loops cannot be checked by a full depth of 2"),
        ("--draft-loops auto --loops 1", 2, "by a full depth of 1"),
        ("--budget-loops-per-token 2 --max-ms-per-token 5", 2, "both say what may be spent"),
        ("--budget-loops-per-token 2 --min-loops 3", 2, "--budget-loops-per-token 2 is less than --min-loops 3"),
        *(
            (f"--max-deferred 3 --cache {policy}", 2, f"--max-deferred 3: nothing waits under --cache {policy}")
            for policy in ("full", "last-exited", "shared-last", "average", "first")
        ),
    ],
    "kv": [
        ("--q 0.5 --exit kl:0.1", 2, "--q 0.5 and --exit kl:0.1 both say when to stop"),
        ("--loops 2 --min-loops 3", 2, "a position cannot stop between loop 3 and loop 2"),
    ],
    "sweep": [("text.txt --html nowhere/page.html", 1, "cannot write nowhere/page.html")],
    "calibrate": [
        ("--target-loops 2 --max-loss-increase 1%", 2, "are two goals for one threshold"),
        ("--undo --target-loops 2", 2, "--undo and --target-loops exclude each other"),
        ("--undo --max-loss-increase 1%", 2, "--undo and --max-loss-increase exclude each other"),
        ("--undo text.txt", 2, "--undo and a corpus exclude each other"),
        ("--undo", 1, "has no previous gate"),
    ],
    "eval": [
        ("--max-loops 2 --min-loops 3", 2, "--min-loops 3 is more than the model's 2 loops"),
        ("--max-loops 2 --exit fixed:3", 2, "--exit fixed:3 lies beyond the 2 loops that a token may stop after"),
        ("--remember --max-loops 2 --min-loops 3", 2, "--min-loops 3 is more than the model's 2 loops"),
        ("builtin:hops", 1, "is a task, not a text"),
    ],
    "inspect": [
        ("--q 0.5 --exit kl:0.1", 2, "--q 0.5 and --exit kl:0.1 both say when to stop"),
        ("--loops 2 --min-loops 3", 2, "--min-loops 3 is more than the model's 2 loops"),
        ("--loops 2 --exit fixed:3", 2, "--exit fixed:3 lies beyond the 2 loops that a token may stop after"),
        ("--html page.html --npz nowhere/a.npz", 1, "cannot write nowhere/a.npz"),
    ],
}

EVERY = [
    pytest.param(command, *case, id=f"{command} {case[0]}")
    for command in COMMANDS
    for case in [*(case for cases in CASES[command].values() for case in cases), *TOGETHER[command]]
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a run, a text, a trace, and files that cannot be read as either."""
    folder = tmp_path_factory.mktemp("place")
    tiny_models.text_run(folder / "run")
    (folder / "text.txt").write_text(tiny_models.HELD_OUT, encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    (folder / "long.txt").write_text("a" * 70, encoding="utf-8")
    (folder / "trace").write_text("[1, 2, 3, 4]", encoding="utf-8")
    (folder / "prompts").write_text("It was\nof times\n", encoding="utf-8")
    return folder


def contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def command_line(command: str, words: str) -> list[str]:
    """As a user would have it: on a model, from a prompt if the command wants one and none is at issue."""
    found = [{"{empty}": "", "{broken}": "x\udcff"}.get(word, word) for word in words.split()]
    if "--model" not in found:
        found += ["--model", "run"]
    prompted = command == "inspect" or (command == "generate" and "--prompts" not in found)
    return [command, *found, *(["--prompt", "abc"] if prompted and "--prompt" not in found else [])]


@pytest.mark.parametrize(("command", "words", "code", "message"), EVERY)
def test_it_is_refused_in_two_lines_and_nothing_is_written(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch, command: str, words: str, code: int, message: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("looplm.kernels.jit.kernels_are_cached", lambda: True)  # else a line says that they are
    before = contents(place)
    out, err = looplm(*command_line(command, words), code=code, width=300)
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert contents(place) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_takes_a_value_is_among_them(command: str) -> None:
    found = set()
    for parameter in app.load(command).params:
        names = [name for name in parameter.opts if name.startswith("--")] or parameter.opts
        if not getattr(parameter, "is_flag", False):
            found.add(names[0])
    assert found == set(CASES[command])
    for name, cases in CASES[command].items():
        short = {"--temperature": "-t", "--max-new-tokens": "-n"}.get(name, name)
        assert all(name == "corpus" or short in words.split() for words, _, _ in cases), name


@pytest.mark.parametrize(
    "words", ["generate --exit fixed:6 -n 2", "kv --exit fixed:6 --windows 1", "inspect --loops 6"]
)
def test_a_depth_beyond_the_models_is_no_mistake_where_it_runs(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(place)
    command, _, rest = words.partition(" ")
    out, err = looplm(*command_line(command, rest), width=200)
    assert out
    assert "warning: 6 loops are more than the 4 this model was trained with" in err
