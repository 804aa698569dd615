"""What every optimizer of torch.optim does, asked of LARS and of SGD alike."""

import copy
import io
import itertools
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from larskit.torch import LARS


@dataclass(frozen=True)
class Info:
    """An optimizer under test, as torch's own tests describe theirs."""

    cls: Any
    inputs: list[tuple[str, dict[str, Any]]]
    implementations: list[dict[str, Any]]
    errors: list[tuple[dict[str, Any], type, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.cls.__name__


INPUTS = [
    ("default", {}),
    ("lr", {"lr": 0.01}),
    ("tensor lr", {"lr": torch.tensor(0.01)}),
    ("no momentum", {"momentum": 0.0}),
    ("weight decay", {"weight_decay": 0.5}),
    ("dampening", {"momentum": 0.9, "dampening": 0.5}),
    ("nesterov", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("maximize", {"momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
]
OURS = [
    ("tensor weight decay", {"weight_decay": torch.tensor(0.5)}),
    ("every layer", {"adapt": True, "decay": True, "weight_decay": 0.1}),
    ("clipped", {"clip": True, "trust_coefficient": 0.1}),
    ("threshold", {"threshold": 1.0, "eps": 1e-3}),
    ("decayed gradient", {"denominator": "decayed_gradient", "weight_decay": 0.1}),
    ("momentum", {"denominator": "momentum", "lr_placement": "outside"}),
    ("outside", {"denominator": "gradient", "lr_placement": "outside"}),
    ("raise", {"on_nonfinite": "raise"}),
    ("skip", {"on_nonfinite": "skip"}),
    ("capturable", {"capturable": True}),
    ("capturable, skip", {"capturable": True, "on_nonfinite": "skip"}),
    ("master weights", {"master_weights": True}),
]
EXCLUSIVE = [
    ({"foreach": True, "fused": True}, "two engines"),
    ({"carry_norms": True, "foreach": True}, "only a fused engine"),
    ({"carry_norms": True, "foreach": False}, "only a fused engine"),
    ({"carry_norms": True, "fused": False}, "only a fused engine"),
    ({"carry_norms": True, "capturable": True}, "another caller writes"),
    ({"carry_norms": True, "differentiable": True}, "only a fused engine"),
    ({"capturable": True, "on_nonfinite": "raise"}, "cannot raise"),
    ({"differentiable": True, "foreach": True}, "autograd"),
    ({"differentiable": True, "fused": True}, "autograd"),
    ({"differentiable": True, "master_weights": True}, "autograd"),
    ({"differentiable": True, "on_nonfinite": "skip"}, "autograd"),
    ({"differentiable": True, "on_nonfinite": "raise"}, "autograd"),
]
INFOS = [
    Info(
        SGD,
        INPUTS,
        [{"foreach": False}, {"foreach": True}, {"fused": True}],
        [({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach`")],
    ),
    Info(
        LARS,
        INPUTS + OURS,
        [
            {"foreach": False, "fused": False},
            {"foreach": True},
            {"fused": True},
            {"carry_norms": True},
        ],
        [
            (
                options,
                RuntimeError,
                " and ".join(f"{k}={v!r}" for k, v in options.items())
                + " conflict: .*"
                + why,
            )
            for options, why in EXCLUSIVE
        ],
    ),
]
BY_INPUT = [
    pytest.param(info.cls, kwargs, id=f"{info}, {name}")
    for info in INFOS
    for name, kwargs in info.inputs
]
BY_CLASS = pytest.mark.parametrize("cls", [info.cls for info in INFOS])


def params(dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (3,), (2, 2, 2), (1,), (0, 3), ()]
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in shapes
    ]


def give(these, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in these:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def values(these):
    return [p.detach().clone() for p in these]


def train(optimizer, these, steps: Iterable[int] = range(3)):
    for step in steps:
        give(these, step)
        optimizer.step()
    return values(these)


def make(cls, these, kwargs) -> Any:
    return cls(these, **copy.deepcopy({"lr": 0.1, "momentum": 0.9} | kwargs))


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        pytest.param(info.cls, *row, id=f"{info}, {row[0]}")
        for info in INFOS
        for row in info.errors
    ],
)
def test_switches_that_exclude_each_other(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(params(), 0.1, **options)


@BY_CLASS
def test_parameters_it_does_not_take(cls):
    with pytest.raises(TypeError, match="params argument given to the optimizer"):
        cls(torch.ones(2, requires_grad=True), 0.1)
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        cls([{"params": [p]}, {"params": [p]}], 0.1)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        cls([p * 2], 0.1)
    with pytest.raises(ValueError, match="all optimizer params should be with"):
        cls([("p", p), nn.Parameter(torch.ones(2))], 0.1)


@pytest.mark.parametrize(("cls", "kwargs"), BY_INPUT)
def test_it_goes_downhill(cls, kwargs):
    p = nn.Parameter(torch.tensor([[3.0, -4.0]]))
    optimizer = make(cls, [p], kwargs)
    sign = -1.0 if kwargs.get("maximize") else 1.0
    before = p.square().sum().item()
    for _ in range(20):
        p.grad = sign * 2 * p.detach()
        optimizer.step()
    assert 0 < p.square().sum().item() < before


def allowed(kwargs, switches):
    both = kwargs | switches
    on_cpu = {"capturable": True, "fused": True}
    pairs = [on_cpu, *(pair for pair, _ in EXCLUSIVE)]
    return not any(pair.items() <= both.items() for pair in pairs)


@pytest.mark.parametrize(("cls", "kwargs"), BY_INPUT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_implementations_agree(cls, kwargs, dtype):
    (implementations,) = (info.implementations for info in INFOS if info.cls is cls)
    found = []
    for switches in implementations:
        if allowed(kwargs, switches):
            these = params(dtype)
            found.append(train(make(cls, these, kwargs | switches), these))
    assert len(found) > 1
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("cls", "kwargs"), BY_INPUT)
def test_complex_layers_step_like_their_real_views(cls, kwargs):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64, generator=generator))
    q = nn.Parameter(torch.view_as_real(p.detach()).clone())
    one, other = make(cls, [p], kwargs), make(cls, [q], kwargs)
    for _ in range(3):
        p.grad = torch.randn(3, 2, dtype=torch.complex64, generator=generator)
        q.grad = torch.view_as_real(p.grad)
        one.step()
        other.step()
    torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach())


@pytest.mark.parametrize(("cls", "kwargs"), BY_INPUT)
def test_nothing_moves_without_gradients_or_along_zeros(cls, kwargs):
    these = params()
    before = values(these)
    optimizer = make(cls, these, kwargs | {"weight_decay": 0.0})
    optimizer.step()
    assert not optimizer.state or cls is SGD
    for p in these:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, before, values(these)))


@pytest.mark.parametrize(("cls", "kwargs"), BY_INPUT)
@pytest.mark.parametrize("way", ["file", "deepcopy", "pickle", "state_dict"])
def test_a_restored_one_goes_on_bit_for_bit(cls, kwargs, way):
    these = params()
    optimizer = make(cls, these, kwargs)
    train(optimizer, these)
    if way == "deepcopy":
        twins, other = copy.deepcopy((these, optimizer))
    elif way == "pickle":
        twins, other = pickle.loads(pickle.dumps((these, optimizer)))
    else:
        twins = copy.deepcopy(these)
        other = make(cls, twins, {})
        state = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other.load_state_dict(state)
    steps = range(3, 6)
    found = train(optimizer, these, steps), train(other, twins, steps)
    assert all(map(torch.equal, *found))
    assert str(optimizer.state_dict()) == str(other.state_dict())


@pytest.mark.parametrize(("cls", "kwargs"), BY_INPUT)
def test_a_state_loads_into_another_dtype(cls, kwargs):
    these, wide = params(), params(torch.float64)
    optimizer = make(cls, these, kwargs)
    train(optimizer, these)
    other = make(cls, wide, kwargs)
    other.load_state_dict(optimizer.state_dict())
    for p in wide:
        assert all(
            x.dtype == torch.float64 for x in other.state[p].values() if x is not None
        )
    train(other, wide)


@BY_CLASS
def test_a_state_of_another_shape_is_refused(cls):
    these = params()
    optimizer = make(cls, these, {})
    for groups, message in (
        ([{"params": these[:2]}], "doesn't match the size"),
        ([{"params": these[:2]}, {"params": these[2:]}], "different number of"),
    ):
        other = make(cls, groups, {})
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(optimizer.state_dict())


@BY_CLASS
def test_state_dict_hooks(cls):
    these = params()
    optimizer = make(cls, these, {})
    train(optimizer, these)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(
        lambda o, state: {
            **state,
            "param_groups": [dict(g, note=7) for g in state["param_groups"]],
        }
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: {
            **state,
            "param_groups": [dict(g, lr=9.0) for g in state["param_groups"]],
        }
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before saving", "after loading"]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["note"]) == (
        9.0,
        7,
    )


@BY_CLASS
def test_step_hooks(cls):
    these = params()
    optimizer = make(cls, these, {})
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    handle = optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == ["before", "after", "before"]


@BY_CLASS
def test_names_of_parameters(cls):
    these = params()
    named = [(f"layer.{i}", p) for i, p in enumerate(these)]
    optimizer = make(cls, [{"params": named[:2]}], {})
    optimizer.add_param_group({"params": named[2:], "lr": 0.5})
    names = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    assert list(itertools.chain(*names)) == [name for name, _ in named]
    with pytest.raises(ValueError, match="all optimizer param groups should be with"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    train(optimizer, these)


@BY_CLASS
def test_it_can_be_printed(cls):
    text = repr(make(cls, params(), {"lr": 0.125}))
    assert text.startswith(f"{cls.__name__} (\nParameter Group 0\n")
    assert "lr: 0.125" in text


@BY_CLASS
def test_defaults_are_filled_into_each_group(cls):
    optimizer = make(cls, [{"params": params()}, {"params": params(), "lr": 0.5}], {})
    first, second = optimizer.param_groups
    assert first.keys() == second.keys() >= optimizer.defaults.keys()
    assert (first["lr"], second["lr"]) == (0.1, 0.5)


SCHEDULERS = [
    lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    lambda o: lr_scheduler.OneCycleLR(o, 0.5, 6),
    lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 3),
]


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", range(len(SCHEDULERS)))
def test_schedulers(schedule, tensor):
    """They set of LARS what they set of SGD, and the step takes it from there."""
    lr = torch.tensor(0.1) if tensor else 0.1
    scheduled = {cls: params() for cls in (SGD, LARS)}
    optimizers = {cls: make(cls, these, {"lr": lr}) for cls, these in scheduled.items()}
    schedulers = {cls: SCHEDULERS[schedule](o) for cls, o in optimizers.items()}
    by_hand = params()
    other = make(LARS, by_hand, {})
    for step in range(5):
        now = {cls: o.param_groups[0] for cls, o in optimizers.items()}
        for name in ("lr", "momentum"):
            assert float(now[LARS][name]) == float(now[SGD][name])
            other.param_groups[0][name] = float(now[LARS][name])
        for optimizer, these in ((optimizers[LARS], scheduled[LARS]), (other, by_hand)):
            train(optimizer, these, [step])
        for scheduler in schedulers.values():
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.optimizer._opt_called = True
            scheduler.step(1.0) if plateau else scheduler.step()
    assert all(map(torch.equal, values(scheduled[LARS]), values(by_hand)))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"foreach": True}])
@pytest.mark.parametrize("cls", [SGD, LARS])
def test_grad_scaler(cls, options):
    """It unscales before the norms, and skips steps with infinities."""
    torch.manual_seed(0)
    nets = [nn.Linear(3, 2)]
    nets.append(copy.deepcopy(nets[0]))
    plain, scaled = (make(cls, net.parameters(), options) for net in nets)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    for step in range(5):
        x = torch.randn(4, 3)
        overflows = step == 2
        if not overflows:
            plain.zero_grad()
            nets[0](x).square().mean().backward()
            plain.step()
        before = copy.deepcopy(scaled.state_dict())
        scaled.zero_grad()
        loss = nets[1](x).square().mean() * (float("inf") if overflows else 1.0)
        scaler.scale(loss).backward()
        scaler.step(scaled)
        scaler.update()
        if overflows:
            assert str(scaled.state_dict()) == str(before)
    assert scaler.get_scale() == 2.0**7
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("cls", [SGD, LARS])
def test_autocast(cls):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = make(cls, net.parameters(), {})
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(torch.ones(4, 3)).square().mean()
    loss.backward()
    before = values(net.parameters())
    optimizer.step()
    for old, p in zip(before, net.parameters(), strict=True):
        assert p.dtype == torch.float32
        assert not torch.equal(old, p.detach())


@pytest.mark.parametrize("cls", [SGD, LARS])
def test_dtypes_and_devices_may_be_mixed_in_a_group(cls):
    these = [
        p for d in (torch.float32, torch.float64, torch.bfloat16) for p in params(d)
    ]
    optimizer = make(cls, [*these, nn.Parameter(torch.empty(2, 2, device="meta"))], {})
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    alone = params()
    other = make(cls, alone, {})
    for p in alone:
        p.grad = torch.ones_like(p)
    other.step()
    assert all(map(torch.equal, values(alone), values(these[: len(alone)])))


GRADIENTS = [
    {},
    {"weight_decay": 0.1, "momentum": 0.5, "nesterov": True},
    {"momentum": 0.0, "maximize": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
]
OUR_GRADIENTS = [
    {"clip": True, "trust_coefficient": 0.1, "eps": 1e-3},
    {"denominator": "decayed_gradient", "weight_decay": 0.1},
    {"denominator": "momentum", "lr_placement": "outside", "weight_decay": 0.1},
    {"denominator": "gradient", "lr_placement": "outside", "nesterov": True},
]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("cls", "options"),
    # SGD cuts its first momentum buffer off from the graph
    [(SGD, {"momentum": 0.0, "maximize": True})]
    + [(LARS, o) for o in GRADIENTS + OUR_GRADIENTS],
)
def test_gradients_pass_through_the_step(cls, options, steps):
    """By weights, gradients, momentum, learning rate and decay, against differences."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        x = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5
        return x.requires_grad_()

    w, b, g, h, v = random(3, 2), random(2), random(3, 2), random(2), random(3, 2)
    lr, decay = random(), random()
    tensors = (
        {"weight_decay": decay} if cls is LARS and "weight_decay" in options else {}
    )

    def after(w, b, g, h, v, lr, decay):
        these = [w.clone(), b.clone()]
        kwargs = options | {name: decay for name in tensors}
        if cls is LARS:
            kwargs = {"lr": lr} | kwargs
        optimizer = cls(
            these, **{"lr": 0.1, "momentum": 0.9} | kwargs, differentiable=True
        )
        if optimizer.defaults["momentum"]:
            optimizer.state[these[0]]["momentum_buffer"] = v.clone()
        for _ in range(steps):
            these[0].grad, these[1].grad = g, h
            optimizer.step()
        kept = [x for p in these for x in optimizer.state[p].values() if x is not None]
        return *these, *kept

    assert torch.autograd.gradcheck(after, (w, b, g, h, v, lr, decay))


@pytest.mark.parametrize("cls", [SGD, LARS])
def test_a_differentiable_step_needs_tensors_that_can_be_in_the_graph(cls):
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    optimizer = cls([p], 0.1, differentiable=True)
    with pytest.raises(RuntimeError, match="leaf"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 2))
