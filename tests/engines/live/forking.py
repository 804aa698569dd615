"""Steps, forks, and steps in the child and in the parent. Run by test_native.py."""

import os
import signal

import jax.numpy as jnp  # noqa: F401  # whose threads a fork leaves behind
import numpy as np

from larskit.config import Config
from larskit.engines import Layers, native


def step() -> float:
    w = np.ones(500_000, "float32")
    config = Config(trust_coefficient=1.0)
    gradients, flags = [w.copy(), w.copy()], [True, True]
    layers = Layers([w, w.copy()], gradients, [None, None], flags, flags)
    native.bind(layers, config).step_(0.5, config)
    return float(w[-1])


assert step() == 0.5
if os.fork() == 0:
    signal.alarm(30)
    os._exit(0 if step() == 0.5 else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]), step())
