"""Ends while daemon threads step arrays of ``KIND``. Run by test_native.py.

Those of torch call the kernel alone: an operation of torch in a daemon thread aborts
the process at its end, with or without larskit.
"""

import sys
import threading
import time
from typing import Any

import numpy as np

from larskit.config import Config
from larskit.engines import Layers, native

FLAGS, CONFIG = [True] * 4, Config()


def layers(make: Any) -> Layers:
    w, g = ([make(500_000) for _ in FLAGS] for _ in range(2))
    return Layers(w, g, [None] * 4, FLAGS, FLAGS)


def step_numpy() -> None:
    bound = layers(lambda n: np.ones(n, "float32"))
    while True:
        native.bind(bound, CONFIG).step_(0.5, CONFIG)


def step_torch(kernel: Any, options: Any, table: np.ndarray) -> None:
    while True:
        table[:] = -1
        kernel.step(options, table.ctypes.data, 2, False)


groups = []
for _ in range(3):
    if sys.argv[1] == "torch":
        import torch

        from larskit import _native  # pyright: ignore[reportMissingModuleSource]

        groups.append(native.bind(layers(torch.ones), CONFIG))
        given = groups[-1]._kernel, _native.Options(CONFIG, 0.5), np.empty((4, 5))
        threading.Thread(target=step_torch, args=given, daemon=True).start()
    else:
        threading.Thread(target=step_numpy, daemon=True).start()
time.sleep(0.2)
print("done")
