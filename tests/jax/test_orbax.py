"""Orbax saves and restores the state of `larskit.jax.lars`, sharded too."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from larskit.jax import lars


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
