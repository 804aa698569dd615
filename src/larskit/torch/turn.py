"""One step at a time, whichever threads ask for it."""

import os
from threading import RLock


class Turn:
    """A lock around the steps of an optimizer.

    The kernels release the interpreter's lock, so that another thread could replace the
    gradients and buffers that a step is reading.
    """

    def __init__(self) -> None:
        """Begin unlocked."""
        self._lock, self._process = RLock(), os.getpid()

    def __enter__(self) -> None:
        """Wait until no other thread is inside."""
        if self._process != os.getpid():  # the thread inside was not forked with us
            self.__init__()
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        """Let the next thread in."""
        self._lock.release()
