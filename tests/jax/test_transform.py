"""LARS in optax's form: what it computes, what it is wrapped in, how it is sharded."""

import pickle
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from larskit import functional
from larskit.jax import LarsState, lars, layer_stats, scale_by_lars

ETA = 0.1
apply_updates: Any = optax.apply_updates


def tree(seed=0, dtype=jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (4, 3), "bias": (3,), "stem": (2, 2, 1, 3), "scale": ()}
    arrays = {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in shapes.items()}
    kernel, bias = arrays.pop("kernel"), arrays.pop("bias")
    return {"dense": {"kernel": kernel, "bias": bias}, **arrays}


def train(tx, params, steps=5, jit=True, grads=None) -> Any:
    state = tx.init(params)

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    for i in range(steps):
        params, state = step(params, state, grads or tree(i + 1))
    return params, state


def close(one, other, rtol=1e-6):
    """Return True, or say where two trees differ."""
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-7), one, other)
    return True


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.01, "nesterov": True},
    {"denominator": "decayed_gradient", "weight_decay": 0.01, "adapt": True},
    {"denominator": "momentum", "lr_placement": "outside", "dampening": 0.9},
    {"denominator": "gradient", "lr_placement": "outside", "eps": 1e-3},
    {"clip": True, "threshold": 1.0, "maximize": True},
    {"momentum": 0.0, "weight_decay": 0.1, "decay": True},
    {"dampening": 0.5, "adapt": "dense.*", "decay": ["*.kernel", re.compile("st")]},
    {"adapt": lambda name, w: w.ndim == 4, "decay": False},
]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_rule(options, jit):
    """As `functional.update` has it, with a changing rate."""
    found, state = train(
        lars(lambda i: 1.0 / (1 + i), trust_coefficient=ETA, **options),
        tree(),
        jit=jit,
    )
    params, kept = tree(), functional.init(tree())
    for i in range(5):
        how = {"trust_coefficient": ETA, **options}
        params, kept = functional.update(params, tree(i + 1), kept, 1 / (1 + i), **how)
    assert close(found, params)
    assert int(state.count) == 5
    if options.get("momentum") == 0.0:
        assert state.momentum is None
    else:
        assert close(state.momentum, kept.momentum)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_it_is_optax_lars(decay):
    mask = {"dense": {"kernel": True, "bias": False}, "stem": True, "scale": False}
    theirs = optax.lars(0.5, decay, mask, ETA, trust_ratio_mask=mask, momentum=0.8)
    how = {"denominator": "decayed_gradient", "adapt": mask, "decay": mask}
    ours = lars(0.5, 0.8, decay, ETA, **how)
    assert close(train(ours, tree())[0], train(theirs, tree())[0])


def test_trust_ratios_alone():
    inner = partial(optax.sgd, 0.5, momentum=0.8)
    alone: Any = scale_by_lars(0.01, ETA)
    chained = optax.chain(alone, inner())
    whole = lars(0.5, 0.8, 0.01, ETA, lr_placement="outside")
    assert close(train(chained, tree())[0], train(whole, tree())[0])
    assert jax.tree.leaves(scale_by_lars().init(tree())) == []


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx()),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(tx)(),
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx(), "b": tx()}, {"dense": "a", "stem": "b", "scale": "a"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx(), 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx(), 2),
    "masked": lambda tx: optax.masked(tx(), True),
    "with_extra_args": lambda tx: optax.with_extra_args_support(tx()),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_works_inside_the_wrappers_of_optax(wrapper, dtype):
    def make(learning_rate=0.5, weight_decay=0.01) -> Any:
        return lars(learning_rate, weight_decay=weight_decay, trust_coefficient=ETA)

    grads = tree(1, dtype)
    found, _ = train(WRAPPERS[wrapper](make), tree(0, dtype), grads=grads)
    expected, _ = train(make(), tree(0, dtype), grads=grads)
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))
    assert close(found, expected, rtol=1e-6 if dtype == jnp.float32 else 0.02)


def test_hyper_parameters_can_be_injected_and_scheduled():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    static: Any = {"learning_rate": schedule, "weight_decay": schedule}
    factory: Any = lars
    injected = optax.inject_hyperparams(factory)(**static, trust_coefficient=ETA)
    own = lars(**static, trust_coefficient=ETA)
    found, state = train(injected, tree())
    assert close(found, train(own, tree())[0])
    assert set(state.hyperparams) >= {"learning_rate", "weight_decay", "momentum"}


@pytest.mark.parametrize("mask", ["tree", "prefix", "array"])
def test_masks_are_trees_of_bools(mask):
    flags: Any = {
        "tree": {
            "dense": {"kernel": True, "bias": True},
            "stem": False,
            "scale": False,
        },
        "prefix": {"dense": True, "stem": False, "scale": False},
        "array": {"dense": np.True_, "stem": np.False_, "scale": np.False_},
    }[mask]
    found = train(lars(0.5, adapt=flags, trust_coefficient=ETA), tree())[0]
    named = train(lars(0.5, adapt="dense.*", trust_coefficient=ETA), tree())[0]
    assert close(found, named)


def test_leaves_that_are_none():
    """Of parameters that are not trained, and of gradients that were not computed."""
    params, grads = tree(), tree(1)
    params["frozen"] = grads["frozen"] = None
    tx = lars(0.5, trust_coefficient=ETA)
    state = tx.init(params)
    updates, state = tx.update({**grads, "stem": None}, state, params)
    assert updates["frozen"] is None
    assert updates["stem"] is None
    assert not state.momentum["stem"].any()
    whole, _ = tx.update(tree(1), tx.init(tree()), tree())
    assert close(updates["dense"], whole["dense"])


@pytest.mark.parametrize("accumulator", [None, jnp.float32])
def test_dtypes(accumulator):
    params, grads = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    tx = lars(0.5, accumulator_dtype=accumulator)
    found, state = train(tx, params, grads=grads)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    expected = jnp.dtype(accumulator or jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(state.momentum)} == {expected}


@settings(max_examples=settings().max_examples // 4)  # each compiles
@given(
    axis=st.integers(-3, 2),
    options=st.sampled_from([x for x in OPTIONS if "adapt" not in x]),
    seed=st.integers(0, 9),
)
def test_stacked_layers_step_as_each_of_them_alone(axis, options, seed):
    rng = np.random.default_rng(seed)
    w, *gs = (jnp.asarray(rng.standard_normal((3, 4, 2)), "float32") for _ in range(4))
    stacked = {"w": w}
    how = {"trust_coefficient": ETA, **options}
    tx, one = lars(0.5, layer_axis=axis, **how), lars(0.5, **how)
    state = tx.init(stacked)
    alone = [{"w": jnp.take(w, i, axis)} for i in range(w.shape[axis])]
    states = [one.init(params) for params in alone]
    for g in gs:
        updates, state = tx.update({"w": g}, state, stacked)
        stacked = apply_updates(stacked, updates)
        for i, params in enumerate(alone):
            own, states[i] = one.update({"w": jnp.take(g, i, axis)}, states[i], params)
            alone[i] = apply_updates(params, own)
    for i, params in enumerate(alone):
        assert close(jnp.take(stacked["w"], i, axis), params["w"], rtol=1e-5)


@pytest.mark.parametrize(
    "layer_axis",
    [
        {"blocks.*": 0},
        {re.compile("kernel"): 0, "blocks.bias": 0},
        lambda name, w: 0 if name.startswith("blocks") else None,
    ],
    ids=["pattern", "patterns", "callable"],
)
def test_some_arrays_are_stacks(layer_axis):
    """And by default the vectors in them are neither adapted nor decayed."""
    rng = np.random.default_rng(0)
    blocks = {"kernel": rng.standard_normal((5, 4, 3)), "bias": np.ones((5, 3))}
    params = {"blocks": blocks, "head": np.ones((3, 2))}
    params = jax.tree.map(lambda x: jnp.asarray(x, "float32"), params)
    tx = lars(1.0, weight_decay=0.1, layer_axis=layer_axis)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert close(updates["blocks"]["bias"], -grads["blocks"]["bias"])
    one = lars(1.0, weight_decay=0.1)
    for i in range(5):
        layer = {"kernel": params["blocks"]["kernel"][i]}
        g = {"kernel": grads["blocks"]["kernel"][i]}
        own, _ = one.update(g, one.init(layer), layer)
        assert close(updates["blocks"]["kernel"][i], own["kernel"])


def loss(params, x):
    y = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.mean(y**2)


def model(seed=0) -> Any:
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)
    return {"kernel": kernel, "bias": jnp.full(2, 0.1)}


def step(tx: Any, params: Any, state: Any, x: Any) -> Any:
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return apply_updates(params, updates), state


def test_scan_vmap_and_donation():
    tx = lars(lambda i: 0.5 / (1 + i), weight_decay=0.01, trust_coefficient=ETA)
    x = jnp.ones((4, 3))

    def scanned(params):
        def body(carry, _):
            params, state = carry
            return step(tx, params, state, x), None

        return jax.lax.scan(body, (params, tx.init(params)), length=5)[0]

    expected = model(), tx.init(model())
    for _ in range(5):
        expected = step(tx, expected[0], expected[1], x)
    assert close(scanned(model()), expected)
    several = jax.tree.map(lambda *xs: jnp.stack(xs), *map(model, range(3)))
    together = jax.vmap(scanned)(several)
    for i in range(3):
        own = jax.tree.map(lambda a, i=i: a[i], together)
        assert close(own, scanned(model(i)), rtol=1e-5)
    donated = jax.jit(partial(step, tx), donate_argnums=(0, 1))
    given = model(), tx.init(model())
    for _ in range(5):
        given = donated(*given, x)
    assert close(given, expected)


def test_gradients_pass_through_the_step():
    tx = lars(0.5, weight_decay=0.01, trust_coefficient=ETA)
    x = jnp.ones((4, 3))

    def after(params):
        params, state = step(tx, params, tx.init(params), x)
        return loss(step(tx, params, state, x)[0], x)

    params = model()
    found = jax.grad(after)(params)
    h = 1e-2
    for i in range(3):
        change = params["kernel"].at[i, 0].add(h), params["kernel"].at[i, 0].add(-h)
        up, down = (float(after({**params, "kernel": k})) for k in change)
        slope = (up - down) / (2 * h)
        assert float(found["kernel"][i, 0]) == pytest.approx(slope, abs=2e-3)
    zero = jax.tree.map(jnp.zeros_like, params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.grad(after)(zero)))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_step_can_be_exported(momentum):
    tx = lars(0.5, momentum, trust_coefficient=ETA)
    params = model()
    given = params, tx.init(params), jnp.ones((4, 3))
    exported = export.export(jax.jit(partial(step, tx)))(*given)
    again = export.deserialize(bytearray(exported.serialize()))
    assert close(again.call(*given), step(tx, *given))
    assert isinstance(again.call(*given)[1], LarsState)
    assert pickle.loads(pickle.dumps(given[1])).count == 0


BAD = [
    ({"learning_rate": -1.0}, ValueError, "learning_rate must be a finite number"),
    ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1"),
    ({"denominator": "lamb"}, ValueError, "denominator must be one of"),
    ({"adapt": "head.*"}, ValueError, r"adapt='head.*' matches no parameter"),
    ({"decay": 3}, TypeError, "decay must be None, True, False, a name pattern"),
    ({"layer_axis": 2}, ValueError, "layer_axis is 2 for 'bias', which has the shape"),
    ({"layer_axis": {"head": 0}}, ValueError, "layer_axis='head' matches no parameter"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        lars(**{"learning_rate": 1.0} | options).init(model())


def test_what_does_not_fit_the_parameters():
    tx = lars(1.0)
    params = model()
    state = tx.init(params)
    with pytest.raises(ValueError, match="params is None, but LARS measures"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="updates must have the structure of params"):
        tx.update({"kernel": params["kernel"]}, state, params)
    wrong = {**params, "bias": jnp.ones(5)}
    with pytest.raises(ValueError, match=r"updates at 'bias' has the shape \(5,\)"):
        tx.update(wrong, state, params)
    integers = {"kernel": jnp.ones((2, 2), jnp.int32)}
    with pytest.raises(TypeError, match="params at 'kernel' has the dtype int32"):
        tx.init(integers)
    with pytest.raises(ValueError, match="but scale_by_lars keeps none"):
        scale_by_lars(denominator="momentum")


# The statistics of the last step


def stacked_and_plain():
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (3, 2)}, "bias": (2,), "blocks": (4, 2, 3)}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return [jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(2)]


@pytest.mark.parametrize("jit", [False, True])
def test_statistics_are_kept_where_they_are_asked_for(jit):
    params, grads = stacked_and_plain()
    axis = {"blocks": 0}
    options: Any = {"weight_decay": 0.5, "eps": 0.25, "layer_axis": axis}
    recording: Any = lars(0.5, **options, layer_stats=True)
    chain: Any = optax.chain(optax.identity(), recording)
    state = chain.init(params)
    assert layer_stats(state) == {}
    update = jax.jit(chain.update) if jit else chain.update
    updates, state = update(grads, state, params)
    found = layer_stats(state)
    assert set(found) == {"a.kernel", "bias", "blocks"}
    w, g = params["a"]["kernel"], grads["a"]["kernel"]
    norms = float(jnp.linalg.norm(w)), float(jnp.linalg.norm(g))
    ratio = 1e-3 * norms[0] / (norms[1] + 0.5 * norms[0] + 0.25)
    assert found["a.kernel"][:3] == pytest.approx((*norms, ratio), rel=1e-6)
    assert found["a.kernel"][3:] == (True, True, None)
    assert found["bias"].trust_ratio == 1.0
    assert (found["bias"].adapted, found["bias"].decayed) == (False, False)
    assert found["blocks"].trust_ratio.shape == (4,)
    np.testing.assert_allclose(
        found["blocks"].weight_norm,
        jnp.linalg.norm(params["blocks"].reshape(4, -1), axis=1),
        rtol=1e-6,
    )
    plain = lars(0.5, **options)
    expected, without = plain.update(grads, plain.init(params), params)
    assert without.stats is None
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    grads["a"]["kernel"] = None
    _, state = chain.update(grads, state, params)  # the former ones stay
    assert layer_stats(state)["a.kernel"] == found["a.kernel"]


def test_statistics_that_are_not_kept_cannot_be_read():
    optimizer = lars(0.5)
    state = optimizer.init({"a": jnp.ones(2)})
    for where in (state, (state, ()), ()):
        with pytest.raises(ValueError, match="keeps statistics: make the optimizer wi"):
            layer_stats(where)
