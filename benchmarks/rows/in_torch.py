"""Optimizers of torch, and the rows that measure the memory limit."""

import importlib
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import distribution
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from larskit import GradientLARS
from larskit.torch import LARS as OurLARS
from rows import ELEMENTWISE, LARS, MOVED, PRODUCT, SGD, SGD_LR, Shapes, Work

_matrix, _vector = torch.ones(PRODUCT, PRODUCT), torch.ones(ELEMENTWISE)


def backward() -> None:
    torch.mm(_matrix, _matrix)
    _vector.mul_(1.0)


def copy(shapes: Shapes) -> Work:
    source, destination = torch.ones(MOVED), torch.zeros(MOVED)
    return Work(lambda: destination.copy_(source))


def scale(shapes: Shapes) -> Work:
    x = torch.ones(MOVED)
    return Work(lambda: x.mul_(1.0))


def sgd(shapes: Shapes, **switch: bool) -> Work:
    return _work(
        lambda params: torch.optim.SGD(params, SGD_LR, **SGD, **switch), shapes
    )


def larskit(shapes: Shapes, **switches: bool) -> Work:
    arguments: dict[str, Any] = {**LARS, **switches}
    return _work(lambda params: OurLARS(params, **arguments), shapes)


def hook(shapes: Shapes) -> Work:
    def make(params: list[Tensor]) -> Any:
        optimizer = torch.optim.SGD(params, SGD_LR, SGD["momentum"], fused=True)
        GradientLARS(weight_decay=1e-4).attach(optimizer)
        return optimizer

    return _work(make, shapes)


def timm(shapes: Shapes, foreach: bool) -> Work:
    """Import one file of timm: the whole package needs torchvision."""
    package = ModuleType("timm_optim")
    package.__path__ = [str(distribution("timm").locate_file("timm/optim"))]
    sys.modules[package.__name__] = package
    lars = importlib.import_module("timm_optim.lars")
    return _work(lambda params: lars.Lars(params, **LARS, foreach=foreach), shapes)


def pytorch_optimizer(shapes: Shapes, foreach: bool) -> Work:
    """Give it its own gradients, because it writes into them."""
    lars = importlib.import_module("pytorch_optimizer").LARS
    own = _gradients_to_change(shapes)
    work = _work(lambda params: lars(params, **LARS, foreach=foreach), shapes, own)
    work.restore = lambda: torch._foreach_copy_(own, _gradients(shapes))
    return work


@cache
def _gradients(shapes: Shapes) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) * 0.01 for shape in shapes]


@cache
def _gradients_to_change(shapes: Shapes) -> list[Tensor]:
    return [g.clone() for g in _gradients(shapes)]


def _work(
    make: Callable[[list[Tensor]], Any],
    shapes: Shapes,
    gradients: list[Tensor] | None = None,
) -> Work:
    """Return the step of an optimizer with its own weights."""
    params = [5 * g for g in _gradients(shapes)]
    for p, g in zip(params, gradients or _gradients(shapes), strict=True):
        p.grad = g
    return Work(make(params).step)
