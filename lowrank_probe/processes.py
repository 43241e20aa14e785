"""The processes of one training, as torchrun and accelerate start them: which one this is, and waiting for each other.

Without them there is one process, and nothing to wait for.
"""

import os
from typing import Any


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and prints: the one of rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def meet(device_type: str) -> None:
    """Let the processes find each other, over the CPU or their cards; before anything else here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device_type == "cpu")


def wait() -> None:
    """Until all of them are here."""
    if count() > 1:
        _state().wait_for_everyone()


def agreed(value: Any) -> Any:
    """The first process's value, on all of them."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    told = [value]
    broadcast_object_list(told)
    return told[0]


def _state() -> Any:
    from accelerate import PartialState

    return PartialState()
