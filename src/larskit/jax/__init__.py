"""The optimizer of JAX objects: `LARS`, and the variables it trains."""

try:
    import jax  # noqa: F401
except ImportError as missing:
    raise ImportError("larskit.jax needs JAX: pip install 'larskit[jax]'") from missing

from larskit.jax.optimizer import LARS
from larskit.jax.transform import LarsState, lars
from larskit.jax.variables import TrainVar, Variable

__all__ = ["LARS", "LarsState", "TrainVar", "Variable", "lars"]
