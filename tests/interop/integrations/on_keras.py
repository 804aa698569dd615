"""Keras, on the backend that KERAS_BACKEND names."""

import fit
import keras

from larskit.keras import LARS


def found():
    net = keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    net.compile(LARS(*fit.HYPERPARAMETERS), loss="mse")
    net.set_weights(fit.WEIGHTS)
    while True:
        yield net.get_weights()
        net.train_on_batch(fit.X, fit.Y)


fit.run(
    "keras",
    {f"larskit.keras.LARS on {keras.backend.backend()}": (found, fit.optimizer())},
)
