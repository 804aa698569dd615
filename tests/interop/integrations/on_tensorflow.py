"""TensorFlow: variables and a tape."""

from typing import Any

import fit
import tensorflow

tf: Any = tensorflow
WEIGHTS = [tf.constant(w) for w in fit.WEIGHTS]


@tf.function
def gradients(weights):
    with tf.GradientTape() as tape:
        tape.watch(weights)
        kernel, bias, last_kernel, last_bias = weights
        out = tf.tanh(fit.X @ kernel + bias) @ last_kernel + last_bias
        loss = tf.reduce_mean((out - fit.Y) ** 2)
    return tape.gradient(loss, weights)


fit.run(
    "tensorflow-cpu",
    {"lars_update": (lambda: fit.function(WEIGHTS, gradients), fit.function())},
)
