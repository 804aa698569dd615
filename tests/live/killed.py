"""A process that dies with exit code 9 while it writes a file.

Run by test_checkpoint.py: the name of a function, and the file.
"""

import os
import sys

from larskit.state import atomic, read_state, write_state


def die(*_: object) -> None:
    os._exit(9)


def between_two_writes(filename: str) -> None:
    with atomic(filename) as file:
        file.write(b"half")
        file.flush()
        die()


def before_a_state_is_on_disk(filename: str) -> None:
    state = read_state(filename)
    os.fsync = die
    write_state(state.renamed(str.upper), filename)


if __name__ == "__main__":
    _, name, filename = sys.argv
    globals()[name](filename)
