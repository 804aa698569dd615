"""Paddle."""

import fit
import paddle

X, Y, *WEIGHTS = map(paddle.to_tensor, (fit.X, fit.Y, *fit.WEIGHTS))


def gradients(weights):
    weights = [w.detach() for w in weights]
    for w in weights:
        w.stop_gradient = False
    kernel, bias, last_kernel, last_bias = weights
    out = paddle.tanh(X @ kernel + bias) @ last_kernel + last_bias
    return paddle.grad(paddle.nn.functional.mse_loss(out, Y), weights)


fit.run(
    "paddlepaddle",
    {"lars_update": (lambda: fit.function(WEIGHTS, gradients), fit.function())},
)
