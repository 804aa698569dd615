"""One LARS (layer-wise adaptive rate scaling) for every framework.

`lars_update` is the function, `GradientLARS` the gradient hook; the optimizers are
``larskit.torch.LARS``, ``larskit.jax.LARS`` and ``larskit.keras.LARS``, loaded on first
touch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from larskit.containers import Array, Container
from larskit.functional import lars_update
from larskit.hook import GradientLARS

if TYPE_CHECKING:
    from larskit import jax, keras, torch

__version__ = "0.1.0"
__all__ = [
    "Array",
    "Container",
    "GradientLARS",
    "jax",
    "keras",
    "lars_update",
    "torch",
]

_FACES = ("torch", "jax", "keras")


def __getattr__(name: str) -> Any:
    if name in _FACES:
        return import_module(f"larskit.{name}")
    raise AttributeError(f"module 'larskit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
