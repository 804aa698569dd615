"""Train in several ranks: full, stopped and resumed runs.

test_torchrun.py runs it with torchrun. Arguments: a folder, and a JSON file with a list
of [name, event, arguments]. The event "signal" stops the run with a signal to the
second rank after the fourth step. Another event is the folder of a run to resume.
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


def step_and_signal(self: Trainer, indices: torch.Tensor) -> None:
    STEP(self, indices)
    if (self.ranks.rank, self.step) == (1, 3):
        os.kill(os.getpid(), signal.SIGTERM)


def record(self: Trainer, *args: Any, **kwargs: Any) -> None:
    trainers.append(self)
    INIT(self, *args, **kwargs)


INIT = Trainer.__init__
Trainer.__init__ = record


def statistics_agree() -> bool:
    """Whether batch norm has the same statistics on all ranks."""
    local = [b.tolist() for b in trainers[-1].model.buffers()]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    return gathered == [local] * len(gathered)


def run(out: Path, event: str | None, given: dict[str, Any]) -> tuple[int, bool]:
    shard = given.pop("shard", None)
    if event not in (None, "signal"):
        if dist.get_rank() == 0:
            shutil.copytree(out.parent / event, out)
        dist.barrier()
    Trainer._step = step_and_signal if event == "signal" else STEP
    resume = event not in (None, "signal")
    code = train(given, str(out), resume=resume, shard=shard)
    return code, statistics_agree()


def main() -> None:
    folder, plan = map(Path, sys.argv[1:])
    with ranks.process_group():
        results = {
            name: run(folder / name, event, given)
            for name, event, given in json.loads(plan.read_text())
        }
        if dist.get_rank() == 0:
            plan.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
