"""The command line, with something that happens to one rank after a given step.

Run through torchrun by test_ranks.py: rank, step, what happens, then arguments.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import larskit.app.train
from larskit.app import InputError, ranks
from larskit.app.trainer import Trainer
from larskit.cli import main

victim, step, event, *arguments = sys.argv[1:]
original = Trainer._step
ranks.GRACE = 1.0


def happens() -> None:
    if event == "hangs":
        (Path(arguments[arguments.index("--out") + 1]) / event).touch()
        time.sleep(60)
    else:
        os.kill(os.getpid(), getattr(signal, event))


def watched(self: Any, indices: Any) -> None:
    original(self, indices)
    if (self.ranks.rank, self.step) == (int(victim), int(step)):
        happens()


def blind(*args: Any) -> None:
    raise InputError("nothing to be seen")


if event == "is blind" and os.environ["RANK"] == victim:
    larskit.app.train.read = blind
Trainer._step = watched
raise SystemExit(main(arguments))
