"""The state of an optimizer in one file, from any framework and for any other.

`save_optimizer` and `load_optimizer` write and read the state of a ``LARS`` of PyTorch,
JAX or Keras; `to_portable` and `from_portable` convert that of `functional.update`.
`save`, `load` and `atomic` write any arrays, or any file, atomically.
"""

from larskit.state.files import atomic, load, save
from larskit.state.functional import from_portable, to_portable
from larskit.state.portable import (
    Names,
    PortableState,
    load_optimizer,
    read_state,
    save_optimizer,
    write_state,
)

__all__ = [
    "Names",
    "PortableState",
    "atomic",
    "from_portable",
    "load",
    "load_optimizer",
    "read_state",
    "save",
    "save_optimizer",
    "to_portable",
    "write_state",
]
