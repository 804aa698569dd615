"""A fork waits until no thread is in a container: run by test_tree.py.

Ends with 0 where the thread was at its end in the child and in the parent.
"""

import os
import signal
import sys
import threading
import time
from collections import UserDict

from larskit import tree


class Slow(UserDict[str, float]):
    """Whoever takes an item lets other threads run for a while."""

    def __getitem__(self, key: str) -> float:
        entered.set()
        time.sleep(0.3)
        left.set()
        return super().__getitem__(key)


entered, left = threading.Event(), threading.Event()
walk = threading.Thread(target=tree.flatten, args=[Slow(w=1.0)])
walk.start()
entered.wait()
child = os.fork()
if not child:
    signal.alarm(30)
    tree.flatten({"w": 1.0})
    sys.exit(not left.is_set())
walk.join()
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
