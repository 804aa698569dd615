"""array-api-strict, which has nothing that is not in the standard."""

import functools

import array_api_strict as xp
import fit

x, y, *weights = (xp.asarray(a) for a in (fit.X, fit.Y, *fit.WEIGHTS))
gradients = functools.partial(fit.gradients, xp=xp, x=x, y=y)
fit.run(
    "array_api_strict",
    {"lars_update": (lambda: fit.function(weights, gradients), fit.function())},
)
