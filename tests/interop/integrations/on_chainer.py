"""Chainer: the hook in its optimizer."""

import chainer  # pyright: ignore[reportMissingImports]
import chainer.functions as F  # pyright: ignore[reportMissingImports]
import chainer.links as L  # pyright: ignore[reportMissingImports]
import fit

from larskit import GradientLARS


def hooked():
    """Train two layers of Chainer's; their kernels are (out, in)."""
    kernel, bias, last_kernel, last_bias = fit.WEIGHTS
    net = chainer.Sequential(
        L.Linear(6, 16, initialW=kernel.T, initial_bias=bias),
        F.tanh,
        L.Linear(16, 3, initialW=last_kernel.T, initial_bias=last_bias),
    )
    optimizer = chainer.optimizers.MomentumSGD(fit.LR, fit.MOMENTUM).setup(net)
    optimizer.add_hook(GradientLARS(weight_decay=fit.DECAY))
    while True:
        layers = (layer for layer in net if layer is not F.tanh)
        yield [w for layer in layers for w in (layer.W.array.T, layer.b.array)]
        net.cleargrads()
        F.mean_squared_error(net(fit.X), fit.Y).backward()
        optimizer.update()


fit.run("chainer", {"GradientLARS on MomentumSGD": (hooked, fit.hook(fit.sgd))})
