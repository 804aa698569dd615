"""State dicts of other optimizers, and of either placement of the learning rate."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from larskit.torch import LARS, convert_state_dict


class MAE(torch.optim.Optimizer):
    """The LARS of MAE and MoCo v3, restated from their published equations."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"trust_coefficient": 0.001, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                u = p.grad
                if p.ndim > 1:
                    u = u + group["weight_decay"] * p
                    ratio = group["trust_coefficient"] * p.norm() / u.norm()
                    u = u * ratio
                state = self.state[p]
                mu = state.setdefault("mu", torch.zeros_like(p))
                mu.mul_(group["momentum"]).add_(u)
                p.sub_(group["lr"] * mu)


def barlow(params, **options) -> Any:
    """Return MAE's, with the further entries that Barlow Twins keeps in its groups."""
    options["eta"] = options.pop("trust_coefficient", 0.001)
    optimizer = MAE(params, **options)
    for group in optimizer.param_groups:
        group["trust_coefficient"] = group["eta"]
        group["weight_decay_filter"] = group["lars_adaptation_filter"] = len
    return optimizer


def layers():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]


def train(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


SETTINGS = {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1}
PAPER = {"trust_coefficient": 0.02, **SETTINGS}
# Each with what makes a LARS of the same arithmetic.
OTHERS = {
    "SGD": (
        torch.optim.SGD,
        {**SETTINGS, "dampening": 0.2, "nesterov": False},
        {"adapt": False, "decay": True},
    ),
    "MAE": (MAE, PAPER, {"denominator": "decayed_gradient"}),
    "Barlow Twins": (barlow, PAPER, {"denominator": "decayed_gradient"}),
}


@pytest.mark.parametrize("placement", ["inside", "outside"])
@pytest.mark.parametrize("name", OTHERS)
def test_training_goes_on_where_another_optimizer_left_it(name, placement):
    other_class, options, ours = OTHERS[name]
    theirs = layers()
    other = other_class(theirs, **options)
    train(other, theirs, range(3))
    params = copy.deepcopy(theirs)
    optimizer = LARS(params, 9.0, lr_placement=placement, **ours)
    state = copy.deepcopy(other.state_dict())
    if placement == "inside":
        state = convert_state_dict(state, "inside")
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert {k: group[k] for k in SETTINGS} == SETTINGS
    assert group["trust_coefficient"] == options.get("trust_coefficient", 1e-3)
    assert group["denominator"] == ours.get("denominator", "paper")
    assert not {"eta", "weight_decay_filter", "mu"} & group.keys()
    for which, these in ((other, theirs), (optimizer, params)):
        train(which, these, range(3, 8))
    torch.testing.assert_close(params, theirs, rtol=1e-6, atol=1e-6)


def test_timms_words_are_understood():
    params = layers()
    optimizer = LARS(params, 1.0, lr_placement="outside")
    state = optimizer.state_dict()
    group = {"lr": 0.3, "momentum": 0.5, "dampening": 0.0, "weight_decay": 0.2}
    group |= {"nesterov": True, "trust_coeff": 0.07, "eps": 1e-8}
    group |= {"trust_clip": True, "always_adapt": False, "params": [0, 1]}
    buffers = {i: {"momentum_buffer": torch.ones_like(p)} for i, p in enumerate(params)}
    optimizer.load_state_dict({"state": buffers, "param_groups": [group]})
    (found,) = optimizer.param_groups
    assert found.keys() == {"params", *state["param_groups"][0]}
    assert (found["trust_coefficient"], found["clip"]) == (0.07, True)
    assert (found["lr"], found["nesterov"], found["eps"]) == (0.3, True, 1e-8)
    assert found["adapt"] is None


def test_what_a_state_dict_does_not_say_stays_as_it_is_here():
    """Of an older version, or of an optimizer that knows less."""
    params = layers()
    options: Any = {"adapt": True, "decay": False, "denominator": "gradient"}
    optimizer = LARS(params, 1.0, eps=0.5, on_nonfinite="skip", **options)
    train(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for name in ("adapt", "decay", "eps", "denominator", "on_nonfinite"):
            del group[name]
    other = LARS(copy.deepcopy(params), 1.0, eps=0.5, on_nonfinite="skip", **options)
    other.load_state_dict(state)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert str(other.state_dict()["state"]) == str(optimizer.state_dict()["state"])


def test_buffers_of_the_other_placement_are_refused_until_they_are_converted():
    params = layers()
    sgd = torch.optim.SGD(params, lr=0.5, momentum=0.9)
    optimizer = LARS(params, 2.0)
    optimizer.load_state_dict(sgd.state_dict())  # which has no buffers yet
    assert optimizer.param_groups[0]["lr"] == 0.5
    train(sgd, params, range(2))
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"does not say whether.*convert_state_dict"):
        optimizer.load_state_dict(sgd.state_dict())
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    ("other_class", "kept"),
    [
        (torch.optim.AdamW, "exp_avg, exp_avg_sq, step"),
        (torch.optim.Adagrad, "step, sum"),
        (torch.optim.RMSprop, "square_avg, step"),
    ],
)
def test_states_without_momentum_are_refused(other_class, kept):
    params = layers()
    other = other_class(params, lr=0.01)
    train(other, params, range(2))
    optimizer = LARS(params, 2.0, lr_placement="outside")
    train(optimizer, params, range(2))
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"parameter 0 has {kept} and no momentum_buf"):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == before


def test_the_state_of_sgd_without_momentum_is_no_state():
    params = layers()
    sgd = torch.optim.SGD(params, lr=0.01)
    train(sgd, params, range(2))
    optimizer = LARS(params, 2.0)
    optimizer.load_state_dict(sgd.state_dict())
    assert not any(optimizer.state.values())
    assert optimizer.param_groups[0]["momentum"] == 0.0


def test_a_bad_hyper_parameter_in_a_state_dict_is_refused_before_anything_changes():
    params = layers()
    optimizer = LARS(params, 2.0)
    train(optimizer, params, range(2))
    state = optimizer.state_dict()
    before = str(state)
    bad = copy.deepcopy(state)
    bad["param_groups"][0].update(momentum=3.0, lr=0.1)
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        optimizer.load_state_dict(bad)
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_there_and_back_are_the_same_buffers(momentum):
    params = layers()
    optimizer = LARS(params, 0.25, momentum=momentum)
    train(optimizer, params, range(2))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    outside = convert_state_dict(state, "outside")
    assert outside["param_groups"][0]["lr_placement"] == "outside"
    back = convert_state_dict(outside, "inside")
    assert str(state) == str(before)
    assert str(back) == str(state)
    if momentum:
        v, v_out = (x["state"][0]["momentum_buffer"] for x in (state, outside))
        assert torch.equal(v, 0.25 * v_out)
        stated = convert_state_dict(outside, "outside", source="inside")
        assert torch.equal(stated["state"][0]["momentum_buffer"], v_out / 0.25)


def test_what_cannot_be_converted():
    params = layers()
    optimizer = LARS(params, 0.5)
    train(optimizer, params, range(1))
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match="lr is 0 in a parameter group"):
        convert_state_dict(optimizer.state_dict(), "outside")
    state: Any = optimizer.state_dict()
    wrong: Any = "within"
    with pytest.raises(ValueError, match="lr_placement must be one of 'inside', 'ou"):
        convert_state_dict(state, wrong)
    with pytest.raises(ValueError, match="source must be one of 'inside', 'outside'"):
        convert_state_dict(state, "inside", source=wrong)
