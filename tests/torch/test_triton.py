"""The optimizer on Triton's kernels: without a GPU, in Triton's interpreter.

Then the CPU plays the GPU: what the optimizer asks of a device's type is told so.
"""

import copy
import sys
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch import nn

from larskit import engines
from larskit.engines import conditional, foreach, native, triton
from larskit.torch import LARS, step_in_backward


@pytest.fixture(autouse=True)
def plays_the_gpu(monkeypatch):
    monkeypatch.setattr(engines, "GPU", DEVICE)


def layers(dtype=torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,), (2, 2), (50, 60)]
    rows = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(x.to(DEVICE, dtype)) for x in rows]


def give(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        g = torch.randn(p.shape, generator=generator) * scale
        p.grad = g.to(DEVICE, p.dtype)


def tensors(params, o):
    """Return weights and state, on the CPU."""
    kept = [x for p in params for x in o.state[p].values()]
    return [x.detach().cpu() for x in (*params, *kept)]


def groups(o):
    return [bucket.group for bucket in o._stepper.plan.buckets]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"fused": True, "nesterov": True, "weight_decay": 0.1},
    {"denominator": "momentum", "lr_placement": "outside", "dampening": 0.5},
    {"on_nonfinite": "skip"},
    {"on_nonfinite": "raise", "dampening": 0.5},
    {"carry_norms": True},
    {"capturable": True, "fused": True},
    {"momentum": 0.0, "clip": True},
    {"lr": torch.tensor(0.3, device=DEVICE), "adapt": True},
    {"weight_decay": torch.tensor(0.25, device=DEVICE), "decay": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_steps_as_the_reference(options):
    found = []
    for engine in ({}, {"fused": False, "foreach": False}):
        params = layers()
        switches = {"lr": 0.5, "trust_coefficient": 0.1} | options | engine
        if engine:
            switches |= {"carry_norms": False, "capturable": False}
        o = LARS(params, **switches)
        for step in range(3):
            give(params, step)
            o.step()
        fused = [isinstance(engine, triton.Group) for engine in groups(o)]
        assert all(fused) == (not engine)
        found.append(
            [*tensors(params, o), *flat(dict(sorted(o.layer_stats().items())))]
        )
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def flat(stats):
    rows = (stats[name][:5] for name in sorted(stats))
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights(dtype):
    found = []
    for fused in (True, False):
        params = layers(dtype)
        o = LARS(params, 0.5, master_weights=True, fused=fused)
        for step in range(3):
            give(params, step)
            o.step()
        found.append(tensors(params, o))
    assert all(map(torch.equal, *found))


def test_what_it_cannot_step_goes_to_another_engine():
    p = nn.Parameter(torch.ones(3, 4, device=DEVICE)[:, ::2])
    q = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64, device=DEVICE))
    o = LARS([p, q], 0.5)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    o.step()
    assert isinstance(groups(o)[0], foreach.Group)
    assert isinstance(groups(o)[1], triton.Group)
    with pytest.raises(RuntimeError, match="fused=True, but weight 0 is not contig"):
        LARS([p], 0.5, fused=True).step()


def test_without_triton_it_says_so(monkeypatch):
    for name in [
        name for name in sys.modules if name.startswith("larskit.engines.tri")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("larskit.engines.triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    params = layers()
    give(params, 0)
    message = "fused=True, but triton is not installed, which comes with PyTorch for"
    with pytest.raises(RuntimeError, match=message):
        LARS(params, 0.5, fused=True).step()
    o = LARS(params, 0.5)
    o.step()
    assert [type(group) for group in groups(o)] == [foreach.Group]


def test_layers_that_are_adapted_and_others_share_the_kernels():
    names = ["a", "b", "c", "d"]
    found = []
    for fused in (True, False):
        params = layers()
        options: Any = {"adapt": ["a", "b"], "decay": ["b", "c"], "weight_decay": 0.5}
        named = list(zip(names, params, strict=True))
        o = LARS(named, 0.5, fused=fused, trust_coefficient=0.1, **options)
        for step in range(3):
            give(params, step)
            o.step()
        found.append(
            [*tensors(params, o), *flat(dict(sorted(o.layer_stats().items())))]
        )
        assert len(groups(o)) == 1
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_the_cpu_has_its_own_engine(monkeypatch):
    monkeypatch.setattr(engines, "GPU", "cuda")
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    o = LARS([p], 0.5)
    o.step()
    assert isinstance(groups(o)[0], native.Group)


def test_states_go_on_in_any_engine():
    found = []
    for first, second in ((True, False), (False, True), (True, True)):
        params = layers()
        o = LARS(params, 0.5, fused=first)
        for step in range(4):
            if step == 2:
                state = copy.deepcopy(o.state_dict())
                o = LARS(params, 0.5)
                o.load_state_dict(state)
                o.param_groups[0]["fused"] = second
            give(params, step)
            o.step()
        found.append(tensors(params, o))
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


def test_gradients_may_come_and_go():
    found = []
    for fused in (True, False):
        params = layers()
        o = LARS(params, 0.5, fused=fused, carry_norms=fused)
        for step in range(5):
            give(params, step)
            if step in (1, 3):
                params[step].grad = None
            o.step()
        found.append(tensors(params, o))
    assert all(map(torch.equal, *found))


def test_a_step_in_backward():
    found = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(3, 2).to(DEVICE)
        o = LARS(net.parameters(), 0.5, fused=True)
        if in_backward:
            step_in_backward(o)
            assert not o._step_supports_amp_scaling
        for _ in range(3):
            net.zero_grad()
            net(torch.ones(4, 3, device=DEVICE)).square().mean().backward()
            o.step()
        found.append(tensors(list(net.parameters()), o))
    assert all(map(torch.equal, *found))


def scaled_training(fused, overflows, **options):
    """Train with GradScaler; some steps have a gradient that is not finite."""
    params = layers()
    engine = None if fused else False
    o = LARS(params, 0.5, fused=fused, foreach=engine, adapt=True, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=2)
    scales = []
    for step in range(5):
        scaler.scale(torch.ones((), device=DEVICE))  # which makes the scale
        give(params, step, scaler.get_scale())
        if step in overflows:
            params[0].grad[0, 0] = torch.inf
        before = [p.grad.clone() for p in params]
        scaler.step(o)
        if fused:
            pairs = zip(before, (p.grad for p in params), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        scaler.update()
        scales.append(scaler.get_scale())
    return tensors(params, o), scales


SCALED: list[dict[str, Any]] = [
    {},
    {"dampening": 0.5},
    {"weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.0},
    {"on_nonfinite": "skip"},
    {"on_nonfinite": "raise"},
]


# The second has what the others have.
OVERFLOWS = [(), (0, 1, 3), (0,), (2,)]


@pytest.mark.parametrize(
    ("options", "overflows"),
    [
        pytest.param(
            options, steps, marks=[pytest.mark.slow] if options and i > 1 else []
        )
        for options in SCALED
        for i, steps in enumerate(OVERFLOWS)
    ],
)
def test_grad_scaler_leaves_its_scale_to_the_kernels(options, overflows):
    ours, our_scales = scaled_training(True, overflows, **options)
    theirs, their_scales = scaled_training(False, overflows, **options)
    assert all(map(torch.equal, ours, theirs))
    assert our_scales == their_scales


def test_who_takes_the_scale_of_the_loss(monkeypatch):
    params = layers()
    assert LARS(params, 0.5, fused=True)._step_supports_amp_scaling
    assert not LARS(params, 0.5)._step_supports_amp_scaling
    monkeypatch.setattr(engines, "GPU", "another")
    assert not LARS(params, 0.5, fused=True)._step_supports_amp_scaling


def test_unscaled_gradients_are_not_divided_again():
    found = []
    for fused in (True, False):
        params = layers()
        o = LARS(params, 0.5, fused=fused)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
        scaler.scale(torch.ones((), device=DEVICE))
        give(params, 0, 8.0)
        scaler.unscale_(o)
        nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(o)
        scaler.update()
        found.append(tensors(params, o))
    assert all(map(torch.equal, *found))


def test_layers_that_another_engine_steps_are_unscaled_too():
    found = []
    for fused in (True, False):
        p = nn.Parameter(torch.ones(3, 4, device=DEVICE)[:, ::2])
        o: Any = LARS([p], 0.5, fused=None if fused else False)
        p.grad = torch.full_like(p, 16.0 if fused else 2.0)
        for flag in (1.0, 0.0):
            if fused:
                o.grad_scale = torch.tensor(8.0, device=DEVICE)  # as GradScaler does
                o.found_inf = torch.tensor(flag, device=DEVICE)
            if fused or flag == 0.0:
                o.step()
        found.append(tensors([p], o))
    assert all(map(torch.equal, *found))


def test_a_graph_is_captured_with_tables_of_its_own(monkeypatch):
    if DEVICE != "cpu":
        pytest.skip("here capturing is pretended")
    params = layers()
    o = LARS(params, 0.5, fused=True, capturable=True)
    give(params, 0)
    o.step()
    gradients = [p.grad for p in params]
    monkeypatch.setattr(conditional, "is_capturing", lambda device: True)
    o.step()  # on the gradients of before: the tables that are there become the graph's
    first = groups(o)
    assert all(group.captured for group in first)
    give(params, 1)
    o.step()  # on others: the graph writes tables for itself
    second = groups(o)
    assert all(group.captured for group in second)
    monkeypatch.undo()
    monkeypatch.setattr(engines, "GPU", DEVICE)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    o.step()
    assert not any(group.captured for group in groups(o))
    kept = o._stepper.plan._captured  # so that the graphs go on
    assert kept == [*first, *second]
    twin = layers()
    other = LARS(twin, 0.5, fused=False)
    for step in (0, 0, 1, 0):
        give(twin, step)
        other.step()
    assert all(map(torch.equal, tensors(params, o), tensors(twin, other)))


def test_a_graph_needs_a_step_that_can_be_captured(monkeypatch):
    params = layers()
    o = LARS(params, 0.5, fused=True)
    give(params, 0)
    o.step()
    monkeypatch.setattr(conditional, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="but capturable=False"):
        o.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on its own parts
def test_a_compiled_training_step_calls_the_kernels_between_its_graphs():
    found = []
    for compiles in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(3, 2).to(DEVICE)
        o = LARS(net.parameters(), 0.5, fused=True, capturable=True)

        def train(net: Any = net, o: Any = o) -> None:
            o.zero_grad()
            net(torch.ones(4, 3, device=DEVICE)).square().mean().backward()
            o.step()

        torch._dynamo.reset()
        step = torch.compile(train, backend="eager") if compiles else train
        for _ in range(3):
            step()
        assert all(isinstance(group, triton.Group) for group in groups(o))
        found.append(tensors(list(net.parameters()), o))
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_by_default_a_compiled_step_is_one_graph_without_the_kernels(monkeypatch):
    """On the device "meta", which plays the GPU and on which nothing is computed."""
    monkeypatch.setattr(engines, "GPU", "meta")
    asked = []
    monkeypatch.setattr(triton, "bind", lambda *_: asked.append(1))
    params = [nn.Parameter(torch.empty(4, 3, device="meta"))]
    o = LARS(params, torch.empty((), device="meta"))
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(o.step, fullgraph=True, backend=backend)
    for _ in range(3):
        params[0].grad = torch.empty_like(params[0])
        step()
    assert len(graphs) == 2  # without a momentum buffer, and with it
    assert [type(group) for group in groups(o)] == [foreach.Group]
    assert not asked
