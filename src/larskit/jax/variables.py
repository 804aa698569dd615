"""Variables: arrays that are replaced in place.

JAX arrays are immutable. A variable holds one and can be given another of its shape and
dtype. Three kinds are supported: `Variable`, and those of flax.nnx and of BrainPy.
"""

import sys
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_pytree_node_class

from larskit.arrays import Array, check_shape, dtype_name

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # where JAX is older
    from jax.core import get_opaque_trace_state

AnyVariable = Any  # a `Variable`, or one of flax.nnx or BrainPy


@register_pytree_node_class
class Variable:
    """An array that can be replaced by another of its shape and dtype.

    It is a pytree with one leaf, and goes where JAX takes an array.

    Parameters
    ----------
    value : array-like, or a variable
        The first content, copied.
    dtype : dtype, optional
        Its dtype; by default that which `jax.numpy` gives it.
    """

    _value: Array
    _trace: Any

    def __init__(self, value: Array, dtype: Any = None) -> None:
        """Hold a copy of `value`."""
        value = jnp.array(native(value), dtype)
        self._hold(jnp.asarray(value, value.dtype))  # no longer weakly typed

    def _hold(self, value: Array) -> None:
        self._value = value
        self._trace = get_opaque_trace_state("flax")

    @property
    def value(self) -> Array:
        """The array; what it is set to must have its shape and dtype.

        Raises
        ------
        ValueError, TypeError
            The shape or the dtype is another.
        RuntimeError
            It is set inside a JAX transformation that it was not passed into, where
            the new value could not outlive the transformation.
        """
        return self._value

    @value.setter
    def value(self, value: Array) -> None:
        if self._trace != get_opaque_trace_state("flax"):
            raise RuntimeError(
                f"a {type(self).__name__} cannot be set inside a JAX transformation "
                "that it was not passed into: pass what holds it, such as the "
                "optimizer, as an argument and return it"
            )
        what = f"the {type(self).__name__}'s value"
        self._value = checked_like(value, self._value, what)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._value.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array."""
        return self._value.dtype

    def __jax_array__(self) -> Array:
        """Return the array, for the functions of `jax.numpy`."""
        return self._value

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Convert to NumPy as the array does."""
        return self._value.__array__(*args, **kwargs)

    def __repr__(self) -> str:
        """Show the array."""
        return f"{type(self).__name__}({self._value!r})"

    def __reduce__(self) -> tuple[type, tuple[Array]]:
        """Copy and pickle the array alone."""
        return type(self), (self._value,)

    def tree_flatten(self) -> tuple[tuple[Array], None]:
        """Return the array as the only leaf."""
        return (self._value,), None

    @classmethod
    def tree_unflatten(cls, aux: None, values: tuple[Array]) -> Self:
        """Rebuild the variable around a leaf."""
        self = object.__new__(cls)
        self._hold(values[0])
        return self


@register_pytree_node_class
class TrainVar(Variable):
    """A variable that is trained."""


def variable_type(x: Any) -> Any:
    """Return the class of variables that `x` belongs to; None where it is no variable.

    It is `Variable`, ``flax.nnx.Variable`` or ``brainpy.math.Variable``.
    """
    return next((kind for kind in variable_types() if isinstance(x, kind)), None)


def read(variable: AnyVariable) -> Array:
    """Return the array in a variable of any type."""
    if isinstance(variable, if_loaded("flax.nnx", "Variable")):
        return variable.get_value()
    return variable.value


def write(variable: AnyVariable, value: Array) -> None:
    """Put an array that fits into a variable of any type."""
    if isinstance(variable, if_loaded("flax.nnx", "Variable")):
        variable.set_value(value)
    else:
        variable.value = value


def native(x: Array | AnyVariable) -> Array:
    """Return the array in a variable or in an array of BrainPy, else `x` itself."""
    if variable_type(x):
        return read(x)
    return x.value if isinstance(x, if_loaded("brainpy.math", "Array")) else x


def checked_like(x: Array | AnyVariable, like: Array, what: str) -> Array:
    """Return `x` as a JAX array; refuse another shape or dtype than that of `like`."""
    x = native(x)
    if not hasattr(x, "dtype"):
        x = jnp.asarray(x, like.dtype)
    check_shape(x, like, what, "the variable")
    if dtype_name(x) != dtype_name(like):
        raise TypeError(
            f"{what} has the dtype {dtype_name(x)}, expected {dtype_name(like)}: "
            "convert it first"
        )
    return x if isinstance(x, jax.Array) else jnp.array(x)


def variable_types() -> tuple[type, ...]:
    """Return the classes of variables that are loaded."""
    flax = if_loaded("flax.nnx", "Variable")
    return (Variable, *flax, *if_loaded("brainpy.math", "Variable"))


def trainable_types() -> tuple[type, ...]:
    """Return the classes of trainable variables that are loaded."""
    flax = if_loaded("flax.nnx", "Param")
    return (TrainVar, *flax, *if_loaded("brainpy.math", "TrainVar"))


def if_loaded(module: str, name: str) -> tuple[type, ...]:
    """Return the class of that name alone, or nothing if its module is not loaded."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)
