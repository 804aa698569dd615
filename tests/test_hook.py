import copy
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR

from larskit import GradientLARS
from larskit.engines import native
from larskit.rule import scaled_gradient

SHAPES = ((5, 3), (3,), (2, 2, 2), (4,), (2, 3))
SHORT, WITHOUT_GRADIENT = 3, 4  # of SHAPES: below the threshold; frozen
PLAIN = {"threshold": 0.0, "eps": 0.0}
HOOKS = [
    {},
    {"weight_decay": 0.1},
    {"threshold": 1.5, "weight_decay": 0.3, "eps": 0.5},
    {"threshold": 0.0, "eps": 0.0},
]


def rescaled(
    w: Any,
    g: Any,
    threshold: float = 1e-2,
    weight_decay: float = 0.0,
    eps: float = 1e-9,
) -> np.ndarray:
    """The hook restated, in float64."""
    w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
    w_norm = np.linalg.norm(w)
    r = w_norm / (eps + np.linalg.norm(g) + weight_decay * w_norm)
    return (g + weight_decay * w) * (r if w_norm > threshold else 1.0)


def layer(w: Any, g: Any) -> SimpleNamespace:
    return SimpleNamespace(data=w, grad=g)


def numbers(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    found = [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]
    found[SHORT] *= 1e-4
    return found


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.from_numpy(w)) for w in numbers(0)]


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    for i, (p, g) in enumerate(zip(params, numbers(seed), strict=True)):
        p.grad = None if i == WITHOUT_GRADIENT else torch.from_numpy(g)


def set_rescaled(params: list[torch.nn.Parameter], **hook: Any) -> None:
    """Do by hand what an attached hook does."""
    for p in params:
        if p.grad is not None:
            p.grad = torch.from_numpy(rescaled(p.detach(), p.grad, **hook)).float()


def quadratic(params: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.stack([((p - 1) ** 2).sum() for p in params]).sum()


@contextmanager
def kept(params: list[torch.nn.Parameter]) -> Iterator[None]:
    """Assert that the gradients are the same objects with the same bits afterwards."""
    before = [(p.grad, None if p.grad is None else bits(p.grad)) for p in params]
    yield
    for p, (g, stored) in zip(params, before, strict=True):
        assert p.grad is g
        assert g is None or bits(g) == stored


def bits(x: torch.Tensor) -> bytes:
    return x.detach().clone().numpy().tobytes()


def moves_like_lars(optimizer: Any, params: list[torch.nn.Parameter]) -> bool:
    """Whether a step at rate 1/8 moves each layer by an eighth of its norm."""
    before = [p.detach().clone() for p in params]
    optimizer.step()
    moved = [
        ((p.detach() - w).norm() / w.norm()).item()
        for p, w in zip(params, before, strict=True)
        if p.grad is not None
    ]
    return moved == pytest.approx([1 / 8] * len(moved), rel=1e-5)


def assert_equal_weights(found: Any, expected: Any) -> None:
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q)


# --- Chainer's protocol ---------------------------------------------------------------


def test_signature_and_attributes_are_the_seeds() -> None:
    signature = str(inspect.signature(GradientLARS)).replace(": Any", "")
    assert signature.startswith("(threshold = 0.01, weight_decay = 0.0, eps = 1e-09)")
    assert GradientLARS.name == "GradientLARS"
    assert GradientLARS.timing == "pre"
    assert GradientLARS.call_for_each_param is True
    hook = GradientLARS(0.5, 0.25, 0.125)
    assert (hook.threshold, hook.weight_decay, hook.eps) == (0.5, 0.25, 0.125)


def test_compares_and_hashes_by_identity() -> None:
    hook, twin = GradientLARS(), GradientLARS()
    assert hook == hook
    assert hook != twin
    assert hash(hook) != hash(twin)
    assert len({hook, twin, hook}) == 2
    for compare in ("__lt__", "__le__", "__gt__", "__ge__"):
        assert getattr(hook, compare)(twin) is NotImplemented
    with pytest.raises(TypeError, match="not supported"):
        _ = hook < twin  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("attribute", ["data", "array"])
def test_rescales_in_place(hook: dict[str, Any], attribute: str) -> None:
    for w, g in zip(numbers(0), numbers(1), strict=True):
        expected, untouched = rescaled(w, g, **hook), w.copy()
        param = SimpleNamespace(**{attribute: w}, grad=g)
        assert GradientLARS(**hook)(None, param) is None
        assert param.grad is g
        np.testing.assert_allclose(g, expected, rtol=1e-6)
        np.testing.assert_array_equal(w, untouched)


@pytest.mark.parametrize("hook", HOOKS)
def test_rescales_a_torch_parameter_in_place(hook: dict[str, Any]) -> None:
    p = parameters()[0]
    p.grad = g = torch.ones(5, 3)
    expected = rescaled(p.detach(), g, **hook)
    GradientLARS(**hook)(None, p)
    assert p.grad is g
    np.testing.assert_allclose(g, expected, rtol=1e-6)


def test_leaves_the_graph_of_a_gradient_alone() -> None:
    p = parameters()[0]
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    graph = p.grad.grad_fn
    GradientLARS()(None, p)
    assert p.grad.grad_fn is graph


BASE = np.arange(24, dtype="float32").reshape(4, 6) + 1
FIXED = BASE.copy()
FIXED.flags.writeable = False
ONE_BY_ONE = {
    "float16": (BASE.astype("float16"), BASE.astype("float16"), True),
    "float32": (BASE, BASE.copy(), True),
    "float64": (BASE.astype("float64"), BASE.astype("float64"), True),
    "large": (np.ones((1024, 1024), "f4"), np.ones((1024, 1024), "f4"), True),
    "fixed weights": (FIXED, BASE.copy(), True),
    "no dimension": (np.array(3.0), np.array(0.5), True),
    "empty": (np.ones((0, 3)), np.ones((0, 3)), True),
    "fixed gradient": (BASE, FIXED, False),
    "strided": (BASE, np.ones((4, 12), "f4")[:, ::2], False),
    "transposed": (BASE.T, np.ones((6, 4), "f4").T.copy().T, False),
    "other dtype": (BASE, BASE.astype("float64"), False),
    "other byte order": (BASE.astype(">f4"), BASE.astype(">f4"), False),
    "other shape": (BASE, BASE[:2].copy(), False),
    "one array": (BASE, BASE, False),
    "integers": (BASE.astype("int32"), BASE.astype("int32"), False),
    "tensors": (torch.ones(3), torch.ones(3), False),
}


@pytest.mark.parametrize("what", ONE_BY_ONE)
def test_arrays_that_are_rescaled_one_by_one(what: str) -> None:
    w, g, taken = ONE_BY_ONE[what]
    config = GradientLARS(weight_decay=0.01, eps=0.1).config()
    before = g.copy() if isinstance(g, np.ndarray) else g.clone()
    assert native.ArrayScaler(config)(w, g) is taken
    expected = scaled_gradient(w, before, config) if taken else before
    assert bool((g == expected).all())


def test_the_native_engine_rescales_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook = GradientLARS(weight_decay=0.01)
    taken = []
    scale_gradients = native.Group.scale_gradients

    def counted(group: Any, *arguments: Any) -> Any:
        taken.append(len(group.weights))
        return scale_gradients(group, *arguments)

    def rescaled() -> Any:
        generator = np.random.default_rng(0)
        w = generator.standard_normal((2, 3000)).astype("float32")
        layer = SimpleNamespace(data=w[0], grad=w[1] * 0.1)
        hook(None, layer)
        first, second = parameters(), parameters()
        optimizer = torch.optim.SGD([*first, *second], lr=0.1)
        for p in second:
            p.data = p.data.bfloat16()
        for p in (*first, *second):
            p.grad = torch.ones_like(p) * 0.3
        with hook.attach(optimizer):
            optimizer.step()
        return [torch.from_numpy(layer.grad), *first, *second]

    with monkeypatch.context() as patch:
        patch.setattr(native.Group, "scale_gradients", counted)
        found = rescaled()
    assert taken == [len(parameters())] * 2
    monkeypatch.setattr(native, "unavailable", lambda: "not now")
    monkeypatch.setattr(native.ArrayScaler, "__call__", lambda self, w, g: False)
    assert all(map(torch.equal, found, rescaled()))


@pytest.mark.parametrize("missing", ["data", "grad"])
def test_skips_what_is_unset(missing: str) -> None:
    param = layer(np.ones(2), np.ones(2))
    setattr(param, missing, None)
    GradientLARS(weight_decay=0.1)(None, param)
    assert param.data is None or (param.data == 1).all()
    assert param.grad is None or (param.grad == 1).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_keeps_the_dtype_and_does_not_overflow(dtype: str) -> None:
    w = np.full((300, 300), 100, dtype)  # the sum of squares exceeds float16
    g = np.full((300, 300), 200, dtype)
    GradientLARS(**PLAIN)(None, layer(w, g))
    assert g.dtype == dtype
    np.testing.assert_array_equal(g, w)


def test_nan_stays_nan() -> None:
    g = np.array([1.0, np.nan])
    GradientLARS()(None, layer(np.ones(2), g))
    assert np.isnan(g).all()


def test_a_gradient_of_zeros_decays_as_in_chainer() -> None:
    w, g = np.array([3.0, 4.0]), np.zeros(2)
    GradientLARS(weight_decay=0.01, eps=0.0)(None, layer(w, g))
    np.testing.assert_allclose(g, w)


@given(
    w=st.lists(st.floats(0.5, 100), min_size=1, max_size=40),
    factor=st.floats(1e-6, 1e6),
    seed=st.integers(0, 99),
)
def test_length_of_the_weights_whatever_the_scale_of_the_gradient(
    w: list[float], factor: float, seed: int
) -> None:
    g = np.random.default_rng(seed).normal(size=len(w))
    scaled = factor * g
    for gradient in (g, scaled):
        GradientLARS(**PLAIN)(None, layer(np.array(w), gradient))
    np.testing.assert_allclose(np.linalg.norm(g), np.linalg.norm(w))
    np.testing.assert_allclose(scaled, g)


WRONG = [
    ({"threshold": -1}, ValueError, "threshold must be .* at least 0, got -1"),
    ({"threshold": float("nan")}, ValueError, "threshold must be"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be .*, got -0.1"),
    ({"weight_decay": float("inf")}, ValueError, "weight_decay must be"),
    ({"eps": -1e-9}, ValueError, "eps must be .* at least 0"),
    ({"eps": None}, TypeError, "eps must be .*, got None: pass a number"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_refuses_wrong_hyperparameters_when_made_and_when_changed(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GradientLARS(**wrong)
    hook = GradientLARS()
    for name, value in wrong.items():
        setattr(hook, name, value)
    g = np.ones(2)
    with pytest.raises(error, match=message):
        hook(None, layer(np.ones(2), g))
    np.testing.assert_array_equal(g, 1)


def test_copies_after_a_call() -> None:
    hook = GradientLARS(weight_decay=0.5)
    hook(None, SimpleNamespace(data=np.ones(2), grad=np.ones(2)))
    for other in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert vars(other) == {"threshold": 1e-2, "weight_decay": 0.5, "eps": 1e-9}


def test_a_changed_attribute_counts_from_the_next_call() -> None:
    hook = GradientLARS()
    hook.weight_decay, hook.eps = 0.5, 0.25
    w, g = numbers(0)[0], numbers(1)[0]
    expected = rescaled(w, g, weight_decay=0.5, eps=0.25)
    hook(None, layer(w, g))
    np.testing.assert_allclose(g, expected, rtol=1e-6)


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


REFUSED = [
    (np.ones(2), np.ones(3), ValueError, r"param.grad has the shape \(3,\).* \(2,\)"),
    (np.ones(2), [1.0, 1.0], TypeError, "param.grad is a list, expected an array"),
    (np.ones(2, int), np.ones(2), TypeError, "param.data has the dtype int64"),
    (np.ones(2), np.ones(2, int), TypeError, "param.grad has the dtype int64"),
    (np.ones(2), read_only(np.ones(2)), TypeError, "read-only, but the hook writes"),
    (jnp.ones(2), jnp.ones(2), TypeError, "param.grad is a JAX array"),
    (
        torch.ones(2),
        torch.ones(2).to_sparse(),
        TypeError,
        "param.grad is a Tensor of a kind .*sparse",
    ),
]


@pytest.mark.parametrize(("w", "g", "error", "message"), REFUSED)
def test_refuses_what_it_cannot_rescale(
    w: Any, g: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GradientLARS()(None, layer(w, g))


# --- attached to a torch optimizer ----------------------------------------------------


INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
    "loop": lambda p: torch.optim.SGD(p, 0.1, 0.9, foreach=False),
    "foreach": lambda p: torch.optim.SGD(p, 0.1, 0.9, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, 0.1, 0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adam fused": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1),
    "calls its parent": lambda p: CallsItsParent(p, 0.1),
}


class CallsItsParent(torch.optim.SGD):
    """PyTorch runs the pre-hooks of such an optimizer twice in a step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.fixture
def params() -> list[torch.nn.Parameter]:
    found = parameters()
    set_gradients(found, 1)
    return found


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
def test_any_optimizer_steps_with_the_rescaled_gradient(
    make: Callable[..., torch.optim.Optimizer], hook: dict[str, Any]
) -> None:
    params, plain = parameters(), parameters()
    optimizer, by_hand = make(params), make(plain)
    GradientLARS(**hook).attach(optimizer)
    for seed in range(1, 5):
        set_gradients(params, seed)
        set_gradients(plain, seed)
        set_rescaled(plain, **hook)
        with kept(params):
            optimizer.step()
        by_hand.step()
        assert_equal_weights(params, plain)


def test_several_groups_and_one_that_came_later(params: Any) -> None:
    plain = parameters()
    groups = [
        [{"params": p[:2], "lr": 0.5}, {"params": p[2:4]}] for p in (params, plain)
    ]
    optimizer, by_hand = (torch.optim.SGD(group, 0.1) for group in groups)
    GradientLARS().attach(optimizer)
    optimizer.add_param_group({"params": params[4], "lr": 0.2})
    by_hand.add_param_group({"params": plain[4], "lr": 0.2})
    for p, q in zip(params, plain, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    set_rescaled(plain)
    optimizer.step()
    by_hand.step()
    assert_equal_weights(params, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    w = torch.nn.Parameter(torch.full((3,), 2.0, dtype=dtype))
    w.grad = torch.full((3,), 4.0, dtype=dtype)
    optimizer = torch.optim.SGD([w], 0.5)
    GradientLARS(**PLAIN).attach(optimizer)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.ones(3, dtype=dtype), rtol=0, atol=0)


def test_accumulated_gradients_stay_raw() -> None:
    params, plain = parameters(), parameters()
    optimizer, by_hand = (torch.optim.SGD(p, 0.1) for p in (params, plain))
    GradientLARS(weight_decay=0.1).attach(optimizer)
    for _ in range(2):  # never zeroed: the second sum grows out of the first
        for p in (params, plain):
            quadratic(p).backward()
            quadratic(p).backward()
        raw = [(q.grad, torch.clone(q.grad)) for q in plain if q.grad is not None]
        set_rescaled(plain, weight_decay=0.1)
        with kept(params):
            optimizer.step()
        by_hand.step()
        for q, (g, stored) in zip(plain, raw, strict=True):
            torch.testing.assert_close(g, stored, rtol=0, atol=0)
            q.grad = g
        assert_equal_weights(params, plain)


class Fails(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        raise RuntimeError("the step fails")


def test_gradients_are_put_back_when_the_step_raises(params: Any) -> None:
    optimizer = Fails(params, 0.1)
    GradientLARS().attach(optimizer)
    with kept(params), pytest.raises(RuntimeError, match="the step fails"):
        optimizer.step()


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closure_runs_first_and_on_its_own_gradients(as_keyword: bool) -> None:
    params, plain = parameters(), parameters()
    optimizer, by_hand = (torch.optim.SGD(p, 0.1, 0.9) for p in (params, plain))
    GradientLARS(weight_decay=0.1).attach(optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = quadratic(params)
        loss.backward()
        return loss

    for _ in range(3):
        expected = quadratic(params).item()
        arguments = {"closure": closure} if as_keyword else {}
        positional = () if as_keyword else (closure,)
        loss = optimizer.step(*positional, **arguments)
        by_hand.zero_grad()
        quadratic(plain).backward()
        raw = [q.grad for q in plain]
        set_rescaled(plain, weight_decay=0.1)
        by_hand.step()
        assert loss is not None
        assert loss.item() == expected
        assert_equal_weights(params, plain)
        for p, g in zip(params, raw, strict=True):
            torch.testing.assert_close(p.grad, g)


def test_lbfgs_calls_its_closure_often_and_each_time_on_raw_gradients() -> None:
    params, plain = parameters(), parameters()
    optimizer, by_hand = (
        torch.optim.LBFGS(p, 0.1, max_iter=6, line_search_fn="strong_wolfe")
        for p in (params, plain)
    )
    hook = GradientLARS(weight_decay=0.1)
    hook.attach(optimizer)
    raw: list[Any] = []
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls, raw
        calls += 1
        for p, g in zip(params, raw, strict=bool(raw)):
            assert p.grad is g
        optimizer.zero_grad()
        loss = quadratic(params)
        loss.backward()
        raw = [p.grad for p in params]
        return loss

    def closure_by_hand() -> torch.Tensor:
        by_hand.zero_grad()
        loss = quadratic(plain)
        loss.backward()
        for q in plain:
            hook(None, q)
        return loss

    optimizer.step(closure)
    by_hand.step(closure_by_hand)
    assert calls > 2
    assert all(p.grad is g for p, g in zip(params, raw, strict=True))
    assert_equal_weights(params, plain)


@pytest.mark.parametrize("failing_call", [1, 2])
def test_gradients_are_put_back_when_the_closure_raises(
    params: Any, failing_call: int
) -> None:
    optimizer = torch.optim.LBFGS(params, 0.1)
    GradientLARS().attach(optimizer)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise RuntimeError("the closure fails")
        return quadratic(params)

    with kept(params), pytest.raises(RuntimeError, match="the closure fails"):
        optimizer.step(closure)


def test_step_hooks_see_raw_gradients_before_and_rescaled_ones_after(
    params: Any,
) -> None:
    plain = parameters()
    set_gradients(plain, 1)
    optimizer, by_hand = (torch.optim.SGD(p, 0.1) for p in (params, plain))
    seen: list[Any] = []

    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append(params[0].grad)
        params[0].grad.mul_(0.5)

    optimizer.register_step_pre_hook(halve)
    GradientLARS(weight_decay=0.1).attach(optimizer)
    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(lambda *_: seen.append(params[0].grad))
    own, original = params[0].grad, params[0].grad.clone()
    optimizer.step()
    assert seen[0] is seen[1] is own is params[0].grad
    torch.testing.assert_close(own, original / 4, rtol=0, atol=0)
    plain[0].grad = original / 4
    set_rescaled(plain, weight_decay=0.1)
    torch.testing.assert_close(seen[2], plain[0].grad)
    assert not seen[2].requires_grad
    by_hand.step()
    assert_equal_weights(params, plain)


def test_gradients_dropped_during_the_step_stay_dropped(params: Any) -> None:
    optimizer = torch.optim.SGD(params, 0.1)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    GradientLARS().attach(optimizer)
    optimizer.step()
    assert all(p.grad is None for p in params)


SCALED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, 0.9),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.05, 0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
    "adam fused": lambda p: torch.optim.Adam(p, 0.05, fused=True),
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_a_loss_scale_changes_nothing(
    make: Callable[..., torch.optim.Optimizer], hook: dict[str, Any], clip: bool
) -> None:
    params, plain = parameters(), parameters()
    optimizer, unscaled = make(params), make(plain)
    for each in (optimizer, unscaled):
        GradientLARS(**hook).attach(each)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e4, growth_interval=2)
    for _ in range(5):  # the scale doubles on the way
        optimizer.zero_grad()
        scaler.scale(quadratic(params)).backward()
        unscaled.zero_grad()
        quadratic(plain).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            torch.nn.utils.clip_grad_norm_(plain, 1.0)
        scaler.step(optimizer)
        scaler.update()
        unscaled.step()
        assert_equal_weights(params, plain)
    assert scaler.get_scale() > 3e4


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_gradscaler_skips_a_step_with_an_infinite_gradient(
    params: Any, make: Callable[..., torch.optim.Optimizer]
) -> None:
    optimizer = make(params)
    GradientLARS(weight_decay=0.1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    params[0].grad[0] = torch.inf
    before = [bits(p) for p in params]
    if optimizer.defaults["fused"]:
        with kept(params):
            scaler.step(optimizer)
    else:
        scaler.step(optimizer)  # it unscales the gradients in place
    scaler.update()
    assert [bits(p) for p in params] == before
    assert scaler.get_scale() == 4.0


def test_a_grad_scale_that_nobody_divides_by_is_ignored(params: Any) -> None:
    optimizer: Any = torch.optim.ASGD(params, 0.1)
    by_hand = torch.optim.ASGD(plain := parameters(), 0.1)
    optimizer.grad_scale = torch.tensor(8.0)
    GradientLARS(weight_decay=1.0).attach(optimizer)
    set_gradients(plain, 1)
    set_rescaled(plain, weight_decay=1.0)
    optimizer.step()
    by_hand.step()
    assert_equal_weights(params, plain)


def test_never_waits_for_the_device() -> None:
    with FakeTensorMode():  # refuses to turn a tensor into a number
        w = torch.nn.Parameter(torch.randn(3, 2))
        w.grad = torch.randn(3, 2)
        optimizer: Any = torch.optim.SGD([w], 0.1, fused=True)
        GradientLARS(weight_decay=0.1).attach(optimizer)
        optimizer.grad_scale = torch.full((), 8.0)
        with pytest.raises(DataDependentOutputException):
            bool(w.sum() > 0)
        optimizer.step()


@pytest.mark.parametrize("attached_first", [True, False])
def test_with_a_scheduler(params: Any, attached_first: bool) -> None:
    optimizer = torch.optim.SGD(params, 0.125)
    if not attached_first:
        LambdaLR(optimizer, lambda step: 1.0)
    handle = GradientLARS(**PLAIN).attach(optimizer)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    assert moves_like_lars(optimizer, params)
    scheduler.step()  # would warn if it had not seen the optimizer step
    handle.remove()
    assert not moves_like_lars(optimizer, params)
    scheduler.step()


def test_copies_and_state_come_without_the_hook(params: Any) -> None:
    optimizer = torch.optim.SGD(params, 0.125, 0.9)
    expected = optimizer.state_dict().keys()
    GradientLARS(**PLAIN).attach(optimizer)
    assert moves_like_lars(optimizer, params)
    assert optimizer.state_dict().keys() == expected
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    optimizer.load_state_dict(torch.load(stream, weights_only=True))
    for twin in (
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
    ):
        assert "step" not in vars(twin)
        weights = twin.param_groups[0]["params"]
        for q, p in zip(weights, params, strict=True):
            q.grad = p.grad
        assert not moves_like_lars(twin, weights)


def test_the_signature_of_step_stays(params: Any) -> None:
    optimizer = torch.optim.SGD(params, 0.1)
    expected = inspect.signature(optimizer.step)
    GradientLARS().attach(optimizer)
    assert inspect.signature(optimizer.step) == expected


def test_the_handle_takes_the_hook_off_and_leaves_no_trace(params: Any) -> None:
    optimizer = torch.optim.SGD(params, 0.125)
    with GradientLARS(**PLAIN).attach(optimizer) as handle:
        assert moves_like_lars(optimizer, params)
    assert "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not moves_like_lars(optimizer, params)
    handle.remove()
    assert not moves_like_lars(optimizer, params)


@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("removed", ["first", "last", None])
def test_two_hooks_and_either_removed(removed: str | None, with_closure: bool) -> None:
    params, plain = parameters(), parameters()
    optimizer, by_hand = (torch.optim.SGD(p, 0.1) for p in (params, plain))
    hooks: dict[str, dict[str, Any]] = {
        "last": {"weight_decay": 0.3},
        "first": {"weight_decay": 0.1, "eps": 0.5},
    }
    handles = {
        which: GradientLARS(**hooks[which]).attach(optimizer)
        for which in ("first", "last")
    }
    if removed:
        handles[removed].remove()
    set_gradients(params, 1)
    set_gradients(plain, 1)
    for which, hook in hooks.items():
        if which != removed:
            set_rescaled(plain, **hook)
    closure: Any = (lambda: torch.zeros(())) if with_closure else None
    with kept(params):
        optimizer.step(closure)
    by_hand.step()
    assert_equal_weights(params, plain)
    for handle in handles.values():
        handle.remove()
    assert_equal_weights(params, plain)


def test_a_sparse_gradient_is_refused_before_anything_changes(params: Any) -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = torch.optim.SGD([*params, table.weight], 0.1)
    GradientLARS().attach(optimizer)
    before = [bits(p) for p in params]
    own = table.weight.grad
    with kept(params), pytest.raises(TypeError, match=r"of parameter 5 is .*sparse"):
        optimizer.step()
    assert table.weight.grad is own
    assert [bits(p) for p in params] == before


def test_wrong_hyperparameters_stop_the_step(params: Any) -> None:
    hook = GradientLARS()
    optimizer = torch.optim.SGD(params, 0.1)
    hook.attach(optimizer)
    hook.weight_decay = -1.0
    before = [bits(p) for p in params]
    with kept(params), pytest.raises(ValueError, match="weight_decay must be"):
        optimizer.step()
    assert [bits(p) for p in params] == before


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch import distributed

    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def placed(x: torch.Tensor, mesh: Any, how: str) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if how == "plain":
        return x
    kinds = {"shard": Shard(0), "sum": Partial(), "replica": Replicate()}
    return DTensor.from_local(x, mesh, [kinds[how]], run_check=False)


def test_a_sum_that_is_not_complete_has_no_length(mesh: Any, params: Any) -> None:
    message = "parameter {} is a DTensor placed as .*Partial.*: shard or replicate it"
    bad = torch.nn.Parameter(placed(torch.ones(2), mesh, "sum"))
    bad.grad = torch.zeros_like(bad)
    with pytest.raises(TypeError, match=message.replace("eter {}", r"\.data")):
        GradientLARS()(None, bad)
    optimizer = torch.optim.SGD([bad], 0.1)
    with pytest.raises(TypeError, match=message.format(0)):
        GradientLARS().attach(optimizer)
    assert "step" not in vars(optimizer)
    optimizer = torch.optim.SGD(params, 0.1)
    GradientLARS().attach(optimizer)
    optimizer.add_param_group({"params": [bad]})
    with kept(params), pytest.raises(TypeError, match=message.format(5)):
        optimizer.step()


@pytest.mark.parametrize(
    ("weight", "gradient"), [("shard", "plain"), ("plain", "shard"), ("plain", "sum")]
)
def test_weights_and_gradients_lie_on_one_mesh(
    mesh: Any, params: Any, weight: str, gradient: str
) -> None:
    p = torch.nn.Parameter(placed(torch.ones(2), mesh, weight))
    p.grad = own = placed(torch.ones(2), mesh, gradient)
    optimizer = torch.optim.SGD([*params, p], 0.1)
    GradientLARS().attach(optimizer)
    message = "the gradient of parameter 5 is a .* distribute both over one mesh"
    with kept(params), pytest.raises(TypeError, match=message):
        optimizer.step()
    assert p.grad is own
    with pytest.raises(TypeError, match=r"param\.grad is a .* over one mesh"):
        GradientLARS()(None, p)


def test_a_sharded_gradient_is_rescaled_in_place(mesh: Any) -> None:
    w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.1])
    p = torch.nn.Parameter(placed(w, mesh, "shard"))
    held = g.clone()
    p.grad = own = placed(held, mesh, "shard")
    GradientLARS()(None, p)
    assert p.grad is own
    assert torch.equal(held, torch.from_numpy(rescaled(w, g)).float())
    p.grad = placed(g, mesh, "replica")
    with pytest.raises(TypeError, match=r"expected .*Shard.* redistribute it first"):
        GradientLARS()(None, p)
    assert torch.equal(g, torch.tensor([0.0, 0.1]))


def test_only_torch_optimizers_are_attached_to(params: Any) -> None:
    for wrong in (params, optax.sgd(0.1), None):
        with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
            GradientLARS().attach(wrong)
    optimizer = torch.optim.SGD(params, 0.1, differentiable=True)
    with pytest.raises(ValueError, match="differentiable=True"):
        GradientLARS().attach(optimizer)
    assert "step" not in vars(optimizer)


# --- in a chain of optax --------------------------------------------------------------


def tree(seed: int) -> dict[str, Any]:
    a, b, c, short, d = (jnp.asarray(x) for x in numbers(seed))
    return {"one": {"kernel": a, "bias": b}, "rest": [c, short, d]}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("jit", [True, False])
def test_chained_equals_the_hook_and_sgd(hook: dict[str, Any], jit: bool) -> None:
    weights = tree(0)
    chain: Any = optax.chain(GradientLARS(**hook).transform(), optax.sgd(0.1, 0.9))
    update = jax.jit(chain.update) if jit else chain.update
    state = chain.init(weights)
    plain = [torch.nn.Parameter(torch.tensor(np.array(w))) for w in leaves(weights)]
    by_hand = torch.optim.SGD(plain, 0.1, 0.9)
    for seed in range(1, 4):
        gradients = tree(seed)
        updates, state = update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
        for p, g in zip(plain, leaves(gradients), strict=True):
            p.grad = torch.tensor(np.array(g))
            GradientLARS(**hook)(None, p)
        by_hand.step()
        for w, p in zip(leaves(weights), plain, strict=True):
            np.testing.assert_allclose(w, p.detach(), rtol=1e-5, atol=1e-6)


def leaves(x: Any) -> list[Any]:
    return jax.tree.leaves(x)


def test_masked_layers_keep_their_gradient() -> None:
    weights, gradients = tree(0), tree(1)
    mask = jax.tree.map(lambda x: x.ndim > 1, weights)
    masked: Any = optax.masked(GradientLARS().transform(), mask)  # pyright: ignore[reportArgumentType]
    updates, _ = jax.jit(masked.update)(gradients, masked.init(weights), weights)
    rows = zip(*map(leaves, (weights, gradients, updates, mask)), strict=True)
    for w, g, new, adapted in rows:
        np.testing.assert_allclose(new, rescaled(w, g) if adapted else g, rtol=1e-5)


def test_leaves_that_are_none_stay_none() -> None:
    transform = GradientLARS().transform()
    weights = {"a": jnp.ones(4), "b": jnp.ones(2)}
    updates = {"a": jnp.full(4, 2.0), "b": None}
    new, state = transform.update(updates, transform.init(weights), weights)
    assert new["b"] is None
    np.testing.assert_allclose(new["a"], 1.0, rtol=1e-6)
    assert leaves(state) == []


def test_hyperparameters_may_be_traced() -> None:
    make = optax.inject_hyperparams(
        lambda weight_decay: GradientLARS(weight_decay=weight_decay).transform()
    )
    chain: Any = make(weight_decay=0.1)
    weights, gradients = numbers(0)[0], numbers(1)[0]
    state = chain.init(weights)
    new, _ = jax.jit(chain.update)(jnp.asarray(gradients), state, jnp.asarray(weights))
    expected = rescaled(weights, gradients, weight_decay=0.1)
    np.testing.assert_allclose(new, expected, rtol=1e-5)


UPDATES = [
    ({"a": jnp.ones(2)}, None, "params is None, but LARS measures"),
    ({"a": jnp.ones(2)}, {"a": jnp.ones(3)}, r"updates\['a'\] has the shape \(2,\)"),
    ({"a": jnp.ones(2)}, {"a": None}, r"params\['a'\] is a NoneType"),
    ({"a": jnp.ones(2)}, {"a": jnp.ones(2, int)}, r"params\['a'\] has the dtype int32"),
]


@pytest.mark.parametrize(("updates", "weights", "message"), UPDATES)
def test_updates_that_do_not_fit(updates: Any, weights: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GradientLARS().transform().update(updates, (), weights)


def test_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("larskit.jax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match=r"pip install 'larskit\[jax\]'"):
        GradientLARS().transform()
