"""Saves a training run of four processes, and resumes it in four, two and one.

Run by test_checkpoint_dtensor.py through torchrun. The first process writes a JSON
object: for each case the parameters that differ from those of a run that went on.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from sharded import differing, whole
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from larskit.torch import LARS, param_groups

MIDDLE, END = 6, 11  # the steps before which the run is saved, and before which it ends
OPTIONS: dict[str, Any] = {"weight_decay": 0.01, "trust_coefficient": 0.1}
OPTIMIZERS: dict[str, Any] = {
    "groups": lambda m: LARS(param_groups(m, excluded_lr=0.1), 1.0, **OPTIONS),
    "pattern": lambda m: LARS(m.named_parameters(), 1.0, adapt="0.*", **OPTIONS),
    "masters": lambda m: LARS(param_groups(m), 1.0, master_weights=True, **OPTIONS),
    "no momentum": lambda m: LARS(m.named_parameters(), 1.0, 0.0, **OPTIONS),
}


class Run:
    """A model, sharded where there are several processes, and its optimizer."""

    def __init__(self, kind: str, processes: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 3))
        if kind == "masters":
            self.model.bfloat16()
        if processes > 1:
            mesh = init_device_mesh("cpu", (processes,))
            for layer in (self.model[0], self.model[2], self.model):
                fully_shard(layer, mesh=mesh)
        self.optimizer = OPTIMIZERS[kind](self.model)

    def train(self, steps: range, real: bool) -> None:
        for step in steps:
            for i, group in enumerate(self.optimizer.param_groups):
                group["lr"] = (1.0, 0.1)[i] / step
            (self._learn if real else self._give_gradients)(step)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _learn(self, step: int) -> None:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        self.model(x).square().mean().backward()

    def _give_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in self.model.parameters():
            g = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                g = distribute_tensor(g, p.device_mesh, p.placements)
            p.grad = g

    def weights(self) -> list[torch.Tensor]:
        return [whole(p.detach()).clone() for p in self.model.parameters()]

    def state(self, flat: bool) -> dict[str, Any]:
        options = states.StateDictOptions(flatten_optimizer_state_dict=flat)
        both = states.get_state_dict(self.model, self.optimizer, options=options)
        return dict(zip(("model", "optimizer"), both, strict=True))

    def take(self, state: dict[str, Any], flat: bool) -> None:
        states.set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=states.StateDictOptions(flatten_optimizer_state_dict=flat),
        )


# Of which optimizer, whether flattened, and whether with a real backward pass.
CASES = [
    *((kind, flat, False) for kind in OPTIMIZERS for flat in (False, True)),
    ("groups", False, True),
]


def in_processes(count: int, folder: Path, work: Any) -> None:
    """Do some work in a group of the first few processes."""
    if (rank := int(os.environ["RANK"])) >= count:
        return
    store = dist.FileStore(str(folder / f"{work.__name__}-{count}"), count)
    options: Any = {"store": store, "rank": rank, "world_size": count}
    dist.init_process_group("gloo", timeout=timedelta(minutes=5), **options)
    work(count)
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    results: dict[str, list[int]] = {}
    expected = {}
    for kind, _, real in CASES:
        run = Run(kind, 1)
        run.train(range(1, END), real)
        expected[kind, real] = run.weights()

    def save(processes: int) -> None:
        for case in CASES:
            kind, flat, real = case
            run = Run(kind, processes)
            run.train(range(1, MIDDLE), real)
            checkpoint.save(run.state(flat), checkpoint_id=file.parent / str(case))

    def load(processes: int) -> None:
        for case in CASES:
            kind, flat, real = case
            run = Run(kind, processes)
            state = run.state(flat)
            checkpoint.load(state, checkpoint_id=file.parent / str(case))
            run.take(state, flat)
            run.train(range(MIDDLE, END), real)
            differ = differing(run.weights(), expected[kind, real], exact=not real)
            results[f"{case}, {processes}"] = differ

    in_processes(4, file.parent, save)
    for processes in (4, 2, 1):
        in_processes(processes, file.parent, load)
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(results))
    # The threads of gloo may abort a process as it ends, and torchrun then ends all:
    # none may leave while another still works.
    while not file.exists():
        time.sleep(0.1)


if __name__ == "__main__":
    main()
