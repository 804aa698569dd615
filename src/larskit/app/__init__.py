"""The main job behind the command line: train a classifier, study optimizers."""

import os


class InputError(Exception):
    """What the user gave cannot be used; the message is one sentence for them."""


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
