"""Flax, Equinox and Orbax around `larskit.jax.lars`: the same steps, the same bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from larskit import functional
from larskit.jax import lars

STEPS = 10
HOW: dict[str, Any] = {
    "momentum": 0.8,
    "weight_decay": 0.01,
    "trust_coefficient": 0.1,
    "eps": 1e-3,
    "nesterov": True,
}
X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4)), "float32")
Y = jnp.sin(X @ X[:4, :2])


def rate(count):
    return 0.5 / (1 + count)


TX: Any = lars(rate, **HOW)


def loss(y):
    return ((y - Y) ** 2).mean()


def with_nnx():
    """Return parameters, what applies them, and the parameters after the steps."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 2, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    graph, start = nnx.split(model)
    start = jax.tree.map(jnp.copy, start)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: loss(model(X)))(model)
        optimizer.update(model, grads)

    for _ in range(STEPS):
        step(model, optimizer)
    return start, lambda params: nnx.merge(graph, params)(X), nnx.state(model)


def with_linen():
    model = linen.Sequential([linen.Dense(8), linen.tanh, linen.Dense(2)])
    start = model.init(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, params=start, tx=TX)

    @jax.jit
    def step(state):
        grads = jax.grad(lambda params: loss(state.apply_fn(params, X)))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(STEPS):
        state = step(state)
    return start, lambda params: model.apply(params, X), state.params


def with_equinox():
    """Beside arrays, the model has a function and an array of integers."""
    one, two = jax.random.split(jax.random.key(0))
    layers = [
        eqx.nn.Linear(4, 8, key=one),
        eqx.nn.Lambda(lambda x: jnp.tanh(x)),
        eqx.nn.Linear(8, 2, key=two),
    ]
    model = eqx.nn.Sequential(layers), jnp.arange(2)
    start, rest = eqx.partition(model, eqx.is_inexact_array)
    assert None in jax.tree.leaves(start, is_leaf=lambda x: x is None)

    def apply(model):
        network, order = model
        return jax.vmap(network)(X)[:, order]

    @eqx.filter_jit
    def step(model, state):
        _, grads = eqx.filter_value_and_grad(lambda model: loss(apply(model)))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = TX.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    state = TX.init(start)
    for _ in range(STEPS):
        model, state = step(model, state)
    end = eqx.filter(model, eqx.is_inexact_array)
    return start, lambda params: apply(eqx.combine(params, rest)), end


@pytest.mark.parametrize("client", [with_nnx, with_linen, with_equinox])
def test_it_steps_as_the_function_does(client):
    start, apply, end = client()
    arrays, structure = jax.tree.flatten(start)
    state = functional.init(arrays)
    grad = jax.grad(lambda arrays: loss(apply(structure.unflatten(arrays))))
    for i in range(STEPS):
        arrays, state = functional.update(arrays, grad(arrays), state, rate(i), **HOW)
    found = jax.tree.leaves(end)
    assert len(found) == len(arrays) == 4
    for x, expected, w in zip(found, arrays, jax.tree.leaves(start), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
        assert np.abs(x - w).max() > 1e-3


# ---------------------------------------------------------------------- Orbax


@pytest.mark.parametrize("devices", [jax.device_count()])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_orbax_restores_the_state_exactly(momentum, dtype, devices, tmp_path):
    """Sharded over all devices."""
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=auto)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    w = np.random.default_rng(0).standard_normal((2, 16, 8)).astype("float32")
    params = jax.device_put({"kernel": w[0], "bias": w[1, 0]}, sharding)
    optimizer = lars(0.1, momentum, accumulator_dtype=dtype)
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, optimizer.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "state", target)
    assert type(found) is type(state)
    assert int(found.count) == 1
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for x, expected in zip(*map(jax.tree.leaves, (found, state)), strict=True):
        assert x.dtype == expected.dtype
        assert np.asarray(x).tobytes() == np.asarray(expected).tobytes()
    if momentum:
        kernel = found.momentum["kernel"]
        assert kernel.dtype == (dtype or "float32")
        assert kernel.sharding.shard_shape(kernel.shape) == (16 // devices, 8)
        assert np.abs(kernel).max() > 0


@pytest.mark.distributed
def test_orbax_restores_sharded_states():
    """The test above, where there are eight devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    name = f"{Path(__file__)}::{test_orbax_restores_the_state_exactly.__name__}"
    cases = [
        f"{name}[{m}-{dtype}-8]" for m in (0.9, 0.0) for dtype in (None, "bfloat16")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases],
        env={**os.environ, **flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
