"""One fit that every integration runs, and its expected weights.

Two dense layers, the mean squared error, ten steps. The expected weights are those of
`larskit.functional` on NumPy in float64, from gradients that are written out here; an
integration starts from the same weights, with its own network, loss and gradients.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

from larskit import functional, lars_update

Weights = list[Any]  # kernel (in, out), bias, kernel, bias

STEPS = 10
LR = 0.1
MOMENTUM = 0.9
DECAY = 0.01
HYPERPARAMETERS = (LR, MOMENTUM, DECAY, 0.1)  # in the order of every optimizer
ADAM_EPS = 1e-2  # so that a gradient near 0 does not become a step of full size

_rng = np.random.default_rng(0)
SHAPES = ((6, 16), (16,), (16, 3), (3,))
# They are exact in float32.
X, Y, *WEIGHTS = (
    _rng.normal(size=shape).astype("float32") for shape in ((32, 6), (32, 3), *SHAPES)
)


def float64(arrays: Iterable[Any]) -> Weights:
    """Return arrays of NumPy in float64, where a fit is exact."""
    return [np.array(x, "float64") for x in arrays]


def gradients(weights: Weights, xp: Any = np, x: Any = X, y: Any = Y) -> Weights:
    """Differentiate the loss by hand, in any namespace of the array API."""
    kernel, bias, last_kernel, last_bias = weights
    hidden = xp.tanh(x @ kernel + bias)
    error = (hidden @ last_kernel + last_bias - y) * (2 / Y.size)
    back = (error @ last_kernel.T) * (1 - hidden * hidden)
    of_bias, of_last_bias = xp.sum(back, axis=0), xp.sum(error, axis=0)
    return [x.T @ back, of_bias, hidden.T @ error, of_last_bias]


def function(weights: Any = None, grads: Any = gradients) -> Iterator[Weights]:
    """Yield the weights before and after each step of `lars_update`."""
    weights = float64(WEIGHTS) if weights is None else weights
    while True:
        yield weights
        weights = lars_update(weights, grads(weights), LR, decay_lambda=DECAY)


def schedule(count: Any) -> Any:
    """Return the learning rate of a step, counted from 0."""
    return LR / (1 + count)


def optimizer(
    weights: Weights = WEIGHTS,
    grads: Any = gradients,
    rate: Callable[[int], float] = lambda count: LR,
    **how: Any,
) -> Any:
    """Yield the weights before and after each step of LARS with momentum."""
    weights = float64(weights)
    state = functional.init(weights)
    for count in itertools.count():
        yield weights
        weights, state = functional.update(
            weights, grads(weights), state, rate(count), *HYPERPARAMETERS[1:], **how
        )


def hook(step: Callable[..., Any]) -> Iterator[Weights]:
    """Yield the weights of an optimizer that takes what `GradientLARS` makes."""
    weights = float64(WEIGHTS)
    state: list[Any] = [()] * len(weights)
    for count in itertools.count(1):
        yield weights
        pairs = zip(weights, gradients(weights), state, strict=True)
        stepped = [step(w, _rescaled(w, g), count, *s) for w, g, s in pairs]
        weights, state = map(list, zip(*stepped, strict=True))


def _rescaled(w: Any, g: Any) -> Any:
    return w - lars_update(w, g, 1.0, decay_lambda=DECAY)


def sgd(w: Any, g: Any, count: int, v: Any = 0.0) -> Any:
    """Step as SGD with momentum does."""
    v = MOMENTUM * v + g
    return w - LR * v, (v,)


def adam(w: Any, g: Any, count: int, m: Any = 0.0, v: Any = 0.0) -> Any:
    """Step as Adam does, with an eps of `ADAM_EPS`."""
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    m_hat, v_hat = m / (1 - 0.9**count), v / (1 - 0.999**count)
    return w - LR * m_hat / (np.sqrt(v_hat) + ADAM_EPS), (m, v)


def adamw(w: Any, g: Any, count: int, *state: Any) -> Any:
    """Step as AdamW does."""
    return adam(w * (1 - LR * DECAY), g, count, *state)


def difference(found: Iterable[Weights], expected: Iterable[Weights]) -> float:
    """Return how far the two are apart, as a part of how far the layer moves."""
    parts = [
        np.abs(ours - theirs).max() / np.abs(theirs - theirs[0]).max()
        for ours, theirs in zip(_layers(found), _layers(expected), strict=True)
    ]
    return float(np.max(parts))


def _layers(fit: Iterable[Weights]) -> Iterator[Any]:
    """Return each layer before and after the steps, in one array."""
    weights = [float64(arrays) for arrays in itertools.islice(fit, STEPS + 1)]
    return map(np.stack, zip(*weights, strict=True))


def run(package: str, rows: dict[str, tuple[Callable[[], Any], Iterable[Any]]]) -> None:
    """Run the fit that the command line names, and print its result."""
    (_, name) = sys.argv
    found, expected = rows[name]
    line = {
        "package": package,
        "version": version(package),
        "ran": name,
        "difference": difference(found(), expected),
    }
    print(json.dumps(line))
