"""p-hop induction against its definition, read literally."""

import numpy as np
import pytest

from looplm.errors import DataError
from looplm.tasks import hops


def literal_targets(rows, occurrence=-1, offset=1, extra=0, first_place=1):
    """The definition in words: one position, one hop at a time.  The options make it a wrong one."""
    answers = np.full(rows.shape, -1)
    for b, row in enumerate(rows):
        for i in range(1, len(row)):
            at = i
            for _ in range(row[0] + 1 + extra):
                earlier = [j for j in range(first_place, at) if row[j] == row[at]]
                if not earlier:
                    break
                at = earlier[occurrence] + offset
            else:
                answers[b, i] = row[at]
    return answers


@pytest.mark.parametrize(
    ("alphabet", "max_hops", "seq_len"), [(8, 3, 64), (2, 1, 9), (5, 4, 30), (26, 9, 40), (3, 2, 2)]
)
def test_targets_are_the_definition(alphabet, max_hops, seq_len):
    rng = np.random.default_rng(0)
    input_ids, target = hops.sample(rng, 20, seq_len, alphabet, max_hops)
    assert np.array_equal(target, literal_targets(input_ids))
    assert np.array_equal(target, hops.targets(input_ids, alphabet, max_hops))
    assert set(input_ids[:, 0]) <= set(range(max_hops))
    assert input_ids[:, 1:].min() >= max_hops
    assert input_ids[:, 1:].max() < max_hops + alphabet


def written(text):
    return "".join("." if i < 0 else hops.tokens()[i] for i in hops.targets(hops.parse_prompt(text))[0])


def test_worked_examples():
    assert written("1abcacb") == "....bac"
    assert written("2abcacb") == ".....b."
    assert written("1aaa") == "..aa", "a letter twice in a row hops to its second place"
    assert written("3aab") == "..a."
    for text in ("1abcacb", "2abcacb"):
        assert " ".join(text) in hops.__doc__
        assert " ".join(written(text)) in hops.__doc__


@pytest.mark.parametrize(
    "wrong", [{"occurrence": 0}, {"offset": 0}, {"extra": 1}, {"extra": -1}, {"first_place": 2}], ids=str
)
def test_the_oracle_tells_near_misses_apart(wrong):
    input_ids, target = hops.sample(np.random.default_rng(0), 20, 64)
    assert not np.array_equal(target, literal_targets(input_ids, **wrong))


def test_every_target_is_reachable_in_enough_sequences():
    _, target = hops.sample(np.random.default_rng(1), 200, 64)
    assert np.all(target[:, :2] == -1)
    assert (target[:, 32:] >= 0).mean() > 0.95


def test_batches_depend_on_seed_and_step_alone():
    source = hops.HopsSource(16, 64, seed=3)
    first = source.batch(5)
    source.batch(6)
    again = hops.HopsSource(16, 64, seed=3).batch(5)
    assert np.array_equal(first.input_ids, again.input_ids)
    assert np.array_equal(first.target, again.target)
    assert not np.array_equal(first.input_ids, source.batch(6).input_ids)
    assert not np.array_equal(first.input_ids, hops.HopsSource(16, 64, seed=4).batch(5).input_ids)
    assert first.input_ids.dtype == first.target.dtype == np.int64
    assert first.start is None


def test_validation_is_fixed_and_apart():
    source = hops.HopsSource(4, 32, seed=0)
    one = [batch.input_ids for batch in source.validation(3)]
    two = [batch.input_ids for batch in hops.HopsSource(4, 32, seed=0).validation(3)]
    assert len(one) == 3
    assert np.array_equal(one, two)
    trained = {row.tobytes() for step in range(50) for row in source.batch(step).input_ids}
    assert not any(row.tobytes() in trained for rows in one for row in rows)
    assert len(list(source.validation())) == hops.VALIDATION_BATCHES
    assert set(np.concatenate([hops.hops_of(rows) for rows in one])) == {1, 2, 3}


def test_accuracy_by_hop_and_loop():
    target = np.array([[-1, 3, 4], [-1, 5, 6], [-1, -1, 7]])
    asked = np.array([1, 1, 3])
    predictions = np.array([[[0, 3, 0], [0, 0, 0], [-1, -1, 7]], [[-1, 3, 4], [-1, 5, 0], [0, 0, 0]]])
    found = hops.accuracy_by_hop_and_loop(predictions, target, asked)
    np.testing.assert_equal(found, [[0.25, 0.75], [np.nan, np.nan], [1.0, 0.0]])


def test_mean_by_hop_counts_positions_with_a_target_only():
    target = np.array([[-1, 3, 4], [-1, -1, 6]])
    loops = np.array([[100, 1, 2], [100, 100, 4]])
    np.testing.assert_equal(hops.mean_by_hop(loops, target, np.array([2, 3])), [np.nan, 1.5, 4.0])


def test_tokens_are_what_one_types():
    source = hops.HopsSource(2, 16, seed=0)
    assert hops.tokens() == "123abcdefgh"
    assert source.vocab_size == source.tokenizer().vocab_size == 11
    assert source.tokenizer().encode("2abh").tolist() == hops.parse_prompt(" 2 ab\nh")[0].tolist() == [1, 3, 4, 10]
    assert source.settings == {"alphabet": 8, "max_hops": 3, "seq_len": 16}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("  \n", "the prompt is empty"),
        ("abc", "the prompt starts with 'a': the first letter must be one of 1 2 3"),
        ("4abc", "the prompt starts with '4': the first letter must be one of 1 2 3"),
        ("1abz", "letter 4 of the prompt is 'z'"),
        ("1a2b", "letter 3 of the prompt is '2'"),
    ],
)
def test_prompts_that_are_no_sequence(prompt, message):
    with pytest.raises(DataError) as caught:
        hops.parse_prompt(prompt)
    assert str(caught.value) == message
    assert "e.g. 3abcabcabc" in caught.value.hint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([3, 4], "first id 3 is outside 0..2"),
        ([0, 2], "id after the first 2 is outside 3..10"),
        ([0, 11], "11 is outside"),
    ],
)
def test_ids_that_are_no_sequence(row, message):
    with pytest.raises(DataError, match=message):
        hops.targets(np.array([row]))


@pytest.mark.parametrize("settings", [{"alphabet": 1}, {"alphabet": 27}, {"max_hops": 0}, {"max_hops": 10}])
def test_settings_that_cannot_be_spelled(settings):
    with pytest.raises(DataError, match="is outside"):
        hops.HopsSource(2, 16, 0, **settings)
