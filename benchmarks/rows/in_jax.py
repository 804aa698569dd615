"""Optimizers under `jax.jit`, whose weights and state are donated."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from larskit.jax import LARS as OurLARS
from larskit.jax import TrainVar
from rows import ELEMENTWISE, LARS, PRODUCT, SGD_LR, Shapes, Work

Arrays = dict[str, jax.Array]
_matrix, _vector = jnp.ones((PRODUCT, PRODUCT)), jnp.ones(ELEMENTWISE)


@jax.jit
def _compiled_backward(matrix: jax.Array, vector: jax.Array) -> Any:
    return matrix @ matrix, vector * 2


def backward() -> None:
    jax.block_until_ready(_compiled_backward(_matrix, _vector))


def weights(shapes: Shapes) -> Arrays:
    return {name: 5 * g for name, g in gradients(shapes).items()}


@cache
def gradients(shapes: Shapes) -> Arrays:
    draw = np.random.default_rng(0).standard_normal
    found = (jnp.array(0.01 * draw(shape, "float32")) for shape in shapes)
    return {f"p{i}": g for i, g in enumerate(found)}


def optax_sgd(shapes: Shapes) -> Work:
    sgd = optax.sgd(SGD_LR, momentum=LARS["momentum"])
    return _optax(optax.chain(optax.add_decayed_weights(1e-4), sgd), shapes)


def optax_lars(shapes: Shapes) -> Work:
    arguments = {**LARS, "learning_rate": LARS["lr"]}
    del arguments["lr"]
    return _optax(optax.lars(**arguments), shapes)


def _optax(optimizer: Any, shapes: Shapes) -> Work:
    params, grads = weights(shapes), gradients(shapes)
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def compiled(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(compiled(params, state, grads))

    return Work(step)


def larskit(shapes: Shapes) -> Work:
    variables = {name: TrainVar(w) for name, w in weights(shapes).items()}
    optimizer, grads = OurLARS(**LARS, train_vars=variables), gradients(shapes)

    @partial(jax.jit, donate_argnums=0)
    def compiled(optimizer: OurLARS, grads: Any) -> OurLARS:
        optimizer.update(grads)
        return optimizer

    def step() -> None:
        nonlocal optimizer
        optimizer = jax.block_until_ready(compiled(optimizer, grads))

    return Work(step)
