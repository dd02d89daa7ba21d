"""`looplm generate` with drafts, budgets, time limits and exit traces: the same text, what is said."""

import json
import pathlib

import pytest

from in_process import looplm, report_of
from tiny_models import text_run

PROMPT = "It was the best"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return text_run(tmp_path_factory.mktemp("runs") / "one")


def words(*extra: object, model: pathlib.Path) -> list[object]:
    return ["generate", "-m", model, "-p", PROMPT, *extra]


@pytest.mark.parametrize("drafts", [("2", "3"), ("auto", "auto"), ("1", None), (None, "2"), ("2", "flow")], ids=str)
def test_greedy_text_with_drafts_is_the_text_without(model: pathlib.Path, drafts: tuple[str | None, ...]) -> None:
    options = [w for name, v in zip(("loops", "tokens"), drafts, strict=True) if v for w in (f"--draft-{name}", v)]
    plain = report_of(*words("-t", 0, "-n", 40, "--repetition-penalty", 1.2, model=model))
    found = report_of(*words("-t", 0, "-n", 40, "--repetition-penalty", 1.2, *options, model=model))
    assert found["generated"] == plain["generated"]
    assert plain["drafts"] is plain["pace"] is None
    account = found["drafts"]
    assert account["rounds"] + account["accepted"] == found["tokens"] - 1
    assert account["rounds"] == sum(choice["rounds"] for choice in account["choices"])
    assert account["speedup"] > 0
    assert account["ms"]["single_pass"] > 0


def test_more_loops_than_trained_check_drafts_too(model: pathlib.Path) -> None:
    plain = report_of(*words("-t", 0, "-n", 12, "--loops", 6, model=model))
    assert report_of(*words("-t", 0, "-n", 12, "--loops", 6, "--draft-loops", 4, model=model))["text"] == plain["text"]


def test_the_account_of_drafts_is_a_line_on_stderr(model: pathlib.Path) -> None:
    out, err = looplm(*words("--draft-loops", 2, "--draft-tokens", 2, "-n", 30, model=model), width=300)
    assert out
    last = err.splitlines()[-1]
    assert last.startswith("drafts: ")
    assert " of 2 loops, " in last
    assert " % stood; " in last
    assert " tokens a round; " in last
    assert "x the speed of full decoding, by the cost of its passes" in last
    assert looplm(*words("--draft-loops", 2, "--quiet", model=model))[1] == ""
    _, err = looplm(*words("--draft-loops", 2, "-n", 1, model=model), width=300)
    assert "drafts: none, the text ended with its first token" in err


def test_drafts_ignore_what_is_calibrated_and_q_1_says_the_same(model: pathlib.Path) -> None:
    plain = report_of(*words("-t", 0, "-n", 20, "--q", 1, model=model))["text"]
    assert report_of(*words("-t", 0, "-n", 20, "--q", 1, "--draft-loops", 1, model=model))["text"] == plain


def test_a_budget_is_kept_and_told(model: pathlib.Path) -> None:
    report = report_of(*words("--budget-loops-per-token", 2.5, "-t", 0, "-n", 40, model=model))
    assert report["pace"]["budget_loops_per_token"] == 2.5
    assert 2.2 <= report["pace"]["mean_loops"] <= 2.5
    loops = [token["loops_run"] for token in report["generated"][1:]]
    assert sum(loops) / len(loops) == pytest.approx(report["pace"]["mean_loops"], abs=1e-3)
    assert report["text"] == report_of(*words("--budget-loops-per-token", 2.5, "-t", 0, "-n", 40, model=model))["text"]
    _, err = looplm(
        *words("--budget-loops-per-token", 2, "--q", 0.9, "--min-loops", 2, "-t", 0, "-n", 20, model=model), width=200
    )
    assert "\npace: 2.00 loops a token over 19 tokens, 2 allowed\n" in err
    least = report_of(*words("--budget-loops-per-token", 3, "--loops", 2, "-n", 20, model=model))
    assert max(token["loops_run"] for token in least["generated"]) == 2


def test_a_time_limit_is_told(model: pathlib.Path) -> None:
    report = report_of(*words("--max-ms-per-token", 1e6, "-n", 20, model=model))
    assert report["pace"]["within"] == 1.0
    assert report["pace"]["mean_loops"] == 4.0
    report = report_of(*words("--max-ms-per-token", 0.001, "-t", 0, "-n", 20, model=model))
    assert [token["loops_run"] for token in report["generated"][3:]] == [1] * 17
    _, err = looplm(*words("--max-ms-per-token", 0.001, "-n", 20, model=model), width=200)
    assert "pace: 0 % of tokens within 0.001 ms, median " in err
    assert "pace: the text ended" in looplm(*words("--max-ms-per-token", 1, "-n", 1, model=model))[1]


def test_exits_of_a_file(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    exits = [1, 3, 2, 4, 1, 1]
    (tmp_path / "trace.json").write_text(json.dumps(exits))
    report = report_of(*words("--exit-trace", tmp_path / "trace.json", "-n", 6, model=model))
    assert [token["exit_loop"] for token in report["generated"]] == exits
    assert report["exit"] == "trace of 6 exits"
    again = tmp_path / "again"
    again.write_text("\n".join(str(token["exit_loop"]) for token in report["generated"]))
    assert report_of(*words("--exit-trace", again, "-n", 6, model=model))["text"] == report["text"]
