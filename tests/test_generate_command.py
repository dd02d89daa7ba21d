"""`looplm generate`: what it writes where, what it says afterwards, and what it refuses."""

import io
import pathlib
import re
import sys

import numpy as np
import pytest

from in_process import looplm, report_of
from looplm.checkpoint import load_model, save_model
from looplm.exits import LearnedGate
from looplm.generation import Generated
from looplm.generation import generate as engine
from looplm.memory import resident
from looplm.sampling import Sampling
from looplm.text import byte_tokenizer, letter_tokenizer
from looplm_cli.written import Written
from tiny_models import hops_model, save_tiny, text_run

PROMPT = "It was the best"
UNMATCHED = "<never written>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return text_run(tmp_path_factory.mktemp("runs") / "one")


def words(*extra: object, model: pathlib.Path) -> list[object]:
    return ["generate", "-m", model, "-p", PROMPT, *extra]


def test_it_writes_what_the_engine_generates(model: pathlib.Path) -> None:
    report = report_of(*words("--q", 0.5, "-n", 20, "-t", 0.9, "--top-k", 40, "--seed", 3, model=model))
    tokens = list(
        engine(
            load_model(model).weights,
            byte_tokenizer().encode(PROMPT),
            rule=LearnedGate(0.5),
            rng=np.random.default_rng(3),
            sampling=Sampling(temperature=0.9, top_k=40),
            max_new_tokens=20,
            stop_ids={0},
        )
    )
    assert [token["id"] for token in report["generated"]] == [token.token_id for token in tokens]
    assert [token["exit_loop"] - 1 for token in report["generated"]] == [token.exit_loop for token in tokens]
    assert [token["loops_run"] for token in report["generated"]] == [token.loops_run for token in tokens]
    assert report["text"] == byte_tokenizer().decode(token.token_id for token in tokens)
    assert report["prompt_tokens"] == len(PROMPT)
    assert report["finish"] == tokens[-1].finish
    assert report["mean_loops"] == pytest.approx(np.mean([token.loops_run for token in tokens]), abs=1e-4)
    assert report["loops_saved"] == pytest.approx(1 - report["mean_loops"] / 4, abs=1e-3)
    assert sum(report["exits"]) == pytest.approx(1.0, abs=1e-3)
    assert len(set(report["exits"])) > 1
    assert report["tokens_per_s"] > 0


def test_the_text_goes_to_stdout_and_the_account_to_stderr(model: pathlib.Path) -> None:
    arguments = words("--q", 0.5, "-n", 20, model=model)
    out, err = looplm(*arguments, width=200)
    report = report_of(*arguments)
    assert out.removesuffix("\n") == report["text"].removesuffix("\n")
    first, second = err.splitlines()
    count, finish = report["tokens"], report["finish"]
    spent = r"[\d.]+ s: [\d.]+ s to the first two, then [\d,.]+ tokens/s"
    assert re.fullmatch(rf"{count} tokens in {spent} \({finish}\)", first)
    share = round(100 * report["loops_saved"])
    assert second.startswith(f"loops {report['mean_loops']:.2f} of 4 on average, {share} % saved; read after loop ")
    assert f"4: {round(100 * report['exits'][3])} %" in second
    assert looplm(*arguments, "--quiet") == (out, "")


def test_smaller_thresholds_save_loops_and_the_models_own_is_the_default(model: pathlib.Path) -> None:
    reports = [report_of(*words("--q", q, "-n", 30, model=model)) for q in (0.2, 0.6, 1.0)]
    loops = [report["mean_loops"] for report in reports]
    assert loops[0] < loops[1] < loops[2] == 4.0
    assert reports[2]["loops_saved"] == 0.0
    assert report_of(*words("-n", 30, model=model))["text"] == reports[2]["text"]


def test_full_keys_and_values_save_nothing(model: pathlib.Path) -> None:
    report = report_of(*words("--q", 0.3, "-n", 20, "--cache", "full", model=model))
    assert report["mean_loops"] == 4.0
    assert report["exits"][0] > 0


def test_exact_writes_what_full_writes_and_saves_loops(model: pathlib.Path) -> None:
    full, exact = (report_of(*words("--q", 0.3, "-n", 30, "--cache", name, model=model)) for name in ("full", "exact"))
    for key in ("text", "exits", "tokens"):
        assert exact[key] == full[key]
    assert exact["mean_loops"] < full["mean_loops"]
    assert exact["kv"] == "exact"
    bounded = report_of(*words("--q", 0.3, "-n", 30, "--cache", "exact", "--max-deferred", 2, model=model))
    assert bounded["text"] == full["text"]


@pytest.mark.parametrize("policy", ["shared-last", "average", "first"])
def test_one_slot_for_all_loops_writes_something_else(model: pathlib.Path, policy: str) -> None:
    full, shared = (report_of(*words("-n", 30, "-t", 0, "--cache", name, model=model)) for name in ("full", policy))
    assert shared["tokens"] == full["tokens"]
    assert shared["text"] != full["text"]


def test_a_fixed_depth_and_more_loops_than_trained(model: pathlib.Path) -> None:
    assert report_of(*words("--loops", 2, model=model))["exits"] == [0.0, 1.0, 0.0, 0.0]
    assert report_of(*words("--loops", 2, model=model))["loops_saved"] == 0.5
    assert report_of(*words("--loops", 2, "--q", 1, model=model))["mean_loops"] == 2.0
    _, err = looplm(*words("--loops", 6, "-n", 2, model=model))
    assert "warning: 6 loops are more than the 4 this model was trained with" in err


def test_a_seed_fixes_the_text_and_greedy_needs_none(model: pathlib.Path) -> None:
    texts = [looplm(*words("--seed", seed, "--quiet", model=model))[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [looplm(*words("--seed", seed, "-t", 0, "--quiet", model=model))[0] for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_a_stop_string_is_neither_shown_nor_passed(model: pathlib.Path) -> None:
    unstopped = report_of(*words("-n", 40, model=model))
    whole, stop = unstopped["text"], unstopped["text"][7:10]
    report = report_of(*words("-n", 40, "--stop", UNMATCHED, "--stop", stop, model=model))
    assert report["text"] == whole[: whole.index(stop)]
    assert report["finish"] == "stop string"
    assert report["tokens"] < unstopped["tokens"]
    out, _ = looplm(*words("-n", 40, "--stop", stop, model=model))
    assert out == report["text"] + "\n"


def test_what_may_begin_a_stop_string_is_shown_after_all_at_the_end(model: pathlib.Path) -> None:
    whole = report_of(*words("-n", 12, model=model))["text"]
    report = report_of(*words("-n", 12, "--stop", whole[-1] + UNMATCHED, model=model))
    assert report["text"] == whole


class Pieces(io.StringIO):
    """A stdout that remembers what reached the reader when."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def flush(self) -> None:
        self.seen.append(self.getvalue())


def test_text_is_shown_as_it_comes_in_whole_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Pieces()
    monkeypatch.setattr(sys, "stdout", out)
    written, decoder = Written(depth=4), byte_tokenizer().stream()
    for token_id in byte_tokenizer().encode("a€b"):
        written.add(Generated(int(token_id), 0, 1, -1.0), decoder.push(int(token_id)), shown=True)
    written.end(decoder.flush(), stopped=False, shown=True)
    assert out.seen == ["a", "a€", "a€b", "a€b\n"]


def test_an_empty_prompt_begins_a_document(model: pathlib.Path) -> None:
    nothing, empty = report_of("generate", "-m", model), report_of("generate", "-m", model, "-p", "")
    assert nothing["prompt_tokens"] == 1
    assert nothing["text"] == empty["text"]


def test_the_most_recent_run_is_used(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parents[2])
    (model.parents[2] / "runs").symlink_to(model.parents[1])
    assert report_of("generate", "-p", PROMPT)["text"] == report_of(*words(model=model))["text"]


def test_the_prompt_may_come_from_standard_input(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for raw, code in ((PROMPT.encode() + b"\n", 0), (b"caf\xe9", 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        out, err = looplm("generate", "-m", model, "-p", "-", code=code)
        if code:
            assert "standard input is not UTF-8: byte 0xe9 at offset 3" in err
        else:
            assert out == looplm(*words(model=model))[0]


def test_it_ends_where_the_context_does(model: pathlib.Path) -> None:
    report = report_of(*words("-n", 500, "-t", 0, model=model))
    assert (report["finish"], report["tokens"]) == ("context full", 64 - len(PROMPT) + 1)


def test_an_interrupt_leaves_the_text_and_the_account(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm import generation

    def interrupted(*_: object, **__: object):  # type: ignore[no-untyped-def]
        yield Generated(byte_tokenizer().encode("x")[0], 1, 4, -1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate", interrupted)
    out, err = looplm(*words(model=model), code=130)
    assert out == "x\n"
    assert err.startswith("1 tokens in ")
    assert "(interrupted)" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-p", "a" * 70], 1, "the prompt has 70 tokens, but the model's context is 64"),
        (["--stop", ""], 2, "a stop string is empty"),
        (["--cache", "shared"], 2, "--cache 'shared' is not known"),
        (["--cache", "exact", "--max-deferred", "0"], 2, "0 tokens cannot wait for their deeper loops"),
        (["--cache", "exact", "--max-deferred", "24"], 2, "24 tokens cannot wait for their deeper loops"),
        (["--max-deferred", "3"], 2, "--max-deferred 3: nothing waits under --cache last-exited"),
        (["--weights", "int3"], 2, "--weights 'int3' is not known"),
        (["--kv-dtype", "int8"], 2, "--kv-dtype 'int8' is not known"),
        (["--threads", "0"], 2, "0 is not in the range"),
        (["--q", "1.5"], 2, "1.5 is not in the range"),
        (["--q", "nan"], 2, "nan is not a finite number"),
        (["--temperature", "-1"], 2, "-1.0 is not in the range"),
        (["--top-p", "nan"], 2, "nan is not a finite number"),
        (["--repetition-penalty", "0"], 2, "0.0 is not in the range"),
        (["--loops", "0"], 2, "0 is not in the range"),
        (["--max-new-tokens", "0"], 2, "0 is not in the range"),
    ],
    ids=str,
)
def test_bad_input_is_two_lines(model: pathlib.Path, arguments: list[str], code: int, message: str) -> None:
    out, err = looplm("generate", "-m", model, *arguments, code=code, width=300)
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_the_weights_may_be_held_in_any_format(model: pathlib.Path, weights: str, threads: int) -> None:
    arguments = words("-n", 20, "-t", 0, "--weights", weights, model=model)
    report = report_of(*arguments, "--threads", threads, "--kv-dtype", "bfloat16")
    assert report["tokens"] == 20
    assert report["text"] == report_of(*arguments, "--kv-dtype", "bfloat16")["text"]


def test_a_long_prompt_may_be_multiplied_in_bfloat16(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from looplm.decoder import Decoder

    asked, run_loop = [], Decoder.run_loop

    def run(decoder: Decoder, *arguments: int) -> None:
        asked.append(decoder._weights.prompt_precision)
        run_loop(decoder, *arguments)

    monkeypatch.setattr(Decoder, "run_loop", run)
    for precision in ("fp32", "bf16"):
        report = report_of("generate", "-m", model, "-p", "a" * 40, "-n", 4, "--prompt-precision", precision, "--json")
        assert report["tokens"] == 4
        assert set(asked) == {precision}
        asked.clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_weights_that_are_no_numbers_are_named(tmp_path: pathlib.Path, command: str, dtype: str) -> None:
    folder = text_run(tmp_path / "run")
    weights = load_model(folder).weights.copy()
    weights.embedding[3, 0] = np.inf
    save_model(folder, weights, None, None, {}, dtype=dtype)
    _, err = looplm(command, "-m", folder, "-p", "a", *(["-n", 1] if command == "generate" else []), width=300)
    assert "warning: weights that are not finite numbers: model.embed_tokens.weight (1 of " in err


def test_a_cache_that_cannot_fit_is_refused(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("looplm.generation.available_memory", lambda: (resident() or 0) + 10_000)
    out, err = looplm(*words(model=model), code=1, width=300)
    assert out == ""
    error, hint = err.splitlines()
    assert error.startswith("error: states, keys and values of 64 tokens in 4 loops take 0.0 GiB in float32, more than")
    assert hint == "hint: ask for fewer tokens or loops, or keep them in bfloat16"


def test_more_loops_than_memory_holds_are_refused(model: pathlib.Path) -> None:
    out, err = looplm(*words("--loops", 100_000_000, model=model), code=1, width=300)
    assert out == ""
    _, error, hint = err.splitlines()  # the first warns of more loops than were trained
    assert error.startswith("error: states, keys and values of 64 tokens in 100000000 loops take ")
    assert hint.startswith("hint: ask for fewer tokens or loops")


def test_sharing_fits_where_slots_of_their_own_do_not(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 125_000  # of which 80 % hold the states of four loops, and 15 tokens of 1,024 bytes, but not 64 of these
    monkeypatch.setattr("looplm.generation.resident", lambda: 0)
    monkeypatch.setattr("looplm.generation.available_memory", lambda: free)
    assert report_of(*words("--cache", "shared-last", model=model))["tokens"] > 0
    assert "64 tokens in 4 loops" in looplm(*words(model=model), code=1, width=300)[1]
    free = 30_000
    error = looplm(*words("--cache", "first", model=model), code=1, width=300)[1].splitlines()[0]
    assert error.startswith("error: states, keys and values of 64 tokens in 1 loops take")
    error = looplm(*words("--cache", "first", "-n", 1, model=model), code=1, width=300)[1].splitlines()[0]
    assert error.startswith("error: states, keys and values of 15 tokens in 4 loops take")


def test_a_task_model_is_no_language_model(tmp_path: pathlib.Path) -> None:
    hops_model(tmp_path / "hops")
    _, err = looplm("generate", "-m", tmp_path / "hops", "-p", "1ab", code=1)
    assert "was trained on the task 'hops': it is not a language model" in err
    assert f"looplm inspect -m {tmp_path / 'hops'}" in err


def test_without_a_token_that_begins_a_document_a_prompt_is_needed(tmp_path: pathlib.Path) -> None:
    save_tiny(tmp_path, letter_tokenizer("abc"), {"task": "text"}, loops=2)
    assert "give it a text to continue" in looplm("generate", "-m", tmp_path, code=1)[1]
    assert set(report_of("generate", "-m", tmp_path, "-p", "ab", "-n", 5)["text"]) <= set("abc")
