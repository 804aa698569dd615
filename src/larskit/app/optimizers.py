"""The optimizers to compare, and their learning-rate schedules."""

import torch
from torch import nn
from torch.optim import lr_scheduler

from larskit.app.settings import Settings
from larskit.torch import LARS, param_groups

POLY_POWER = 2.0


def build(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer named by `settings`.

    Every optimizer decays the parameters with two or more dimensions, and LARS and LARC
    adapt the same ones. LARS updates the others at ``lr * trust_coefficient``: at its
    raw learning rate, biases diverge in a network without batch norm. As a result only
    that product matters. LARC uses learning rates as small as those of SGD, so its
    other parameters keep them.
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
    plain_groups = [
        {
            "params": [p for _, p in group["params"]],
            "weight_decay": s.weight_decay if group["decay"] else 0.0,
        }
        for group in groups
    ]
    if s.optimizer == "sgd":
        return torch.optim.SGD(plain_groups, lr=s.lr, momentum=s.momentum)
    return torch.optim.AdamW(plain_groups, lr=s.lr, betas=(s.momentum, 0.999))


def schedule(
    settings: Settings, optimizer: torch.optim.Optimizer, steps: int
) -> lr_scheduler.LRScheduler:
    """Build the schedule over `steps` steps: a linear warm-up, then a decay."""
    warmup = min(round(settings.warmup * steps), steps - 1)
    remaining = steps - warmup
    if settings.schedule == "poly":
        decay = lr_scheduler.PolynomialLR(optimizer, remaining, POLY_POWER)
    elif settings.schedule == "cosine":
        decay = lr_scheduler.CosineAnnealingLR(optimizer, remaining)
    else:
        decay = lr_scheduler.ConstantLR(optimizer, 1.0)
    if warmup == 0:
        return decay
    ramp = lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / (warmup + 1))
    return lr_scheduler.SequentialLR(optimizer, [ramp, decay], [warmup])
