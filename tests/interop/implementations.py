"""One run for every implementation of LARS, and larskit's result for it.

The configurations that make larskit do what another implementation does are those of
docs/implementations.md, so that the page says what was tested.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from larskit import functional

PAGE = Path(__file__).parents[2] / "docs" / "implementations.md"
Weights = dict[str, Any]

_rng = np.random.default_rng(0)
WEIGHTS: Weights = {
    "conv.w": _rng.normal(size=(4, 3, 2, 2)),
    "dense.w": _rng.normal(size=(6, 5)),
    "dense.b": np.zeros(5),
    "batch_normalization.bias": _rng.normal(size=7),
    "head.scale": _rng.normal(size=3),
    "head.shift": np.full(2, 1e-3),  # its norm is too small for Chainer to adapt it
    "head.temperature": np.array(0.7),
}
# A warm-up from a rate of 0, and then a decay, over 20 steps. They and the following
# are exact in float32, in which Paddle keeps them.
RATES = [*(i / 4 for i in range(5)), *((i / 16) ** 2 for i in range(15, 0, -1))]
GRADIENTS: list[Weights] = [
    {name: np.asarray(_rng.normal(size=w.shape) * scale) for name, w in WEIGHTS.items()}
    for scale in 10 ** _rng.uniform(-2, 1, len(RATES))
]
HYPERPARAMETERS = {
    "momentum": 7 / 8,
    "weight_decay": 1 / 16,
    "trust_coefficient": 1 / 64,
}


def steps() -> Iterator[tuple[Weights, float]]:
    """Return the gradients and the learning rate of each step."""
    return zip(GRADIENTS, RATES, strict=True)


def configurations() -> dict[str, dict[str, Any]]:
    """Return larskit's arguments for each implementation, from the page's code."""
    found = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found, f"{PAGE} has no code"
    scope: dict[str, Any] = {}
    exec(compile(found[1], PAGE.name, "exec"), scope)
    return scope["configurations"]


def larskit_run(**configuration: Any) -> Iterator[Weights]:
    """Yield the weights after each step of larskit on NumPy."""
    weights, state = WEIGHTS, functional.init(WEIGHTS)
    for gradients, lr in steps():
        weights, state = functional.update(
            weights, gradients, state, lr, **{**HYPERPARAMETERS, **configuration}
        )
        yield weights


def assert_same(
    found: Iterable[Mapping[str, Any]],
    expected: Iterable[Mapping[str, Any]],
    tolerance: float = 1e-10,
) -> None:
    """Check every layer after every step, to a part of how far it has moved."""
    pairs = zip(RATES, found, expected, strict=True)
    for step, (_, these, those) in enumerate(pairs):
        for name, that in those.items():
            moved = np.abs(np.asarray(that) - WEIGHTS[name]).max()
            apart = np.abs(np.asarray(these[name]) - np.asarray(that)).max()
            assert apart <= tolerance * moved, f"{name} at step {step}: {apart}/{moved}"
