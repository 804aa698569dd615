"""One LARS (layer-wise adaptive rate scaling) for every framework.

`lars_update` is the function, `GradientLARS` the gradient hook; the optimizers are
``larskit.torch.LARS``, ``larskit.jax.LARS`` and ``larskit.keras.LARS``. Those modules,
and `larskit.state`, are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from larskit import functional
from larskit.containers import Array, Container
from larskit.functional import lars_update
from larskit.hook import GradientLARS

if TYPE_CHECKING:
    from larskit import jax as jax
    from larskit import keras as keras
    from larskit import state as state
    from larskit import torch as torch

__version__ = "0.1.0"
# Without the lazy modules: `from larskit import *` must not import every framework.
__all__ = ["Array", "Container", "GradientLARS", "functional", "lars_update"]

_LAZY = ("jax", "keras", "state", "torch")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_module(f"larskit.{name}")
    if name == "LARS":  # of an AttributeError `from larskit import` shows no text
        raise ImportError(
            "there is one LARS for each framework: import it from larskit.torch, "
            "larskit.jax or larskit.keras"
        )
    raise AttributeError(f"module 'larskit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
