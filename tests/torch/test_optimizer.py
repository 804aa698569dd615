"""larskit.torch: LARS as a torch optimizer, and the groups of a model."""

import copy
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import larskit
from larskit import rule
from larskit.config import Config
from larskit.torch import LARS, param_groups, step_in_backward


def model(seed=0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def backward(net, seed=0):
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    net.zero_grad()
    net(x).square().mean().backward()


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


ENGINES = [
    {"foreach": True},
    {"foreach": False, "fused": False},
    {"fused": True},
    {},
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.01, "momentum": 0.5, "nesterov": True},
        {"denominator": "decayed_gradient", "lr_placement": "outside"},
        {"denominator": "momentum", "lr_placement": "outside", "dampening": 0.9},
        {"clip": True, "trust_coefficient": 0.02, "eps": 1e-8},
        {"maximize": True, "threshold": 1.0, "momentum": 0.0},
        {"adapt": True, "decay": False, "weight_decay": 0.1},
        {"adapt": True, "weight_decay": 0.1},
    ],
)
def test_steps_follow_the_rule(engine: Any, options: Any):
    net = model()
    optimizer = LARS(net.parameters(), lr=1.0, **engine, **options)
    own: Any = {k: v for k, v in options.items() if k not in ("adapt", "decay")}
    expected = [(w, None) for w in weights(net)]
    for step in range(4):
        optimizer.param_groups[0]["lr"] = lr = 1.0 / (1 + step)
        backward(net, step)
        for i, p in enumerate(net.parameters()):
            flags = {
                name: p.ndim >= 2 if options.get(name) is None else options[name]
                for name in ("adapt", "decay")
            }
            config = Config(**own, **flags)
            expected[i] = rule.step(*cut(expected[i], p.grad), lr, config)[:2]
        optimizer.step()
    for p, (w, _) in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-6)


def cut(pair, g):
    w, v = pair
    return w, g, v


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_keep_their_bits_and_identity(engine):
    net = model()
    optimizer = LARS(net.parameters(), 1.0, weight_decay=0.1, **engine)
    for step in range(3):
        backward(net, step)
        before = [(p.grad, p.grad.clone()) for p in net.parameters()]
        optimizer.step()
        for p, (same, bits) in zip(net.parameters(), before, strict=True):
            assert p.grad is same
            assert torch.equal(same, bits)


@pytest.mark.parametrize("engine", ENGINES)
def test_state_is_one_buffer_of_the_parameters_own_kind(engine):
    net = model().to(torch.bfloat16)
    optimizer = LARS(net.parameters(), 1.0, **engine)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in net.parameters():
        assert list(optimizer.state[p]) == ["momentum_buffer"]
        buffer = optimizer.state[p]["momentum_buffer"]
        assert (buffer.dtype, buffer.shape) == (p.dtype, p.shape)
    without = LARS(net.parameters(), 1.0, momentum=0.0, **engine)
    without.step()
    assert not without.state


def test_the_first_buffer_is_the_step_and_not_the_raw_gradient():
    p = nn.Parameter(torch.full((2, 2), 3.0))
    p.grad = torch.full((2, 2), 1e6)
    optimizer = LARS([p], lr=2.0, dampening=0.5)
    optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    torch.testing.assert_close(buffer, torch.full((2, 2), 2.0 * 1e-3 * 3.0))


@pytest.mark.parametrize("foreach", [True, False])
def test_a_step_never_waits_for_the_device(foreach):
    p = nn.Parameter(torch.empty(4, 4, device="meta"))
    q = nn.Parameter(torch.empty(4, device="meta"))
    lr = torch.tensor(1.0, device="meta")
    optimizer = LARS([p, q], lr, weight_decay=0.1, clip=True, foreach=foreach)
    for _ in range(2):
        p.grad, q.grad = torch.empty_like(p), torch.empty_like(q)
        optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.layer_stats()


def test_closures_run_first_and_with_gradients():
    net = model()
    optimizer = LARS(net.parameters(), 1.0)
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        backward(net)
        return torch.tensor(7.0)

    before = weights(net)
    assert optimizer.step(closure).item() == 7.0
    assert seen == [True]
    assert not torch.equal(before[0], weights(net)[0])


def test_a_closure_that_fails_changes_nothing():
    net = model()
    optimizer = LARS(net.parameters(), 1.0)
    backward(net)
    before = weights(net)

    def closure():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, weights(net)))
    assert not optimizer.state


def test_parameters_without_gradients_are_skipped():
    net = model()
    optimizer = LARS(net.parameters(), 1.0)
    backward(net)
    net[0].weight.grad = None
    before = weights(net)
    optimizer.step()
    after = weights(net)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[-2], after[-2])
    assert net[0].weight not in optimizer.state
    backward(net, 1)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[net[0].weight]


def test_sparse_gradients_are_refused_before_anything_moves():
    dense = nn.Parameter(torch.ones(3, 2))
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = LARS([dense, table.weight], 1.0)
    table(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=r"gradient of '0.1' is sparse.*dense"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(3, 2))
    assert not optimizer.state


FREED = {
    "parameter": lambda p, optimizer: p,
    "gradient": lambda p, optimizer: p.grad,
    "momentum_buffer": lambda p, optimizer: optimizer.state[p]["momentum_buffer"],
    "master_weight": lambda p, optimizer: optimizer.state[p]["master_weight"],
}


@pytest.mark.parametrize("steps_before", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", FREED)
def test_freed_memory_is_refused_before_anything_moves(what, engine, steps_before):
    dtype = torch.bfloat16 if what == "master_weight" else torch.float32
    params = [nn.Parameter(torch.ones(3, 2, dtype=dtype)) for _ in range(2)]
    optimizer = LARS(params, 1.0, **engine, master_weights=what == "master_weight")
    for _ in range(steps_before):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    before = params[0].detach().clone()
    storage = FREED[what](params[1], optimizer).untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(
        RuntimeError, match=rf"{what} of '0.1' needs 6 .* storage has 0"
    ):
        optimizer.step()
    assert torch.equal(params[0].detach(), before)
    storage.resize_(size)
    optimizer.step()


def test_a_gradient_whose_elements_share_memory_is_not_refused():
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(1).expand(3, 2)
    LARS([p], 1.0).step()
    assert (p < 1).all()


def test_everything_can_differ_between_groups():
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    own = {
        "lr": 4.0,
        "trust_coefficient": 0.25,
        "momentum": 0.0,
        "denominator": "gradient",
        "lr_placement": "outside",
        "adapt": True,
    }
    optimizer = LARS([{"params": [a]}, {"params": [b], **own}], lr=1.0)
    a.grad, b.grad = torch.ones(2, 2), torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((2, 2), 0.999))
    torch.testing.assert_close(b.detach(), torch.zeros(2, 2))
    assert optimizer.param_groups[1]["adapt"] is True


def test_torch_schedulers_drive_it():
    net = model()
    optimizer = LARS(net.parameters(), lr=8.0)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, 4, power=2)
    for step in range(4):
        backward(net, step)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    before = weights(net)
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.step()
    assert all(map(torch.equal, before, weights(net)))


@pytest.mark.parametrize("way", ["weights_only", "deepcopy", "pickle"])
def test_a_restored_optimizer_goes_on_bit_for_bit(way):
    net = model()
    optimizer = LARS(net.named_parameters(), 1.0, weight_decay=1e-2, adapt="*.weight")
    for step in range(2):
        backward(net, step)
        optimizer.step()
    twin = copy.deepcopy(net)
    if way == "weights_only":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = LARS(twin.named_parameters(), 0.1, adapt=True)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        copies = (
            copy.deepcopy
            if way == "deepcopy"
            else lambda x: pickle.loads(pickle.dumps(x))
        )
        twin, other = copies((net, optimizer))
    assert other.param_groups[0]["adapt"] == optimizer.param_groups[0]["adapt"]
    for step in range(2, 5):
        for some, optim in ((net, optimizer), (twin, other)):
            backward(some, step)
            optim.step()
    assert all(map(torch.equal, weights(net), weights(twin)))


def test_lengths_of_the_last_step():
    net = model()
    optimizer = LARS(net.named_parameters(), 1.0, trust_coefficient=0.1)
    assert optimizer.layer_stats() == {}
    backward(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.step()
    found = optimizer.layer_stats()
    assert sorted(found) == sorted(before)
    for name, p in net.named_parameters():
        w, g, ratio = found[name][:3]
        assert w == pytest.approx(before[name].norm().item(), rel=1e-6)
        assert g == pytest.approx(p.grad.norm().item(), rel=1e-6)
        assert ratio == pytest.approx(0.1 * w / g if p.ndim > 1 else 1.0)
    unnamed = LARS(net.parameters(), 1.0)
    unnamed.step()
    assert set(unnamed.layer_stats()) == {f"0.{i}" for i in range(6)}


def disturbances():
    def frozen(net, optimizer):
        net[0].weight.grad = None

    def swapped(net, optimizer):
        net[0].weight.data = net[0].weight.data.clone() * 2

    def channels_last(net, optimizer):
        net.to(memory_format=torch.channels_last)

    def written(net, optimizer):
        with torch.no_grad():
            net[4].weight.mul_(3.0)

    def narrowed(net, optimizer):
        for p in net.parameters():
            p.grad = None
        net.bfloat16()
        for p in net.parameters():
            p.grad = torch.ones_like(p)

    def forgotten(net, optimizer):
        optimizer.state.clear()

    def replaced(net, optimizer):
        state = optimizer.state[net[4].weight]
        state["momentum_buffer"] = torch.ones_like(state["momentum_buffer"])

    def loaded(net, optimizer):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def added(net, optimizer):
        more = nn.Parameter(torch.ones(3, 3))
        more.grad = torch.ones(3, 3)
        optimizer.add_param_group({"params": [more], "lr": 0.1})

    def retuned(net, optimizer):
        group = optimizer.param_groups[0]
        group.update(lr=0.5, weight_decay=0.1, momentum=0.5, denominator="gradient")

    def stopped(net, optimizer):
        optimizer.param_groups[0]["momentum"] = 0.0

    def restricted(net, optimizer):
        group = optimizer.param_groups[0]
        group["adapt"] = (False,) * len(group["params"])

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize(
    ("disturb", "carry"),
    [
        pytest.param(disturb, carry, id=f"{disturb.__name__}-{carry}")
        for disturb in disturbances()
        for carry in (False, True)
        if not (carry and disturb.__name__ == "narrowed")  # wide buffers: not native
    ],
)
@pytest.mark.usefixtures("every_layer_carries")
def test_what_is_kept_between_steps_hides_no_change(disturb, carry):
    results = []
    for engine in ({"foreach": False, "fused": False}, {"carry_norms": carry}):
        net = model()
        options: Any = {"trust_coefficient": 0.1, "adapt": True, **engine}
        optimizer = LARS(net.parameters(), 1.0, weight_decay=0.01, **options)
        for i in range(4):
            if i != 3 or disturb.__name__ != "narrowed":
                backward(net, i)
            if i == 2:
                disturb(net, optimizer)
            optimizer.step()
            if i == 2 and disturb.__name__ == "narrowed":
                net.float()
        results.append(weights(net) + [p for p in optimizer.param_groups[-1]["params"]])
    assert all(map(torch.equal, *results))


@pytest.mark.usefixtures("every_layer_carries")
def test_carried_norms_are_those_that_would_be_measured():
    found = []
    for carry in (False, True):
        net = model()
        optimizer = LARS(net.named_parameters(), 1.0, carry_norms=carry)
        for i in range(3):
            backward(net, i)
            optimizer.step()
        found.append(optimizer.layer_stats())
    assert found[0] == found[1]


def test_carried_norms_need_a_fused_engine():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    optimizer = LARS([p], 1.0, carry_norms=True)
    with pytest.raises(
        RuntimeError, match="carry_norms=True, but weight 0 is complex64"
    ):
        optimizer.step()


ARGUMENTS = [
    ({"lr": -1.0}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
    ({"momentum": 1.5}, ValueError, "momentum must be at least 0 and below 1"),
    ({"nesterov": True, "momentum": 0.0}, ValueError, "nesterov=True needs a momentum"),
    ({"denominator": "lamb"}, ValueError, "denominator must be one of"),
    ({"on_nonfinite": "hide"}, ValueError, "on_nonfinite must be one of"),
    ({"capturable": "yes"}, TypeError, "capturable must be True or False, got 'yes'"),
    ({"foreach": "no"}, TypeError, "foreach must be True, False or None, got 'no'"),
    ({"lr": torch.ones(2)}, ValueError, r"lr has the shape \(2,\), expected one"),
    ({"weight_decay": torch.ones(2)}, ValueError, r"weight_decay has the shape \(2"),
    ({"momentum": torch.ones(0)}, ValueError, r"momentum has the shape \(0,\), exp"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be a finite number of at least"),
    ({"adapt": "*.weight"}, ValueError, "needs names"),
    ({"decay": 3}, TypeError, "decay must be None, True, False, a name pattern"),
]


@pytest.mark.parametrize(("options", "error", "message"), ARGUMENTS)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        LARS([nn.Parameter(torch.ones(2))], **{"lr": 1.0} | options)


def test_groups_may_bring_their_own_rates():
    model = nn.Linear(4, 2)
    groups = [
        {"params": [model.weight], "lr": 4.0},
        {"params": [model.bias], "lr": 0.1, "weight_decay": 0.5},
    ]
    optimizer = LARS(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [4.0, 0.1]

    class Distributed(LARS):  # what Horovod makes of an optimizer
        def __init__(self, params):
            super().__init__(params)

    again = Distributed(optimizer.param_groups)
    for ours, theirs in zip(again.param_groups, optimizer.param_groups, strict=True):
        assert {**ours, "params": 0} == {**theirs, "params": 0}
    del groups[0]["lr"]
    groups[0]["params"] = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="parameter group 0 has no learning rate: pass"):
        LARS(groups)
    with pytest.raises(TypeError, match="parameter group 0 has no learning rate: pass"):
        LARS(nn.Linear(4, 2).parameters())


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "eps"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_defaults_that_no_group_uses_are_checked_too(name, value):
    own = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "eps": 0.0}
    group = {"params": [nn.Parameter(torch.ones(2))], **own}
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        LARS([group], **{name: value})


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("trust_coeff", "trust_coefficient"),
        ("eta", "trust_coefficient"),
        ("trust_clip", "clip"),
        ("epsilon", "eps"),
        ("always_adapt", "adapt=True"),
        ("exclude_bias_n_norm", "nothing: adapt=None and decay=None exclude them"),
    ],
)
def test_names_of_other_implementations_are_explained(name, instead):
    arguments: Any = {name: 0.5}
    with pytest.raises(TypeError, match=f"LARS got {name}: pass {instead} instead"):
        LARS([nn.Parameter(torch.ones(2))], 1.0, **arguments)


def test_lars_is_imported_from_the_module_of_a_framework():
    with pytest.raises(ImportError, match=r"import it from larskit\.torch, lar"):
        from larskit import LARS  # noqa: F401  # pyright: ignore


WRONG_GROUPS = [
    (
        {"model": [nn.Parameter(torch.ones(2))]},
        TypeError,
        "model is a list, expected a",
    ),
    (
        {"weight_decay": -1.0},
        ValueError,
        "weight_decay must be a finite number of at l",
    ),
    (
        {"weight_decay": "1e-4"},
        TypeError,
        "weight_decay must be a finite number of at l",
    ),
    ({"excluded_lr": -0.1}, ValueError, "excluded_lr must be a finite number of"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_GROUPS)
def test_wrong_arguments_of_param_groups(options, error, message):
    with pytest.raises(error, match=message):
        param_groups(**{"model": nn.Linear(4, 2), **options})


def test_bad_parameters():
    integers = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match="parameter 0 has the dtype int64"):
        LARS([integers], 1.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        LARS([], 1.0)
    net = model()
    with pytest.raises(ValueError, match=r"decay='bn.*' matches no parameter"):
        LARS(net.named_parameters(), 1.0, decay="bn.*")


def test_a_group_that_is_refused_is_not_added():
    net = model()
    optimizer = LARS(net[0].named_parameters(), 1.0)
    extra = dict(net[4].named_parameters(prefix="head"))
    for bad, message in (
        ({"momentum": -1.0}, "momentum must be"),
        ({"adapt": "tail.*"}, "matches no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": list(extra.items()), **bad})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": list(extra.items()), "adapt": "*.weight"})
    assert optimizer.param_groups[1]["adapt"] == (True, False)


def test_a_pattern_for_all_groups_need_not_match_in_each():
    net = model()
    groups = [
        {"params": list(layer.named_parameters(prefix=name))}
        for name, layer in (("stem", net[0]), ("head", net[4]))
    ]
    optimizer = LARS(groups, 1.0, adapt="head.*")
    adapted = [group["adapt"] for group in optimizer.param_groups]
    assert adapted == [(False, False), (True, True)]
    with pytest.raises(ValueError, match=r"adapt='tail.*' matches no parameter"):
        LARS(groups, 1.0, adapt="tail.*")


def test_a_hyper_parameter_spoilt_later_is_refused_before_anything_moves():
    net = model()
    optimizer = LARS(param_groups(net), 1.0)
    backward(net)
    before = weights(net)
    optimizer.param_groups[-1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be a finite number"):
        optimizer.step()
    assert all(map(torch.equal, before, weights(net)))


def test_mixed_dtypes_in_one_group():
    p = [nn.Parameter(torch.ones(2, 2, dtype=d)) for d in (torch.half, torch.double)]
    optimizer = LARS(p, 1.0, trust_coefficient=0.5)
    for x in p:
        x.grad = torch.ones_like(x)
    optimizer.step()
    for x in p:
        torch.testing.assert_close(x.detach(), torch.full_like(x, 0.5))


BRAINPY = json.loads(
    (Path(__file__).parents[1] / "golden" / "brainpy.json").read_text()
)
SEED = {"weight_decay": 1e-4, "eps": 1e-5, "adapt": True, "decay": True}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", BRAINPY["cases"])
def test_the_trajectories_of_brainpy(case, engine):
    options = {**SEED, **case["kwargs"]}
    options["trust_coefficient"] = options.pop("tc", 1e-3)
    params = {k: nn.Parameter(torch.tensor(w)) for k, w in case["params"].items()}
    optimizer = LARS(params.items(), lr=1.0, **options, **engine)
    for grads, step in zip(case["grads"], case["steps"], strict=True):
        for key, p in params.items():
            p.grad = torch.tensor(grads[key])
        optimizer.param_groups[0]["lr"] = step["lr"]
        optimizer.step()
        for key, expected in step["params"].items():
            expected = torch.tensor(expected)
            atol = 2e-6 * expected.abs().max().item()
            found = params[key].detach()
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_momentum_it_is_lars_update(engine):
    net = model()
    backward(net)
    before, grads = weights(net), [p.grad.clone() for p in net.parameters()]
    options = {"momentum": 0.0, "trust_coefficient": 1.0, "weight_decay": 0.1}
    every = {"adapt": True, "decay": True}
    LARS(net.parameters(), 0.5, **options, **every, **engine).step()
    expected = larskit.lars_update(before, grads, 0.5, decay_lambda=0.1)
    torch.testing.assert_close(weights(net), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_outside_it_is_sgd_behind_the_hook(engine):
    nets = [model(), model()]
    hook = larskit.GradientLARS(weight_decay=0.1, eps=1e-6)
    sgd = torch.optim.SGD(nets[0].parameters(), lr=0.1, momentum=0.9)
    hook.attach(sgd)
    lars = LARS(
        nets[1].parameters(),
        lr=0.1,
        weight_decay=0.1,
        trust_coefficient=1.0,
        eps=1e-6,
        threshold=1e-2,
        lr_placement="outside",
        adapt=True,
        decay=True,
        **engine,
    )
    for step in range(5):
        for net, optimizer in zip(nets, (sgd, lars), strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            backward(net, step)
            optimizer.step()
    torch.testing.assert_close(*map(weights, nets), rtol=1e-4, atol=1e-5)


class TestParamGroups:
    """`param_groups` splits a model by what is adapted and what is decayed."""

    def names(self, groups):
        return {
            (group["adapt"], group["decay"]): [name for name, _ in group["params"]]
            for group in groups
        }

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (
                {},
                {
                    (True, True): ["0.weight", "4.weight"],
                    (False, False): ["0.bias", "1.weight", "1.bias", "4.bias"],
                },
            ),
            (
                {"adapt": re.compile("^4"), "decay": "*.weight"},
                {
                    (True, True): ["4.weight"],
                    (True, False): ["4.bias"],
                    (False, True): ["0.weight", "1.weight"],
                    (False, False): ["0.bias", "1.bias"],
                },
            ),
            (
                {"adapt": True, "decay": lambda name, p: p.numel() > 40},
                {
                    (True, True): ["4.weight"],
                    (True, False): [
                        "0.weight", "0.bias", "1.weight", "1.bias", "4.bias"
                    ],
                },
            ),
        ],
        ids=["defaults", "patterns", "a function"],
    )  # fmt: skip
    def test_split(self, options, expected):
        assert self.names(param_groups(model(), **options)) == expected

    def test_own_rates_reach_the_optimizer(self):
        groups = param_groups(model(), weight_decay=0.1, excluded_lr=0.01)
        optimizer = LARS(groups, 2.0)
        rates = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        assert rates == [(2.0, 0.1), (0.01, 0.1)]
        assert optimizer.param_groups[0]["adapt"] is True
        assert optimizer.param_groups[1]["decay"] is False

    def test_frozen_and_shared_parameters(self):
        net = model()
        net[0].requires_grad_(False)
        net.add_module("twin", net[4])
        assert self.names(param_groups(net)) == {
            (True, True): ["4.weight"],
            (False, False): ["1.weight", "1.bias", "4.bias"],
        }

    @pytest.mark.parametrize("what", ["adapt", "decay"])
    def test_a_pattern_that_matches_nothing(self, what):
        options: Any = {what: "head.*"}
        with pytest.raises(ValueError, match=f"{what}='head.*' matches no parameter"):
            param_groups(model(), **options)

    def test_a_model_without_parameters(self):
        with pytest.raises(ValueError, match="ReLU has no parameter"):
            param_groups(nn.ReLU())


def test_larskit_torch_is_loaded_on_touch():
    assert larskit.torch.LARS is LARS


@pytest.mark.parametrize("engine", [*ENGINES, {"carry_norms": True}])
def test_a_compiled_training_step(engine):
    def train(wrap):
        torch.compiler.reset()
        net = model()
        optimizer = LARS(net.parameters(), 1.0, trust_coefficient=0.1, **engine)

        def step(x):
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step = wrap(step)
        for i in range(3):
            optimizer.param_groups[0]["lr"] = 1.0 / (i + 1)
            step(torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(i)))
        return weights(net)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = train(lambda step: torch.compile(step, backend=backend))
    assert graphs
    assert all(map(torch.equal, compiled, train(lambda step: step)))


# Stepping in the backward pass


def trained(in_backward, engine, named=True, steps=4):
    net = model()
    groups = param_groups(net, excluded_lr=0.1) if named else net.parameters()
    optimizer = LARS(groups, 1.0, weight_decay=0.01, trust_coefficient=0.1, **engine)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    if in_backward:
        step_in_backward(optimizer)
    stats = []
    for i in range(steps):
        backward(net, i)
        assert in_backward == all(p.grad is None for p in net.parameters())
        optimizer.step()
        scheduler.step()
        stats.append(optimizer.layer_stats())
        if i == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return weights(net), optimizer.state_dict(), stats


@pytest.mark.parametrize("engine", [*ENGINES, {"carry_norms": True}])
@pytest.mark.parametrize("named", [True, False])
def test_stepping_in_backward_is_the_ordinary_step(engine, named):
    ours, theirs = (trained(x, engine, named) for x in (True, False))
    assert all(map(torch.equal, ours[0], theirs[0]))
    assert ours[1]["param_groups"] == theirs[1]["param_groups"]
    for i, state in theirs[1]["state"].items():
        assert torch.equal(
            ours[1]["state"][i]["momentum_buffer"], state["momentum_buffer"]
        )
    assert ours[2] == theirs[2]


def test_no_two_gradients_exist_at_once():
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    optimizer = LARS(net.parameters(), 1.0)
    step_in_backward(optimizer)
    seen = []
    for p in net.parameters():
        p.register_hook(
            lambda g: seen.append(sum(p.grad is not None for p in net.parameters()))
        )
    for _ in range(2):
        net(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    assert seen == [0] * 20


def test_wrong_use_in_backward_is_refused():
    net = model()
    optimizer = LARS(net.named_parameters(), 1.0)
    backward(net)
    with pytest.raises(RuntimeError, match="there are gradients that no step has used"):
        step_in_backward(optimizer)
    optimizer.zero_grad()
    handle = step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="steps in backward already"):
        step_in_backward(optimizer)
    backward(net)
    before = weights(net)
    with pytest.raises(RuntimeError, match=r"'4.bias' got a second gradient"):
        backward(net)
    assert all(map(torch.equal, weights(net), before))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="step\\(\\) got a closure"):
        optimizer.step(lambda: 0.0)
    optimizer.step()
    handle.remove()
    backward(net)
    assert all(map(torch.equal, weights(net), before))
    optimizer.step()
    assert not all(map(torch.equal, weights(net), before))
    with pytest.raises(TypeError, match="optimizer is a SGD, expected a"):
        step_in_backward(torch.optim.SGD(net.parameters(), 0.1))  # pyright: ignore


def test_groups_may_follow_and_gradients_may_come_by_hand():
    first, second = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LARS([first], 1.0, trust_coefficient=0.5)
    with step_in_backward(optimizer):
        optimizer.add_param_group({"params": [second]})
        (second * 2).sum().backward()
        assert second.grad is None
        first.grad = torch.ones(2, 2)
        optimizer.step()
        assert first.grad is None
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.detach(), torch.full((2, 2), 0.5))


def test_stepping_in_backward_with_several_processes_is_refused():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", rank=0, world_size=2, store=FakeStore()
    )
    try:
        with pytest.raises(RuntimeError, match="supports one process, got 2"):
            step_in_backward(LARS(model().parameters(), 1.0))
    finally:
        torch.distributed.destroy_process_group()
