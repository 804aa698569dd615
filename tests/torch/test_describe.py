"""What an optimizer says of its layers: `repr`, `describe` and `layer_stats`."""

from typing import Any

import pytest
import torch
from torch import nn

from larskit import GradientLARS
from larskit.torch import LARS, param_groups, step_in_backward


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def backward(net: nn.Module) -> None:
    net(torch.ones(5, 4)).square().mean().backward()


def test_the_repr_names_what_is_excluded():
    named = model().named_parameters()
    found = repr(LARS(named, lr=8.0, weight_decay=1e-4, clip=True, decay=True))
    assert found == (
        "LARS (\n"
        "Parameter Group 0\n"
        "    lr: 8.0\n"
        "    weight_decay: 0.0001\n"
        "    clip: True\n"
        "    layers: 6\n"
        "    not adapted (4): 0.bias, 1.weight, 1.bias, 2.bias\n"
        ")"
    )


def test_the_repr_of_many_layers_and_of_tensors_stays_short():
    params = [nn.Parameter(torch.ones(2)) for _ in range(40)]
    lr, wd = torch.tensor(0.5), torch.tensor(0.1)
    found = repr(LARS(params, lr, weight_decay=wd))  # pyright: ignore[reportArgumentType]
    assert "    lr: 0.5\n    weight_decay: 0.1" in found
    assert "    layers: 40\n" in found
    assert "not adapted (40): 0.0, 0.1, 0.2, 0.3, 0.4, 0.5 and 34 more" in found
    assert len(found) < 400


def test_describe_is_a_table_of_the_layers():
    net = model()
    optimizer = LARS(param_groups(net, excluded_lr=0.5), lr=8.0, foreach=True)
    before = optimizer.describe().splitlines()
    assert before[0].split() == ["layer", "shape", "adapted", "decayed", "engine"]
    assert before[1].split() == ["0.weight", "3x4", "yes", "yes", "none", "yet"]
    assert len(before) == 7
    backward(net)
    optimizer.step()
    after = [line.split() for line in optimizer.describe().splitlines()]
    assert after[1:3] == [
        ["0.weight", "3x4", "yes", "yes", "foreach"],
        ["2.weight", "2x3", "yes", "yes", "foreach"],
    ]
    assert after[3] == ["0.bias", "3", "no", "no", "foreach"]


def test_a_rate_that_is_high_for_a_layer_that_is_not_adapted_is_marked():
    named = list(model().named_parameters())
    assert "0.bias    3      no       no       none yet  raw rate 8" in (
        LARS(named, lr=8.0).describe()
    )
    for optimizer in (
        LARS(named, lr=1.0),
        LARS(named, lr=8.0, adapt=True),
        LARS(named, lr=torch.tensor(8.0)),  # which is not looked at
    ):
        assert "raw rate" not in optimizer.describe()


def test_a_scalar_and_a_step_in_backward_are_described():
    net = nn.Linear(3, 2)
    net.scale = nn.Parameter(torch.tensor(1.0))
    optimizer = LARS(net.named_parameters(), lr=0.5)
    step_in_backward(optimizer)
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    rows = {line.split()[0]: line for line in optimizer.describe().splitlines()}
    assert "scalar" in rows["scale"]
    assert rows["scale"].endswith("none yet")  # it has no gradient
    assert "none yet" not in rows["weight"]


@pytest.mark.parametrize(
    ("denominator", "gradient_norm", "ratio"),
    [
        ("paper", 1.0, 5 / (1 + 0.5 * 5 + 0.25)),
        ("gradient", 1.0, 5 / 1.25),
        ("decayed_gradient", 3.5, 5 / 3.75),
        ("momentum", 3.5, 5 / 3.75),
    ],
)
@pytest.mark.parametrize("engine", [{}, {"foreach": True}, {"foreach": False}])
def test_the_statistics_mean_what_they_say(
    denominator: Any, gradient_norm: float, ratio: float, engine: Any
) -> None:
    """The gradient norm is q, without the decay and eps of the denominator."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    w.grad = torch.tensor([[0.6, 0.8]])
    optimizer = LARS(
        [("w", w)],
        0.1,
        weight_decay=0.5,
        eps=0.25,
        trust_coefficient=1.0,
        denominator=denominator,
        lr_placement="outside",
        **engine,
    )
    assert optimizer.layer_stats() == {}
    optimizer.step()
    found = optimizer.layer_stats()["w"]
    assert found.weight_norm == pytest.approx(5)
    assert found.gradient_norm == pytest.approx(gradient_norm)
    assert found.trust_ratio == pytest.approx(ratio)
    assert (found.adapted, found.decayed) == (True, True)


def test_the_attached_hook_shows_its_hyper_parameters():
    optimizer = torch.optim.Adam(model().parameters())
    hook = GradientLARS(weight_decay=0.1)
    assert repr(hook) == "GradientLARS(threshold=0.01, weight_decay=0.1, eps=1e-09)"
    handle = hook.attach(optimizer)
    assert repr(handle) == f"<{hook!r} attached to Adam>"
    handle.remove()
    assert repr(handle) == f"<{hook!r} removed from Adam>"
