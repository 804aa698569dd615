"""Every field of the configuration: its default, what is refused, and how."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch

from larskit.config import NAMES, Config, check_lr

VALUES = [
    ("momentum", 1.0, "momentum must be at least 0 and below 1, got 1.0"),
    ("momentum", -0.1, "momentum must be at least 0 and below 1, got -0.1"),
    ("momentum", math.nan, "momentum must be at least 0 and below 1, got nan"),
    ("weight_decay", -1, "weight_decay must be a finite number of at least 0, got -1"),
    ("weight_decay", math.inf, "weight_decay must be a finite number of at least 0"),
    ("trust_coefficient", 0, "trust_coefficient must be a finite number above 0"),
    ("trust_coefficient", np.float32(-1), "must be a finite number above 0"),
    ("eps", -1e-9, "eps must be a finite number of at least 0, got -1e-09"),
    ("dampening", 1.5, "dampening must be between 0 and 1, got 1.5"),
    ("threshold", -1.0, "threshold must be a number of at least 0, got -1.0"),
    ("denominator", "Paper", "denominator must be one of 'paper', 'decayed_gradient'"),
    ("lr_placement", "in", "lr_placement must be one of 'inside', 'outside', got 'in'"),
]
TYPES = [
    ("momentum", "0.9", "momentum must be at least 0 and below 1, got '0.9'"),
    ("eps", None, "eps must be a finite number of at least 0, got None"),
    ("weight_decay", True, "got True: pass a number"),
    ("nesterov", "yes", "nesterov must be True or False, got 'yes'"),
    ("clip", 0.5, "clip must be True or False, got 0.5"),
    ("adapt", None, "adapt must be True or False, got None"),
]
COMBINATIONS = [
    ({"nesterov": True, "momentum": 0}, "nesterov=True needs a momentum above 0"),
    ({"dampening": 0.5, "momentum": 0}, "dampening=0.5 needs a momentum above 0"),
    ({"denominator": "momentum"}, "pass lr_placement='outside'"),
]


@pytest.mark.parametrize(("name", "value", "message"), VALUES)
def test_values_out_of_range(name, value, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Config(**{name: value})


@pytest.mark.parametrize(("name", "value", "message"), TYPES)
def test_values_of_the_wrong_type(name, value, message):
    with pytest.raises(TypeError, match=message):
        Config(**{name: value})


@pytest.mark.parametrize(("options", "message"), COMBINATIONS)
def test_combinations(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize("lr", [-1e-3, math.nan, math.inf])
def test_learning_rates(lr):
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0"):
        check_lr(lr)


@pytest.mark.parametrize("lr", [0, 0.0, 1, 30.0, np.float32(0.1)])
def test_legal_learning_rates(lr):
    assert check_lr(lr) is None


def test_values_on_a_device_are_not_looked_at():
    unreadable = torch.empty((), device="meta")
    config = Config(momentum=unreadable, weight_decay=unreadable, nesterov=True)
    check_lr(unreadable)
    assert config.momentum is unreadable


def test_defaults_are_the_documented_ones():
    documented = Config.__doc__ or ""
    for field in dataclasses.fields(Config):
        if isinstance(field.default, str):
            assert f'{field.name} : {{"' in documented
        else:
            entry = documented.split(f"\n    {field.name} : ")[1]
            assert entry.split("\n")[0].endswith(f"default={field.default}")
    assert tuple(field.name for field in dataclasses.fields(Config)) == NAMES


def test_what_all_layers_share_is_picked():
    values = {"lr": 3.0, "eps": 0.5, "adapt": "*.weight", "zero_guard": False}
    assert Config.pick(values, momentum=0.0) == Config(eps=0.5, momentum=0.0)
    assert Config.pick({"eps": 0.5}, eps=0.25) == Config(eps=0.25)
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0"):
        Config.pick({"eps": -1.0})


def test_the_first_step_is_not_dampened():
    config = Config(dampening=0.5)
    assert [config.at_step(count).dampening for count in (0, 1, 2)] == [0.0, 0.5, 0.5]
    traced = jax.jit(lambda count: config.at_step(count).dampening)
    assert [float(traced(count)) for count in (0, 1)] == [0.0, 0.5]
    averaged = Config(dampening=0.5, denominator="momentum", lr_placement="outside")
    assert averaged.at_step(0) is averaged
    assert Config().at_step(0) == Config()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().momentum = 0.5  # pyright: ignore[reportAttributeAccessIssue]
