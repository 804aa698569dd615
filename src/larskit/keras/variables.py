"""Variables and tensors of Keras, on any of its backends."""

from typing import Any

from keras import ops

from larskit.arrays import Array, is_array, namespace, stop_gradient

Variable = Any  # a `keras.Variable`, or a ``tf.Variable``


def path_of(variable: Variable) -> str:
    """Return the path of a variable; a TensorFlow variable has only a name."""
    path = getattr(variable, "path", None) or getattr(variable, "name", None)
    if path is None:
        raise TypeError(
            f"{variable!r} is a {type(variable).__name__}, expected a variable: pass "
            "names in var_names"
        )
    return path


def tensor(x: Any) -> Array:
    """Return the backend's own tensor, cut off from what it was computed from."""
    return stop_gradient(ops.convert_to_tensor(x))


def dense(gradient: Any) -> Array:
    """Return a gradient with all its elements: those of embeddings can be sparse."""
    gradient = ops.convert_to_tensor(gradient, sparse=False)
    if is_array(gradient):
        return gradient
    return namespace(gradient).asarray(gradient)  # tf.IndexedSlices
