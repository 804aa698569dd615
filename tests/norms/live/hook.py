"""Steps sharded layers under an attached hook, and the same layers unsharded.

Run by test_hook_dtensor.py through torchrun. The first process writes a JSON object:
for each case the parameters that differ, and the collectives of one step.
"""

import json
import sys
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
from sharded import PLACEMENTS, counted, differing, distributed, full, place, whole
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from larskit import GradientLARS
from larskit.engines import native

STEPS, WITHOUT = 5, (2, 3)  # the parameter without a gradient, and the step
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, foreach=False),
}
HOOKS = {"SGD": {"weight_decay": 0.01}, "Adam": {"threshold": 2.0, "eps": 0.1}}


def look(optimizer: Any, *arguments: Any) -> None:
    """Check what the inner optimizer sees, after its step."""
    for p in optimizer.param_groups[0]["params"]:
        if (g := p.grad) is not None and isinstance(p, DTensor):
            assert (g.device_mesh, g.placements) == (p.device_mesh, p.placements)
            assert (g.shape, g.stride()) == (p.shape, p.stride())


def local(x: Any) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def train(params: list[Any], kind: str, put: Any) -> dict[str, int]:
    """Take some steps; return the collectives of the last."""
    optimizer = OPTIMIZERS[kind](params)
    optimizer.register_step_post_hook(look)
    GradientLARS(**HOOKS[kind]).attach(optimizer)
    counts: dict[str, int] = {}
    for step in range(1, STEPS + 1):
        for i, (p, g) in enumerate(zip(params, full(step), strict=True)):
            p.grad = None if (i, step) == WITHOUT else put(p, g)
        own = [p.grad for p in params]
        before = [None if g is None else local(g).clone() for g in own]
        counts = counted(optimizer.step)
        for p, g, x in zip(params, own, before, strict=True):
            assert p.grad is g
            assert x is None or torch.equal(local(g), x)
    return counts


def plain() -> list[Any]:
    return [nn.Parameter(x) for x in full(0)]


def case(params: list[Any], kind: str, partial: bool) -> Any:
    counts = train(params, kind, lambda p, g: place(p, g, partial))
    expected = plain()
    train(expected, kind, lambda p, g: g)
    return result(params, expected, counts)


def result(params: Any, expected: Any, counts: Any) -> Any:
    differ = differing([whole(p) for p in params], expected, exact=True)
    return {"weights": differ, "collectives": counts}


def two_meshes(one: Any, other: Any) -> list[Any]:
    return [*distributed(*one)[:3], *distributed(*other)[3:]]


def gradients_in_one_process(how: Any) -> Any:
    """Compare with a gradient that is zero elsewhere, which moves nothing."""
    params, expected = distributed(*how), plain()
    first = dist.get_rank() == 0
    for p, q, g in zip(params, expected, full(1), strict=True):
        spread = distribute_tensor(g, p.device_mesh, p.placements)
        p.grad = spread if first else None
        q.grad = whole(spread * int(first))
    counts = {}
    for each in (expected, params):
        optimizer = torch.optim.SGD(each, 0.1)
        GradientLARS().attach(optimizer)
        counts = counted(optimizer.step)
    return result(params, expected, counts)


def one_by_one(how: Any) -> Any:
    """Call the hook itself, as Chainer does."""
    params, expected = distributed(*how), plain()
    hook, counts = GradientLARS(weight_decay=0.01), {}
    for p, q, g in zip(params, expected, full(1), strict=True):
        p.grad, q.grad = place(p, g.clone(), False), g.clone()
        hook(None, q)
        counts = counted(lambda p=p: hook(None, p))
    found, wanted = ([p.grad for p in each] for each in (params, expected))
    return result(found, wanted, counts)


def scaled(how: Any) -> Any:
    """Step an optimizer that gets scaled gradients from GradScaler."""
    params, expected = distributed(*how), plain()
    counts = {}
    for each, scale in ((expected, 1.0), (params, 8.0)):
        optimizer = torch.optim.Adam(each, 0.1, fused=True)
        GradientLARS(weight_decay=0.01).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(1))
        for p, g in zip(each, full(1), strict=True):
            p.grad = place(p, scale * g, False)
        counts = counted(lambda x=(scaler, optimizer): x[0].step(x[1]))
    assert not torch.equal(expected[0], full(0)[0])
    return result(params, expected, counts)


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    torch.set_num_threads(1)
    placements = PLACEMENTS[dist.get_world_size()]
    results: dict[str, Any] = {}
    for kind in OPTIMIZERS:
        for name, how in placements.items():
            for partial in (False, True):
                found = case(distributed(*how), kind, partial)
                results[f"{name}, {kind}, partial {partial}"] = found
    rows = placements["rows"]
    with patch.object(native, "unavailable", lambda: "not now"):
        results["rows, by the rule"] = case(distributed(*rows), "SGD", False)
    results["gradients in one process"] = gradients_in_one_process(rows)
    results["one by one"] = one_by_one(rows)
    results["scaled"] = scaled(rows)
    if both := placements.get("rows and columns"):
        results["two meshes"] = case(two_meshes(rows, both), "SGD", False)
    dist.barrier()
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(results, file)
    dist.barrier()  # one that leaves may abort, and torchrun then ends the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
