"""Ends while daemon threads are stepping. Run by test_native.py."""

import threading
import time

import numpy as np

from larskit.config import Config
from larskit.engines import Layers, native


def work() -> None:
    w = [np.ones(500_000, "float32") for _ in range(4)]
    flags, config = [True] * 4, Config()
    while True:
        layers = Layers(w, [x.copy() for x in w], [None] * 4, flags, flags)
        native.bind(layers, config).step_(0.5, config)


for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print("done")
