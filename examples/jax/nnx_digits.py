"""Train on scikit-learn's digits with LARS in Flax NNX.

pip install 'larskit[jax]' flax scikit-learn
python examples/jax/nnx_digits.py
"""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from larskit.jax import lars

STEPS, BATCH = 120, 128


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.out = nnx.Linear(32 * 4 * 4, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.out(x.reshape(len(x), -1))


def loss(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    optimizer.update(model, nnx.grad(loss)(model, images, labels))


@nnx.jit
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).mean()


def main():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    model = Network(nnx.Rngs(0))
    # Biases and scales step at the raw rate: keep it low, and the coefficient high.
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.4, STEPS // 10, STEPS)
    tx = lars(schedule, weight_decay=1e-4, trust_coefficient=0.04)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = rng.choice(len(x), BATCH, replace=False)
        train_step(model, optimizer, x[batch], y[batch])
    model.eval()
    print(f"accuracy {accuracy(model, test_x, test_y):.2%}")


if __name__ == "__main__":
    main()
