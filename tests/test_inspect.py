"""`looplm inspect` and `looplm eval`: what they print, write and refuse."""

import json
import pathlib

import numpy as np
import pytest

from in_process import looplm, report_of
from looplm import analysis
from looplm.checkpoint import load_model
from looplm.exits import LearnedGate
from looplm.model_files import open_model
from looplm.stored import read_stored
from looplm.tasks import hops
from looplm.text import byte_tokenizer
from looplm_cli import page, render
from tiny_models import HELD_OUT, hops_model, text_run, token_count

PROMPT = "the cat sat </script> on\ta mat"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return text_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def hopping(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return hops_model(tmp_path_factory.mktemp("hops") / "model")


# ---- inspect


def test_the_report_holds_what_the_engine_computed(model: pathlib.Path) -> None:
    report = report_of("inspect", "-m", model, "-p", PROMPT, "--q", 0.6, "--top-k", 3)
    ids = byte_tokenizer().encode(PROMPT)[None]
    found = analysis.inspect(read_stored(open_model(model)), ids, rule=LearnedGate(0.6), top_k=3)
    assert (report["task"], report["loops"], report["trained_loops"], report["q"]) == ("text", 4, 4, 0.6)
    assert report["mean_loops"] == pytest.approx(found.mean_loops)
    assert [p["exit_loop"] for p in report["positions"]] == (found.exit_index[0] + 1).tolist()
    assert len(set(found.exit_index[0].tolist())) > 1
    assert [p["id"] for p in report["positions"]] == ids[0].tolist()
    assert [p["target_id"] for p in report["positions"]] == [*ids[0, 1:].tolist(), None]
    assert [p["token"] for p in report["positions"]][7:9] == ["·", "s"]
    assert "\\t" in [p["token"] for p in report["positions"]]
    for s in (0, 5, ids.size - 1):
        for r in range(4):
            cell = report["positions"][s]["loops"][r]
            assert [guess["id"] for guess in cell["top"]] == found.top_ids[r, 0, s].tolist()
            assert [guess["prob"] for guess in cell["top"]] == pytest.approx(found.top_prob[r, 0, s].tolist(), rel=1e-6)
            for name in ("hazard", "exit_prob", "exit_cdf", "change", "kl_to_last"):
                assert np.float32(cell[name]) == getattr(found, name)[r, 0, s], "not every digit survived"
            if s == ids.size - 1:
                assert (cell["loss"], cell["rank"], cell["target_prob"]) == (None, None, None)
            else:
                assert np.float32(cell["loss"]) == found.loss[r, 0, s]
                assert cell["rank"] == found.rank[r, 0, s]
                assert cell["target_prob"] == pytest.approx(np.exp(-cell["loss"]), rel=1e-5)
    for r, loop in enumerate(report["by_loop"]):
        assert loop["loss"] == pytest.approx(np.nanmean(found.loss[r, 0]), rel=1e-5)
        assert loop["exits"] == pytest.approx((found.exit_index == r).mean())


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_the_terminal(model: pathlib.Path, width: int) -> None:
    out, err = looplm("inspect", "-m", model, "-p", PROMPT, "--q", 0.6, width=width)
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(lines[0].split()) == "token true next loop 1 loop 2 loop 3 loop 4"
    report = report_of("inspect", "-m", model, "-p", PROMPT, "--q", 0.6)
    for line, position in zip(lines[1:], report["positions"], strict=False):
        assert line.split()[0] == str(position["position"])
        assert line.count("◆") == 1
        before_mark = line[: line.index("◆")]
        cell = (width - 22) // 4 if width == 80 else 33
        assert (len(before_mark) - 22) // cell + 1 == position["exit_loop"]
        assert ("λ" in line) == (width == 160)
    assert f"at q = 0.6: {report['mean_loops']:.2f} of 4 loops on average" in out


def test_loops_that_do_not_fit_come_in_further_tables(model: pathlib.Path) -> None:
    out, err = looplm("inspect", "-m", model, "-p", "abc", "--loops", 6)
    assert "6 loops are more than the 4 this model was trained with" in err
    heads = [line for line in out.splitlines() if line.strip().startswith("token")]
    assert [" ".join(head.split()) for head in heads] == [
        "token true next loop 1 loop 2 loop 3",
        "token true next loop 4 loop 5 loop 6",
    ]


def test_colour_only_adds_to_the_numbers(model: pathlib.Path) -> None:
    assert "\x1b" not in looplm("inspect", "-m", model, "-p", "abcdef")[0]
    shades = [render.heat(share / 10) for share in range(11)]
    assert len({style.bgcolor for style in shades}) == 11
    for style in shades:
        assert style.color is not None
        assert style.bgcolor is not None
        dark, light = sorted(luminance(colour.get_truecolor()) for colour in (style.color, style.bgcolor))
        assert (light + 0.05) / (dark + 0.05) > 4.5


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance of an sRGB colour, as contrast ratios want it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_without_a_prompt_the_held_out_text_is_shown(model: pathlib.Path) -> None:
    report = report_of("inspect", "-m", model)
    assert [p["id"] for p in report["positions"]] == byte_tokenizer().encode(HELD_OUT)[:24].tolist()


def test_a_model_without_a_run_asks_for_a_prompt(hopping: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (text_run(tmp_path / "run")).rename(tmp_path / "alone")
    _, err = looplm("inspect", "-m", tmp_path / "alone", code=2)
    assert err.splitlines()[0].endswith("has no held-out text beside it to show")
    assert err.splitlines()[1] == "hint: give a text with -p"


def test_a_hops_model_is_held_against_the_tasks_targets(hopping: pathlib.Path) -> None:
    report = report_of("inspect", "-m", hopping, "-p", "2abcacb")
    assert report["task"] == "hops"
    assert [p["target"] for p in report["positions"]] == [None, None, None, None, None, "b", None]
    assert [p["loops"][0]["loss"] is None for p in report["positions"]] == [True] * 5 + [False, True]
    sampled = report_of("inspect", "-m", hopping)
    ids = np.array([[p["id"] for p in sampled["positions"]]])
    wanted = hops.targets(ids, alphabet=5, max_hops=2)[0]
    assert [p["target_id"] for p in sampled["positions"]] == [None if i < 0 else i for i in wanted.tolist()]
    assert (wanted >= 0).any()


def test_raw_arrays_are_those_of_a_fixture(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    looplm("inspect", "-m", model, "-p", "abcabc", "--q", 0.7, "--npz", tmp_path / "expected.npz")
    with np.load(tmp_path / "expected.npz") as arrays:
        names = {
            "input_ids",
            "hidden",
            "logits",
            "gate_logit",
            "exit_prob",
            "exit_logits@0.7",
            "expected_logits",
            "loss",
        }
        assert set(arrays) == names
        assert arrays["input_ids"].dtype == np.int64
        assert arrays["logits"].shape == (4, 1, 6, 257)
    assert [path.name for path in tmp_path.iterdir()] == ["expected.npz"]


@pytest.mark.parametrize("option", ["--html", "--npz"])
def test_a_file_that_cannot_be_written_leaves_nothing(model: pathlib.Path, tmp_path: pathlib.Path, option: str) -> None:
    _, err = looplm("inspect", "-m", model, "-p", "abc", option, tmp_path / "nowhere" / "x", code=1)
    assert err.startswith("error: cannot write ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-p", ""], 1, "the prompt is empty"),
        (["-p", "x" * 65], 1, "the prompt has 65 tokens, more than the model's context of 64"),
        (["--q", "nan"], 2, "nan is not a finite number"),
        (["--q", "1.1"], 2, "1.1 is not in the range"),
        (["--loops", "0"], 2, "0 is not in the range"),
        (["--top-k", "0"], 2, "0 is not in the range"),
        (["-p", "x\udcff"], 1, "the prompt is not UTF-8"),
    ],
)
def test_bad_requests_are_two_lines(model: pathlib.Path, arguments: list[str], code: int, said: str) -> None:
    out, err = looplm("inspect", "-m", model, *arguments, code=code)
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert second.startswith("hint: ")


def test_hops_prompts_are_checked(hopping: pathlib.Path) -> None:
    _, err = looplm("inspect", "-m", hopping, "-p", "9abc", code=1)
    assert "the prompt starts with '9'" in err


def test_a_page_cannot_be_broken_by_its_text(model: pathlib.Path) -> None:
    report = report_of("inspect", "-m", model, "-p", "ab")
    report["positions"][0]["token"] = "</script><!--<script>"
    report["model"] = "</title><b>{{script}}&"
    built = page.build(report)
    assert built.count("</script>") == 2, "one ends the data, one the program"
    assert "<!--" not in built
    embedded = built.split('id="report">')[1].split("</script>")[0]
    assert json.loads(embedded) == report
    assert "<title>&lt;/title&gt;&lt;b&gt;{{script}}&amp;: inside the loops</title>" in built
    assert "http" not in built.replace("http-equiv", "")


# ---- eval


def test_eval_measures_what_the_run_held_out(model: pathlib.Path) -> None:
    report = report_of("eval", "-m", model, "--max-loops", 6, "--q", "0.5,1", "--batch-size", 3)
    assert report["tokens"] == token_count() - 1
    assert report["bytes_per_token"] == 1.0
    assert [depth["loops"] for depth in report["depths"]] == [1, 2, 3, 4, 5, 6]
    assert [depth["exit_prob"] is None for depth in report["depths"]] == [False] * 4 + [True] * 2
    assert sum(depth["exit_prob"] for depth in report["depths"][:4]) == pytest.approx(1.0)
    half, all_loops = report["thresholds"]
    assert half["mean_loops"] < all_loops["mean_loops"] == 4.0
    assert all_loops["loss"] == pytest.approx(report["depths"][3]["loss"])
    assert half["bits_per_byte"] == pytest.approx(half["loss"] / np.log(2))
    assert sum(half["exits"]) == pytest.approx(1.0)


def test_eval_of_a_text_counts_its_bytes(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.txt").write_text("zwölf Boxkämpfer", encoding="utf-8")
    report = report_of("eval", tmp_path / "text.txt", "-m", model)
    assert report["tokens"] == 18  # 18 bytes after the one token that starts a document
    assert report["bytes_per_token"] == pytest.approx(18 / 19)
    assert [at["q"] for at in report["thresholds"]] == [0.3, 0.5, 0.7, 0.9]


def test_eval_prints_both_tables(model: pathlib.Path) -> None:
    out, err = looplm("eval", "-m", model, "--max-loops", 5, "-q", 0.3, "-q", 0.9)
    assert "warning: 5 loops are more than the 4 this model was trained with" in err
    assert "batch" in err
    assert "5 (beyond training)" in out
    assert [line.split()[:3] for line in out.splitlines() if "q = " in line] == [["q", "=", "0.3"], ["q", "=", "0.9"]]
    assert max(map(len, out.splitlines())) <= 80
    assert "batch" not in looplm("eval", "-m", model, "--quiet")[1]


def test_eval_of_a_task_tells_hops_apart(hopping: pathlib.Path) -> None:
    report = report_of("eval", "-m", hopping, "--q", 0.5)
    assert [part["hops"] for part in report["hops"]] == [1, 2]
    assert report["bytes_per_token"] is None
    assert report["depths"][0]["bits_per_byte"] is None
    source = hops.HopsSource(16, 20, seed=0, alphabet=5, max_hops=2)
    trace = analysis.evaluate(load_model(hopping).weights, source.validation())
    assert report["tokens"] == trace.tokens
    shares = [part["accuracy"][2] for part in report["hops"]]
    assert min(shares) <= report["depths"][2]["accuracy"] <= max(shares)
    assert "2 hops" in looplm("eval", "-m", hopping, "--q", 0.5)[0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.txt"], 1, "nowhere.txt does not exist"),
        (["builtin:hops"], 1, "is a task, not a text"),
        (["--seq-len", "65"], 2, "more than the model's context of 64"),
        (["--max-loops", "0"], 2, "0 is not in the range"),
        (["--q", "0.5,x"], 2, "'x' is not a number"),
        (["--q", "nan"], 2, "nan is not in the range"),
        (["--q", "0.5,-0.1"], 2, "-0.1 is not in the range"),
    ],
)
def test_eval_refuses_in_two_lines(model: pathlib.Path, arguments: list[str], code: int, said: str) -> None:
    out, err = looplm("eval", "-m", model, *arguments, code=code)
    assert out == ""
    assert said in err.splitlines()[0]
    assert len(err.splitlines()) == 2


def test_a_hops_model_is_not_evaluated_on_text(hopping: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.txt").write_text("abc", encoding="utf-8")
    _, err = looplm("eval", tmp_path / "text.txt", "-m", hopping, code=1)
    assert "was trained on the task hops" in err


def test_a_text_with_nothing_to_predict_is_refused(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    _, err = looplm("eval", tmp_path / "empty.txt", "-m", model, code=1)
    assert "is empty" in err
