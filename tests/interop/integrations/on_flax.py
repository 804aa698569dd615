"""Flax: NNX, its optimizer and its variables, and Linen."""

from typing import Any

import fit
import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.training.train_state import TrainState

from larskit.jax import LARS, lars

TX: Any = lars(fit.schedule, *fit.HYPERPARAMETERS[1:])


class Network(nnx.Module):
    """The layers, with the weights of the fit."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.last = nnx.Linear(16, 3, rngs=rngs)
        for variable, w in zip(variables_of(self), fit.WEIGHTS, strict=True):
            variable[...] = jnp.asarray(w)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


def variables_of(net):
    return [net.first.kernel, net.first.bias, net.last.kernel, net.last.bias]


def loss(net):
    return jnp.mean((net(fit.X) - fit.Y) ** 2)


@nnx.jit
def step(net, optimizer):
    optimizer.update(net, nnx.grad(loss)(net))


def by_nnx():
    net = Network()
    optimizer = nnx.Optimizer(net, TX, wrt=nnx.Param)
    while True:
        yield [variable[...] for variable in variables_of(net)]
        step(net, optimizer)


def variables():
    net = Network()
    lr, *others = fit.HYPERPARAMETERS
    named = {str(i): variable for i, variable in enumerate(variables_of(net))}
    optimizer = LARS(lr, named, *others, eps=0.0)
    while True:
        yield [variable[...] for variable in named.values()]
        grads = variables_of(nnx.grad(loss)(net))
        optimizer.update({str(i): grad[...] for i, grad in enumerate(grads)})


class Linen(linen.Module):
    """The layers."""

    @linen.compact
    def __call__(self, x):
        x = linen.tanh(linen.Dense(16)(x))
        return linen.Dense(3)(x)


@jax.jit
def linen_step(state):
    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, fit.X) - fit.Y) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def by_linen():
    names = [(layer, x) for layer in ("Dense_0", "Dense_1") for x in ("kernel", "bias")]
    params = {"Dense_0": {}, "Dense_1": {}}
    for (layer, name), w in zip(names, fit.WEIGHTS, strict=True):
        params[layer][name] = jnp.asarray(w)
    state = TrainState.create(apply_fn=Linen().apply, params=params, tx=TX)
    while True:
        yield [state.params[layer][name] for layer, name in names]
        state = linen_step(state)


fit.run(
    "flax",
    {
        "larskit.jax.lars in nnx.Optimizer": (by_nnx, fit.optimizer(rate=fit.schedule)),
        "larskit.jax.LARS on nnx variables": (
            variables,
            fit.optimizer(adapt=True, decay=True),
        ),
        "larskit.jax.lars in Linen's TrainState": (
            by_linen,
            fit.optimizer(rate=fit.schedule),
        ),
    },
)
