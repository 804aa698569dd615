"""Train on scikit-learn's digits with LARS, sharded over eight devices.

pip install 'larskit[jax]' optax scikit-learn
XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/jax/sharded_digits.py

Each device holds an eighth of the parameters, of the momentum and of each batch, as in
FSDP. LARS needs no setting for that: under jit the norms are those of whole layers.
"""

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from larskit.jax import lars

STEPS, BATCH, HIDDEN = 120, 128, 256

optimizer = lars(
    optax.warmup_cosine_decay_schedule(0.0, 0.4, STEPS // 10, STEPS),
    weight_decay=1e-4,
    trust_coefficient=0.04,
)


def network(params, x):
    return jax.nn.relu(x @ params["kernel"] + params["bias"]) @ params["out"]


def loss(params, images, labels):
    logits = network(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(params, state, images, labels):
    grads = jax.grad(loss)(params, images, labels)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@jax.jit
def accuracy(params, images, labels):
    return (network(params, images).argmax(1) == labels).mean()


def main():
    auto = (AxisType.Auto,)  # the compiler chooses the shardings in between
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    sharded = NamedSharding(mesh, P("data"))  # along the first dimension
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(0, 64**-0.5, (64, HIDDEN)).astype("float32"),
        "bias": np.zeros(HIDDEN, "float32"),
        "out": rng.normal(0, HIDDEN**-0.5, (HIDDEN, 10)).astype("float32"),
    }
    params = jax.device_put(params, sharded)
    state = optimizer.init(params)
    for _ in range(STEPS):
        batch = rng.choice(len(x), BATCH, replace=False)
        placed = jax.device_put((x[batch], y[batch]), sharded)
        params, state = train_step(params, state, *placed)
        jax.block_until_ready(params)  # devices on one CPU may hang if steps overlap
    for what, tree in (("kernel", params), ("its momentum", state.momentum)):
        shape = tree["kernel"].sharding.shard_shape(tree["kernel"].shape)
        print(f"{what} on each device: {shape} of {tree['kernel'].shape}")
    print(f"accuracy {accuracy(params, test_x, test_y):.2%}")


if __name__ == "__main__":
    main()
