"""Trainings of several ranks, whole and stopped, as test_ranks.py names them.

Run through torchrun: a folder, and a JSON file with a list of [name, event, arguments]
in it. An event is what happens before: a signal to the second rank after the fourth
step, or another folder to go on from.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from larskit.app import ranks
from larskit.app.train import train
from larskit.app.trainer import Trainer

STEP = Trainer._step
trainers: list[Trainer] = []


def signalled(self: Trainer, indices: torch.Tensor) -> None:
    STEP(self, indices)
    if (self.ranks.rank, self.step) == (1, 3):
        os.kill(os.getpid(), signal.SIGTERM)


def kept(self: Trainer, *args: Any, **kwargs: Any) -> None:
    trainers.append(self)
    INIT(self, *args, **kwargs)


INIT = Trainer.__init__
Trainer.__init__ = kept


def statistics_agree() -> bool:
    """Whether batch norm has the same statistics on all ranks."""
    own = [b.tolist() for b in trainers[-1].model.buffers()]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found == [own] * len(found)


def run(out: Path, event: str | None, given: dict[str, Any]) -> tuple[int, bool]:
    shard = given.pop("shard", None)
    if event not in (None, "signal"):
        if dist.get_rank() == 0:
            shutil.copytree(out.parent / event, out)
        dist.barrier()
    Trainer._step = signalled if event == "signal" else STEP
    resume = event not in (None, "signal")
    code = train(given, str(out), resume=resume, shard=shard)
    return code, statistics_agree()


def main() -> None:
    folder, plan = map(Path, sys.argv[1:])
    with ranks.joined():
        results = {
            name: run(folder / name, event, given)
            for name, event, given in json.loads(plan.read_text())
        }
        if dist.get_rank() == 0:
            plan.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
