"""LARS for Keras 3, on its JAX, PyTorch and TensorFlow backends."""

try:
    import keras  # noqa: F401
except ModuleNotFoundError as why:
    if why.name != "keras":  # Keras is there, but not the backend it was told to use
        raise
    raise ImportError(
        "larskit.keras needs Keras: pip install 'larskit[keras]'"
    ) from why

from larskit.keras.optimizer import LARS

__all__ = ["LARS"]
