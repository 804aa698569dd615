"""CuPy, which needs a GPU."""

import functools

import cupy as xp  # pyright: ignore[reportMissingImports]
import fit

x, y, *weights = (xp.asarray(a) for a in (fit.X, fit.Y, *fit.WEIGHTS))
gradients = functools.partial(fit.gradients, xp=xp, x=x, y=y)


def found():
    for arrays in fit.function(weights, gradients):
        yield [xp.asnumpy(a) for a in arrays]


fit.run("cupy", {"lars_update": (found, fit.function())})
