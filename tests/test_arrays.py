"""The few functions that stand between the rule and seven kinds of arrays."""

import importlib
import warnings
from types import ModuleType
from typing import Any

import array_api_strict as strict
import flax.nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from larskit import arrays


def optional(name: str) -> ModuleType | Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


# In this order: Paddle crashes if TensorFlow was there before it.
paddle, tf = optional("paddle"), optional("tensorflow")

MAKE: dict[str, Any] = {
    "numpy": np.array,
    "torch": torch.tensor,
    "jax": jnp.array,
    "array_api_strict": strict.asarray,
    "tensorflow": tf and tf.constant,
    "paddle": paddle and paddle.to_tensor,
}
FRAMEWORKS = [
    pytest.param(name, marks=pytest.mark.skipif(not make, reason=f"{name} is missing"))
    for name, make in MAKE.items()
]
every_framework = pytest.mark.parametrize("name", FRAMEWORKS)


def make(name: str, values: Any, dtype: str = "float32") -> Any:
    x = np.asarray(values, "float32" if dtype == "bfloat16" else dtype)
    return arrays.cast(MAKE[name](x), dtype)


def values(x: Any) -> np.ndarray:
    return np.asarray(x.float() if getattr(x, "dtype", 0) is torch.bfloat16 else x)


@every_framework
def test_an_array_knows_its_framework_dtype_and_namespace(name):
    x = make(name, [3.0, 4.0])
    assert arrays.is_array(x)
    assert arrays.framework(x) == name
    assert arrays.dtype_name(x) == "float32"
    xp = arrays.namespace(x)
    assert float(xp.sqrt(xp.sum(x * x))) == 5.0
    assert bool(xp.all(xp.where(x > 3, xp.zeros_like(x), xp.ones_like(x)) < 2))
    assert xp.reshape(xp.asarray(0), (1,)).shape[0] == 1


def test_subclasses_count_as_their_base():
    class Mine(torch.Tensor):
        pass

    class Ours(np.ndarray):
        pass

    assert arrays.framework(torch.nn.Parameter(torch.ones(1))) == "torch"
    assert arrays.framework(torch.ones(1).as_subclass(Mine)) == "torch"
    assert arrays.framework(np.ones(1).view(Ours)) == "numpy"
    assert arrays.framework(np.float32(1)) == "numpy"
    assert arrays.framework(np.ones(1, ml_dtypes.bfloat16)) == "numpy"
    assert arrays.framework(flax.nnx.Param(jnp.ones(1))) == "jax"


def test_a_tracer_counts_as_its_framework():
    seen = []
    jax.make_jaxpr(lambda x: seen.append(x) or x)(jnp.ones(2))
    assert arrays.framework(seen[0]) == "jax"
    assert arrays.is_array(seen[0])


@pytest.mark.skipif(not tf, reason="tensorflow is missing")
def test_tensorflow_has_arrays_that_are_none():
    assert arrays.framework(tf.Variable([1.0])) == "tensorflow"
    assert arrays.is_array(tf.Variable([1.0]))
    slices = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]), (3, 2))
    assert arrays.framework(slices) == "tensorflow"
    assert not arrays.is_array(slices)
    assert not arrays.is_array(tf.sparse.from_dense([[0.0, 1.0]]))


@pytest.mark.parametrize(
    "x", [1.0, "a", None, [1.0], {"a": 1}, object(), torch.nn.ReLU]
)
def test_what_is_no_array_has_no_namespace(x):
    assert not arrays.is_array(x)
    with pytest.raises(TypeError, match=f"got {type(x).__name__}: convert it first"):
        arrays.namespace(x)


@every_framework
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32")],
)
def test_low_precision_dtypes_are_widened(name, dtype, wide):
    if name == "array_api_strict" and dtype != "float32":
        assert not hasattr(strict, dtype)
        return
    x = make(name, [1.5, -2.0], dtype)
    assert arrays.dtype_name(x) == dtype
    arrays.check_floating(x, "x")
    widened = arrays.widen(x)
    assert arrays.framework(widened) == name
    assert arrays.dtype_name(widened) == wide
    back = arrays.cast(widened, dtype)
    assert arrays.dtype_name(back) == dtype
    np.testing.assert_array_equal(values(widened), [1.5, -2.0])


@pytest.mark.parametrize("dtype", ["float64", "complex64", "complex128"])
def test_wide_dtypes_stay(dtype):
    for name in ("numpy", "torch", "array_api_strict"):
        x = make(name, [1.5], dtype)
        assert arrays.dtype_name(arrays.widen(x)) == dtype
        assert arrays.cast(x, dtype) is x


def test_numpy_scalars_become_arrays():
    x = arrays.cast(np.float32(2.5), "float32")
    assert isinstance(x, np.ndarray)
    assert x.shape == ()


MASKED = np.ma.masked_array([1.0, 2.0], mask=[True, False])
REFUSED_KINDS = [
    (np.arange(3), "has the dtype int64, expected one of float16"),
    (np.ones(3, bool), "has the dtype bool"),
    (np.ones(3, object), "has the dtype object"),
    (np.array(["a"]), "has the dtype str"),
    (np.ones(3, ml_dtypes.float8_e5m2), "has the dtype float8_e5m2"),
    (np.ones(3, np.longdouble), "has the dtype (longdouble|float128)"),
    (torch.ones(3, dtype=torch.int32), "has the dtype int32"),
    (torch.ones(3).to(torch.float8_e4m3fn), "has the dtype float8_e4m3fn"),
    (torch.ones(3).to_sparse(), "is a Tensor of a kind .* dense array"),
    (MASKED, "is a MaskedArray of a kind .* dense array"),
    (jnp.arange(3), "has the dtype int32"),
    (jax.random.key(0), "has the dtype key"),
]


@pytest.mark.parametrize(("x", "message"), REFUSED_KINDS)
def test_refused_kinds(x, message):
    with pytest.raises(TypeError, match=f"^w {message}"):
        arrays.check_floating(x, "w")


@pytest.mark.parametrize("name", FRAMEWORKS[4:])
def test_complex_is_refused_where_the_shim_has_none(name):
    x = MAKE[name](np.ones(2, "complex64"))
    message = f"w has the dtype complex64, .* for {name}: pass its real view"
    with pytest.raises(TypeError, match=message):
        arrays.check_floating(x, "w")


def test_lengths_are_as_wide_as_the_framework_allows():
    assert arrays.norm_dtype(np.ones(1, "float16")) == "float64"
    assert arrays.norm_dtype(torch.ones(1)) == "float64"
    assert arrays.norm_dtype(jnp.ones(1)) == "float32"
    with jax.enable_x64(True):
        assert arrays.norm_dtype(jnp.ones(1)) == "float64"


@every_framework
def test_scalar_joins_an_array(name):
    like = make(name, [1.0, 2.0])
    assert arrays.scalar(0.5, like) == 0.5
    for value in (make(name, 0.5), make(name, [0.5]), make(name, 1, "int32")):
        joined = arrays.scalar(value, like)
        assert tuple(joined.shape) == ()
        assert arrays.dtype_name(joined) == "float32"
        assert arrays.dtype_name(joined * like) == "float32"
    for foreign in MAKE.keys() - {name}:
        if MAKE[foreign]:
            joined = arrays.scalar(make(foreign, [0.5]), like)
            assert isinstance(joined, float)
            assert joined == 0.5


def test_scalar_of_a_complex_array_is_real():
    joined = arrays.scalar(np.array(0.5), np.ones(2, "complex64"))
    assert joined.dtype == "float32"
    joined = arrays.scalar(torch.tensor(0.5), torch.ones(2, dtype=torch.complex128))
    assert joined.dtype == torch.float64


def test_what_a_compiler_orders():
    assert [name for name, f in MAKE.items() if f and arrays.compiles(f([1.0]))] == [
        name for name in ("jax", "tensorflow", "paddle") if MAKE[name]
    ]


def test_stop_gradient():
    x = torch.ones(2, requires_grad=True)
    assert not arrays.stop_gradient(x * 2).requires_grad
    assert float(jax.grad(lambda x: arrays.stop_gradient(x) * x)(3.0)) == 3.0
    assert arrays.stop_gradient(0.5) == 0.5
    if paddle:
        x = paddle.to_tensor([1.0], stop_gradient=False)
        assert arrays.stop_gradient(x * 2).stop_gradient
    if tf:
        x = tf.Variable([1.0])
        with tf.GradientTape() as tape:
            y = arrays.stop_gradient(x * 2)
        assert tape.gradient(y, x) is None


def written(name: str) -> Any:
    return tf.Variable([0.0, 0.0]) if name == "tensorflow" else make(name, [0.0, 0.0])


@pytest.mark.parametrize("name", [p for p in FRAMEWORKS if p.values[0] != "jax"])
def test_write(name):
    out = written(name)
    assert arrays.write(out, make(name, [1.0, 2.0]), "out") is out
    np.testing.assert_array_equal(values(out), [1.0, 2.0])


def test_write_into_torch_keeps_what_autograd_knows():
    leaf = torch.zeros(2, requires_grad=True)
    arrays.write(leaf, torch.ones(2), "out")
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert leaf.tolist() == [1, 1]
    x = torch.ones(2, requires_grad=True)
    out = torch.zeros(2)
    arrays.write(out, x * 3, "out").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3]
    node = x * 2
    arrays.write(node, torch.ones(2), "out")
    assert torch.autograd.grad(node.sum(), x)[0].tolist() == [0, 0]


def read_only() -> np.ndarray:
    x = np.ones(2)
    x.flags.writeable = False
    return x


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(2)


UNWRITABLE = [
    (lambda: jnp.ones(2), "is a JAX array, and those are immutable"),
    (read_only, "is read-only"),
    (lambda: np.float32(1), "is read-only"),
    (inference_tensor, "is an inference tensor"),
    (lambda: torch.ones(1).expand(2), "is an expanded view"),
]


@pytest.mark.parametrize(("make_out", "reason"), UNWRITABLE)
def test_what_cannot_be_written(make_out, reason):
    out = make_out()
    assert str(arrays.unwritable(out)).startswith(reason)
    message = f"^out at 'a' {reason}.*: omit out= and use the returned value"
    with pytest.raises(TypeError, match=message):
        arrays.write(out, out, "out at 'a'")


def test_what_cannot_take_up_a_graph():
    parameter = torch.nn.Parameter(torch.ones(2))
    arrays.check_writable(parameter, "out")
    with pytest.raises(TypeError, match="out is a leaf that requires gradients"):
        arrays.check_writable(parameter, "out", differentiable=True)
    arrays.check_writable(torch.ones(2), "out", differentiable=True)
    arrays.check_writable(torch.ones(2).expand(1, 2), "out", differentiable=True)
    with torch.inference_mode():
        arrays.check_writable(torch.ones(2), "out")


@pytest.mark.skipif(not tf, reason="tensorflow is missing")
def test_what_tensorflow_cannot_write():
    with pytest.raises(TypeError, match=r"out is a constant .* only a tf.Variable can"):
        arrays.write(tf.constant([1.0]), tf.constant([2.0]), "out")
    arrays.check_writable(tf.Variable([1.0]), "out")
    with pytest.raises(TypeError, match=r"out is a tf\.Variable, which passes"):
        arrays.check_writable(tf.Variable([1.0]), "out", differentiable=True)
