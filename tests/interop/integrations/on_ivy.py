"""ivy, on those of its backends that work."""

import contextlib
import functools
import tempfile

import fit

# ivy leaves a log file in the working folder that it is imported in.
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    import ivy  # pyright: ignore[reportMissingImports]


def function(backend):
    """Step arrays of ivy, with gradients from its own functions."""
    ivy.set_backend(backend)
    x, y, *weights = (ivy.array(a) for a in (fit.X, fit.Y, *fit.WEIGHTS))
    gradients = functools.partial(fit.gradients, xp=ivy, x=x, y=y)
    for arrays in fit.function(weights, gradients):
        yield [a.to_numpy() for a in arrays]


fit.run(
    "ivy",
    {
        f"lars_update on {backend}": (
            functools.partial(function, backend),
            fit.function(),
        )
        for backend in ("numpy", "torch", "jax", "paddle")
    },
)
