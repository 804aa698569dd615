"""The optimizers that can be compared, and the schedule of their learning rate."""

import torch
from torch import nn
from torch.optim import lr_scheduler

from larskit.app.settings import Settings
from larskit.torch import LARS, param_groups

POWER = 2.0


def build(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer that `settings` name.

    All of them decay the same layers: those with two or more dimensions. Those are
    also the ones that LARS adapts. The others step at ``lr * trust_coefficient``, so
    that nothing but this product counts; at a rate of LARS itself, biases without batch
    norm blow up. LARC, whose rates are those of SGD, has no need of that.
    """
    s = settings
    if s.optimizer == "lars":
        groups = param_groups(model, excluded_lr=s.lr * s.trust_coefficient)
    else:
        groups = param_groups(model)
    if s.optimizer in ("lars", "larc"):
        return LARS(
            groups,
            lr=s.lr,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            trust_coefficient=s.trust_coefficient,
            lr_placement="outside",
            clip=s.optimizer == "larc",
        )
    plain = [
        {
            "params": [p for _, p in group["params"]],
            "weight_decay": s.weight_decay if group["decay"] else 0.0,
        }
        for group in groups
    ]
    if s.optimizer == "sgd":
        return torch.optim.SGD(plain, lr=s.lr, momentum=s.momentum)
    return torch.optim.AdamW(plain, lr=s.lr, betas=(s.momentum, 0.999))


def schedule(
    settings: Settings, optimizer: torch.optim.Optimizer, steps: int
) -> lr_scheduler.LRScheduler:
    """Make the schedule over `steps` steps: a linear warm-up, then the fall."""
    warm = min(round(settings.warmup * steps), steps - 1)
    rest = steps - warm
    if settings.schedule == "poly":
        fall = lr_scheduler.PolynomialLR(optimizer, rest, POWER)
    elif settings.schedule == "cosine":
        fall = lr_scheduler.CosineAnnealingLR(optimizer, rest)
    else:
        fall = lr_scheduler.ConstantLR(optimizer, 1.0)
    if warm == 0:
        return fall
    rise = lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / (warm + 1))
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm])
