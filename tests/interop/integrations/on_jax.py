"""JAX: the function, the optimizer object, and the transformations under optax."""

from typing import Any

import fit
import jax
import jax.numpy as jnp
import optax

from larskit import GradientLARS
from larskit.jax import LARS, TrainVar, lars


def loss(weights):
    kernel, bias, last_kernel, last_bias = weights
    out = jnp.tanh(fit.X @ kernel + bias) @ last_kernel + last_bias
    return jnp.mean((out - fit.Y) ** 2)


WEIGHTS = [jnp.asarray(w) for w in fit.WEIGHTS]
gradients = jax.jit(jax.grad(loss))


def function():
    return fit.function(WEIGHTS, gradients)


def transformed(tx):
    """Train as optax does."""
    weights, state = WEIGHTS, tx.init(WEIGHTS)

    @jax.jit
    def step(weights, state):
        updates, state = tx.update(gradients(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    while True:
        yield weights
        weights, state = step(weights, state)


def transformation():
    tx: Any = lars(*fit.HYPERPARAMETERS)
    return transformed(optax.chain(optax.clip(1e3), tx))


def hook():
    hook = GradientLARS(weight_decay=fit.DECAY).transform()
    return transformed(optax.chain(hook, optax.sgd(fit.LR, fit.MOMENTUM)))


def variables():
    own = {str(i): TrainVar(w) for i, w in enumerate(WEIGHTS)}
    lr, *others = fit.HYPERPARAMETERS
    optimizer = LARS(lr, own, *others, eps=0.0)
    while True:
        weights = [variable.value for variable in own.values()]
        yield weights
        optimizer.update(dict(zip(own, gradients(weights), strict=True)))


fit.run(
    "jax",
    {
        "lars_update": (function, fit.function()),
        "larskit.jax.LARS, its own variables": (
            variables,
            fit.optimizer(adapt=True, decay=True),
        ),
        "larskit.jax.lars in optax.chain": (transformation, fit.optimizer()),
        "GradientLARS in optax.chain": (hook, fit.hook(fit.sgd)),
    },
)
