"""Forks while a thread is stepping; each child steps the same layers, and ends.

Run by test_native.py as ``interrupted.py FRAMEWORK COUNT``. Prints how many children
went on and ended normally, and how the others ended.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

SIZE = 2_000_000


def numpy_step() -> Callable[[], Any]:
    from larskit import lars_update

    w, out = np.ones(SIZE, "float32"), np.ones(SIZE, "float32")
    return lambda: lars_update(w, w, 0.1, out=out)


def torch_step() -> Callable[[], Any]:
    import torch

    from larskit.torch import LARS

    p = torch.nn.Parameter(torch.ones(SIZE))
    p.grad = torch.ones(SIZE)
    return LARS([p], lr=1e-6).step


step = {"numpy": numpy_step, "torch": torch_step}[sys.argv[1]]()
count, going = int(sys.argv[2]), True
codes = []


def keep_stepping() -> None:
    while going:
        step()


step()
thread = threading.Thread(target=keep_stepping)
thread.start()
for i in range(count):
    pid = os.fork()
    if pid == 0:
        going = False
        signal.alarm(30)
        step()
        if i % 10 == 0:  # the end of the interpreter takes much longer than a step
            sys.exit(7)
        os._exit(7)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
going = False
thread.join()
print(f"{codes.count(7)} of {count} went on", *(code for code in codes if code != 7))
