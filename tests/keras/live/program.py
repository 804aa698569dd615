"""What `larskit.keras` computes on one backend: ``program.py FOLDER RESULTS CHECK...``.

The folder has data.npz and cases.json, and takes the files that are written.
"""

import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from larskit.keras import LARS
from larskit.state import load_optimizer, save_optimizer

FOLDER, BACKEND = Path(sys.argv[1]), keras.backend.backend()
DATA = dict(np.load(FOLDER / "data.npz"))
CASES = json.loads((FOLDER / "cases.json").read_text())
NAMES, STEPS = ["kernel", "bias", "cube"], 6
if BACKEND == "tensorflow":
    import tensorflow

    tf: Any = tensorflow
    (CPU,) = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(CPU, two)
HOW: dict[str, Any] = {"weight_decay": 1e-2, "trust_coefficient": 1e-2, "eps": 1e-5}


def listed(arrays):
    return [numpy(x).astype("float64").tolist() for x in arrays]


def numpy(x) -> Any:
    return np.asarray(ops.convert_to_numpy(x))


def variables(dtype="float32", scale=1.0):
    return [keras.Variable(DATA[k] * scale, name=k, dtype=dtype) for k in NAMES]


def grads(number, like, scale=1.0):
    arrays = [DATA[f"{k}.{number}"] * scale for k in NAMES]
    pairs = zip(arrays, like, strict=True)
    cast: Any = ops.cast
    return [cast(ops.convert_to_tensor(g), w.dtype) for g, w in pairs]


def train(optimizer, weights, first=0, last=STEPS, scale=1.0):
    for number in range(first, last):
        apply(optimizer, grads(number, weights, scale), weights)
    return listed(weights)


def apply(optimizer, gradients: Any, weights):
    """Apply gradients; the conditions of LossScaleOptimizer are stateless in JAX."""
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if not (scaled and BACKEND == "jax"):
        optimizer.apply(gradients, weights)
        return
    kept = [*weights, *optimizer.variables]
    state = [x.value for x in optimizer.variables]
    held = [w.value for w in weights]
    step: Any = optimizer.stateless_apply
    held, state = step(state, gradients, held)
    for variable, value in zip(kept, [*held, *state], strict=True):
        variable.assign(value)


def cases():
    return {name: train(LARS(2.0, **how), variables()) for name, how in CASES.items()}


def narrow():
    found = {}
    for dtype in ("bfloat16", "float16"):
        weights = variables(dtype, 100.0)  # whose squares overflow a float16
        train(LARS(2.0, **HOW), weights)
        assert {keras.backend.standardize_dtype(w.dtype) for w in weights} == {dtype}
        found[dtype] = listed(weights)
    return found


def averages():
    weights = variables()
    optimizer = LARS(2.0, use_ema=True, ema_momentum=0.5, **HOW)
    trajectory = [train(optimizer, weights, i, i + 1) for i in range(STEPS)]
    optimizer.finalize_variable_values(weights)
    return {"trajectory": trajectory, "final": listed(weights)}


def loss_scale():
    weights, inner = variables(), LARS(2.0, dampening=0.5, **HOW)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)
    optimizer.build(weights)
    train(optimizer, weights, 0, 1, scale=np.inf)
    untouched = listed(weights)
    train(optimizer, weights, 0, 3, scale=512.0)
    return {
        "untouched": untouched,
        "steps": int(numpy(inner.iterations)),
        "weights": listed(weights),
    }


def missing():
    weights, optimizer = variables(), LARS(2.0, **HOW)
    for number in range(STEPS):
        kernel, _, cube = grads(number, weights)
        optimizer.apply([kernel, None, cube], weights)
    return listed(weights)


def stateless():
    weights, optimizer = variables(), LARS(2.0, dampening=0.3, **HOW)
    optimizer.build(weights)
    step: Any = optimizer.stateless_apply
    if BACKEND == "jax":
        import jax

        step = jax.jit(step)
    held, state = (
        [x.value for x in weights],
        [x.value for x in optimizer.variables],
    )
    before = listed(weights)
    for number in range(STEPS):
        held, state = step(state, grads(number, weights), held)
    assert listed(weights) == before
    return listed(held)


def portable():
    weights = [keras.Variable(DATA[f"{k}.after"], name=k) for k in NAMES]
    optimizer = LARS(0.5, adapt=True, decay=True, **HOW)
    optimizer.build(weights)
    file = FOLDER / "torch.safetensors"
    step = load_optimizer(optimizer, file, names=lambda name: f"net.{name}").step
    found = train(optimizer, weights, 2, 6)
    save_optimizer(optimizer, FOLDER / f"through {BACKEND}.safetensors")
    return {"step": step, "weights": found}


def net():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(6, activation="tanh", name="first"),
            layers.Dense(3, name="second"),
        ],
        name="net",
    )
    model.set_weights([DATA[f"w{i}"] for i in range(4)])
    return model


def fitted(model, epochs=1):
    model.fit(
        DATA["x"],
        DATA["y"],
        batch_size=16,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return listed(model.trainable_variables)


def compiled(optimizer, model=None, **how) -> Any:
    model = model or net()
    model.compile(optimizer, loss="mse", **how)
    return model


def fit():
    model = compiled(LARS(2.0, **HOW))
    return [fitted(model) for _ in range(3)]


def distributed():
    """Train on two devices, each of which gets a half of every batch."""
    if BACKEND == "tensorflow":
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            return fitted(compiled(LARS(2.0, **HOW)), 3)
    both = keras.distribution.DataParallel()
    assert len(both.device_mesh.devices) == 2
    keras.distribution.set_distribution(both)
    found = fitted(compiled(LARS(2.0, **HOW)), 3)
    keras.distribution.set_distribution(None)
    return found


def schedule():
    rate = keras.optimizers.schedules.ExponentialDecay(4.0, 3, 0.5, staircase=True)
    return fitted(compiled(LARS(rate, **HOW)), 3)


def jit():
    """Train in the way that is not the backend's own."""
    model = compiled(LARS(2.0, **HOW), jit_compile=BACKEND == "torch")
    return fitted(model, 3)


def mixed():
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(LARS(2.0, **HOW))
    keras.config.set_dtype_policy("float32")
    fitted(model, 2)
    assert {w.dtype for w in model.trainable_variables} == {"float32"}
    inner = model.optimizer.inner_optimizer
    return {
        "optimizer": type(model.optimizer).__name__,
        "steps": int(numpy(inner.iterations)),
        "weights": fitted(model, 1),
    }


def saved():
    model = net()
    optimizer = LARS(
        3.0,
        nesterov=True,
        dampening=0.2,
        clipnorm=0.5,
        decay=["*kernel", "*bias"],
        gradient_accumulation_steps=2,
        **HOW,
    )
    optimizer.exclude_from_weight_decay(var_names=["second/bias"])
    optimizer.exclude_from_adaptation(var_list=[model.layers[0].kernel])
    fitted(compiled(optimizer, model))
    model.save(FOLDER / f"{BACKEND}.keras")
    again: Any = keras.models.load_model(FOLDER / f"{BACKEND}.keras")
    assert isinstance(again.optimizer, LARS)
    assert again.optimizer.get_config() == optimizer.get_config()
    return {"one": fitted(model, 3), "other": fitted(again, 3)}


def sparse():
    rows = DATA["rows"]
    model: Any = keras.Sequential(
        [keras.Input((4,)), layers.Embedding(9, 5), layers.Flatten(), layers.Dense(1)]
    )
    model.build((None, 4))
    model.set_weights([DATA["table"], DATA["out"], np.zeros(1)])
    model.compile(LARS(1.0, clipnorm=0.02, adapt="*embeddings", **HOW), loss="mse")
    model.fit(rows, rows.sum(1) / 9, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return listed(model.trainable_variables)


def slices():
    """Apply a gradient of rows, one of them named twice, and the same one whole."""
    found = []
    for whole in (False, True):
        w = keras.Variable(DATA["table"], name="table")
        g = tf.IndexedSlices(tf.constant(DATA["table"][:3]), [2, 5, 2], [9, 5])
        optimizer = LARS(1.0, global_clipnorm=0.5, **HOW)
        optimizer.apply([tf.convert_to_tensor(g) if whole else g], [w])
        raw = tf.Variable(DATA["table"])  # and one that is TensorFlow's own
        optimizer = LARS(1.0, global_clipnorm=0.5, **HOW)
        optimizer.apply([tf.convert_to_tensor(g) if whole else g], [raw])
        found += [listed([w]), listed([raw])]
    return found


if __name__ == "__main__":
    results = {name: globals()[name]() for name in sys.argv[3:]}
    Path(sys.argv[2]).write_text(json.dumps(results))
