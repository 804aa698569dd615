"""Train on scikit-learn's digits with the LARS object, on variables of Flax NNX.

pip install 'larskit[jax]' flax optax scikit-learn
python examples/jax/variables_digits.py
"""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from larskit.jax import LARS

STEPS, BATCH = 120, 128


def loss(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    """Change the model and the optimizer's state in place."""
    grads = nnx.grad(loss)(model, images, labels)
    optimizer.update(by_name(grads))


def by_name(variables):
    """Return variables, or gradients, by their dotted paths."""
    paths = nnx.to_flat_state(nnx.state(variables, nnx.Param))
    return {".".join(map(str, path)): x for path, x in paths}


def main():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(64, 256, use_bias=False, rngs=rngs),
        nnx.relu,
        nnx.Linear(256, 10, use_bias=False, rngs=rngs),
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, 8.0, STEPS // 10, STEPS)
    optimizer = LARS(schedule, by_name(model))
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = rng.choice(len(x), BATCH, replace=False)
        train_step(model, optimizer, x[batch], y[batch])
    accuracy = (model(test_x).argmax(1) == test_y).mean()
    print(f"{optimizer.step_count[...]} steps, accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
