"""A folder's weights decoded as they are stored, judged by the reference with what they stand for.

What all other comparisons of a folder use are weights widened to float32; this is the other way to read them.
"""

import pathlib
from collections.abc import Iterator

from looplm.errors import VerificationError
from looplm.model_files import ModelFiles, open_model
from looplm.stored import StoredWeights, read_stored
from looplm.weights import parameter_count
from looplm_cli.quantized_engine import decoded
from looplm_reference.contract import Row, relative_error
from looplm_reference.fixture import Fixture
from looplm_reference.quantized_judge import BOUND

PREFIX = "as stored"
LARGEST = 1 << 28  # parameters; the reference holds 8 bytes of each, and the judge's reading as much again


def stored_rows(fixture: Fixture, model: pathlib.Path) -> Iterator[Row]:
    """States and logits after every loop, of text that is fed in half and decoded from there on.

    Floats are exact in the reference, so the fixture's own tolerance holds; products with integers round what they
    are multiplied by, within the bound of the format.
    """
    weights = read_stored(open_model(model))
    kind = format_of(weights)
    allowed = BOUND.get(kind, fixture.tolerance)
    found = decoded(weights, fixture.input_ids)
    for r in range(fixture.config["total_ut_steps"]):
        for name in ("hidden", "logits"):
            error = relative_error(fixture.answers[name][r], found[name][r])
            yield Row(f"{PREFIX} ({kind}).loop{r + 1}.{name}", error, allowed)


def format_of(weights: StoredWeights) -> str:
    """The format of a model's layers."""
    return weights.matrices["model.layers.0.mlp.down_proj.weight"].format


def check_size(files: ModelFiles) -> None:
    """Raises: VerificationError for a model that is too large for the reference."""
    count = parameter_count(files.config)
    if count > LARGEST:
        raise VerificationError(
            f"{files.folder} has {count:,} parameters, and the reference, in float64, is for {LARGEST:,} at most",
            "verify a model of its shape with fewer layers: looplm init --like FOLDER --set num_hidden_layers=1",
        )
