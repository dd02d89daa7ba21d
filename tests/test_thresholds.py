"""Exit rules on the command line, thresholds from a goal, and what is told about depths beyond training."""

import json
import pathlib

import pytest

import tiny_models
from in_process import looplm, report_of
from looplm.exits import MEASURED
from looplm.text import byte_tokenizer

PROMPT = "It was the best"


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return tiny_models.text_run(tmp_path / "run")


def provenance(model: pathlib.Path) -> dict[str, object]:
    return json.loads((model / "looplm.json").read_text())


def contents(model: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


# ---- one spelling everywhere


@pytest.mark.parametrize("rule", ["change:0.5", "kl:0.1", "top:0.2", "margin:0.5", "stable:2", "fixed:2", "gate:0.5"])
def test_every_rule_steers_generate_inspect_and_eval(rule: str, model: pathlib.Path) -> None:
    written = report_of("generate", "-m", model, "-p", PROMPT, "-n", 20, "--exit", rule)
    assert written["exit"] == rule
    assert 1 < len(written["generated"]) <= 20
    looked = report_of("inspect", "-m", model, "-p", PROMPT, "--exit", rule)
    assert (looked["exit"], looked["q"]) == (rule, 0.5 if rule == "gate:0.5" else None)
    shown, _ = looplm("inspect", "-m", model, "-p", PROMPT, "--exit", rule)
    assert ("at q = 0.5:" if rule == "gate:0.5" else f"by {rule}:") in shown
    measured = report_of("eval", "-m", model, "--exit", rule)["thresholds"]
    assert [at["exit"] for at in measured] == [rule]
    assert 1.0 <= measured[0]["mean_loops"] <= 4.0


def test_the_gate_by_its_name_is_q(model: pathlib.Path) -> None:
    by_q, by_name = (
        report_of("generate", "-m", model, "-p", PROMPT, "-n", 20, *way)
        for way in (["--q", 0.4], ["--exit", "gate:0.4"])
    )
    assert by_q["generated"] == by_name["generated"]
    assert by_q["exit"] == by_name["exit"]


def test_bounds_hold_on_the_command_line(model: pathlib.Path) -> None:
    words = ("generate", "-m", model, "-p", PROMPT, "-n", 20)
    assert report_of(*words, "--q", 0, "--min-loops", 3)["exits"] == [0.0, 0.0, 1.0, 0.0]
    assert report_of(*words, "--exit", "top:1", "--loops", 2)["exits"] == [0.0, 1.0, 0.0, 0.0]
    assert report_of(*words, "--min-loops", 4)["exits"] == [0.0, 0.0, 0.0, 1.0]
    at = report_of("eval", "-m", model, "--q", 0, "--min-loops", 2)["thresholds"][0]
    assert (at["mean_loops"], at["exit"], at["q"]) == (2.0, "gate:0, at least 2 loops", None)
    looked = report_of("inspect", "-m", model, "-p", PROMPT, "--q", 0, "--min-loops", 2)
    assert {position["exit_loop"] for position in looked["positions"]} == {2}


def test_eval_takes_thresholds_and_rules_together(model: pathlib.Path) -> None:
    found = report_of("eval", "-m", model, "--q", "0.5", "--exit", "kl:0.1,top:0.5", "--exit", "kl:0.1")["thresholds"]
    assert [(at["q"], at["exit"]) for at in found] == [(0.5, "gate:0.5"), (None, "kl:0.1"), (None, "top:0.5")]
    assert [at["q"] for at in report_of("eval", "-m", model)["thresholds"]] == [0.3, 0.5, 0.7, 0.9]
    shown, _ = looplm("eval", "-m", model, "--exit", "kl:0.1")
    assert "kl:0.1" in shown


@pytest.mark.parametrize("command", ["generate", "inspect", "eval"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit", "kl:x"], "--exit 'kl:x': 'x' is not a number"),
        (["--exit", "kl:"], "--exit 'kl:': '' is not a number"),
        (["--exit", "kl:-1"], "kl:-1: the threshold is not between 0 and infinity"),
        (["--exit", "kl:nan"], "kl:nan: the threshold is not between 0 and infinity"),
        (["--exit", "top:2"], "top:2: the threshold is not between 0 and 1"),
        (["--exit", "gate:2"], "q=2.0 is outside [0, 1]"),
        (["--exit", "stable:1.5"], "stable:1.5: a number of loops is whole and at least 1"),
        (["--exit", "fixed"], "fixed:nan: a number of loops is whole"),
        (["--exit", "sure:1"], "'sure' is not an exit rule"),
        (["--exit", "kl"], "--exit kl names no threshold, and none is calibrated"),
        (["--min-loops", "0"], "0 is not in the range"),
        (["--min-loops", "5"], "--min-loops 5 is more than the model's 4 loops"),
    ],
    ids=str,
)
def test_bad_rules_are_two_lines(command: str, arguments: list[str], message: str, model: pathlib.Path) -> None:
    prompt = [] if command == "eval" else ["-p", PROMPT]
    out, err = looplm(command, "-m", model, *prompt, *arguments, code=2, width=300)
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith(f"error: {message}") or message in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_two_rules_at_once_are_refused(command: str, model: pathlib.Path) -> None:
    _, err = looplm(command, "-m", model, "-p", PROMPT, "--q", 0.5, "--exit", "kl:0.1", code=2, width=300)
    assert err.startswith("error: --q 0.5 and --exit kl:0.1 both say when to stop\nhint: use one")
    _, err = looplm(command, "-m", model, "-p", PROMPT, "--min-loops", 3, "--loops", 2, code=2)
    seen = {"generate": "a position cannot stop between loop 3 and loop 2", "inspect": "--min-loops 3 is more than"}
    assert err.startswith(f"error: {seen[command]}")
    assert "\nhint: " in err


# ---- thresholds from a goal


def test_a_goal_is_solved_checked_stored_and_used(model: pathlib.Path) -> None:
    report = report_of("calibrate", "-m", model, "--accept", "never", "--target-loops", 2.5)
    found = report["exit"]
    assert provenance(model)["exit"] == found
    assert (found["goal"], found["rule"]) == ("2.5 loops on average", "gate")
    assert set(found["thresholds"]) == {"gate", *MEASURED}
    assert set(found["solved"]) == set(found["checked"]) == {"gate", *MEASURED, "all loops"}
    assert found["solved"]["gate"]["mean_loops"] == pytest.approx(2.5, abs=0.05)
    assert found["solved"] != found["checked"]

    out, err = looplm("generate", "-m", model, "-p", PROMPT, "-n", 20)
    q = found["thresholds"]["gate"]
    assert f"stopping by gate:{q:g}, calibrated for 2.5 loops on average" in err
    assert out == looplm("generate", "-m", model, "-p", PROMPT, "-n", 20, "--q", q)[0]
    assert looplm("generate", "-m", model, "-p", PROMPT, "-n", 20, "--quiet")[1] == ""
    by_name = report_of("generate", "-m", model, "-p", PROMPT, "-n", 20, "--exit", "margin")
    assert by_name["exit"] == f"margin:{found['thresholds']['margin']:g}"
    assert report_of("generate", "-m", model, "-p", PROMPT, "-n", 20, "--loops", 3)["exit"] == "fixed:3"


def test_what_was_solved_is_what_eval_finds_on_that_half(model: pathlib.Path) -> None:
    found = report_of("calibrate", "-m", model, "--accept", "never", "--target-loops", 3)["exit"]
    wishes = [f"{rule}:{threshold}" for rule, threshold in found["thresholds"].items()]
    for wish, at in zip(wishes, report_of("eval", "-m", model, "--exit", ",".join(wishes))["thresholds"], strict=True):
        halves = [found[half][wish.partition(":")[0]] for half in ("solved", "checked")]
        low, high = sorted(half["loss"] for half in halves)
        assert low - 1e-3 <= at["loss"] <= high + 1e-3
        assert (
            min(h["mean_loops"] for h in halves) - 1e-3
            <= at["mean_loops"]
            <= max(h["mean_loops"] for h in halves) + 1e-3
        )


def test_loss_may_grow_by_a_share(model: pathlib.Path) -> None:
    for share in ("2%", "0.02"):
        found = report_of("calibrate", "-m", model, "--accept", "never", "--max-loss-increase", share)["exit"]
        assert found["goal"] == "at most 2 % more loss than all loops"
        for rule in found["thresholds"]:
            assert found["solved"][rule]["loss"] <= 1.02 * found["solved"]["all loops"]["loss"] + 1e-4


def test_undo_takes_thresholds_back_too(model: pathlib.Path) -> None:
    before = contents(model)
    looplm("calibrate", "-m", model, "--steps", 5, "--accept", "always", "--target-loops", 2)
    assert "exit" in provenance(model)
    looplm("calibrate", "-m", model, "--undo")
    after = contents(model)
    assert {name: after[name] for name in before} == before
    looplm("calibrate", "-m", model, "--accept", "never", "--target-loops", 2)
    assert contents(model)["model.safetensors"] == before["model.safetensors"]
    looplm("calibrate", "-m", model, "--undo")
    assert "exit" not in provenance(model)


def test_a_new_gate_without_a_goal_drops_the_old_gates_thresholds(model: pathlib.Path) -> None:
    looplm("calibrate", "-m", model, "--accept", "never", "--target-loops", 2)
    looplm("calibrate", "-m", model, "--steps", 5, "--accept", "always")
    assert "exit" not in provenance(model)
    assert "loss_by_depth" in provenance(model)


def test_the_terminal_tells_both_halves_and_what_is_stored(model: pathlib.Path) -> None:
    out, err = looplm("calibrate", "-m", model, "--steps", 5, "--accept", "always", "--target-loops", 2.5, width=200)
    for text in ("goal: 2.5 loops on average", "threshold", "solved on", "checked on", "margin", "all loops"):
        assert text in out
    assert "looplm generate now stops by gate:" in err
    kept = looplm("calibrate", "-m", model, "--accept", "never")
    assert "keeping the old gate" in kept[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-loops", "0.5"], "--target-loops 0.5 is not between 1 and the model's 4 loops"),
        (["--target-loops", "4.1"], "--target-loops 4.1 is not between 1 and the model's 4 loops"),
        (["--target-loops", "nan"], "nan is not a finite number"),
        (["--max-loss-increase", "-1%"], "--max-loss-increase '-1%' is not a share of the loss"),
        (["--max-loss-increase", "much"], "--max-loss-increase 'much' is not a share of the loss"),
        (["--max-loss-increase", "nan"], "--max-loss-increase 'nan' is not a share of the loss"),
        (["--max-loss-increase", "101%"], "--max-loss-increase '101%' is not a share of the loss"),
        (["--target-loops", "2", "--max-loss-increase", "1%"], "are two goals for one threshold"),
        (["--accept", "maybe"], "--accept 'maybe' is not known"),
        (["--target", "later"], "target 'later' is not known"),
    ],
    ids=str,
)
def test_bad_goals_are_two_lines_and_change_nothing(arguments: list[str], message: str, model: pathlib.Path) -> None:
    before = contents(model)
    code = 1 if "--target" in arguments else 2
    out, err = looplm("calibrate", "-m", model, *arguments, code=code, width=300)
    assert out == ""
    error, hint = err.splitlines()
    assert message in error
    assert hint.startswith("hint: ")
    assert contents(model) == before


def test_a_damaged_note_is_no_rule(model: pathlib.Path) -> None:
    for note in (
        "2.5",
        {"rule": "kl"},
        {"rule": "gate", "thresholds": 3},
        {"rule": "gate", "thresholds": {"gate": "x"}},
    ):
        (model / "looplm.json").write_text(json.dumps({"task": "text", "exit": note}))
        out, err = looplm("generate", "-m", model, "-p", PROMPT, "-n", 3)
        assert "4.00 of 4 on average" in err, note
        assert out


# ---- depths beyond training


def test_the_loss_at_a_depth_is_told_once_it_is_known(model: pathlib.Path) -> None:
    before = contents(model)
    words = ("inspect", "-m", model, "-p", "abc", "--loops", 6)
    _, err = looplm(*words, width=300)
    told = "6 loops are more than the 4 this model was trained with"
    assert f"warning: {told}; what they do is not known: looplm eval --max-loops 6 --remember measures it" in err
    looplm("eval", "-m", model, "--max-loops", 6)
    assert contents(model) == before, "nothing is written unasked"
    report = report_of("eval", "-m", model, "--max-loops", 6, "--remember")
    losses = {str(depth["loops"]): depth["loss"] for depth in report["depths"]}
    assert provenance(model)["loss_by_depth"] == losses
    changed = {name for name, data in contents(model).items() if before.get(name) != data}
    assert changed == {"looplm.json"}
    _, err = looplm(*words, width=300)
    verdict = "no better" if losses["6"] >= losses["4"] else "better"
    assert (
        f"{told}; measured on held-out data they are {verdict}: loss {losses['6']:.4f}, after 4 {losses['4']:.4f}"
        in err
    )
    _, err = looplm("generate", "-m", model, "-p", "abc", "-n", 2, "--exit", "fixed:6", width=300)
    assert f"{told}; measured on held-out data" in err


def test_calibrating_notes_the_losses_of_twice_the_depth(model: pathlib.Path) -> None:
    looplm("calibrate", "-m", model, "--accept", "never", "--target-loops", 2)
    found = provenance(model)["loss_by_depth"]
    assert list(found) == [str(loops) for loops in range(1, 9)]
    assert len(byte_tokenizer().encode(PROMPT)) == len(PROMPT)
