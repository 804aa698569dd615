"""`larskit.lars_update` beside the real `ivy.lars_update`, on ivy's own types.

Run inside ivy's environment; `tests/interop/test_live.py` does it.
"""

import contextlib
import functools
import inspect
import tempfile
from typing import Any

import implementations
import numpy as np
import pytest

import larskit

# ivy leaves a log file in the working folder that it is imported in.
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    import ivy  # pyright: ignore[reportMissingImports]

BACKENDS = ("numpy", "torch", "jax")
NUMBERS = {
    "w": ([3.2, -2.6, 1.3], [[1.4, 3.1], [5.1, 0.2]]),
    "dcdw": ([0.2, 0.4, -0.1], [[0.3, 0.1], [-0.2, 7.0]]),
    "lr": (0.1, 0.03),
    "zeros": ([0.0, 0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]),
    "ones": ([1.0, 1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]]),
}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    ivy.set_backend(request.param)
    yield request.param
    ivy.unset_backend()


def container(what: str, dtype: str = "float32") -> Any:
    b, k = (ivy.array(x, dtype=dtype) for x in NUMBERS[what])
    return ivy.Container(b=b, a=ivy.Container(k=k))


def assert_agree(ours: Any, theirs: Any, dtype: str = "float32") -> None:
    """Check the types of ivy, ivy's dtype, and the numbers to 2e-6 of the largest."""
    assert type(ours) is type(theirs)
    if isinstance(ours, ivy.Container):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_agree(ours[key], theirs[key], dtype)
        return
    assert type(ours) is ivy.Array
    assert type(ours.data) is type(theirs.data)
    assert str(ours.dtype) == str(theirs.dtype) == dtype
    ours, theirs = (np.asarray(x.to_numpy(), np.float64) for x in (ours, theirs))
    assert np.abs(ours - theirs).max() <= 2e-6 * np.abs(theirs).max()


def parameters(function: Any) -> list[Any]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


def test_signatures_are_those_of_ivy():
    assert parameters(larskit.lars_update) == parameters(ivy.lars_update)
    for kind in ("Array", "Container"):
        ours, theirs = getattr(larskit, kind), getattr(ivy, kind)
        assert parameters(ours.lars_update) == parameters(theirs.lars_update)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, "float32") for backend in BACKENDS),
        *((backend, "float64") for backend in ("numpy", "torch")),  # JAX has none
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize("lr", [0.1, 0.0, 2])
def test_arrays(lr, dtype):
    w, g = container("w", dtype).a.k, container("dcdw", dtype).a.k
    theirs = ivy.lars_update(w, g, lr)
    assert_agree(larskit.lars_update(w, g, lr), theirs, dtype)
    assert_agree(
        larskit.lars_update(w, g.data, ivy.array(lr, dtype=dtype)), theirs, dtype
    )
    native = larskit.lars_update(w.data, g.data, lr)
    assert_agree(ivy.Array(native), theirs, dtype)
    assert type(native) is type(w.data)


def test_containers_for_weights_gradients_and_rates():
    w, g, lr = container("w"), container("dcdw"), container("lr")
    assert_agree(larskit.lars_update(w, g, 0.1), ivy.lars_update(w, g, 0.1))
    assert_agree(larskit.lars_update(w, g, lr), ivy.lars_update(w, g, lr))
    assert_agree(larskit.lars_update(w, g, lr.b), ivy.lars_update(w, g, lr.b))


def test_one_gradient_serves_every_leaf():
    w, g = container("w"), ivy.array([0.3, 0.1, 0.2])
    w = ivy.Container(a=w.b, c=ivy.Container(d=w.b * 2))
    assert_agree(larskit.lars_update(w, g, 0.1), ivy.lars_update(w, g, 0.1))


def test_our_container_and_array_hold_those_of_ivy():
    w, g = container("w"), container("dcdw")
    ours = larskit.Container(w).lars_update(g, 0.1)
    assert type(ours) is type(ours.a) is larskit.Container
    assert_agree(ivy.Container(ours), ivy.lars_update(w, g, 0.1))
    one = larskit.Array(w.b.data).lars_update(g.b, 0.1)
    assert_agree(ivy.Array(one.native), ivy.lars_update(w.b, g.b, 0.1))


def test_out_receives_the_result():
    w, g = container("w"), container("dcdw")
    expected = ivy.lars_update(w, g, 0.1)
    out = container("zeros")
    b = out.b
    assert larskit.lars_update(w, g, 0.1, out=out) is out
    assert_agree(out, expected)
    assert out.b is b, "the arrays of `out` themselves are written"
    assert_agree(w, container("w"))
    assert larskit.lars_update(w.b, g.b, 0.1, out=b) is b
    assert_agree(b, expected.b)
    assert larskit.lars_update(w, g, 0.1, out=w) is w
    assert_agree(w, expected)


def test_out_writes_the_native_array_where_that_is_possible(backend):
    out = container("zeros").b
    native = out.data
    larskit.lars_update(container("w").b, container("dcdw").b, 0.1, out=out)
    assert (out.data is native) == (backend != "jax")


def test_a_layer_without_gradient_stands_still():
    w, g = container("w"), container("zeros")
    assert_agree(larskit.lars_update(w, g, 0.1), ivy.lars_update(w, g, 0.1))


def test_a_layer_of_zeros_stands_still_in_ivy_and_moves_here():
    w, g = container("zeros").b, container("ones").b
    assert_agree(ivy.lars_update(w, g, 0.1), w)
    assert_agree(larskit.lars_update(w, g, 0.1), g * -0.1)


@pytest.mark.parametrize("backend", ["numpy"], indirect=True)
def test_the_configuration_of_the_page_is_ivy_without_decay():
    def theirs():
        weights = {k: to_ivy(w) for k, w in implementations.WEIGHTS.items() if w.any()}
        for gradients, lr in implementations.steps():
            for k, w in weights.items():
                weights[k] = ivy.lars_update(w, to_ivy(gradients[k]), lr)
            yield {k: w.data for k, w in weights.items()}

    to_ivy = functools.partial(ivy.array, dtype="float64")
    ours = implementations.larskit_run(
        **implementations.configurations()["ivy.lars_update"]
    )
    implementations.assert_same(ours, theirs())


def test_with_a_decay_a_layer_of_zeros_is_nan_in_ivy():
    w, g = container("zeros").b, container("ones").b
    assert np.isnan(np.asarray(ivy.lars_update(w, g, 0.1, decay_lambda=0.5))).all()
    assert_agree(larskit.lars_update(w, g, 0.1, decay_lambda=0.5), g * -0.1)


def test_with_a_decay_ivy_loses_the_weights():
    """The one deliberate difference: see the notes of `larskit.lars_update`."""
    w, g, lr, decay = container("w").b, container("dcdw").b, 0.1, 0.5
    g_norm = ivy.vector_norm(g)
    assert_agree(
        ivy.lars_update(w, g, lr, decay_lambda=decay), w - lr / decay * g / g_norm
    )
    w_norm = ivy.vector_norm(w)
    rate = lr * w_norm / (g_norm + decay * w_norm)
    ours = larskit.lars_update(w, g, lr, decay_lambda=decay)
    assert_agree(ours, w - rate * (g + decay * w))


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_gradients_flow_through_the_result_or_are_stopped():
    w, g = container("w").b, container("dcdw").b
    w.data.requires_grad_()
    assert not larskit.lars_update(w, g, 0.1).data.requires_grad
    larskit.lars_update(w, g, 0.1, stop_gradients=False).data.sum().backward()
    ours, w.data.grad = w.data.grad, None
    ivy.lars_update(w, g, 0.1, stop_gradients=False).data.sum().backward()
    assert_agree(ivy.Array(ours), ivy.Array(w.data.grad))


def test_errors_name_the_leaf_of_an_ivy_container():
    w, g = container("w"), container("dcdw")
    g.a.k = ivy.array([1.0])
    with pytest.raises(ValueError, match=r"dcdw at 'a.k' has the shape \(1,\)"):
        larskit.lars_update(w, g, 0.1)
