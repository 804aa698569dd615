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

Array = Any  # an array of any framework that `namespace` knows
Scalar = Any  # a number, or an array with one element
Namespace = Any  # the array-API namespace of a framework, or a shim of it

_WIDE = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex64": "complex64",
    "complex128": "complex128",
}
_SHIMS = ("tensorflow", "paddle")
_KINDS = {
    "tensorflow": ("Tensor", "Variable"),
    "paddle": ("Tensor",),
    "torch": ("Tensor",),
}
_FAMILY = {"jaxlib": "jax", "flax": "jax"}


def framework(x: Any) -> str:
    """Name the top-level module that the type of `x` comes from.

    A subclass (``torch.nn.Parameter``, a TensorFlow variable, a JAX tracer) counts as
    its base class.
    """
    kind = type(x)
    if kind not in _frameworks:
        _frameworks[kind] = _framework(kind)
    return _frameworks[kind]


# A dict and no cache, because torch.compile looks into it without a warning.
_frameworks: dict[type, str] = {}


def _framework(kind: type) -> str:
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
    roots = [_FAMILY.get(root, root) for root in roots]
    known = ("torch", *_SHIMS, "jax", "numpy", "cupy")
    return next((name for name in known if name in roots), roots[0])


def is_array(x: Any) -> bool:
    """Whether `x` is a dense array of a framework that `namespace` knows."""
    name = framework(x)
    if name in _KINDS:
        kinds = tuple(getattr(sys.modules[name], kind) for kind in _KINDS[name])
        return isinstance(x, kinds)
    return array_api_compat.is_array_api_obj(x)


def namespace(x: Array) -> Namespace:
    """Return the array-API namespace that `x` belongs to."""
    name = framework(x)
    if name in _SHIMS:
        return _shim(name)
    if name == "torch":
        from array_api_compat import torch as xp

        return xp
    try:
        return array_api_compat.array_namespace(x)
    except TypeError as why:
        raise TypeError(
            f"expected an array of NumPy, PyTorch, JAX, TensorFlow, Paddle, CuPy or of "
            f"the array API, got {type(x).__name__}: convert it first"
        ) from why


def dtype_name(x: Array) -> str:
    """Name the dtype of `x` as NumPy would: ``"float32"``."""
    if isinstance(x.dtype, np.dtype):
        return _numpy_name(x.dtype)
    return getattr(x.dtype, "name", str(x.dtype).rpartition(".")[2]).lower()


@cache
def _numpy_name(dtype: np.dtype) -> str:
    return dtype.name  # NumPy builds the string at each access, in microseconds


def check_floating(x: Array, what: str) -> None:
    """Refuse an array that LARS cannot step, by its dtype or its kind."""
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
    sparse = framework(x) == "torch" and str(x.layout) != "torch.strided"
    if sparse or isinstance(x, (np.matrix, np.ma.MaskedArray)):
        raise TypeError(
            f"{what} is a {type(x).__name__} of a kind that larskit does not step "
            "(sparse, masked or a matrix): convert it to a dense array"
        )


def check_array(x: Any, what: str) -> None:
    """Refuse what is no array, or an array that LARS cannot step."""
    if not is_array(x):
        raise TypeError(f"{what} is a {type(x).__name__}, expected an array")
    check_floating(x, what)
    if framework(x) == "torch":
        check_memory(x, what)


def check_memory(x: Any, what: str) -> None:
    """Refuse a torch tensor without memory: torch's own operations crash at one."""
    torch = sys.modules["torch"]
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    if not plain or not x.numel() or torch.compiler.is_compiling():
        return
    try:
        held = x.untyped_storage().nbytes() // x.itemsize
    except (RuntimeError, NotImplementedError):  # inside torch.func.vmap and the like
        return
    extents = zip(x.shape, x.stride(), strict=True)
    needed = x.storage_offset() + 1 + sum((n - 1) * stride for n, stride in extents)
    if held < needed:
        raise RuntimeError(
            f"{what} needs {needed} elements of memory, but its storage has {held}: it "
            "was freed or resized; restore it first"
        )


def check_shape(x: Array, like: Array, what: str, other: str) -> None:
    """Refuse an array of another shape than that of `like`, which is called `other`."""
    if tuple(x.shape) != tuple(like.shape):
        raise ValueError(
            f"{what} has the shape {tuple(x.shape)}, expected that of {other}, "
            f"{tuple(like.shape)}"
        )


def widen(x: Array) -> Array:
    """Cast `x` to the dtype that its arithmetic runs in: float32 or float64."""
    return cast(x, _WIDE[dtype_name(x)])


def cast(x: Array, name: str) -> Array:
    """Cast `x` to the dtype called `name`; `x` itself where it has it already."""
    if framework(x) == "numpy":  # its arithmetic makes scalars of 0-d arrays
        return np.asarray(x).astype(np.dtype(name), copy=False)
    if dtype_name(x) == name:
        return x
    xp = namespace(x)
    return xp.astype(x, getattr(xp, name))


def flat(x: Array) -> Array:
    """Return the elements of `x` in one axis, in the order of their addresses.

    Where the framework hides that, in the order of the indices.
    """
    name = framework(x)
    if name == "numpy":
        axes = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
        return x.transpose(axes).reshape(-1)
    if name == "torch":
        axes = sorted(range(x.ndim), key=lambda i: -x.stride(i))
        x = x.permute(axes)
    return namespace(x).reshape(x, (-1,))


def norm_dtype(x: Array) -> str:
    """Name the dtype that norms accumulate in: float64 if the framework has it."""
    name = framework(x)
    if name == "jax" and not sys.modules["jax"].config.jax_enable_x64:
        return "float32"
    if name == "torch" and x.device.type == "mps":
        return "float32"
    return "float64"


def scalar(value: Scalar, like: Array) -> Scalar:
    """Return `value` ready to multiply `like`: a number as it is, an array 0-d."""
    if isinstance(value, (int, float)) or not is_array(value):
        return value
    value = namespace(value).reshape(value, ())
    if framework(value) != framework(like):
        return float(stop_gradient(value))
    name = dtype_name(like).replace("complex64", "float32")
    return cast(value, name.replace("complex128", "float64"))


def compiles(x: Array) -> bool:
    """Whether a compiler may reorder the arithmetic on `x`."""
    return framework(x) in ("jax", *_SHIMS)


def scaled_by_one(x: Array) -> Array:
    """Return `x`, in JAX times a one that XLA cannot take out.

    XLA's CPU backend does not vectorise a subtraction on its own where the last
    axes are short, as those of convolutions: it takes four times as long.
    """
    if framework(x) != "jax":
        return x
    one = sys.modules["jax"].numpy.ones((), x.dtype)
    return x * sys.modules["jax"].lax.optimization_barrier(one)


def stop_gradient(x: Array) -> Array:
    """Return `x` cut off from what it was computed from."""
    name = framework(x)
    if name == "jax":
        return sys.modules["jax"].lax.stop_gradient(x)
    if name == "tensorflow":
        return sys.modules["tensorflow"].stop_gradient(x)
    return x.detach() if name in ("torch", "paddle") else x


def to_numpy(x: Array) -> np.ndarray:
    """Copy an array to NumPy, in its dtype: bfloat16 is that of ml_dtypes."""
    name = dtype_name(x)
    x = cast(stop_gradient(x), "float32" if name == "bfloat16" else name)
    if framework(x) in ("torch", "cupy"):
        x = array_api_compat.to_device(x, "cpu")
    return np.asarray(x).astype(numpy_dtype(name))


def from_numpy(x: np.ndarray, like: Array) -> Array:
    """Return a copy of `x` with the framework, dtype and device of `like`."""
    name = "float32" if x.dtype.name == "bfloat16" else x.dtype.name
    known = np.array(x, name)  # few frameworks know the bfloat16 of ml_dtypes
    new = cast(namespace(like).asarray(known), dtype_name(like))
    if framework(like) == "jax":
        return sys.modules["jax"].device_put(new, like.sharding)
    if framework(like) in ("torch", "cupy"):
        return array_api_compat.to_device(new, array_api_compat.device(like))
    return new


def numpy_dtype(name: str) -> np.dtype:
    """Return NumPy's dtype called `name`; bfloat16 is that of ml_dtypes.

    Raises
    ------
    ModuleNotFoundError
        ml_dtypes is not installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError as why:
        raise ModuleNotFoundError(
            "bfloat16 in NumPy needs ml_dtypes: pip install ml_dtypes"
        ) from why
    return np.dtype(ml_dtypes.bfloat16)


def write(out: Array, value: Array, what: str) -> Array:
    """Write `value` into `out` and return `out`.

    Raises
    ------
    TypeError
        Where `out` cannot be written, see `unwritable`.
    """
    check_writable(out, what)
    name = framework(out)
    if name == "torch":
        (out.detach() if _is_parameter(out) else out).copy_(value)
    elif name == "tensorflow":
        out.assign(value)
    elif name == "paddle":
        sys.modules["paddle"].assign(value, output=out)
    else:
        out[...] = value
    return out


def check_writable(out: Array, what: str, differentiable: bool = False) -> None:
    """Refuse an array that cannot be written in place, before anything was."""
    reason = unwritable(out, differentiable)
    if reason:
        raise TypeError(f"{what} {reason}: omit out= and use the returned value")


def unwritable(x: Array, differentiable: bool = False) -> str | None:
    """Say why `x` cannot be written in place; None where it can.

    A `differentiable` value needs more: what receives it must pass gradients on.
    """
    name = framework(x)
    if name == "jax":
        return "is a JAX array, and those are immutable"
    if name == "tensorflow" and not hasattr(x, "assign"):
        return "is a constant TensorFlow tensor, only a tf.Variable can be written"
    if name == "tensorflow" and differentiable:
        return "is a tf.Variable, which passes no gradient on to what it was assigned"
    if name == "numpy" and not (isinstance(x, np.ndarray) and x.flags.writeable):
        return "is read-only"
    return _unwritable_tensor(x, differentiable) if name == "torch" else None


def _unwritable_tensor(x: Array, differentiable: bool) -> str | None:
    if x.is_inference() and not sys.modules["torch"].is_inference_mode_enabled():
        return "is an inference tensor, which only torch.inference_mode() may write"
    strides = zip(x.stride(), x.shape, strict=True)
    if x.numel() and any(stride == 0 and size > 1 for stride, size in strides):
        return "is an expanded view, whose elements share their memory"
    if differentiable and _is_parameter(x):
        return "is a leaf that requires gradients, which passes none on"
    return None


def _is_parameter(x: Array) -> bool:
    return x.requires_grad and x.is_leaf


@cache
def _shim(name: str) -> SimpleNamespace:
    """Return the few functions that are called, under their array-API names."""
    xp = sys.modules[name]
    tensorflow = name == "tensorflow"
    same = (*_WIDE, "sqrt", "where", "zeros_like", "ones_like", "reshape")
    return SimpleNamespace(
        **{member: getattr(xp, member) for member in same},
        astype=xp.cast,
        asarray=xp.convert_to_tensor if tensorflow else xp.to_tensor,
        sum=xp.reduce_sum if tensorflow else xp.sum,
        all=xp.reduce_all if tensorflow else xp.all,
    )
