"""Spoils a gradient in one process, of a sharded or a whole layer, and steps in both.

Run by test_nonfinite.py through torchrun. The first process writes a JSON object: for
each case what every process saw.
"""

import json
import sys
from typing import Any

import torch
from sharded import full
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from larskit.torch import LARS

WHOLE = 1  # the layer that is not sharded


def spoilt(layer: int, rank: int, policy: Any, **switches: Any) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params: list[Any] = [
        nn.Parameter(x if i == WHOLE else distribute_tensor(x, mesh, [Shard(0)]))
        for i, x in enumerate(full(0))
    ]
    optimizer = LARS(params, 0.5, on_nonfinite=policy, **switches)
    message, same = "", False
    for step in (1, 2, 3):
        for i, (p, g) in enumerate(zip(params, full(step), strict=True)):
            p.grad = g if i == WHOLE else distribute_tensor(g, mesh, p.placements)
        if step == 2:
            grad = params[layer].grad
            if dist.get_rank() == rank:
                (grad if layer == WHOLE else grad.to_local()).view(-1)[0] = float("inf")
            before = state(optimizer, params)
            message = attempt(optimizer)
            same = all(map(torch.equal, before, state(optimizer, params)))
        else:
            optimizer.step()
    finite = all(bool(x.isfinite().all()) for x in state(optimizer, params))
    return {"message": message, "same": same, "finite": finite}


def attempt(optimizer: Any) -> str:
    try:
        optimizer.step()
    except FloatingPointError as why:
        return str(why)
    return ""


def state(optimizer: Any, params: list[Any]) -> list[torch.Tensor]:
    kept = [optimizer.state[p]["momentum_buffer"] for p in params]
    local = [x.to_local() if hasattr(x, "to_local") else x for x in (*params, *kept)]
    return [x.detach().clone() for x in local]


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {}
    for layer, rank in ((0, 1), (WHOLE, 0)):
        for policy in ("skip", "raise"):
            for switches in ({}, {"foreach": True}, {"capturable": policy == "skip"}):
                seen: list[Any] = [None] * dist.get_world_size()
                case = spoilt(layer, rank, policy, **switches)
                dist.all_gather_object(seen, case)
                found[f"{layer} {policy} {switches}"] = seen
    dist.barrier()
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
    dist.barrier()  # one that leaves may abort, and torchrun then ends the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
