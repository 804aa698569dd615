"""Non-finite norms, CUDA graph capture and compilation."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from larskit.engines import conditional
from larskit.torch import LARS, step_in_backward

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.usefixtures("every_layer_carries")


def layers() -> list[Any]:
    torch.manual_seed(0)
    shapes = [(4, 3), (3,), (2, 2)]
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def give(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def values(optimizer):
    return copy.deepcopy(
        [
            [p.detach(), dict(optimizer.state[p])]
            for group in optimizer.param_groups
            for p in group["params"]
            if p in optimizer.state
        ]
    )


ENGINES = [
    {"foreach": False, "fused": False},
    {"foreach": True},
    {"fused": True},
    {"carry_norms": True},
    {"capturable": True},
]
KINDS = [
    {},
    {"adapt": False},
    {"denominator": "decayed_gradient", "weight_decay": 0.1},
    {"denominator": "momentum", "lr_placement": "outside"},
    {"momentum": 0.0},
    {"dampening": 0.5},
]


@pytest.mark.parametrize("where", ["weight", "gradient"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_with_nonfinite_lengths_is_left_out(engine, kind, at, bad, where):
    """For each layer; training continues as if the step had not been taken."""
    found = []
    for spoilt in (False, True):
        params = layers()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
        optimizer = LARS(groups, 0.5, on_nonfinite="skip", **engine, **kind)
        for step in range(4):
            give(params, step)
            if step == at and not spoilt:
                continue
            if step == at:
                x = params[2].detach() if where == "weight" else params[2].grad
                right, x[0, 1] = x[0, 1].clone(), bad
                before = str(values(optimizer))
                optimizer.step()
                assert str(values(optimizer)) == before
                stats = optimizer.layer_stats()["1.0"]
                measured = getattr(stats, f"{where}_norm")
                assert not math.isfinite(measured) or engine == {"carry_norms": True}
                x[0, 1] = right
            else:
                optimizer.step()
        found.append([p.detach() for p in params])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("engine", ENGINES[:4])
def test_nonfinite_lengths_raise_before_anything_moves(engine):
    params = layers()
    named = [(f"layer.{i}", p) for i, p in enumerate(params)]
    optimizer = LARS(named, 0.5, on_nonfinite="raise", **engine)
    give(params, 0)
    optimizer.step()
    before = str(values(optimizer))
    params[1].grad[0] = INF
    message = r"the norm of the gradient of 'layer.1' \(inf\) is not finite"
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step()
    assert str(values(optimizer)) == before
    give(params, 1)
    optimizer.step()
    assert str(values(optimizer)) != before


def test_by_default_they_show():
    params = layers()
    optimizer = LARS(params, 0.5)
    give(params, 0)
    params[0].grad[0, 0] = NAN
    optimizer.step()
    assert params[0].isnan().all()
    assert params[2].isfinite().all()


def test_one_policy_for_all_groups():
    params = layers()
    optimizer = LARS(params[:1], 0.5)
    with pytest.raises(ValueError, match="'propagate' and 'skip': give all of them"):
        optimizer.add_param_group({"params": params[1:], "on_nonfinite": "skip"})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[1:]})
    optimizer.param_groups[1]["on_nonfinite"] = "raise"
    give(params, 0)
    with pytest.raises(ValueError, match="'propagate' and 'raise'"):
        optimizer.step()


def test_skipping_does_not_wait_for_the_device(monkeypatch):
    """Once there are buffers; here the CPU plays the device."""
    params = layers()
    optimizer = LARS(params, 0.5, on_nonfinite="skip", capturable=True)
    give(params, 0)
    optimizer.step()
    give(params, 1)

    def wait(*_: Any) -> None:
        raise AssertionError("the host looked at a tensor")

    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    before = params[0].detach().clone()
    optimizer.step()
    monkeypatch.undo()
    assert not torch.equal(params[0], before)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_step_in_backward_cannot_be_left_out_as_a_whole(policy):
    optimizer = LARS(layers(), 0.5, on_nonfinite=policy)
    with pytest.raises(RuntimeError, match=f"on_nonfinite={policy!r}"):
        step_in_backward(optimizer)


def test_a_learning_rate_on_the_device_is_read_there():
    params = layers()
    lr = torch.tensor(0.5)
    optimizer = LARS(params, lr, capturable=True)
    by_hand = copy.deepcopy(params)
    other = LARS(by_hand, 0.5, foreach=True)
    for step, rate in enumerate((0.5, 0.25, 1.5)):
        lr.fill_(rate)
        other.param_groups[0]["lr"] = rate
        for these, o in ((params, optimizer), (by_hand, other)):
            give(these, step)
            o.step()
    torch.testing.assert_close(params, by_hand, rtol=1e-6, atol=1e-6)
    p = nn.Parameter(torch.empty(2, 2, device="meta"))
    p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match=r"lr is on the device cpu.*move it to meta"):
        LARS([p], lr, capturable=True).step()
    message = "fused=True, but the native engine reads lr on the host"
    with pytest.raises(RuntimeError, match=message):
        LARS(params, lr, capturable=True, fused=True).step()


def test_what_a_graph_can_capture(monkeypatch):
    monkeypatch.setattr(conditional, "is_capturing", lambda device: True)
    params = layers()
    give(params, 0)
    with pytest.raises(RuntimeError, match="but capturable=False"):
        LARS(params, 0.5, foreach=True).step()
    with pytest.raises(RuntimeError, match="which the first step makes"):
        LARS(params, 0.5, capturable=True).step()
    LARS(params, 0.5, capturable=True, momentum=0.0).step()


COMPILED = [
    {},
    {"weight_decay": 0.1, "nesterov": True},
    {"denominator": "decayed_gradient", "clip": True, "trust_coefficient": 0.1},
    {"denominator": "momentum", "lr_placement": "outside"},
    {"momentum": 0.0, "maximize": True, "adapt": True},
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on its own parts
@pytest.mark.parametrize("options", COMPILED)
def test_a_compiled_step_is_one_graph(options):
    params = layers()
    twins = copy.deepcopy(params)
    lr = torch.tensor(0.5)
    optimizer = LARS(params, lr, foreach=True, **options)
    other = LARS(twins, lr, foreach=True, **options)
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=backend)
    for step in range(5):
        lr.fill_(1 / (1 + step))
        for these, take in ((params, compiled), (twins, other.step)):
            give(these, step)
            take()
    assert all(map(torch.equal, params, twins))
    assert len(graphs) == (2 if optimizer.param_groups[0]["momentum"] else 1)
    assert optimizer.layer_stats() == other.layer_stats()
    give(params, 9)
    optimizer.step()  # and then without the compiler


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_default_compiler_takes_it():
    params = layers()
    twins = copy.deepcopy(params)
    lr = torch.tensor(0.5)
    optimizer, other = (LARS(these, lr, foreach=True) for these in (params, twins))
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, fullgraph=True)
    for step in range(3):
        for these, take in ((params, compiled), (twins, other.step)):
            give(these, step)
            take()
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"foreach": True, "on_nonfinite": "skip"}], ids=str
)
def test_what_cannot_be_traced_runs_between_two_graphs(options):
    params = layers()
    twins = copy.deepcopy(params)
    optimizer, other = (LARS(these, 0.5, **options) for these in (params, twins))
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def compiled():
        optimizer.step()
        return params[0] * 2

    for step in range(3):
        for these, take in ((params, compiled), (twins, other.step)):
            give(these, step)
            take()
    assert all(map(torch.equal, params, twins))
