"""`ivy.lars_update` over a container of NumPy arrays."""

import logging

import ivy  # pyright: ignore[reportMissingImports]

from rows import Shapes, Work
from rows.in_numpy import backward, gradients, weights

__all__ = ["backward", "lars_update"]


def lars_update(shapes: Shapes) -> Work:
    logging.disable()  # it warns at every call
    ivy.set_backend("numpy")
    w, g = (
        ivy.Container({name: ivy.array(x) for name, x in arrays.items()})
        for arrays in (weights(shapes), gradients(shapes))
    )

    def step() -> None:
        nonlocal w
        w = ivy.lars_update(w, g, 1e-6)

    return Work(step)
