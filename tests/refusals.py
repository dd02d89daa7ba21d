"""A user's mistake must be answered in two lines: what was seen, and the cure."""

import pytest

from looplm.errors import DataError


def refused(call, *args, **kwargs):
    """The (message, hint) of the DataError that a call must raise; both are one line."""
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    message, hint = str(caught.value), caught.value.hint
    assert message
    assert hint
    assert "\n" not in message + hint
    return message, hint
