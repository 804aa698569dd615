"""Ends while daemon threads are stepping. Run by test_native.py."""

import threading
import time

import numpy as np

from larskit.config import Config
from larskit.engines import native


def work() -> None:
    w = [np.ones(500_000, "float32") for _ in range(4)]
    while True:
        native.step_(w, [x.copy() for x in w], [None] * 4, 0.5, Config())


for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
print("done")
