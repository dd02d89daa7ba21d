"""What inspect and eval compute, against the same quantities written out in plain float64."""

import math

import numpy as np
import pytest

from looplm import analysis
from looplm.config import ModelConfig
from looplm.data import Batch
from looplm.exits import LearnedGate
from looplm.model import forward
from looplm.settings import InitConfig
from looplm.weights import Weights, initialise

VOCAB, LOOPS = 19, 3


def tiny(loops: int = LOOPS) -> Weights:
    """A random model whose predictions and gates are far from uniform."""
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=4,
        total_ut_steps=loops,
    )
    return initialise(config, InitConfig(weight_std=0.5, embedding_std=1.0, post_norm=0.5), seed=3)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return tiny()


def random_ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCAB, (batch, length))


def log_probabilities(weights: Weights, hidden: np.ndarray) -> np.ndarray:
    logits = hidden.astype(np.float64) @ weights.head.T.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_every_array_of_an_inspection_is_what_it_says(weights: Weights) -> None:
    ids = random_ids(2, 7)
    found = analysis.inspect(weights, ids, rule=LearnedGate(0.6), top_k=4)
    log_prob = log_probabilities(weights, found.trace.hidden)
    for r in range(LOOPS):
        for b in range(2):
            for s in range(7):
                order = np.argsort(-log_prob[r, b, s])
                assert found.top_ids[r, b, s].tolist() == order[:4].tolist()
                assert found.top_prob[r, b, s] == pytest.approx(np.exp(log_prob[r, b, s, order[:4]]), rel=1e-4)
                kl = np.exp(log_prob[r, b, s]) @ (log_prob[r, b, s] - log_prob[-1, b, s])
                assert found.kl_to_last[r, b, s] == pytest.approx(kl, abs=1e-5)
                if s == 6:
                    assert math.isnan(found.loss[r, b, s])
                    assert found.rank[r, b, s] == 0
                else:
                    wanted = ids[b, s + 1]
                    assert found.loss[r, b, s] == pytest.approx(-log_prob[r, b, s, wanted], rel=1e-4)
                    assert found.rank[r, b, s] == 1 + order.tolist().index(wanted)
    assert len({*found.exit_index.ravel().tolist()}) > 1, "the thresholds of this test decide nothing"
    assert np.array_equal(found.exit_index, found.trace.exit_index(0.6))
    assert found.mean_loops == pytest.approx(1 + found.exit_index.mean())
    assert np.array_equal(found.right, (found.rank == 1) & (found.target >= 0))


def test_the_change_of_the_state_starts_from_the_embedding(weights: Weights) -> None:
    ids = random_ids(1, 5)
    found = analysis.inspect(weights, ids)
    hidden = found.trace.hidden
    before = [weights.embedding[ids], *hidden[:-1]]
    for r in range(LOOPS):
        wanted = np.linalg.norm(hidden[r] - before[r], axis=-1) / np.linalg.norm(hidden[r], axis=-1)
        assert found.change[r] == pytest.approx(wanted, rel=1e-5)


def test_chunks_do_not_change_an_inspection(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(2, 7)
    whole = analysis.inspect(weights, ids)
    monkeypatch.setattr(analysis, "LOGIT_CHUNK", 3 * VOCAB)
    chunked = analysis.inspect(weights, ids)
    assert np.array_equal(whole.top_ids, chunked.top_ids)
    assert np.allclose(whole.loss, chunked.loss, rtol=1e-5, equal_nan=True)
    assert np.allclose(whole.kl_to_last, chunked.kl_to_last, atol=1e-5)


def test_targets_may_be_a_tasks_own(weights: Weights) -> None:
    ids = random_ids(1, 4)
    target = np.array([[-1, 3, -1, 18]])
    found = analysis.inspect(weights, ids, target, top_k=100)
    assert found.top_ids.shape[-1] == VOCAB
    assert np.isnan(found.loss[0, 0]).tolist() == [True, False, True, False]
    place = found.top_ids[1, 0, 3].tolist().index(18)
    assert found.rank[1, 0, 3] == place + 1
    assert found.loss[1, 0, 3] == pytest.approx(-math.log(found.top_prob[1, 0, 3, place]), rel=1e-4)


def test_more_loops_than_the_models_own_are_inspected(weights: Weights) -> None:
    found = analysis.inspect(weights, random_ids(1, 4), loops=5, rule=LearnedGate(1.0))
    assert found.loss.shape == (5, 1, 4)
    assert (found.exit_index == 4).all()
    assert found.exit_prob.sum(0) == pytest.approx(1.0)


def test_raw_arrays_have_the_names_and_shapes_of_a_fixture(weights: Weights) -> None:
    ids = random_ids(2, 5)
    found = analysis.inspect(weights, ids, np.full_like(ids, -1), rule=LearnedGate(0.6))
    arrays = analysis.fixture_arrays(found)
    assert {name: array.shape for name, array in arrays.items()} == {
        "input_ids": (2, 5),
        "hidden": (LOOPS, 2, 5, 12),
        "logits": (LOOPS, 2, 5, VOCAB),
        "gate_logit": (LOOPS, 2, 5),
        "exit_prob": (LOOPS, 2, 5),
        "exit_logits@0.6": (2, 5, VOCAB),
        "expected_logits": (2, 5, VOCAB),
        "loss": (LOOPS, 2, 4),
    }
    log_prob = log_probabilities(weights, arrays["hidden"])
    assert arrays["loss"][1, 1, 2] == pytest.approx(-log_prob[1, 1, 2, ids[1, 3]], rel=1e-4)
    assert np.array_equal(arrays["exit_logits@0.6"][1, 3], arrays["logits"][found.exit_index[1, 3], 1, 3])
    mixed = sum(arrays["exit_prob"][r, 0, 2] * arrays["logits"][r, 0, 2] for r in range(LOOPS))
    assert arrays["expected_logits"][0, 2] == pytest.approx(mixed, rel=1e-4, abs=1e-5)
    assert "loss" not in analysis.fixture_arrays(analysis.inspect(weights, ids[:, :1]))


def batches_with_everything() -> list[Batch]:
    """Targets that are not counted, batches of unequal size, and rows padded on the left."""
    ids, target = random_ids(3, 6), np.random.default_rng(6).integers(0, VOCAB, (3, 6))
    target[0, :2] = -1
    target[2, :4] = -1
    return [Batch(ids, target, np.array([0, 0, 4])), Batch(ids[:1, ::-1], target[1:2])]


def counted_positions(weights: Weights, loops: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per counted position: losses (R), right or not (R), gate logits (R); one unpadded row at a time."""
    found = []
    for batch in batches_with_everything():
        for b, row in enumerate(batch.input_ids):
            begin = 0 if batch.start is None else int(batch.start[b])
            trace = forward(weights, np.ascontiguousarray(row[None, begin:]), loops=loops)
            log_prob = log_probabilities(weights, trace.hidden)[:, 0]
            for s, wanted in enumerate(batch.target[b, begin:]):
                if wanted >= 0:
                    right = log_prob[:, s].argmax(-1) == wanted
                    found.append((-log_prob[:, s, wanted], right, trace.gate_logit[:, 0, s].astype(np.float64)))
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_an_evaluation_is_the_mean_over_counted_positions(weights: Weights, threads: int) -> None:
    found = analysis.evaluate(
        weights,
        batches_with_everything(),
        max_loops=5,
        rules=[LearnedGate(q) for q in (0.4, 0.8, 1.0)],
        threads=threads,
    )
    positions = counted_positions(weights, 5)
    assert found.tokens == len(positions) == 18
    assert found.loss == pytest.approx(np.mean([loss for loss, _, _ in positions], axis=0), rel=1e-4)
    assert found.accuracy == pytest.approx(np.mean([right for _, right, _ in positions], axis=0))

    hazard = np.array([1 / (1 + np.exp(-gate[:LOOPS])) for _, _, gate in positions])
    survival = np.concatenate([np.ones((18, 1)), np.cumprod(1 - hazard, axis=1)[:, :-1]], axis=1)
    exit_prob = survival * hazard
    exit_prob[:, -1] = survival[:, -1]  # the model's last loop takes what is left, however deep the run
    assert found.exit_prob == pytest.approx(exit_prob.mean(0), rel=1e-4)
    assert found.hazard == pytest.approx(hazard.mean(0), rel=1e-4)
    for at in found.at:
        reached = np.cumsum(exit_prob, axis=1) >= at.rule.exit_threshold
        reached[:, -1] = True
        index = np.full(18, LOOPS - 1) if at.rule.exit_threshold >= 1 else reached.argmax(1)
        assert at.mean_loops == pytest.approx(1 + index.mean())
        assert at.exits == pytest.approx(np.bincount(index, minlength=LOOPS) / 18)
        assert at.loss == pytest.approx(np.mean([p[0][i] for p, i in zip(positions, index, strict=True)]), rel=1e-4)
        assert at.accuracy == pytest.approx(np.mean([p[1][i] for p, i in zip(positions, index, strict=True)]))
    assert found.at[0].mean_loops < found.at[1].mean_loops < found.at[2].mean_loops == LOOPS


def test_fewer_loops_than_the_models_own_end_the_exit_law_there(weights: Weights) -> None:
    found = analysis.evaluate(weights, batches_with_everything(), max_loops=2, rules=[LearnedGate(0.999)])
    assert found.exit_prob.shape == (2,)
    assert found.exit_prob.sum() == pytest.approx(1.0)
    assert found.at[0].mean_loops <= 2


def test_bits_per_byte_need_bytes() -> None:
    weights = tiny(loops=1)
    text = analysis.evaluate(weights, batches_with_everything(), bytes_per_token=2.5)
    assert text.bits_per_byte(math.log(2.0) * 5.0) == pytest.approx(2.0)
    assert analysis.evaluate(weights, batches_with_everything()).bits_per_byte(1.0) is None
