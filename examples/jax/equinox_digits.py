"""Train on scikit-learn's digits with LARS in Equinox.

pip install 'larskit[jax]' equinox optax scikit-learn
python examples/jax/equinox_digits.py
"""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from larskit.jax import lars

STEPS, BATCH = 120, 128

# By name, because the biases of Equinox's convolutions have three dimensions.
WEIGHTS = "*.weight"
optimizer = lars(
    optax.warmup_cosine_decay_schedule(0.0, 0.4, STEPS // 10, STEPS),
    weight_decay=1e-4,
    trust_coefficient=0.04,
    adapt=WEIGHTS,
    decay=WEIGHTS,
)


def network(key):
    first, second = jax.random.split(key)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 32, 3, padding=1, key=first),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jax.numpy.ravel),
            eqx.nn.Linear(32 * 4 * 4, 10, key=second),
        ]
    )


@eqx.filter_value_and_grad
def loss(model, images, labels):
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def train_step(model, state, images, labels):
    _, grads = loss(model, images, labels)  # None where the model has no array
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimizer.update(grads, state, params)
    return eqx.apply_updates(model, updates), state


def main():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    model = network(jax.random.key(0))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = rng.choice(len(x), BATCH, replace=False)
        model, state = train_step(model, state, x[batch], y[batch])
    accuracy = (jax.vmap(model)(test_x).argmax(1) == test_y).mean()
    print(f"accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
