"""Equinox, whose kernels are (out, in), with leaves that are not trained."""

import equinox as eqx
import fit
import jax
import jax.numpy as jnp

from larskit.jax import lars

optimizer = lars(fit.schedule, *fit.HYPERPARAMETERS[1:])


def network():
    """Return the layers, and the order of the outputs: an array of integers."""
    net = eqx.nn.MLP(6, 3, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    weights = [jnp.asarray(w.T) for w in fit.WEIGHTS]
    return eqx.tree_at(weights_of, (net, jnp.arange(3)), weights)


def weights_of(net):
    return [w for layer in net[0].layers for w in (layer.weight, layer.bias)]


@eqx.filter_grad
def gradients(net):
    layers, order = net
    return jnp.mean((jax.vmap(layers)(fit.X)[:, order] - fit.Y) ** 2)


@eqx.filter_jit
def step(net, state):
    params = eqx.filter(net, eqx.is_inexact_array)
    updates, state = optimizer.update(gradients(net), state, params)
    return eqx.apply_updates(net, updates), state


def found():
    net = network()
    state = optimizer.init(eqx.filter(net, eqx.is_inexact_array))
    while True:
        yield [w.T for w in weights_of(net)]
        net, state = step(net, state)


fit.run("equinox", {"larskit.jax.lars": (found, fit.optimizer(rate=fit.schedule))})
