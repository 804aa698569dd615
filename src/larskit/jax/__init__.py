"""LARS for JAX: transformations of gradients, and an optimizer of variables."""

try:
    import jax  # noqa: F401
except ImportError as missing:
    raise ImportError("larskit.jax needs JAX: pip install 'larskit[jax]'") from missing

from larskit.containers import register_in_jax
from larskit.jax.optimizer import LARS
from larskit.jax.transform import (
    LarsState,
    ScaleByLarsState,
    lars,
    layer_stats,
    scale_by_lars,
)
from larskit.jax.variables import TrainVar, Variable

register_in_jax()

__all__ = [
    "LARS",
    "LarsState",
    "ScaleByLarsState",
    "TrainVar",
    "Variable",
    "lars",
    "layer_stats",
    "scale_by_lars",
]
