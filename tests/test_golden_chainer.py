"""The hook against what real Chainer computed, behind four of its optimizers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from larskit import GradientLARS

GOLDEN = Path(__file__).parent / "golden" / "chainer.json"
CASES = json.loads(GOLDEN.read_text())["cases"]
MOMENTUM = 0.9


def sgd(w: Any, g: Any, state: dict[str, Any], lr: float) -> None:
    w -= lr * g


def momentum_sgd(w: Any, g: Any, state: dict[str, Any], lr: float) -> None:
    state["v"] = MOMENTUM * state.get("v", 0) - lr * g
    w += state["v"]


def nesterov_ag(w: Any, g: Any, state: dict[str, Any], lr: float) -> None:
    state["v"] = MOMENTUM * state.get("v", 0) - lr * g
    w += MOMENTUM**2 * state["v"] - (1 + MOMENTUM) * lr * g


def adam(w: Any, g: Any, state: dict[str, Any], lr: float) -> None:
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g * g
    lr *= np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    w -= lr * state["m"] / (np.sqrt(state["v"]) + 1e-8)


OPTIMIZERS = {
    "SGD": sgd,
    "MomentumSGD": momentum_sgd,
    "NesterovAG": nesterov_ag,
    "Adam": adam,
}


def arrays(stored: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(values, np.float32) for name, values in stored.items()}


def assert_near(found: np.ndarray, stored: Any) -> None:
    expected = np.array(stored)
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=2e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['optimizer']}-{c['kwargs']}")
def test_every_step_equals_chainer(case: dict[str, Any]) -> None:
    hook = GradientLARS(**case["kwargs"])
    weights = arrays(case["params"])
    states: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for stored, expected in zip(case["grads"], case["steps"], strict=True):
        gradients = arrays(stored)
        for name, w in weights.items():
            g = gradients[name]
            hook(None, SimpleNamespace(data=w, grad=g))
            assert_near(g, expected["scaled_grads"][name])
            OPTIMIZERS[case["optimizer"]](w, g, states[name], case["lr"])
            assert_near(w, expected["params"][name])
