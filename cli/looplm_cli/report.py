"""An inspection as one JSON object: what `looplm inspect --json` prints and the page of --html draws.

Loops and positions are counted from 1.  What does not exist (the loss where there is no target) is null.
"""

from typing import TYPE_CHECKING, Any

from looplm_cli.inputs import Opened
from looplm_cli.render import finite

if TYPE_CHECKING:
    from looplm.analysis import Inspection
    from looplm.arrays import Array


def inspection_report(model: Opened, found: "Inspection") -> dict[str, Any]:
    """The report on the first (here: only) row of an inspection."""
    loops, _, length = found.loss.shape
    return {
        "model": str(model.folder),
        "task": model.task,
        "loops": loops,
        "trained_loops": model.trained_loops,
        "q": finite(found.exit_threshold),
        "exit": str(found.rule),
        "mean_loops": finite(found.mean_loops),
        "by_loop": [_loop_means(found, r) for r in range(loops)],
        "positions": [_position(model, found, s) for s in range(length)],
    }


def _loop_means(found: "Inspection", r: int) -> dict[str, Any]:
    counted = found.target[0] >= 0
    return {
        "loop": r + 1,
        "loss": _mean(found.loss[r, 0, counted]),
        "accuracy": _mean(found.right[r, 0, counted]),
        "hazard": _mean(found.hazard[r, 0]),
        "exit_prob": _mean(found.exit_prob[r, 0]),
        "exits": _mean(found.exit_index[0] == r),
        "change": _mean(found.change[r, 0]),
        "kl_to_last": _mean(found.kl_to_last[r, 0]),
    }


def _mean(values: "Array") -> float | None:
    return finite(float(values.mean(dtype=float))) if values.size else None


def _position(model: Opened, found: "Inspection", s: int) -> dict[str, Any]:
    token, target = int(found.input_ids[0, s]), int(found.target[0, s])
    return {
        "position": s + 1,
        "id": token,
        "token": token_text(model, token),
        "target_id": target if target >= 0 else None,
        "target": token_text(model, target) if target >= 0 else None,
        "exit_loop": int(found.exit_index[0, s]) + 1,
        "loops": [_cell(model, found, r, s) for r in range(found.loss.shape[0])],
    }


def _cell(model: Opened, found: "Inspection", r: int, s: int) -> dict[str, Any]:
    import numpy as np

    best = zip(found.top_ids[r, 0, s].tolist(), found.top_prob[r, 0, s], strict=True)
    return {
        "loop": r + 1,
        "top": [{"id": i, "token": token_text(model, i), "prob": finite(prob)} for i, prob in best],
        "target_prob": finite(np.exp(-found.loss[r, 0, s])),
        "loss": finite(found.loss[r, 0, s]),
        "rank": int(found.rank[r, 0, s]) or None,
        "hazard": finite(found.hazard[r, 0, s]),
        "exit_prob": finite(found.exit_prob[r, 0, s]),
        "exit_cdf": finite(found.exit_cdf[r, 0, s]),
        "change": finite(found.change[r, 0, s]),
        "kl_to_last": finite(found.kl_to_last[r, 0, s]),
    }


def token_text(model: Opened, token_id: int) -> str:
    """A token for display; a model may have more ids than its tokenizer has tokens, and predict one of them."""
    if token_id >= model.tokenizer.vocab_size:
        return f"<{token_id}>"
    return model.tokenizer.token_text(token_id)
