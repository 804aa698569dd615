"""Fits that are not the expected one, or none at all: each a row that must fail."""

import itertools
import sys

import fit


def scaled(factor):
    return ([factor * w for w in weights] for weights in fit.optimizer())


WRONG = {
    "a little off": lambda: scaled(1 + 1e-4),
    "not a number": lambda: scaled(float("nan")),
    "standing still": lambda: itertools.repeat(fit.WEIGHTS),
    "too short": lambda: itertools.islice(fit.optimizer(), 10),
    "missing": lambda: missing,  # noqa: F821  # pyright: ignore
    "silent": sys.exit,
}
fit.run("numpy", {name: (make, fit.optimizer()) for name, make in WRONG.items()})
