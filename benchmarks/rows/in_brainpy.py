"""`brainpy.optim.LARS` under BrainPy's own `jit`."""

import brainpy  # pyright: ignore[reportMissingImports]
import jax

from rows import LARS, Shapes, Work
from rows.in_jax import backward, gradients, weights

__all__ = ["backward", "lars"]


def lars(shapes: Shapes) -> Work:
    variables = {name: brainpy.math.TrainVar(w) for name, w in weights(shapes).items()}
    grads = gradients(shapes)
    optimizer = brainpy.optim.LARS(**LARS, train_vars=variables)
    compiled = brainpy.math.jit(optimizer.update)

    def step() -> None:
        compiled(grads)
        jax.block_until_ready([w.value for w in variables.values()])

    return Work(step)
