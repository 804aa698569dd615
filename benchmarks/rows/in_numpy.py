"""`larskit.lars_update` over a container of NumPy arrays."""

from functools import cache

import numpy as np

from larskit import Container
from larskit import lars_update as our_lars_update
from rows import ELEMENTWISE, PRODUCT, Shapes, Work

Arrays = dict[str, np.ndarray]
_matrix = np.ones((PRODUCT, PRODUCT), "float32")
_vector = np.ones(ELEMENTWISE, "float32")


def backward() -> None:
    _ = _matrix @ _matrix
    np.multiply(_vector, 1.0, out=_vector)


def weights(shapes: Shapes) -> Arrays:
    return {name: 5 * g for name, g in gradients(shapes).items()}


@cache
def gradients(shapes: Shapes) -> Arrays:
    draw = np.random.default_rng(0).standard_normal
    return {f"p{i}": 0.01 * draw(shape, "float32") for i, shape in enumerate(shapes)}


def lars_update(shapes: Shapes, in_place: bool) -> Work:
    w, g = Container(weights(shapes)), Container(gradients(shapes))

    def step() -> None:
        nonlocal w
        w = our_lars_update(w, g, 1e-6, out=w if in_place else None)

    return Work(step)
