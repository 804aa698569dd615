"""larskit.jax.LARS against trajectories of brainpy.optim.LARS 2.8.2."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from larskit.jax import LARS, TrainVar

GOLDEN = Path(__file__).parents[1] / "golden" / "brainpy.json"
CASES = json.loads(GOLDEN.read_text())["cases"]
TOLERANCE = 2e-6


@dataclass
class ExponentialDecay:
    lr: float
    decay_steps: int
    decay_rate: float
    calls: int = 0

    def step_call(self):
        self.calls += 1

    def __call__(self):
        return self.lr * self.decay_rate ** (self.calls / self.decay_steps)


@dataclass
class PolynomialDecay:
    lr: float
    decay_steps: int
    final_lr: float
    power: float
    calls: int = 0

    def step_call(self):
        self.calls += 1

    def __call__(self):
        left = 1 - min(self.calls, self.decay_steps) / self.decay_steps
        return left**self.power * (self.lr - self.final_lr) + self.final_lr


def learning_rate(case):
    if case["schedule"] is None:
        return case["lr"]
    kinds = {
        "ExponentialDecayLR": ExponentialDecay,
        "PolynomialDecayLR": PolynomialDecay,
    }
    values = dict(case["schedule"])
    return kinds[values.pop("kind")](**values)


def assert_close(variable, expected):
    expected = np.asarray(expected, "float32")
    atol = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(variable.value, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_brainpy(case):
    weights = {
        key: TrainVar(np.asarray(x, "float32")) for key, x in case["params"].items()
    }
    optimizer = LARS(learning_rate(case), weights, **case["kwargs"])
    for grads, step in zip(case["grads"], case["steps"], strict=True):
        assert optimizer.lr() == pytest.approx(step["lr"], rel=TOLERANCE)
        optimizer.update({k: jnp.asarray(g, "float32") for k, g in grads.items()})
        for key, expected in step["params"].items():
            assert_close(weights[key], expected)
        for key, expected in step["momentum"].items():
            assert_close(optimizer.implicit_vars[f"{key}_m"], expected)


def test_the_cases_vary_what_they_should():
    kinds = [case["schedule"] and case["schedule"]["kind"] for case in CASES]
    assert set(kinds) == {None, "ExponentialDecayLR", "PolynomialDecayLR"}
    assert {} in [case["kwargs"] for case in CASES]
    norms = [np.abs(np.sum(x)) for case in CASES for x in case["params"].values()]
    assert 0 in norms
