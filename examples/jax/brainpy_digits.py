"""Train on scikit-learn's digits with LARS in BrainPy.

pip install 'larskit[jax]' brainpy scikit-learn
python examples/jax/brainpy_digits.py
"""

import brainpy as bp
import brainpy.math as bm
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from larskit.jax import LARS

STEPS, BATCH = 120, 128


def main():
    bm.random.seed(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    with bm.training_environment():
        model = bp.Sequential(
            bp.dnn.Dense(64, 256, b_initializer=None),
            bp.dnn.Activation(bm.relu),
            bp.dnn.Dense(256, 10, b_initializer=None),
        )
    weights = model.train_vars().unique()
    schedule = bp.optim.PolynomialDecayLR(8.0, STEPS, 0.0, power=2.0)
    optimizer = LARS(schedule, weights)

    def loss(images, labels):
        return bp.losses.cross_entropy_loss(model(images), labels)

    @bm.jit
    def train_step(images, labels):
        optimizer.update(bm.grad(loss, grad_vars=weights)(images, labels))

    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = rng.choice(len(x), BATCH, replace=False)
        train_step(x[batch], y[batch])
    accuracy = (model(test_x).argmax(1) == test_y).mean()
    print(f"accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
