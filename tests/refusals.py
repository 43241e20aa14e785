"""What a refusal looks like: one clear line."""

import pytest

from lowrank_probe import CheckpointError
from lowrank_probe.checkpoints import open_checkpoint


def refused(source, *words, act=open_checkpoint):
    """`act(source)` raises a `CheckpointError` of one line that holds every word; returns the line."""
    with pytest.raises(CheckpointError) as caught:
        act(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return message
