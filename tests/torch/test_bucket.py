"""Float32 weights beside parameters of bfloat16 and float16."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from larskit.torch import LARS, step_in_backward

ENGINES = [{"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}]
LOW_PRECISION = [torch.bfloat16, torch.float16]


def layers(dtype) -> list[Any]:
    torch.manual_seed(0)
    shapes = [(4, 3), (3,), (2, 2)]
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give(params, step, dtype):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(p.dtype)


def masters(optimizer, params):
    return [optimizer.state[p]["master_weight"] for p in params]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_it_is_the_training_of_the_wide_weights(dtype, engine):
    low, full = layers(dtype), [nn.Parameter(p.float()) for p in layers(dtype)]
    options: Any = {"weight_decay": 0.01, "nesterov": True, **engine}
    optimizer = LARS(low, 0.5, master_weights=True, **options)
    other = LARS(full, 0.5, **options)
    for step in range(5):
        for these, o in ((low, optimizer), (full, other)):
            give(these, step, dtype)
            o.step()
    for p, q, master in zip(low, full, masters(optimizer, low), strict=True):
        assert torch.equal(master, q.detach())
        assert torch.equal(p.detach(), q.detach().to(dtype))
        buffers = [
            o.state[x]["momentum_buffer"] for o, x in ((optimizer, p), (other, q))
        ]
        assert torch.equal(*buffers)
    assert optimizer.layer_stats() == other.layer_stats()


def test_small_steps_add_up():
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = LARS([p], 0.1, momentum=0.0, master_weights=True)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    expected = torch.full((4, 4), (1 - 1e-4) ** 200)
    torch.testing.assert_close(optimizer.state[p]["master_weight"], expected)
    assert torch.equal(p.detach(), expected.bfloat16())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_master_follows_where_somebody_else_writes(engine):
    params = layers(torch.bfloat16)
    optimizer = LARS(params, 0.5, master_weights=True, **engine)
    for step in range(2):
        give(params, step, torch.bfloat16)
        optimizer.step()
    before = [m.clone() for m in masters(optimizer, params)]
    with torch.no_grad():
        params[0][1] = 7.0
    optimizer.param_groups[0].update(lr=0.0, momentum=0.0)
    give(params, 2, torch.bfloat16)
    params[2].grad = None  # and is forgotten by none of them
    optimizer.step()
    before[0][1] = 7.0
    assert all(map(torch.equal, masters(optimizer, params), before))
    with torch.no_grad():
        params[2].fill_(3.0)
    give(params, 3, torch.bfloat16)
    optimizer.step()
    assert torch.equal(masters(optimizer, params)[2], torch.full((2, 2), 3.0))


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_checkpoint_keeps_the_wide_bits(order, stepped):
    params = layers(torch.bfloat16)
    optimizer = LARS(params, 0.5, master_weights=True)
    for step in range(3):
        give(params, step, torch.bfloat16)
        optimizer.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    twins = layers(torch.bfloat16)
    other = LARS(twins, 9.0, master_weights=True)
    if stepped:
        give(twins, 7, torch.bfloat16)
        other.step()

    def load_model():
        with torch.no_grad():
            for p, w in zip(twins, weights, strict=True):
                p.copy_(w)

    loads = [load_model, lambda: other.load_state_dict(state)]
    for load in loads if order == "model first" else reversed(loads):
        load()
    for step in range(3, 6):
        for these, o in ((params, optimizer), (twins, other)):
            give(these, step, torch.bfloat16)
            o.step()
    assert all(map(torch.equal, masters(optimizer, params), masters(other, twins)))
    assert masters(other, twins)[0].dtype == torch.float32


def test_only_narrow_parameters_have_one():
    params = [
        nn.Parameter(torch.ones(2, 2, dtype=d))
        for d in (torch.float32, torch.float64, torch.complex64, torch.bfloat16)
    ]
    optimizer = LARS(params, 0.5, master_weights=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    has = ["master_weight" in optimizer.state[p] for p in params]
    assert has == [False, False, False, True]
    optimizer.param_groups[0]["master_weights"] = False
    optimizer.step()
    assert "master_weight" not in optimizer.state[params[3]]


def test_a_group_can_begin_to_keep_them():
    params = layers(torch.bfloat16)
    optimizer = LARS(params, 0.5)
    for step in range(2):
        give(params, step, torch.bfloat16)
        optimizer.step()
    optimizer.param_groups[0]["master_weights"] = True
    before = copy.deepcopy(params)
    optimizer.param_groups[0].update(lr=0.0, momentum=0.0)
    optimizer.step()
    for p, old, master in zip(params, before, masters(optimizer, params), strict=True):
        assert torch.equal(master, old.detach().float())
        assert torch.equal(p, old)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_that_is_left_out_leaves_them_too(capturable):
    params = layers(torch.bfloat16)
    switches: Any = {"on_nonfinite": "skip", "capturable": capturable}
    optimizer = LARS(params, 0.5, master_weights=True, **switches)
    give(params, 0, torch.bfloat16)
    optimizer.step()
    before = copy.deepcopy([params, masters(optimizer, params)])
    params[0].grad[0, 0] = float("inf")
    optimizer.step()
    after = [params, masters(optimizer, params)]
    assert all(map(torch.equal, before[0] + before[1], after[0] + after[1]))


def test_they_step_in_backward_too():
    nets = [nn.Linear(3, 2).to(torch.bfloat16)]
    nets.append(copy.deepcopy(nets[0]))
    optimizers = [LARS(net.parameters(), 0.5, master_weights=True) for net in nets]
    step_in_backward(optimizers[1])
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.zero_grad()
            x = torch.full((4, 3), 1.0 + step, dtype=torch.bfloat16)
            net(x).square().mean().backward()
            optimizer.step()
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert str(states[0]) == str(dict(sorted(states[1].items())))
