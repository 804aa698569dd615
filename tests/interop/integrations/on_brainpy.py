"""BrainPy: its variables, modules, gradients and jit."""

import brainpy as bp  # pyright: ignore[reportMissingImports]
import brainpy.math as bm  # pyright: ignore[reportMissingImports]
import fit

from larskit.jax import LARS


def network():
    kernel, bias, last_kernel, last_bias = map(bm.asarray, fit.WEIGHTS)
    with bm.training_environment():
        return bp.Sequential(
            bp.dnn.Dense(6, 16, W_initializer=kernel, b_initializer=bias),
            bp.dnn.Activation(bm.tanh),
            bp.dnn.Dense(16, 3, W_initializer=last_kernel, b_initializer=last_bias),
        )


def found():
    net = network()
    weights = net.train_vars().unique()
    lr, *others = fit.HYPERPARAMETERS
    optimizer = LARS(lr, weights, *others, eps=0.0)

    def loss():
        return bm.mean((net(fit.X) - fit.Y) ** 2)

    @bm.jit
    def step():
        optimizer.update(bm.grad(loss, grad_vars=weights)())

    while True:
        yield [w.value for w in weights.values()]
        step()


fit.run("brainpy", {"larskit.jax.LARS": (found, fit.optimizer(adapt=True, decay=True))})
