"""Steps sharded layers in several processes, and in one of them unsharded.

Run by test_dtensor.py through torchrun. The first process writes a JSON object: for
each case the parameters that differ, and the collectives of one step.
"""

import json
import os
import sys
from datetime import timedelta
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before anything loads Triton

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from larskit import engines
from larskit.torch import LARS

SHAPES = [(65, 8), (8, 33), (7,), (1,), (3, 2), (1, 1, 1), (130, 130)]
OPTIONS = {
    "paper": {},
    "decayed": {"denominator": "decayed_gradient", "nesterov": True},
    "momentum": {"denominator": "momentum", "lr_placement": "outside"},
    "outside": {"denominator": "gradient", "lr_placement": "outside", "clip": True},
}
ENGINES = {
    "native": {"fused": True},
    "reference": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "triton": {"fused": True},  # in its interpreter; the CPU plays the GPU
}
# The cases for Triton, whose interpreter takes its time.
INTERPRETED = {("rows", "momentum"), ("rows and columns", "paper")}
R, S0, S1 = Replicate(), Shard(0), Shard(1)
# For a weight and for what has one dimension; None: a plain tensor.
PLACEMENTS = {
    2: {
        "rows": ((2,), [S0], [S0]),
        "columns": ((2,), [S1], [S0]),
        "some replicated": ((2,), [S0], [R]),
        "all replicated": ((2,), [R], [R]),
        "some plain": ((2,), [S1], None),
    },
    4: {
        "rows": ((4,), [S0], [S0]),
        "replicas of shards": ((2, 2), [R, S0], [R, S0]),
        "rows and columns": ((2, 2), [S0, S1], [S0, R]),
        "rows and replicas": ((2, 2), [S0, R], [R, S0]),
    },
}


def full(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def train(params: list[Any], place: Any, options: Any) -> tuple[Any, dict[str, int]]:
    """Take ten steps; the third parameter has no gradient in the third."""
    optimizer = LARS(params, 1.0, weight_decay=0.01, trust_coefficient=0.1, **options)
    counts: dict[str, int] = {}
    for step in range(1, 11):
        optimizer.param_groups[0]["lr"] = 1.0 / step
        for i, (p, g) in enumerate(zip(params, full(step), strict=True)):
            p.grad = None if (i, step) == (2, 3) else place(p, g)
        counts = counted(optimizer.step)
    return optimizer, counts


def counted(step: Any) -> dict[str, int]:
    """Take a step and return how often each collective ran."""
    with CommDebugMode() as comm:
        step()
    return {str(k): v for k, v in comm.get_comm_counts().items() if v}


def alone(options: Any) -> Any:
    params = [nn.Parameter(x) for x in full(0)]
    optimizer, _ = train(params, lambda p, g: g, options)
    return params, [optimizer.state[p]["momentum_buffer"] for p in params]


def distributed(sizes: Any, weight: Any, bias: Any) -> list[Any]:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])
    placements = [weight if len(shape) > 1 else bias for shape in SHAPES]
    return [
        nn.Parameter(x if how is None else distribute_tensor(x, mesh, how))
        for x, how in zip(full(0), placements, strict=True)
    ]


def place(p: Any, g: Any, partial: bool) -> Any:
    """Return a gradient as a parameter has it, or as a sum that is not complete."""
    if not isinstance(p, DTensor):
        return g
    if partial:
        mine = g if dist.get_rank() == 0 else torch.zeros_like(g)
        sums = [Partial()] * p.device_mesh.ndim
        return DTensor.from_local(mine, p.device_mesh, sums, run_check=False)
    return distribute_tensor(g, p.device_mesh, p.placements)


def case(how: Any, partial: bool, options: Any) -> Any:
    params = distributed(*how)
    optimizer, counts = train(params, lambda p, g: place(p, g, partial), options)
    buffers: Any = [optimizer.state[p]["momentum_buffer"] for p in params]
    for p, v in zip(params, buffers, strict=True):
        assert isinstance(v, DTensor) == isinstance(p, DTensor)
        if isinstance(p, DTensor):
            assert v.placements == p.placements
            assert (v.shape, v.stride()) == (p.shape, p.stride())
    return [whole(x) for x in params], [whole(x) for x in buffers], counts


def whole(x: Any) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def differing(ours: Any, theirs: Any, exact: bool) -> list[int]:
    pairs = zip(ours, theirs, strict=True)
    if exact:
        return [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
    return [i for i, (a, b) in enumerate(pairs) if not torch.allclose(a, b, rtol=1e-5)]


def fsdp2(net: Any) -> None:
    for layer in (net[0], net[2], net):
        fully_shard(layer)


def tensor_parallel(net: Any, mesh: Any = None) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(net, mesh, plan)


def both(net: Any) -> None:
    """Cut what tensor parallel has cut by columns once more, by rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(net, mesh["tensor"])
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh["data"])


def hsdp(net: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)


MODULES: dict[int, list[Any]] = {
    2: [fsdp2, tensor_parallel],
    4: [fsdp2, tensor_parallel, both, hsdp],
}


def modules(spread: Any, options: Any) -> Any:
    """Train a real module, spread over the processes, and the module alone."""
    found, counts = [], {}
    for sharded in (True, False):
        torch.manual_seed(0)
        net: Any = nn.Sequential(nn.Linear(8, 36), nn.ReLU(), nn.Linear(36, 4))
        if sharded:
            spread(net)
        optimizer = LARS(net.named_parameters(), 1.0, trust_coefficient=0.1, **options)
        for step in range(5):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            net(x).square().mean().backward()
            made = counted(optimizer.step)
            optimizer.zero_grad()
            counts = made if sharded else counts
        found.append([whole(p).detach() for p in net.parameters()])
        found.append([whole(x) for x in map(momentum(optimizer), net.parameters())])
    weights, buffers = (differing(*found[i::2], exact=False) for i in (0, 1))
    return {"weights": weights, "buffers": buffers, "collectives": counts}


def momentum(optimizer: Any) -> Any:
    return lambda p: optimizer.state[p]["momentum_buffer"]


def masters() -> Any:
    """Keep float32 weights beside sharded ones of bfloat16."""
    found = []
    for sharded in (True, False):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))

        def place(x: Any, mesh: Any = mesh, sharded: bool = sharded) -> Any:
            x = x.bfloat16()
            return distribute_tensor(x, mesh, [S0]) if sharded else x

        params = [nn.Parameter(place(x)) for x in full(0)]
        optimizer = LARS(params, 1.0, master_weights=True)
        for step in range(1, 6):
            for p, g in zip(params, full(step), strict=True):
                p.grad = place(g)
            optimizer.step()
        kept = [optimizer.state[p]["master_weight"] for p in params]
        found += [list(map(whole, params)), list(map(whole, kept))]
        assert all(x.dtype == torch.float32 for x in kept)
    weights, buffers = (differing(*found[i::2], exact=True) for i in (0, 1))
    return {"weights": weights, "buffers": buffers, "collectives": {}}


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, how in PLACEMENTS[dist.get_world_size()].items():
        for kind, options in OPTIONS.items():
            for engine, switches in ENGINES.items():
                if engine == "triton" and (name, kind) not in INTERPRETED:
                    continue
                engines.GPU = "cpu" if engine == "triton" else "cuda"
                every = {**options, **switches}
                expected = alone(every)
                for partial in (False, True):
                    *found, counts = case(how, partial, every)
                    results[f"{name}, {kind}, {engine}, partial {partial}"] = {
                        "weights": differing(found[0], expected[0], exact=True),
                        "buffers": differing(found[1], expected[1], exact=True),
                        "collectives": counts,
                    }
    for spread in MODULES[dist.get_world_size()]:
        for engine, switches in ENGINES.items():
            if engine == "triton" and spread is not fsdp2:
                continue
            engines.GPU = "cpu" if engine == "triton" else "cuda"
            results[f"{spread.__name__}, {engine}"] = modules(spread, switches)
    engines.GPU = "cuda"
    results["masters"] = masters()
    dist.barrier()
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.barrier()  # one that leaves may abort, and torchrun then ends the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
