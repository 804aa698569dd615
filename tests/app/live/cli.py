"""Run the command line, and make one rank fail after a given step.

test_torchrun.py runs it with torchrun. Arguments: the rank, the step, the event, then
those of larskit.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

import larskit.app.train
from larskit.app import InputError, ranks
from larskit.app.trainer import Trainer
from larskit.cli import main

victim, step, event, *arguments = sys.argv[1:]
original = Trainer._step
ranks.GRACE = 1.0


def fail() -> None:
    if event == "hangs":
        (Path(arguments[arguments.index("--out") + 1]) / event).touch()
        time.sleep(60)
    else:
        os.kill(os.getpid(), getattr(signal, event))


def step_and_fail(self: Trainer, indices: torch.Tensor) -> None:
    original(self, indices)
    if (self.ranks.rank, self.step) == (int(victim), int(step)):
        fail()


def unreadable(*args: object) -> NoReturn:
    raise InputError("the data cannot be read")


if event == "cannot read" and os.environ["RANK"] == victim:
    larskit.app.train.read = unreadable
Trainer._step = step_and_fail
raise SystemExit(main(arguments))
