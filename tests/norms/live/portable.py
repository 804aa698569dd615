"""Saves the state of sharded layers, and loads it into sharded and into whole ones.

Run by test_portable_dtensor.py through torchrun. The first process writes a JSON list:
the ways of sharding that came to their end.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from larskit.state import load_optimizer, write_state
from larskit.torch import LARS

WAYS = {2: ["fsdp"], 4: ["fsdp", "fsdp and tensor parallel"]}


def build(way: str) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 10), nn.ReLU(), nn.Linear(10, 5))
    if way == "fsdp and tensor parallel":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(net, mesh["tp"], plan)
        fully_shard(net, mesh=mesh["dp"])
    elif way == "fsdp":
        fully_shard(net)
    return net


def make(net: Any) -> LARS:
    return LARS(net.named_parameters(), lr=2.0, adapt=True, dampening=0.2)


def train(net: Any, optimizer: LARS, steps: range) -> None:
    for number in steps:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(number))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def copies(tensors: Any) -> list[Any]:
    return [x.detach().clone() for x in tensors]


def buffers(optimizer: LARS) -> list[Any]:
    params = optimizer.param_groups[0]["params"]
    return [optimizer.state[p]["momentum_buffer"] for p in params]


def check_buffers(resumed: LARS, optimizer: LARS, whole: LARS) -> None:
    for new, old, v in zip(*map(buffers, (resumed, optimizer, whole)), strict=True):
        assert type(new) is type(old) is DTensor
        assert (new.placements, new.shape) == (old.placements, old.shape)
        assert (new.stride(), new.dtype) == (old.stride(), old.dtype)
        assert torch.equal(new.to_local(), old.to_local())
        assert torch.equal(old.full_tensor(), v)


def check_next_steps(net: Any, optimizer: LARS, resumed: LARS) -> None:
    found, before = [], copies(net.parameters())
    for one in (optimizer, resumed):
        for p, w in zip(net.parameters(), before, strict=True):
            p.detach().copy_(w)
        train(net, one, range(3, 13))
        found.append([x.to_local() for x in copies(net.parameters())])
    for p, q, w in zip(*found, before, strict=True):
        assert torch.equal(p, q)
        assert not p.numel() or not torch.equal(p, w.to_local())


def check(way: str, file: Path) -> None:
    net, alone = build(way), build("alone")
    optimizer, resumed, whole = make(net), make(net), make(alone)
    train(net, optimizer, range(3))
    state = optimizer.portable_state()
    if dist.get_rank() == 0:
        write_state(state, file)
    dist.barrier()
    for one in (resumed, whole):
        load_optimizer(one, file)
    check_buffers(resumed, optimizer, whole)
    check_next_steps(net, optimizer, resumed)


def main() -> None:
    results = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ways = WAYS[dist.get_world_size()]
    for way in ways:
        check(way, results.parent / way)
    dist.barrier()
    if dist.get_rank() == 0:
        results.write_text(json.dumps(ways))
    dist.barrier()  # one that leaves may abort, and torchrun then ends the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
