"""`lars_update` on every kind of array and container, and `init` / `update`."""

import dataclasses
import importlib
import itertools
import math
import warnings
from collections import OrderedDict, namedtuple
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

import array_api_strict as strict
import flax.core
import flax.nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from larskit import Array, Container, functional, lars_update, rule
from larskit.arrays import cast, dtype_name, framework
from larskit.config import Config
from larskit.engines import native
from larskit.tree import flatten


def optional(name: str) -> ModuleType | Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


# In this order: Paddle crashes if TensorFlow was there before it.
paddle, tf = optional("paddle"), optional("tensorflow")

# What makes an array of each kind, and whether it can be written in place.
KINDS: dict[str, tuple[Any, bool]] = {
    "numpy": (np.array, True),
    "torch": (torch.tensor, True),
    "parameter": (lambda x: torch.nn.Parameter(torch.tensor(x)), True),
    "jax": (jnp.array, False),
    "array_api_strict": (lambda x: strict.asarray(x, copy=True), True),
    "tensorflow": (tf and tf.constant, False),
    "variable": (tf and (lambda x: tf.Variable(x)), True),
    "paddle": (paddle and paddle.to_tensor, True),
    "trained": (paddle and (lambda x: paddle.to_tensor(x, stop_gradient=False)), True),
}


def kinds(*names: str, but: tuple[str, ...] = ()) -> Any:
    params = [
        pytest.param(
            *(name, make),
            marks=pytest.mark.skipif(not make, reason=f"{name} is missing"),
            id=name,
        )
        for name, (make, _) in KINDS.items()
        if name in (names or KINDS) and name not in but
    ]
    return pytest.mark.parametrize(("name", "make"), params)


every_kind = kinds()
READ_ONLY = tuple(name for name, (_, writable) in KINDS.items() if not writable)

W = np.array([[3.0, -1.0, 5.0], [7.0, 2.0, -9.0]])
G = np.array([[0.3, 0.1, -0.2], [0.1, -0.2, 0.4]])


def values(x: Any) -> np.ndarray:
    """Return a float64 NumPy copy of an array of any framework."""
    if framework(x) in ("torch", "paddle"):
        x = cast(x, "float32") if dtype_name(x) == "bfloat16" else x
        x = x.detach()
    x = np.asarray(x)
    return x.astype("complex128" if np.iscomplexobj(x) else "float64")


def expected(w: Any, g: Any, lr: float, decay: float = 0.0) -> np.ndarray:
    """The documented formula in float64, not from rule.py."""
    w, g = values(w), values(g)
    w_norm, g_norm = (math.sqrt(float((abs(x) ** 2).sum())) for x in (w, g))
    r = w_norm / (g_norm + decay * w_norm) if w_norm and g_norm else 1.0
    return w - lr * r * (g + decay * w)


def agree(ours: Any, theirs: Any, eps: float = 2**-23) -> None:
    theirs = values(theirs)
    atol = 4 * eps * (abs(theirs).max() if theirs.size else 0) + 1e-18
    np.testing.assert_allclose(values(ours), theirs, rtol=0, atol=atol)


# --- arrays ---------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("decay", [0, 0.5])
@pytest.mark.parametrize("lr", [0.1, 0.0, 2])
def test_every_kind_of_array(name, make, lr, decay):
    w, g = make(W.astype("float32")), make(G.astype("float32"))
    new = lars_update(w, g, lr, decay_lambda=decay)
    assert framework(new) == framework(w)
    assert dtype_name(new) == "float32"
    agree(new, expected(W, G, lr, decay))
    assert (values(w) == W).all(), "the input is left alone"


LAYERS = {
    "zero weights": (W * 0, G),
    "zero gradient": (W, G * 0),
    "both zero": (W * 0, G * 0),
    "0-d": (np.array(-3.0), np.array(2.0)),
    "empty": (W[:0], G[:0]),
    "one element": (W[:1, :1], G[:1, :1]),
    "several blocks": (np.arange(-1500.0, 1600.0) / 700, np.cos(np.arange(3100.0))),
    "rank 5": (np.ones((2, 1, 3, 1, 2)), np.full((2, 1, 3, 1, 2), -2.0)),
    "tiny": (W * 1e-15, G * 1e-15),
    "huge": (W * 1e15, G * 1e15),
}


@every_kind
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("decay", [0, 0.25])
def test_every_kind_of_layer(name, make, layer, decay):
    w, g = (np.array(x, "float32") for x in LAYERS[layer])
    new = lars_update(make(w), make(g), 0.1, decay_lambda=decay)
    assert tuple(new.shape) == w.shape
    assert framework(new) == framework(make(w))
    agree(new, expected(w, g, 0.1, decay))


@every_kind
def test_nan_takes_the_whole_layer_and_no_other(name, make):
    w, g, bad = (make(x.astype("float32")) for x in (W, G, np.where(W == 3, np.nan, G)))
    new = lars_update([w, w], [g, bad], 0.1)
    agree(new[0], expected(W, G, 0.1))
    assert np.isnan(values(new[1])).all()


EPS = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}
EPS |= {"complex64": 2**-23, "complex128": 2**-52}
DTYPES = {
    "numpy": tuple(EPS),
    "torch": tuple(EPS),
    "jax": tuple(EPS),
    "array_api_strict": ("float32", "float64", "complex64", "complex128"),
    "tensorflow": ("float16", "bfloat16", "float32", "float64"),
    "paddle": ("float16", "bfloat16", "float32", "float64"),
}


def typed(name: str, x: np.ndarray, dtype: str) -> Any:
    if dtype.startswith("complex"):
        x = x * (1 + 0.5j)
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    if name == "torch" and dtype == "bfloat16":
        return torch.tensor(x.astype("float32")).bfloat16()
    if name == "paddle" and dtype == "bfloat16":
        return paddle.to_tensor(x.astype("float32")).astype("bfloat16")
    return KINDS[name][0](x.astype(narrow))


@kinds(*DTYPES)
@pytest.mark.parametrize("dtype", EPS)
def test_every_dtype_returns_in_its_own(name, make, dtype):
    if dtype not in DTYPES[name]:
        with pytest.raises(TypeError, match=f"float16|w has the dtype {dtype}"):
            lars_update(typed(name, W, dtype), typed(name, G, dtype), 0.1)
        return
    with jax.enable_x64("64" in dtype or "128" in dtype):
        w, g = typed(name, W, dtype), typed(name, G, dtype)
        new = lars_update(w, g, 0.1, decay_lambda=0.5)
        assert dtype_name(new) == dtype_name(w) == dtype
        agree(new, expected(w, g, 0.1, 0.5), EPS[dtype])


@kinds("numpy", "torch", "jax", "tensorflow", "paddle")
def test_float16_does_not_overflow(name, make):
    w, g = np.full(4, 60_000, "float16"), np.full(4, -50_000, "float16")
    new = lars_update(make(w), make(g), 0.01)
    assert dtype_name(new) == "float16"
    agree(new, expected(w, g, 0.01), EPS["float16"])


def test_numpy_of_every_layout():
    base = np.arange(48.0).reshape(6, 8) + 1
    for w in (base[::2, ::-3], base.T, np.asfortranarray(base), base[:, None, :0]):
        agree(lars_update(w, np.cos(w), 0.1), expected(w, np.cos(w), 0.1), 2**-52)
    for kind in (">f4", ">f8", ">c8", "<f2"):
        w, g = W.astype(kind), G.astype(kind)
        new = lars_update(w, g, 0.1)
        assert new.dtype == w.dtype
        agree(new, expected(w, g, 0.1), 2**-10 if kind == "<f2" else 2**-23)
    new = lars_update(W.astype(">f4"), G.astype("f4"), 0.1)
    assert new.dtype == np.dtype(">f4")


def test_torch_of_every_layout():
    base = torch.arange(48.0).reshape(6, 8) + 1
    for w in (base[::2, 1::3], base.T, base.expand(2, 6, 8), base[None].conj()):
        agree(lars_update(w, torch.cos(w), 0.1), expected(w, torch.cos(w), 0.1))


def test_numpy_scalars_count_as_arrays():
    new = lars_update(np.float32(3), np.float32(2), 0.1)
    assert isinstance(new, np.ndarray)
    agree(new, 2.7)


def test_read_only_weights_are_only_read():
    w = W.copy()
    w.flags.writeable = False
    agree(lars_update(w, G, 0.1), expected(W, G, 0.1))


def test_one_array_may_be_several_leaves():
    w = {"a": W, "b": W}
    new = lars_update(w, {"a": G, "b": -G}, 0.1)
    agree(new["a"], expected(W, G, 0.1))
    agree(new["b"], expected(W, -G, 0.1))


# --- rates ----------------------------------------------------------------------------


@every_kind
def test_every_kind_of_rate(name, make):
    w, g = make(W.astype("float32")), make(G.astype("float32"))
    theirs = expected(W, G, 0.125, 0.5)
    numbers = [np.float32, np.float64, np.array, Fraction, Decimal, lambda x: [x]]
    arrays = [make for make, _ in KINDS.values() if make]
    for rate in numbers[:-1]:
        agree(lars_update(w, g, rate(0.125), decay_lambda=rate(0.5)), theirs)
    for rate, shape in itertools.product(arrays, [(), (1,), (1, 1)]):
        lr, decay = (rate(np.full(shape, x, "float32")) for x in (0.125, 0.5))
        new = lars_update(w, g, lr, decay_lambda=decay)
        assert dtype_name(new) == "float32"
        agree(new, theirs)


def test_integer_and_wide_rates_do_not_widen_the_result():
    for one in (1, np.int64(1), np.array(1.0), np.longdouble(1)):
        assert lars_update(np.ones(2, "f2"), np.ones(2, "f2"), one).dtype == "f2"
    for one in (torch.tensor(1), torch.tensor(1.0, dtype=torch.float64)):
        new = lars_update(torch.ones(2), torch.ones(2), one, decay_lambda=one)
        assert new.dtype == torch.float32


# --- containers -----------------------------------------------------------------------

Layer = namedtuple("Layer", "kernel bias")


@dataclasses.dataclass(frozen=True)
class Dense:
    kernel: Any
    bias: Any = None
    units: int = dataclasses.field(default=3, metadata={"static": True})


CONTAINERS = {
    "dict": lambda a, b: {"k": a, "b": b},
    "nested dict": lambda a, b: {"z": {"k": a}, "a": {"y": {"b": b}}},
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, (b,)),
    "namedtuple": Layer,
    "OrderedDict": lambda a, b: OrderedDict(z=a, a=b),
    "dataclass": lambda a, b: [Dense(a, b), Dense(a)],
    "Container": lambda a, b: Container(k=a, n={"b": b}),
    "FrozenDict": lambda a, b: flax.core.FrozenDict(k=a, n={"b": b}),
    "State": lambda a, b: flax.nnx.State({"k": a, "n": {"b": b}}),
    "all of them": lambda a, b: {"a": [Layer(a, (b, Dense(Container(c=a))))], "b": b},
}


@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("make", [np.array, torch.tensor, jnp.array])
def test_every_container(make, build):
    w = build(make(W.astype("float32")), make(W[0].astype("float32")))
    g = build(make(G.astype("float32")), make(G[0].astype("float32")))
    new = lars_update(w, g, 0.1)
    for (path, leaf), old, slope in zip(
        zip(*flatten(new)[:2], strict=True), flatten(w)[1], flatten(g)[1], strict=True
    ):
        assert framework(leaf) == framework(old), path
        agree(leaf, expected(old, slope, 0.1))
    assert flatten(new)[2] == flatten(w)[2]


def test_nnx_state_in_and_out():
    model = flax.nnx.Linear(2, 3, rngs=flax.nnx.Rngs(0))
    before = values(model.kernel[...])
    grads = flax.nnx.grad(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())(model)
    flax.nnx.update(model, lars_update(flax.nnx.state(model), grads, 0.1))
    agree(model.kernel[...], expected(before, values(grads["kernel"][...]), 0.1))


def test_values_for_all_leaves_or_for_each():
    w = Container(a=W, b={"c": [W * 2, W * 3]})
    g = {"a": G, "b": {"c": (G, -G)}}
    g["b"]["c"] = list(g["b"]["c"])
    lr = {"a": 0.1, "b": {"c": [np.array([0.2]), np.float32(0.25)]}}
    decay = {"a": 0, "b": {"c": [1, Fraction(1, 2)]}}
    new = lars_update(w, g, lr, decay_lambda=decay)
    agree(new.a, expected(W, G, 0.1), 2**-52)
    agree(new.b.c[0], expected(W * 2, G, 0.2, 1), 2**-52)
    agree(new.b.c[1], expected(W * 3, -G, 0.25, 0.5), 2**-52)
    new = lars_update(w, G, 0.1, decay_lambda=decay)
    agree(new.b.c[1], expected(W * 3, G, 0.1, 0.5), 2**-52)


def test_other_containers_serve_where_their_paths_are_the_same():
    w = Dense(W, Layer(W, W))
    g = {"bias": {"bias": G, "kernel": G * 2}, "kernel": G * 3}
    new = lars_update(w, g, 0.1)
    assert type(new) is Dense
    assert type(new.bias) is Layer
    agree(new.bias.kernel, expected(W, G * 2, 0.1))


def test_none_and_empty_containers_stay():
    w = {"a": None, "b": [], "c": {}, "d": (W, None)}
    new = lars_update(w, {"d": [G]}, 0.1)
    agree(new["d"][0], expected(W, G, 0.1))
    assert (new["a"], new["b"], new["c"], new["d"][1]) == (None, [], {}, None)
    assert lars_update({}, G, 0.1) == {}
    assert lars_update([], [], 0.1, out=[]) == []


def test_frameworks_may_be_mixed_among_the_leaves():
    w, g = {"a": W, "b": torch.tensor(W)}, {"a": G, "b": torch.tensor(G)}
    new = lars_update(w, g, torch.tensor(0.25, requires_grad=True))
    agree(new["a"], expected(W, G, 0.25))
    agree(new["b"], expected(W, G, 0.25))


# --- out ------------------------------------------------------------------------------


@kinds(but=READ_ONLY)
def test_out_receives_the_result(name, make):
    w, g, out = (make(x.astype("float32")) for x in (W, G, W * 0))
    assert lars_update(w, g, 0.1, out=out) is out
    agree(out, expected(W, G, 0.1))
    assert (values(w) == W).all()
    assert lars_update(w, g, 0.1, out=w) is w
    agree(w, expected(W, G, 0.1))
    assert lars_update(out, g, 0.1, out=g) is g
    agree(g, expected(out, G, 0.1))


@kinds(but=READ_ONLY)
def test_out_may_be_a_container(name, make):
    w, g, zero = (
        [make(x.astype("float32")), {"b": make(x[0].astype("float32"))}]
        for x in (W, G, W * 0)
    )
    out = tuple(zero)
    assert lars_update(w, g, 0.1, out=out) is out
    agree(out[0], expected(W, G, 0.1))
    agree(out[1]["b"], expected(W[0], G[0], 0.1))


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_out_may_overlap_the_weights(make):
    base = make(np.arange(1.0, 8.0))
    w, out = {"a": base[:-1], "b": base[1:]}, {"a": base[1:], "b": make(np.zeros(6))}
    before = {key: values(x).copy() for key, x in w.items()}
    g = make(np.cos(np.arange(6.0)))
    lars_update(w, g, 0.1, out=out)
    for key in w:
        agree(out[key], expected(before[key], g, 0.1), 2**-52)


def test_out_with_none_and_holders():
    out = {"a": None, "b": Array(np.zeros((2, 3)))}
    native = out["b"].native
    lars_update({"a": None, "b": W}, {"b": G}, 0.1, out=out)
    assert out["b"].native is native
    agree(native, expected(W, G, 0.1))


@pytest.mark.skipif(not tf, reason="tensorflow is missing")
def test_out_inside_a_tensorflow_function():
    w, out = tf.Variable(W), tf.Variable(W * 0)

    @tf.function
    def step(g):
        lars_update(w, g, 0.1, out=w)
        return lars_update(w, g, 0.1, out=out)

    agree(step(tf.constant(G)), expected(expected(W, G, 0.1), G, 0.1), 2**-52)
    agree(w, expected(W, G, 0.1), 2**-52)
    agree(out, expected(w, G, 0.1), 2**-52)


def test_a_graph_flows_into_out():
    w = torch.tensor(W, requires_grad=True)
    out = torch.zeros(2, 3, dtype=torch.float64)
    lars_update(w, torch.tensor(G), 0.1, stop_gradients=False, out=out).sum().backward()
    through_out = w.grad
    w.grad = None
    lars_update(w, torch.tensor(G), 0.1, stop_gradients=False).sum().backward()
    assert through_out is not None
    assert w.grad is not None
    assert torch.equal(through_out, w.grad)


# --- errors ---------------------------------------------------------------------------


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


T, TG = torch.tensor(W), torch.tensor(G)
J = jnp.ones(2)
SAME = np.zeros((2, 3))
LEAF = torch.nn.Parameter(torch.ones(2))
DEEP = {"a": [W, W]}

ERRORS: list[tuple[str, Any, type[Exception], str]] = [
    ("w float", (1.0, G, 0.1), TypeError, "w is a float, expected an array"),
    ("w list", ([1.0], G, 0.1), TypeError, "w at '0' is a float, expected an array"),
    ("w str", ({"a": {"b": "x"}}, G, 0.1), TypeError, "w at 'a.b' is a str"),
    (
        "w int",
        (W.astype(int), G, 0.1),
        TypeError,
        "w has the dtype int64, expected one",
    ),
    ("w bool", ({"a": W > 0}, G, 0.1), TypeError, "w at 'a' has the dtype bool"),
    (
        "w wide",
        ([W.astype("g")], G, 0.1),
        TypeError,
        "w at '0' has the dtype (long|float1)",
    ),
    ("w object", (W.astype(object), G, 0.1), TypeError, "w has the dtype object"),
    ("w masked", (np.ma.masked_less(W, 0), G, 0.1), TypeError, "w is a MaskedArray"),
    ("w sparse", (T.to_sparse(), TG, 0.1), TypeError, "w is a Tensor of a kind"),
    ("g sparse", (T, TG.to_sparse(), 0.1), TypeError, "dcdw is a Tensor of a kind"),
    ("g shape", (W, G[0], 0.1), ValueError, r"dcdw has the shape \(3,\), .* \(2, 3\)"),
    (
        "g broadcast",
        ([W], [G[:1]], 0.1),
        ValueError,
        r"dcdw at '0' has the shape \(1, 3\)",
    ),
    ("g for all", (DEEP, G[0], 0.1), ValueError, "dcdw at 'a.0' has the shape"),
    (
        "g dtype",
        (W, G.astype("f4"), 0.1),
        TypeError,
        "dcdw has the dtype float32, .* float64",
    ),
    (
        "g framework",
        ([W], [TG], 0.1),
        TypeError,
        "dcdw at '0' is a Tensor, .* of numpy",
    ),
    (
        "g float",
        (W, 0.1, 0.1),
        TypeError,
        "dcdw is a float, expected an array of numpy",
    ),
    ("g None", (W, None, 0.1), TypeError, "dcdw is a NoneType, expected an array of"),
    (
        "g list",
        (W, [G], 0.1),
        TypeError,
        "dcdw is a list, but the weights are one array",
    ),
    (
        "g misses",
        (DEEP, {"a": [G]}, 0.1),
        ValueError,
        "dcdw misses 'a.1', .*: give both",
    ),
    (
        "g misses two",
        ([W, W], {}, 0.1),
        ValueError,
        r"dcdw misses '0', '1', ",
    ),
    (
        "g extra",
        ([W], [G, G], 0.1),
        ValueError,
        "dcdw has the extra '1', .*: give both",
    ),
    ("g for None", ([None], [G], 0.1), ValueError, "dcdw has the extra '0'"),
    ("g is None", ({"a": W}, {"a": None}, 0.1), ValueError, "dcdw misses 'a'"),
    ("g field", (Layer(W, W), (G, G), 0.1), ValueError, "dcdw misses 'kernel'"),
    (
        "lr negative",
        (W, G, -0.1),
        ValueError,
        "lr must be a finite number of at least 0, got",
    ),
    ("lr nan", (W, G, math.nan), ValueError, "lr must be a finite number .*, got nan"),
    (
        "lr inf",
        ([W], G, math.inf),
        ValueError,
        "lr at '0' must be a finite .*, got inf",
    ),
    ("lr numpy", (T, TG, np.float32(-1)), ValueError, "lr must be .*, got -1.0"),
    ("lr array", (W, G, np.array([-1.0])), ValueError, "lr must be .*, got -1.0"),
    ("lr foreign", (W, G, torch.tensor(-2.0)), ValueError, "lr must be .*, got -2.0"),
    (
        "lr bool",
        (W, G, True),
        TypeError,
        "lr must be a finite .*, got True: pass a number",
    ),
    (
        "lr bools",
        (W, G, np.array(True)),
        TypeError,
        "lr has the dtype bool: pass a number",
    ),
    ("lr str", (W, G, "0.1"), TypeError, "lr must be a finite number .*, got '0.1'"),
    (
        "lr None",
        ([W], G, None),
        TypeError,
        "lr at '0' must be a finite number .*, got None",
    ),
    ("lr complex", (W, G, 1j), TypeError, "lr (is a complex|has the dtype complex)"),
    ("lr complexes", (T, TG, T[0, 0] * 1j), TypeError, "lr has the dtype complex128"),
    (
        "lr object",
        (W, G, object()),
        TypeError,
        "lr is a object, expected a number or an",
    ),
    (
        "lr shape",
        ([W], G, np.ones(3)),
        ValueError,
        r"lr at '0' has the shape \(3,\), .* one",
    ),
    (
        "lr empty",
        (W, G, torch.ones(0)),
        ValueError,
        r"lr has the shape \(0,\), expected one",
    ),
    (
        "lr list",
        (W, G, [0.1]),
        TypeError,
        "lr is a list, but the weights are one array",
    ),
    ("lr misses", ([W, W], G, {0: 0.1}), ValueError, "lr misses '1'"),
    (
        "lr of leaf",
        (DEEP, G, {"a": [1, -1]}),
        ValueError,
        "lr at 'a.1' must be .* got -1",
    ),
    (
        "decay",
        (W, G, 0.1, {"decay_lambda": -1}),
        ValueError,
        "decay_lambda must be .* got -1",
    ),
    (
        "decay shape",
        ([W], G, 0.1, {"decay_lambda": np.ones(2)}),
        ValueError,
        r"decay_lambda at '0' has the shape \(2,\)",
    ),
    (
        "decay None",
        (W, G, 0.1, {"decay_lambda": None}),
        TypeError,
        "decay_lambda must be a finite number of at least 0, got None",
    ),
    ("out jax", (J, J, 0.1, {"out": J}), TypeError, "out is a JAX array, .* immutable"),
    ("out leaf", ([J], J, 0.1, {"out": [J]}), TypeError, "out at '0' is a JAX array"),
    (
        "out read",
        (W, G, 0.1, {"out": read_only(W)}),
        TypeError,
        "out is read-only: omit",
    ),
    (
        "out one",
        ([W], G, 0.1, {"out": W}),
        TypeError,
        "out is one ndarray, .* are a list",
    ),
    (
        "out list",
        (W, G, 0.1, {"out": [W]}),
        TypeError,
        "out is a list, but the weights",
    ),
    ("out misses", ([W], G, 0.1, {"out": []}), ValueError, "out misses '0'"),
    (
        "out extra",
        ([W], G, 0.1, {"out": [SAME, 1]}),
        ValueError,
        "out has the extra '1'",
    ),
    ("out shape", (W, G, 0.1, {"out": W[0]}), ValueError, r"out has the shape \(3,\)"),
    (
        "out dtype",
        (W, G, 0.1, {"out": W.astype("f4")}),
        TypeError,
        "out has the dtype float32",
    ),
    ("out torch", (W, G, 0.1, {"out": T}), TypeError, "out is a Tensor, .* of numpy"),
    (
        "out float",
        (W, G, 0.1, {"out": 1.0}),
        TypeError,
        "out is a float, expected an array",
    ),
    (
        "out twice",
        (DEEP, G, 0.1, {"out": {"a": [SAME, SAME]}}),
        ValueError,
        "out at 'a.1' is the same array as out at 'a.0'",
    ),
    (
        "out graph",
        (LEAF, LEAF, 0.1, {"out": LEAF, "stop_gradients": False}),
        TypeError,
        "out is a leaf that requires gradients, .*: omit out=",
    ),
    (
        "out view",
        (T, TG, 0.1, {"out": T[:1].expand(2, 3)}),
        TypeError,
        "out is an expanded view",
    ),
]


@pytest.mark.parametrize(
    ("given", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_errors_say_what_and_where(given, error, message):
    *arguments, options = (
        given
        if isinstance(given[-1], dict) and len(given) == 4
        else (
            *given,
            {},
        )
    )
    with pytest.raises(error, match=f"^{message}") as caught:
        lars_update(*arguments, **options)
    assert "\n" not in str(caught.value)


@kinds("tensorflow", "paddle")
def test_errors_of_the_shims(name, make):
    w, g = make(W), make(G)
    with pytest.raises(TypeError, match=f"dcdw is a ndarray, .* an array of {name}"):
        lars_update(w, G, 0.1)
    with pytest.raises(TypeError, match=f"w has the dtype complex128, .* for {name}"):
        lars_update(make(W * 1j), make(G * 1j), 0.1)
    if name == "tensorflow":
        with pytest.raises(TypeError, match="out is a constant TensorFlow tensor"):
            lars_update(w, g, 0.1, out=w)
        slices = tf.IndexedSlices(g, tf.constant([0, 1]), w.shape)
        with pytest.raises(TypeError, match="dcdw is a IndexedSlices, expected an arr"):
            lars_update(w, slices, 0.1)
        variable = tf.Variable(W)
        with pytest.raises(
            TypeError, match=r"out is a tf\.Variable, which passes no g"
        ):
            lars_update(w, g, 0.1, out=variable, stop_gradients=False)


def test_a_traced_rate_for_weights_that_are_not():
    with pytest.raises(
        TypeError, match=r"lr is a .*Tracer, expected a number or an array"
    ):
        jax.jit(lambda lr: lars_update(W, G, lr))(0.1)


def test_nothing_is_written_when_any_leaf_is_bad():
    first = np.zeros((2, 3))
    for g, out in (
        ({"a": G, "b": G[0]}, {"a": first, "b": W.copy()}),
        ({"a": G, "b": G}, {"a": first, "b": read_only(W)}),
        ({"a": G, "b": G}, {"a": first, "b": first}),
        ({"a": G, "b": G}, {"a": first, "b": torch.tensor(W)}),
        ({"a": G, "b": G}, {"a": first, "c": W.copy()}),
    ):
        with pytest.raises((ValueError, TypeError)):
            lars_update({"a": W, "b": W}, g, 0.1, out=out)
        assert not first.any()


# --- gradients ------------------------------------------------------------------------


@kinds("torch", "parameter")
@pytest.mark.parametrize("decay", [0, 0.5])
def test_stopped_gradients_leave_no_graph(name, make, decay):
    w = torch.tensor(W, requires_grad=True)
    lr = torch.tensor(0.1, requires_grad=True)
    new = lars_update([w * 2], make(G), lr, decay_lambda=decay)[0]
    assert not new.requires_grad
    assert new.grad_fn is None
    assert lars_update(w * 2, make(G), lr, stop_gradients=False).requires_grad


def moved(w, g, lr, decay):
    new = lars_update(
        {"a": w, "b": [g]}, g, lr, decay_lambda=decay, stop_gradients=False
    )
    return new["a"] * new["b"][0]


def inputs() -> list[torch.Tensor]:
    return [
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for x in (W, G, 0.1, 0.5)
    ]


def test_gradcheck():
    assert torch.autograd.gradcheck(moved, inputs())
    assert torch.autograd.gradgradcheck(moved, inputs())
    w = torch.tensor(W * (1 + 0.5j), requires_grad=True)
    g, lr, decay = torch.tensor(G * (1 - 2j), requires_grad=True), *inputs()[2:]
    lean = lambda *x: lars_update(*x[:3], decay_lambda=x[3], stop_gradients=False)  # noqa: E731
    assert torch.autograd.gradcheck(lean, (w, g, lr[None], decay))


def derivatives() -> list[np.ndarray]:
    """What PyTorch, checked above, finds for the sum of the square of `moved`."""
    x = inputs()
    return [values(d) for d in torch.autograd.grad((moved(*x) ** 2).sum(), x)]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_gradients_in_jax(wrap):
    with jax.enable_x64(True):
        x = [jnp.asarray(values(x)) for x in inputs()]
        f = wrap(lambda *x: (moved(*x) ** 2).sum())
        ours = jax.grad(f, argnums=(0, 1, 2, 3))(*x)
        for our, their in zip(ours, derivatives(), strict=True):
            agree(our, their, 1e-13)
        stopped = jax.grad(lambda w: lars_update(w, x[1], 0.1).sum())(x[0])
        assert not stopped.any()


@pytest.mark.skipif(not tf, reason="tensorflow is missing")
@pytest.mark.parametrize("graph", [False, True])
def test_gradients_in_tensorflow(graph):
    def run(*x):
        with tf.GradientTape(persistent=True) as tape:
            for each in x:
                tape.watch(each)
            y = tf.reduce_sum(moved(*x) ** 2)
            stopped = tf.reduce_sum(lars_update(x[0], x[1], x[2]))
        assert tape.gradient(stopped, x[0]) is None
        return tape.gradient(y, x)

    x = [tf.constant(values(x)) for x in inputs()]
    ours = (tf.function(run) if graph else run)(*x)
    for our, their in zip(ours, derivatives(), strict=True):
        agree(our, their, 1e-13)


@pytest.mark.skipif(not tf, reason="tensorflow is missing")
def test_gradients_of_a_tensorflow_variable():
    w, g = tf.Variable(W), tf.constant(G)
    with tf.GradientTape(persistent=True) as tape:
        y = tf.reduce_sum(lars_update(w, g, 0.1, stop_gradients=False) ** 2)
        stopped = tf.reduce_sum(lars_update(w, g, 0.1) ** 2)
    assert tape.gradient(stopped, w) is None
    torch_w = torch.tensor(W, requires_grad=True)
    (lars_update(torch_w, TG, 0.1, stop_gradients=False) ** 2).sum().backward()
    agree(tape.gradient(y, w), torch_w.grad, 1e-13)


@pytest.mark.skipif(not paddle, reason="paddle is missing")
def test_gradients_in_paddle():
    x = [paddle.to_tensor(values(x), stop_gradient=False) for x in inputs()]
    ours = paddle.grad((moved(*x) ** 2).sum(), x)
    for our, their in zip(ours, derivatives(), strict=True):
        agree(our, their, 1e-13)
    assert lars_update(x[0], x[1], x[2]).stop_gradient


@pytest.mark.parametrize("zero", ["weights", "gradient", "both"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_gradients_through_a_layer_of_zeros_are_finite(zero, decay):
    w, g, lr, wd = inputs()
    w = w * 0 if zero in ("weights", "both") else w
    g = g * 0 if zero in ("gradient", "both") else g
    x = [each.detach().requires_grad_() for each in (w, g, lr, wd * (decay > 0))]
    found = torch.autograd.grad((moved(*x) ** 2).sum(), x)
    assert all(bool(d.isfinite().all()) for d in found)
    with jax.enable_x64(True):
        f = lambda *x: (moved(*x) ** 2).sum()  # noqa: E731
        theirs = jax.grad(f, argnums=(0, 1, 2, 3))(*(jnp.asarray(values(e)) for e in x))
    for our, their in zip(found, theirs, strict=True):
        agree(our, their, 1e-13)


# --- compilers ------------------------------------------------------------------------


def test_jax_traces_all_of_it():
    w = Container(a=jnp.asarray(W), b=[jnp.asarray(W[0])])
    g = Container(a=jnp.asarray(G), b=[jnp.asarray(G[0])])

    @jax.jit
    def step(w, g, lr, decay):
        return lars_update(w, g, lr, decay_lambda=decay)

    new = step(w, g, 0.1, {"a": 0.5, "b": [0.0]})
    agree(new.a, expected(W, G, 0.1, 0.5))
    agree(new.b[0], expected(W[0], G[0], 0.1))
    batched = jax.vmap(lambda w, g, lr: lars_update(w, g, lr), (0, 0, None))
    for row, w, g in zip(
        batched(jnp.asarray(W), jnp.asarray(G), 0.1), W, G, strict=True
    ):
        agree(row, expected(w, g, 0.1))
    with pytest.raises(TypeError, match="out is a JAX array"):
        jax.jit(lambda w: lars_update(w, w, 0.1, out=w))(jnp.ones(2))


@pytest.mark.skipif(not tf, reason="tensorflow is missing")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_tensorflow_traces_all_of_it(jit_compile):
    step = tf.function(
        lambda w, g, lr: lars_update(w, g, lr, decay_lambda=lr), jit_compile=jit_compile
    )
    w, g = {"a": tf.constant(W), "b": [tf.constant(W[0])]}, tf.constant(G)
    new = step(w, {"a": g, "b": [g[0]]}, tf.constant(0.25, tf.float64))
    agree(new["a"], expected(W, G, 0.25, 0.25), 2**-52)
    agree(new["b"][0], expected(W[0], G[0], 0.25, 0.25), 2**-52)


def test_torch_transforms_go_through_it():
    f = lambda w, g: lars_update(w, g, 0.1, stop_gradients=False)  # noqa: E731
    for row, w, g in zip(torch.func.vmap(f)(T, TG), W, G, strict=True):
        agree(row, expected(w, g, 0.1), 2**-52)
    found = torch.func.grad(lambda w: (f(w, TG) ** 2).sum())(T)
    w = T.clone().requires_grad_()
    (f(w, TG) ** 2).sum().backward()
    agree(found, w.grad, 2**-52)


# --- numerical guarantees -------------------------------------------------------------

# No subnormal numbers: compilers flush them to zero.
small, zero = 2.0**-7, st.just(0.0)
element = zero | st.floats(small, 99, width=32) | st.floats(-99, -small, width=32)
rate = zero | st.floats(small, 10, width=32)
shape = st.sampled_from([(), (1,), (3,), (2, 2), (0,), (33,)])


@st.composite
def layers(draw) -> tuple[np.ndarray, np.ndarray]:
    size = draw(shape)
    length = math.prod(size)
    w, g = (draw(st.lists(element, min_size=length, max_size=length)) for _ in "wg")
    return np.array(w, "float32").reshape(size), np.array(g, "float32").reshape(size)


trees = st.recursive(
    layers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(lambda **x: Container(x), a=inner, b=inner)
        | st.builds(lambda x: Dense(x), inner)
    ),
    max_leaves=6,
)


def part(nested: Any, take: Any) -> Any:
    """Return the tree of what `take` makes of each (weights, gradient) of a tree."""
    if isinstance(nested, tuple):
        return take(*nested)
    if isinstance(nested, dict):
        return type(nested)({key: part(x, take) for key, x in nested.items()})
    if isinstance(nested, Dense):
        return Dense(part(nested.kernel, take))
    return [part(x, take) for x in nested]


@given(layers(), rate, st.floats(1e-3, 1e3))
def test_the_scale_of_the_gradient_does_not_matter(layer, lr, factor):
    w, g = (x.astype("float64") for x in layer)
    if w.any():
        one, other = lars_update(w, g, lr), lars_update(w, g * factor, lr)
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13 * lr)


@given(layers(), rate)
def test_a_layer_moves_by_its_own_length(layer, lr):
    w, g = (x.astype("float64") for x in layer)
    if w.any() and g.any():
        step = float(np.linalg.norm(lars_update(w, g, lr) - w))
        w_norm = float(np.linalg.norm(w))
        np.testing.assert_allclose(step, lr * w_norm, rtol=1e-12, atol=1e-14 * w_norm)


@given(layers(), rate, rate)
def test_containers_and_arrays_agree_with_the_formula(layer, lr, decay):
    w, g = (x.astype("float64") for x in layer)
    new = lars_update(Container(a=[w]), g, lr, decay_lambda=decay).a[0]
    assert (new == lars_update(w, g, lr, decay_lambda=decay)).all()
    largest = float((1 + lr) * np.linalg.norm(w) + lr * np.linalg.norm(g))
    theirs = expected(w, g, lr, decay)
    np.testing.assert_allclose(new, theirs, rtol=0, atol=1e-14 * largest)


@given(trees, rate, st.sampled_from([0, 0.25, 1.5]))
def test_frameworks_agree_on_any_tree(nested, lr, decay):
    w, g = part(nested, lambda w, g: w), part(nested, lambda w, g: g)
    theirs = flatten(lars_update(w, g, lr, decay_lambda=decay))[1]

    def made(make: Any, i: int) -> Any:
        return part(nested, lambda *layer: make(layer[i]))

    for name in ("torch", "jax", "array_api_strict", "tensorflow", "paddle"):
        make = KINDS[name][0]
        if make:
            w, g = made(make, 0), made(make, 1)
            ours = flatten(lars_update(w, g, lr, decay_lambda=decay))[1]
            for our, their, old in zip(ours, theirs, flatten(w)[1], strict=True):
                largest = (
                    max(1, lr) * np.linalg.norm(values(old)) + abs(values(their)).sum()
                )
                np.testing.assert_allclose(
                    values(our), values(their), rtol=0, atol=1e-6 * largest
                )


# --- init and update ------------------------------------------------------------------

CONFIGS = [
    {},
    {"weight_decay": 0.01, "trust_coefficient": 0.02, "eps": 1e-3},
    {"lr_placement": "outside", "nesterov": True},
    {"dampening": 0.3},
    {"dampening": 0.3, "lr_placement": "outside", "nesterov": True, "maximize": True},
    {"momentum": 0.0, "clip": True},
    {"denominator": "decayed_gradient", "weight_decay": 0.1},
    {"denominator": "gradient", "threshold": 2.0},
    {"denominator": "momentum", "lr_placement": "outside", "dampening": 0.9},
]


def problem(make: Any, steps: int = 4) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    sizes = {"kernel": (4, 3), "bias": (3,), "scale": ()}
    draw = lambda: Container(  # noqa: E731
        {
            name: make(rng.normal(size=size).astype("float32"))
            for name, size in sizes.items()
        }
    )
    return Container(layer=draw()), [Container(layer=draw()) for _ in range(steps)]


def by_hand(params: Any, gradients: list[Any], lr: float, options: dict) -> Any:
    """Step each leaf with `rule.step`, the buffer beginning as None."""
    new, buffers = dict(params.layer), dict.fromkeys(params.layer)
    for g in gradients:
        for key, w in new.items():
            adapted = w.ndim >= 2
            config = Config(**options, adapt=adapted, decay=adapted)
            new[key], buffers[key], _ = rule.step(
                w, g.layer[key], buffers[key], lr, config
            )
    return Container(layer=new), Container(layer=buffers)


def exact(ours: Any, theirs: Any, ulps: int = 0) -> None:
    for our, their in zip(flatten(ours)[1], flatten(theirs)[1], strict=True):
        assert dtype_name(our) == dtype_name(their)
        largest = abs(values(their)).max()
        assert abs(values(our) - values(their)).max() <= ulps * 2**-23 * largest


@kinds("numpy", "torch", "jax", "array_api_strict")
@pytest.mark.parametrize("options", CONFIGS)
def test_update_is_the_rule_leaf_by_leaf(name, make, options):
    params, gradients = problem(make)
    start = {key: values(w).copy() for key, w in params.layer.items()}
    theirs, buffers = by_hand(params, gradients, 0.5, options)
    state, ours = functional.init(params), params
    for g in gradients:
        ours, state = functional.update(ours, g, state, 0.5, **options)
    ulps = 8 if name == "jax" else 0
    exact(ours, theirs, ulps)
    exact(state.momentum, buffers, ulps)
    assert int(state.count) == len(gradients)
    assert type(ours.layer) is Container
    for key, w in params.layer.items():
        assert (values(w) == start[key]).all(), "the input is left alone"


@pytest.mark.parametrize("options", CONFIGS)
def test_update_under_jit_and_scan_with_traced_hyperparameters(options):
    params, gradients = problem(jnp.array)
    theirs, buffers = by_hand(params, gradients, 0.5, options)
    names = ("momentum", "weight_decay", "trust_coefficient", "eps", "dampening")
    traced = {"weight_decay": 0.0} | {k: v for k, v in options.items() if k in names}
    fixed = {k: v for k, v in options.items() if k not in names}

    @jax.jit
    def train(params, gradients, lr, traced):
        def step(carry, g):
            return functional.update(carry[0], g, carry[1], lr, **traced, **fixed), None

        start = params, functional.init(params)
        return jax.lax.scan(step, start, gradients)[0]

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    ours, state = train(params, stacked, 0.5, traced)
    assert int(state.count) == len(gradients)
    exact(ours, theirs, 16)
    exact(state.momentum, buffers, 64)


def test_update_compiles_once():
    params, gradients = problem(jnp.array)
    traces = []

    @jax.jit
    def step(params, g, state, lr):
        traces.append(lr)
        return functional.update(params, g, state, lr, dampening=0.5)

    state = functional.init(params)
    for i, g in enumerate(gradients):
        params, state = step(params, g, state, 0.1 * i)
    assert len(traces) == 1


@kinds("tensorflow", "paddle")
@pytest.mark.parametrize("options", CONFIGS)
def test_update_through_the_shims(name, make, options):
    numpy_params, numpy_gradients = problem(np.array)
    theirs, _ = by_hand(numpy_params, numpy_gradients, 0.5, options)
    params, gradients = problem(make)
    state = functional.init(params)
    for g in gradients:
        params, state = functional.update(params, g, state, 0.5, **options)
    assert framework(state.count) == name
    exact(params, theirs, 8)


@pytest.mark.skipif(not tf, reason="tensorflow is missing")
def test_update_in_a_tensorflow_function_traces_once():
    traces = []

    @tf.function
    def step(w, g, state):
        traces.append(state.count)
        return functional.update(w, g, state, 0.5, dampening=0.3)

    w, g = tf.constant(W), tf.constant(G)
    state = functional.init(w)
    ours = w
    for _ in range(3):
        ours, state = step(ours, g, state)
    theirs, numpy_state = W, functional.init(W)
    for _ in range(3):
        theirs, numpy_state = functional.update(
            theirs, G, numpy_state, 0.5, dampening=0.3
        )
    agree(ours, theirs, 1e-7)
    assert len(traces) == 1


@pytest.mark.skipif(not tf, reason="tensorflow is missing")
def test_update_of_tensorflow_variables():
    w, g = {"a": tf.Variable(W)}, {"a": tf.constant(G)}
    ours, state = functional.update(w, g, functional.init(w), 0.5, momentum=0.5)
    theirs, _ = functional.update(
        {"a": W}, {"a": G}, functional.init({"a": W}), 0.5, 0.5
    )
    agree(ours["a"], theirs["a"], 2**-52)
    assert int(state.count) == 1


def selected(options: dict) -> dict[str, tuple[bool, bool]]:
    """Find out which layers `update` adapts and decays, from what it does."""
    params, (g,) = problem(np.array, steps=1)
    ones = Container(layer={key: np.ones_like(w) for key, w in params.layer.items()})
    found = {}
    for name, hyper in (
        ("adapt", {}),
        ("decay", {"weight_decay": 1.0, "adapt": False}),
    ):
        hyper = hyper | ({k: v for k, v in options.items() if k == name})
        new, _ = functional.update(ones, g, functional.init(ones), 1.0, **hyper)
        plain = {key: 1 - g.layer[key] for key in g.layer}
        found[name] = {
            key: not np.allclose(new.layer[key], plain[key]) for key in g.layer
        }
    return {key: (found["adapt"][key], found["decay"][key]) for key in g.layer}


BOTH, NEITHER = (True, True), (False, False)


@pytest.mark.parametrize(
    ("options", "kernel", "bias"),
    [
        ({}, BOTH, NEITHER),
        ({"adapt": True, "decay": True}, BOTH, BOTH),
        ({"adapt": False, "decay": False}, NEITHER, NEITHER),
        ({"adapt": "*.bias", "decay": "layer.ker*"}, (False, True), (True, False)),
        ({"adapt": ["*.bias", "*.kernel"]}, BOTH, (True, False)),
        ({"decay": lambda name, x: name == "layer.bias"}, (True, False), (False, True)),
    ],
)
def test_update_selects_layers_by_their_paths(options, kernel, bias):
    found = selected(options)
    assert found["kernel"] == kernel
    assert found["bias"] == bias


def test_state_is_as_wide_as_the_parameters():
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.complex64):
        w = torch.ones(3, 2, dtype=dtype, requires_grad=True)
        state = functional.init([w])
        assert state.count == 0
        assert state.momentum[0].dtype == dtype
        assert not state.momentum[0].any()
        assert not state.momentum[0].requires_grad
        new, state = functional.update([w], [w], state, 0.1)
        assert new[0].dtype == state.momentum[0].dtype == dtype


def test_update_may_have_a_rate_for_each_layer():
    w, g = {"a": W, "b": W}, {"a": G, "b": G}
    new, _ = functional.update(w, g, functional.init(w), {"a": 0.5, "b": 0.0})
    assert (new["b"] == W).all()
    assert (new["a"] != W).all()


def test_update_is_differentiable():
    w, g = (torch.tensor(x, requires_grad=True) for x in (W, G))
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def train(w, g, lr):
        state = functional.init(w)
        for _ in range(2):
            w, state = functional.update(w, g, state, lr, trust_coefficient=0.1)
        return w

    assert torch.autograd.gradcheck(train, (w, g, lr))


STATE = functional.init([W])
UPDATE_ERRORS: list[tuple[Any, dict, type[Exception], str]] = [
    (([W], [G[0]], STATE, 0.1), {}, ValueError, r"grads at '0' has the shape \(3,\)"),
    (([W], [], STATE, 0.1), {}, ValueError, "grads misses '0'"),
    (
        ([W], [G], functional.init([W, W]), 0.1),
        {},
        ValueError,
        "state.momentum has the",
    ),
    (
        ([W], [G], functional.init([T]), 0.1),
        {},
        TypeError,
        "state.momentum at '0' is a T",
    ),
    (
        (["w"], [G], STATE, 0.1),
        {},
        TypeError,
        "params at '0' is a str, expected an array",
    ),
    (([W], [G], STATE, -1), {}, ValueError, "lr at '0' must be a finite number"),
    (
        ([W], [G], STATE, 0.1, 1.5),
        {},
        ValueError,
        "momentum must be at least 0 and below",
    ),
    (([W], [G], STATE, 0.1, 0.9, -1), {}, ValueError, "weight_decay must be a finite"),
    (
        ([W], [G], STATE, 0.1),
        {"denominator": "x"},
        ValueError,
        "denominator must be one",
    ),
    (([W], [G], STATE, 0.1), {"adapt": "bias"}, ValueError, "adapt='bias' matches no"),
    (
        ([W], [G], STATE, 0.1),
        {"decay": 3},
        TypeError,
        "decay must be None, True, False",
    ),
    (
        ([W], [G], STATE, 0.1),
        {"momentum": 0, "dampening": 0.5},
        ValueError,
        "dampening=0.5 needs a momentum above 0",
    ),
]


@pytest.mark.parametrize(("given", "options", "error", "message"), UPDATE_ERRORS)
def test_update_says_what_is_wrong(given, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        functional.update(*given, **options)


def test_init_refuses_what_cannot_be_stepped():
    with pytest.raises(TypeError, match="params at 'a' has the dtype int64"):
        functional.init({"a": np.arange(3)})
    assert functional.init({}) == (0, {})


def test_hyperparameters_are_those_of_the_configuration():
    import inspect

    names = [*inspect.signature(functional.update).parameters.values()][4:]
    fields = [f for f in dataclasses.fields(Config) if f.name != "zero_guard"]
    assert [p.name for p in names] == [f.name for f in fields]
    for p, f in zip(names, fields, strict=True):
        assert p.default == (None if f.name in ("adapt", "decay") else f.default)


# The native engine, which moves NumPy arrays and CPU tensors


def by_the_rule(monkeypatch, move):
    with monkeypatch.context() as patch:
        patch.setattr(native, "unavailable", lambda: "not now")
        return move()


def natively(monkeypatch, move):
    """Return what `move` does, and how many kinds of layers the C++ kernel took."""
    taken = []
    step_ = native.Group.step_

    def counted(group, *args, **options):
        taken.append(len(group.weights))
        return step_(group, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(native.Group, "step_", counted)
        return move(), taken


def nested_arrays(make, dtype="float32") -> Any:
    generator = np.random.default_rng(0)

    def leaf(*shape):
        return make(generator.standard_normal(shape).astype(dtype))

    return {
        "a": [leaf(40, 30), leaf(7), leaf()],
        "b": {"c": leaf(0, 3), "d": leaf(2000)},
    }


def equal(a, b):
    pairs = zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    return all(x.dtype == y.dtype and bool((x == y).all()) for x, y in pairs)


HERE = {"numpy": np.asarray, "torch": torch.from_numpy}


@pytest.mark.parametrize("make", HERE.values(), ids=HERE)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_native_engine_moves_layers_to_the_bit(monkeypatch, make, dtype, decay):
    w, g = nested_arrays(make, dtype), nested_arrays(make, dtype)

    def move():
        return lars_update(w, g, 0.3, decay_lambda=decay)

    found, taken = natively(monkeypatch, move)
    assert taken == [5]
    assert equal(found, by_the_rule(monkeypatch, move))


@pytest.mark.parametrize("make", HERE.values(), ids=HERE)
def test_the_native_engine_writes_out(monkeypatch, make):
    g = nested_arrays(make)
    expected = by_the_rule(
        monkeypatch, lambda: lars_update(nested_arrays(make), g, 0.3)
    )
    for out in (nested_arrays(make), None):
        w = nested_arrays(make)
        out = w if out is None else out
        _, taken = natively(
            monkeypatch, lambda w=w, o=out: lars_update(w, g, 0.3, out=o)
        )
        assert taken == [5]
        assert equal(out, expected)


@pytest.mark.parametrize(("rates", "rows"), [(0.3, []), ([0.3, 0.2], [1, 1])])
def test_out_that_is_other_weights_is_written_last(monkeypatch, rates, rows):
    def swapped(out):
        w = [np.arange(4.0), np.arange(4.0) + 5]
        out = [w[1], w[0]] if out else None
        return lars_update(w, [np.ones(4), np.ones(4)], rates, out=out)

    expected = by_the_rule(monkeypatch, lambda: swapped(out=False))
    found, taken = natively(monkeypatch, lambda: swapped(out=True))
    assert taken == rows
    assert equal(found, expected)


def test_kinds_that_the_native_engine_leaves(monkeypatch):
    w = {"here": np.ones(3), "complex": np.ones(3) + 1j, "jax": jnp.ones(3)}
    g = {"here": np.ones(3), "complex": np.ones(3) - 1j, "jax": jnp.ones(3)}
    found, taken = natively(monkeypatch, lambda: lars_update(w, g, 0.3))
    assert taken == [1]
    assert equal(found, by_the_rule(monkeypatch, lambda: lars_update(w, g, 0.3)))
    rates = {"here": 0.3, "complex": 0.1, "jax": 0.2}
    found, taken = natively(monkeypatch, lambda: lars_update(w, g, rates))
    assert equal(found, by_the_rule(monkeypatch, lambda: lars_update(w, g, rates)))


@pytest.mark.parametrize("make", HERE.values(), ids=HERE)
def test_the_native_engine_takes_steps_with_momentum(monkeypatch, make):
    def run():
        w, state = nested_arrays(make), functional.init(nested_arrays(make))
        for i in range(3):
            g = optree.tree_map(lambda x, i=i: x * (i + 1), nested_arrays(make))
            options: Any = {"nesterov": True, "dampening": 0.2, "weight_decay": 0.1}
            w, state = functional.update(w, g, state, 0.3, **options)
        return [w, state.momentum]

    found, taken = natively(monkeypatch, run)
    assert taken == [5] * 3
    assert equal(found, by_the_rule(monkeypatch, run))


def test_what_is_recorded_is_left_to_the_rule(monkeypatch):
    w = torch.ones(3, requires_grad=True)

    def move():
        return lars_update(w, torch.arange(3.0), 0.1, stop_gradients=False)

    new, taken = natively(monkeypatch, move)
    assert taken == []
    assert new.requires_grad
    with torch.no_grad():
        new, taken = natively(monkeypatch, move)
    assert taken == [1]
    assert not new.requires_grad
