"""The namespace of an array: array-api-compat, or a shim for TensorFlow and Paddle.

A framework is never imported here. Whoever holds one of its arrays has loaded it,
so it is found in ``sys.modules``.
"""

import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import array_api_compat
import numpy as np

_WIDE = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex64": "complex64",
    "complex128": "complex128",
}
_SHIMS = ("tensorflow", "paddle")


def framework(x: Any) -> str:
    """Name the top-level module that the type of `x` comes from.

    A subclass (``torch.nn.Parameter``, a TensorFlow variable, a JAX tracer) counts as
    its base class.
    """
    return _framework(type(x))


@cache
def _framework(kind: type) -> str:
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
    for known in ("torch", *_SHIMS, "jax", "jaxlib", "numpy", "cupy"):
        if known in roots:
            return "jax" if known == "jaxlib" else known
    return roots[0]


def is_array(x: Any) -> bool:
    """Whether `x` is an array of a framework that `namespace` knows."""
    if framework(x) in _SHIMS:
        return hasattr(x, "dtype") and hasattr(x, "shape")
    return array_api_compat.is_array_api_obj(x)


def namespace(x: Any) -> Any:
    """Return the array-API namespace that `x` belongs to."""
    name = framework(x)
    if name in _SHIMS:
        return _shim(name)
    try:
        return array_api_compat.array_namespace(x)
    except TypeError as why:
        raise TypeError(
            f"expected an array of NumPy, PyTorch, JAX, TensorFlow, Paddle, CuPy or of "
            f"the array API, got {type(x).__name__}: convert it first"
        ) from why


def dtype_name(x: Any) -> str:
    """Name the dtype of `x` as every framework would: ``"float32"``."""
    return getattr(x.dtype, "name", None) or str(x.dtype).rpartition(".")[2]


def check_floating(x: Any, what: str) -> None:
    """Refuse an array whose dtype LARS cannot step, by name."""
    name = dtype_name(x)
    if name not in _WIDE:
        raise TypeError(
            f"{what} has the dtype {name}, expected one of {', '.join(_WIDE)}: "
            "convert it first"
        )
    if name.startswith("complex") and framework(x) in _SHIMS:
        raise TypeError(
            f"{what} has the dtype {name}, which larskit does not step for "
            f"{framework(x)}: pass its real view"
        )


def widen(x: Any) -> Any:
    """Cast `x` to the dtype that its arithmetic runs in: float32 or wider."""
    return cast(x, _WIDE[dtype_name(x)])


def cast(x: Any, name: str) -> Any:
    """Cast `x` to the dtype called `name`; `x` itself where it has it already."""
    if dtype_name(x) == name:
        return x
    xp = namespace(x)
    if not hasattr(xp, name) and framework(x) == "numpy":
        return xp.astype(x, np.dtype(name))  # ml_dtypes' bfloat16
    return xp.astype(x, getattr(xp, name))


def norm_dtype(x: Any) -> str:
    """Name the dtype that lengths are summed in: float64 wherever there is one."""
    name = framework(x)
    if name == "jax" and not sys.modules["jax"].config.jax_enable_x64:
        return "float32"
    if name == "torch" and x.device.type == "mps":
        return "float32"
    return "float64"


def scalar(value: Any, like: Any) -> Any:
    """Return `value` ready to multiply `like`: a number as it is, an array 0-d."""
    if not is_array(value):
        return value
    if framework(value) != framework(like):
        return float(value)
    name = dtype_name(like).replace("complex64", "float32")
    value = cast(value, name.replace("complex128", "float64"))
    return namespace(value).reshape(value, ())


def compiles(x: Any) -> bool:
    """Whether a compiler orders the arithmetic on `x`, whatever order is written."""
    return framework(x) in ("jax", *_SHIMS)


def stop_gradient(x: Any) -> Any:
    """Return `x` cut off from what it was computed from."""
    name = framework(x)
    if name == "jax":
        return sys.modules["jax"].lax.stop_gradient(x)
    if name == "tensorflow":
        return sys.modules["tensorflow"].stop_gradient(x)
    return x.detach() if name in ("torch", "paddle") else x


def write(out: Any, value: Any, what: str) -> Any:
    """Write `value` into `out` and return `out`.

    Raises
    ------
    TypeError
        Where `out` cannot be written: JAX arrays, TensorFlow's constant tensors,
        read-only NumPy arrays.
    """
    check_writable(out, what)
    name = framework(out)
    if name == "torch":
        out.copy_(value)
    elif name == "tensorflow":
        out.assign(value)
    elif name == "paddle":
        sys.modules["paddle"].assign(value, output=out)
    else:
        out[...] = value
    return out


def check_writable(out: Any, what: str) -> None:
    """Refuse an array that cannot be written in place, before anything was."""
    name = framework(out)
    if name == "jax":
        reason = "is a JAX array, and those are immutable"
    elif name == "tensorflow" and not hasattr(out, "assign"):
        reason = "is a constant TensorFlow tensor, only a tf.Variable can be written"
    elif name == "numpy" and not (isinstance(out, np.ndarray) and out.flags.writeable):
        reason = "is read-only"
    else:
        return
    raise TypeError(f"{what} {reason}: leave out= away and use the returned value")


@cache
def _shim(name: str) -> SimpleNamespace:
    """Return the few functions that the rule calls, under their array-API names."""
    xp = sys.modules[name]
    found = {dtype: getattr(xp, dtype) for dtype in _WIDE if hasattr(xp, dtype)}
    for same in ("sqrt", "where", "zeros_like", "ones_like", "reshape"):
        found[same] = getattr(xp, same)
    found["astype"] = xp.cast
    found["sum"] = xp.reduce_sum if name == "tensorflow" else xp.sum
    return SimpleNamespace(**found)
