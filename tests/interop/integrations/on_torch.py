"""PyTorch: the function, the hook on its optimizers, and the optimizer."""

import fit
import torch
from torch import nn

from larskit import GradientLARS
from larskit.torch import LARS

X, Y, *WEIGHTS = map(torch.tensor, (fit.X, fit.Y, *fit.WEIGHTS))
ADAM = {"lr": fit.LR, "eps": fit.ADAM_EPS}


def network():
    """Return the layers, with the weights of the fit."""
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        for own, w in zip(net.parameters(), WEIGHTS, strict=True):
            own.copy_(w.T if w.ndim == 2 else w)
    return net


def weights_of(net):
    """Return the weights as the fit has them."""
    held = (w.detach().numpy() for w in net.parameters())
    return [w.T if w.ndim == 2 else w for w in held]


def gradients(weights):
    weights = [w.detach().requires_grad_() for w in weights]
    kernel, bias, last_kernel, last_bias = weights
    out = torch.tanh(X @ kernel + bias) @ last_kernel + last_bias
    return torch.autograd.grad(nn.functional.mse_loss(out, Y), weights)


def trained(make):
    """Train with what is made for the parameters."""
    net = network()
    optimizer = make(net.parameters())
    while True:
        yield weights_of(net)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(X), Y).backward()
        optimizer.step()


def hooked(make, **arguments):
    """Make an optimizer whose gradients the hook rescales."""

    def optimizer(parameters):
        optimizer = make(parameters, **arguments)
        GradientLARS(weight_decay=fit.DECAY).attach(optimizer)
        return optimizer

    return trained(optimizer)


def sgd():
    return hooked(torch.optim.SGD, lr=fit.LR, momentum=fit.MOMENTUM)


def adam():
    return hooked(torch.optim.Adam, **ADAM)


def adamw():
    return hooked(torch.optim.AdamW, weight_decay=fit.DECAY, **ADAM)


def lars():
    return trained(lambda parameters: LARS(parameters, *fit.HYPERPARAMETERS))


if __name__ == "__main__":
    fit.run(
        "torch",
        {
            "lars_update": (lambda: fit.function(WEIGHTS, gradients), fit.function()),
            "GradientLARS on torch.optim.SGD": (sgd, fit.hook(fit.sgd)),
            "GradientLARS on torch.optim.Adam": (adam, fit.hook(fit.adam)),
            "GradientLARS on torch.optim.AdamW": (adamw, fit.hook(fit.adamw)),
            "larskit.torch.LARS": (lars, fit.optimizer()),
        },
    )
