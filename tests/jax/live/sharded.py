"""Steps arrays that are sharded over eight devices of the host, and the arrays whole.

Run by test_sharding.py. Prints a JSON object: for each case whether the parameters came
out equal, and the collectives in the compiled step.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from larskit.jax import LarsState, lars

# The axes of a mesh, and over which of them each array is sharded.
LAYOUTS: dict[str, Any] = {
    "fsdp": (("data",), {"kernel": P("data", None), "bias": P("data")}),
    "tensor parallel": (("model",), {"kernel": P(None, "model"), "bias": P("model")}),
    "both": (("data", "model"), {"kernel": P("data", "model"), "bias": P("model")}),
    "apart": (("data", "model"), {"kernel": P("data", None), "bias": P("model")}),
    "replicas": (("data", "model"), {"kernel": P("model", None), "bias": P()}),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"denominator": "decayed_gradient", "nesterov": True},
    {"denominator": "momentum", "lr_placement": "outside"},
    {"denominator": "gradient", "lr_placement": "outside", "clip": True},
]
apply_updates: Any = optax.apply_updates
COLLECTIVE = r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\("


def arrays(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (16, 8), "bias": (8,)}
    return {
        k: jnp.asarray(rng.standard_normal(s), "float32") for k, s in shapes.items()
    }


def mesh_of(axes: tuple[str, ...], kind: Any) -> Any:
    sizes = (8,) if len(axes) == 1 else (4, 2)
    return jax.make_mesh(sizes, axes, axis_types=(kind,) * len(axes))


def under_jit(update: Any, mesh: Any, specs: Any) -> Any:
    """Leave it to the compiler."""
    return jax.jit(update)


def inside_shard_map(update: Any, mesh: Any, specs: Any) -> Any:
    """See one's own shards only."""
    state = LarsState(P(), specs)
    given, made = (specs, state, specs), (specs, state)
    mapped = jax.shard_map(update, mesh=mesh, in_specs=given, out_specs=made)
    return jax.jit(mapped)


def case(make: Any, layout: Any, options: Any, kind: Any) -> dict[str, Any]:
    axes, specs = layout
    mesh = mesh_of(axes, kind)

    def place(x: Any) -> Any:
        put = jax.device_put
        return jax.tree.map(lambda a, s: put(a, NamedSharding(mesh, s)), x, specs)

    names = {key: [a for a in spec if a] for key, spec in specs.items()}
    how = {"weight_decay": 0.01, "trust_coefficient": 0.1, "adapt": True, **options}
    whole = lars(0.5, **how)
    mapped = make is inside_shard_map
    own = lars(0.5, axis_names=lambda k, _: names[k], **how) if mapped else whole
    update = make(own.update, mesh, specs)
    params, expected = place(arrays(0)), arrays(0)
    state, plain = own.init(params), whole.init(expected)
    for i in range(4):
        updates, state = update(place(arrays(i + 1)), state, params)
        # eight devices on few cores get stuck with several steps under way
        params = jax.block_until_ready(apply_updates(params, updates))
        updates, plain = whole.update(arrays(i + 1), plain, expected)
        expected = apply_updates(expected, updates)
    text = update.lower(place(arrays(1)), state, params).compile().as_text()
    close = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, 1e-5)), params, expected)
    return {
        "equal": all(jax.tree.leaves(close)),
        "collectives": re.findall(COLLECTIVE, text),
        "sets": len({frozenset(own) for own in names.values()} - {frozenset()}),
    }


def main() -> None:
    found = {
        f"{make.__name__}, {name}, {options}, {kind}": case(make, layout, options, kind)
        for kind in (AxisType.Auto, AxisType.Explicit)
        for make in (under_jit, inside_shard_map)
        for name, layout in LAYOUTS.items()
        for options in OPTIONS[:: 1 if kind is AxisType.Auto else 3]
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
