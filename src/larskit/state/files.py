"""Files that are written atomically, and named arrays in them (safetensors).

A file is written beside its destination, flushed to the disk and moved into place in
one step, so that an interrupted write leaves the old file as it was.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from larskit.arrays import numpy_dtype

_DTYPES = {
    "BOOL": "bool",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}


@contextmanager
def atomic(filename: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only after the block has ended well.

    Parameters
    ----------
    filename : path
        Where to write the file; an older one is replaced, through a symbolic link too.
        Its folder must exist.
    mode : {"wb", "w"}
        Bytes (default) or text in UTF-8.

    Yields
    ------
    file object
        To write to. If the block raises, what was written is removed again.

    Raises
    ------
    OSError
        Of the kind that the system reports: the folder is missing or cannot be
        written.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode must be 'wb' or 'w', got {mode!r}")
    target = Path(os.path.realpath(filename))
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {filename}: it is a folder")
    temporary = target.with_name(f".{target.name[:200]}.{os.urandom(6).hex()}.tmp")
    try:
        file = temporary.open("xb" if mode == "wb" else "x", encoding=_encoding(mode))
    except OSError as why:
        raise type(why)(
            f"cannot write {filename}: {why.strerror}: {target.parent} must be a "
            "folder that exists and can be written"
        ) from why
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def save(tensors: Mapping[str, ArrayLike], filename: str | os.PathLike[str]) -> None:
    """Write named arrays to one safetensors file, all of them or none.

    Parameters
    ----------
    tensors : mapping of str to array
        All that `numpy.asarray` accepts, of any shape; the dtypes of safetensors, among
        them bfloat16 (that of ml_dtypes) but not complex128.
    filename : path
        See `atomic`.

    Raises
    ------
    TypeError
        Naming an array whose dtype safetensors cannot hold.
    OSError
        As `atomic` does.
    """
    data = serialize(tensors)
    with atomic(filename) as file:
        file.write(data)


def serialize(
    tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return named arrays, and texts about them, as the bytes of a safetensors file."""
    write = _module("safetensors.numpy").save
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES.values():
            raise TypeError(
                f"{name!r} has the dtype {array.dtype}, expected one of "
                f"{', '.join(_DTYPES.values())}: convert it first"
            )
    return write(arrays, metadata)


def load(filename: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file.

    Parameters
    ----------
    filename : path
        A file of `save`, or of any other writer of safetensors.

    Returns
    -------
    dict of str to numpy.ndarray
        In the dtypes and shapes they were written in; bfloat16 needs ml_dtypes, which
        comes with JAX.

    Raises
    ------
    ValueError
        The file is truncated, corrupt or of another kind.
    OSError
        It cannot be read.
    """
    return deserialize(Path(filename).read_bytes(), filename)


def deserialize(data: bytes, filename: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the arrays in the bytes of the safetensors file called `filename`."""
    safetensors = _module("safetensors")
    try:
        views = safetensors.deserialize(data)
        return {name: _array(**view) for name, view in views}
    except (safetensors.SafetensorError, KeyError) as why:
        raise ValueError(
            f"{filename} is truncated or corrupt, or no safetensors file of arrays "
            f"({why}): write it again, or name another file"
        ) from why


def _encoding(mode: str) -> str | None:
    return None if mode == "wb" else "utf-8"


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    return np.frombuffer(data, numpy_dtype(_DTYPES[dtype])).reshape(shape)


def _module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as why:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(
            f"checkpoints need {package}: pip install {package}"
        ) from why
