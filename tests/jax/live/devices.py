"""Moves weights and state of an optimizer between two devices of the host.

Run by test_optimizer.py.
"""

import jax
import jax.numpy as jnp

from larskit.jax import LARS, TrainVar

jax.config.update("jax_num_cpu_devices", 2)
optimizer = LARS(1.0, {"w": TrainVar([3.0, 4.0])})
second = jax.devices()[1]
assert optimizer.to(second) is optimizer
optimizer.update({"w": jax.device_put(jnp.ones(2), second)})
held = {**optimizer.vars_to_train, **optimizer.vars()}
print(sorted(d.id for x in held.values() for d in x.value.devices()))
optimizer.cpu()
print({d.id for x in held.values() for d in x.value.devices()})
