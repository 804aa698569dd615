"""Train on scikit-learn's digits with LARS in Flax linen, with Orbax checkpoints.

pip install 'larskit[jax]' flax scikit-learn
python examples/jax/linen_digits.py --checkpoints runs/linen

If the training stops or is killed, the same command resumes from the last checkpoint.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from larskit.jax import lars

STEPS, BATCH, SAVE_EVERY = 120, 128, 60


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm()(nn.Conv(32, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def loss(params, state, images, labels):
    logits = state.apply_fn({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(state, images, labels):
    grads = jax.grad(loss)(state.params, state, images, labels)
    return state.apply_gradients(grads=grads)


def main():
    parser = argparse.ArgumentParser(description="digits with LARS, linen and Orbax")
    parser.add_argument("--checkpoints", type=Path, required=True, help="a folder")
    folder = parser.parse_args().checkpoints.absolute()
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    model = Network()
    # Biases and scales step at the raw rate: keep it low, and the coefficient high.
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.4, STEPS // 10, STEPS)
    tx = lars(schedule, weight_decay=1e-4, trust_coefficient=0.04)
    params = model.init(jax.random.key(0), x[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    options = ocp.CheckpointManagerOptions(save_interval_steps=SAVE_EVERY)
    with ocp.CheckpointManager(folder, options=options) as manager:
        if last := manager.latest_step():
            state = manager.restore(last, args=ocp.args.StandardRestore(state))
        print(f"from step {state.step}")
        for step in range(int(state.step), STEPS):
            rng = np.random.default_rng(step)
            batch = rng.choice(len(x), BATCH, replace=False)
            state = train_step(state, x[batch], y[batch])
            manager.save(step + 1, args=ocp.args.StandardSave(state))
    hits = model.apply({"params": state.params}, test_x).argmax(1) == test_y
    error = loss(state.params, state, test_x, test_y)
    print(f"loss {error}, accuracy {hits.mean():.2%}")


if __name__ == "__main__":
    main()
