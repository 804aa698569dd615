"""What only a real GPU can show: graphs, streams, devices, waiting, sizes."""

import copy
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch import nn

from larskit.torch import LARS

if DEVICE == "cpu":
    pytest.skip("needs a GPU and LARSKIT_TEST_DEVICE=cuda", allow_module_level=True)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "nesterov": True},
    {"denominator": "momentum", "lr_placement": "outside"},
    {"on_nonfinite": "skip"},
    {"momentum": 0.0, "clip": True},
]


def layers(device: Any = DEVICE, dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    shapes = [(300, 50), (50,), (2, 2), (1000, 1000)]
    return [nn.Parameter(torch.randn(s).to(device, dtype)) for s in shapes]


def give(params, step):
    """Write gradients, into those that are there."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def by_hand(rates, **options):
    params = layers()
    o = LARS(params, 0.5, fused=False, foreach=False, **options)
    for step, rate in enumerate(rates):
        o.param_groups[0]["lr"] = rate
        give(params, step)
        o.step()
    return params


def close(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)


RATES = (0.5, 0.25, 0.125, 1.0, 0.0625)


def warm(work: Any) -> None:
    """Run something on a stream of its own, as must be done before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_is_captured_once_and_replayed_with_a_changing_rate(options, fused):
    params, lr = layers(), torch.tensor(RATES[0], device=DEVICE)
    o = LARS(params, lr, capturable=True, fused=fused, **options)
    give(params, 0)
    warm(o.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o.step()
    for step, rate in enumerate(RATES[1:], start=1):
        lr.fill_(rate)
        give(params, step)
        graph.replay()
    assert close(params, by_hand(RATES, **options))


def test_steps_between_replays_do_not_disturb_the_graph():
    params, lr = layers(), torch.tensor(0.5, device=DEVICE)
    o = LARS(params, lr, capturable=True, fused=True)
    give(params, 0)
    warm(o.step)
    static = [p.grad for p in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o.step()
    for step in range(1, 5):
        for p, g in zip(params, static, strict=True):
            p.grad = g if step % 2 else None
        give(params, step)
        if step % 2:
            graph.replay()
        else:
            o.step()
    assert close(params, by_hand([0.5] * 5))


def test_a_whole_training_step_is_captured():
    """Its gradients are made in the graph, at addresses of the graph's own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10)).to(DEVICE)
    twin = copy.deepcopy(net)
    x = torch.randn(32, 64, device=DEVICE)
    found = []
    for model, captured in ((net, True), (twin, False)):
        o = LARS(model.parameters(), 0.5, capturable=captured, fused=captured)

        def train(model: Any = model, o: Any = o) -> None:
            o.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            o.step()

        warm(lambda train=train: [train() for _ in range(3)])
        again: Any = train
        if captured:
            graph = torch.cuda.CUDAGraph()
            o.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                train()
            again = graph.replay
        for _ in range(4):
            again()
        found.append([p.detach() for p in model.parameters()])
    assert close(*found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fused", [True, None])
def test_a_compiled_step(fused):
    params, lr = layers(), torch.tensor(0.5, device=DEVICE)
    o = LARS(params, lr, capturable=True, fused=fused)
    step_ = torch.compile(o.step, fullgraph=fused is None)
    for step, rate in enumerate(RATES):
        lr.fill_(rate)
        give(params, step)
        step_()
    assert close(params, by_hand(RATES))


@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_waits_for_the_device(options):
    params, lr = layers(), torch.tensor(0.5, device=DEVICE)
    o: Any = LARS(params, lr, fused=True, **options)
    give(params, 0)
    o.step()
    give(params, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        o.step()
        o.grad_scale = torch.tensor(2.0).pin_memory().to(DEVICE, non_blocking=True)
        o.found_inf = torch.zeros((), device=DEVICE)
        o.step()
        for p in params:
            p.grad = torch.ones_like(p)
        o.step()
        o.param_groups[0]["lr"] = 0.25
        o.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert o.layer_stats()["0.3"].weight_norm > 0  # which may wait
    assert all(p.isfinite().all() for p in params)


def test_streams():
    params = layers()
    o = LARS(params, 0.5, fused=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    last = torch.cuda.current_stream()
    for step in range(5):
        stream = streams[step % 2]
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            give(params, step)
            o.step()
        last = stream
    torch.cuda.synchronize()
    assert close(params, by_hand([0.5] * 5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_several_devices():
    halves = layers("cuda:0")[:2] + layers("cuda:1")[2:]
    o = LARS(halves, 0.5, fused=True)
    for step in range(3):
        give(halves, step)
        o.step()
    assert close([p.cpu() for p in halves], [p.cpu() for p in by_hand([0.5] * 3)])


def test_runs_repeat_to_the_bit():
    found = []
    for _ in range(2):
        params = layers()
        o = LARS(params, 0.5, fused=True)
        for step in range(3):
            give(params, step)
            o.step()
        found.append(params)
    assert all(map(torch.equal, *found))


def test_a_layer_of_more_than_two_to_the_31_elements():
    size = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 4 * 2 * size:
        pytest.skip("needs 18 GB of memory")
    p = nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.ones_like(p)
    o = LARS([p], 0.5, trust_coefficient=1.0, adapt=True, fused=True)
    o.step()
    assert p.detach().min() == p.detach().max() == 0.5
    assert o.layer_stats()["0.0"].weight_norm == float(size) ** 0.5


@pytest.mark.parametrize("fused", [True, None])
def test_float16_training_with_grad_scaler(fused):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10)).to(DEVICE)
    o = LARS(net.parameters(), 0.1, trust_coefficient=0.02, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=5)
    x = torch.randn(64, 64, device=DEVICE)
    y = torch.randint(10, (64,), device=DEVICE)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(net(x), y)
        o.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(o)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert scaler.get_scale() != 2.0**24
