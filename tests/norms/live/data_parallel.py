"""Trains whole layers in two processes, in all ways that torch has for that.

Run by test_data_parallel.py through torchrun. The first process writes a JSON object:
for each way, whether it came out as in one process alone, and what was refused how. The
code of docs/sharded.md runs first.
"""

import copy
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from sharded import full
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from larskit import GradientLARS
from larskit.torch import LARS, param_groups

OPTIONS: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.01, "trust_coefficient": 0.1}
STEPS, BATCH = 5, 8


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 3))


def batch(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))


def alone() -> Any:
    """Train on whole batches."""
    model = net()
    optimizer = LARS(model.parameters(), **OPTIONS)
    for step in range(STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def averaged(parts: int) -> bool:
    """Train under DDP, on a batch cut into as many parts for each process."""
    model = DistributedDataParallel(net())
    optimizer = LARS(model.parameters(), **OPTIONS)
    for step in range(STEPS):
        *first, last = batch(step).chunk(2)[dist.get_rank()].chunk(parts)
        with model.no_sync():
            for x in first:
                (model(x).square().mean() / parts).backward()
        (model(last).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(model.parameters(), alone().parameters(), strict=True)
    return all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in pairs)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def move(model: nn.Module, optimizer: Any, start: int) -> None:
    for step in range(start, start + STEPS):
        give_gradients(model, step)
        optimizer.step()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups without names, which ZeroRedundancyOptimizer does not take."""
    return [
        {**group, "params": [p for _, p in group["params"]]}
        for group in param_groups(model, excluded_lr=0.1)
    ]


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def zero(make: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Train with states that are spread over the processes, and with whole ones."""
    ours, theirs = net(), net()
    spread = ZeroRedundancyOptimizer(make(ours), LARS, **OPTIONS, **options)
    whole = LARS(make(theirs), **OPTIONS)
    for model, optimizer in ((ours, spread), (theirs, whole)):
        move(model, optimizer, 1)
    return ours, spread, theirs, whole


def zero_goes_on(make: Any) -> list[bool]:
    """Collect the state in the first process, and load it into both kinds."""
    ours, spread, theirs, whole = zero(make)
    spread.consolidate_state_dict(to=0)
    box = [spread.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    kept: Any = box[0]
    expected = whole.state_dict()["state"]
    found = [
        torch.equal(kept["state"][key]["momentum_buffer"], x["momentum_buffer"])
        for key, x in expected.items()
    ]
    after = LARS(make(theirs), **OPTIONS)
    after.load_state_dict(copy.deepcopy(kept))
    spread = ZeroRedundancyOptimizer(make(ours), LARS, **OPTIONS)
    spread.load_state_dict(kept)
    for model, optimizer in ((ours, spread), (theirs, after)):
        move(model, optimizer, 1 + STEPS)
    by_hand = net()
    move(by_hand, LARS(make(by_hand), **OPTIONS), 1)
    optimizer = LARS(make(by_hand), **OPTIONS)
    optimizer.load_state_dict(whole.state_dict())
    move(by_hand, optimizer, 1 + STEPS)
    return [*found, equal(ours, by_hand), equal(theirs, by_hand)]


def refusal(attempt: Any) -> str:
    try:
        attempt()
    except (TypeError, RuntimeError) as why:
        return str(why)
    return "none"


def plain_gradient() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(full(0)[0], mesh, [Shard(0)]))
    p.grad = full(1)[0]
    LARS([p], **OPTIONS).step()


def refusals() -> dict[str, str]:
    found = {"plain gradient": refusal(plain_gradient)}
    for own in (False, True):
        model = FullyShardedDataParallel(
            net(), use_orig_params=own, device_id=torch.device("cpu")
        )
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        found |= {
            f"FSDP1, LARS, own {own}": refusal(lambda m=model: LARS(m.parameters(), 1)),
            f"FSDP1, hook, own {own}": refusal(lambda x=sgd: GradientLARS().attach(x)),
        }
    return found


def run_the_document() -> None:
    """Run the code of docs/sharded.md, which makes the process group."""
    document = Path(__file__).parents[3] / "docs" / "sharded.md"
    scope: dict[str, Any] = {}
    for block in re.findall(r"```py\n(.*?)```", document.read_text(), re.DOTALL):
        exec(compile(block, document.name, "exec"), scope)


def main() -> None:
    torch.set_num_threads(1)
    os.chdir(Path(sys.argv[1]).parent)
    run_the_document()
    results: dict[str, Any] = {"refusals": refusals()}
    for parts in (1, 2):
        results[f"DDP, {parts} parts"] = averaged(parts)
    for name, make in {
        "parameters": lambda m: m.parameters(),
        "groups": groups,
    }.items():
        for view in (False, True):
            ours, _, theirs, _ = zero(make, parameters_as_bucket_view=view)
            results[f"ZeRO, {name}, bucket view {view}"] = equal(ours, theirs)
        results[f"ZeRO, {name}, loaded"] = zero_goes_on(make)
    dist.barrier()
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.barrier()  # one that leaves may abort, and torchrun then ends the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
