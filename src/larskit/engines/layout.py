"""The memory layout of arrays, as a kernel that is given addresses needs it."""

import sys

import numpy as np

from larskit.arrays import Array, dtype_name, framework, namespace
from larskit.engines.contract import Arrays, Buffers, Unsupported


def check(
    what: str,
    arrays: Buffers,
    weights: Arrays,
    dtype: str,
    device: str = "cpu",
    *,
    written: bool = False,
) -> None:
    """Refuse arrays that a kernel cannot use beside their weights.

    Parameters
    ----------
    what : str
        Names the arrays in the message.
    arrays : sequence of arrays or None
        One for a layer, or None.
    weights : sequence of arrays
        The weights of the layers.
    dtype, device : str
        Which the arrays must have; NumPy's are all on the CPU.
    written : bool, default=False
        Whether the kernel writes them.

    Raises
    ------
    Unsupported
        Naming the array and what is wrong with it.
    """
    for i, (x, w) in enumerate(zip(arrays, weights, strict=True)):
        if x is None:
            continue
        if why := reason(x, w, device) or (written and _unwritable(x)):
            raise Unsupported(f"{what} {i} {why}")
        if dtype_name(x) != dtype:
            raise Unsupported(f"{what} {i} is {dtype_name(x)}, expected {dtype}")


def reason(x: Array, w: Array, device: str = "cpu") -> str | None:
    """Say why a kernel cannot read an array by its address beside the weights `w`.

    It must be dense, and its strides must order the elements as the weights' do.
    """
    if framework(x) != framework(w):
        return f"is a {type(x).__name__}, its weight a {type(w).__name__}"
    if framework(x) == "torch":
        why = _tensor_reason(x, device)
    elif isinstance(x, np.ndarray):
        why = None if x.flags.aligned and x.dtype.isnative else "is not aligned"
    else:
        why = f"is a {type(x).__name__}, neither a NumPy array nor a torch tensor"
    if why:
        return why
    if tuple(x.shape) != tuple(w.shape):
        return f"has the shape {tuple(x.shape)}, its weight {tuple(w.shape)}"
    # First, because nearly all are: it takes 0.2 us, `_order` 2.2 us (4 axes).
    if _contiguous(x) and _contiguous(w):
        return None
    if (order := _order(x)) is None:
        return "is not contiguous"
    return None if order == _order(w) else "has other strides than its weight"


def new_buffers(weights: Arrays, buffers: Buffers, keep: bool) -> list[Array | None]:
    """Return the buffers that a step in place leaves; make the missing, if to keep."""
    if not keep:
        return list(buffers)
    pairs = zip(weights, buffers, strict=True)
    return [empty_like(w) if v is None else v for w, v in pairs]


def empty_like(x: Array) -> Array:
    """Return an array for results, with the strides of `x`."""
    if isinstance(x, np.ndarray):
        return np.empty_like(x, subok=False)
    return namespace(x).empty_like(x)


def address(x: Array | None) -> int:
    """Return the address of the first element of an array; 0 for None."""
    if x is None:
        return 0
    if isinstance(x, np.ndarray):
        return x.__array_interface__["data"][0]
    return x.data_ptr()


def size(x: Array) -> int:
    """Return the number of elements of an array."""
    return x.size if isinstance(x, np.ndarray) else x.numel()


def _tensor_reason(x: Array, device: str) -> str | None:
    torch = sys.modules["torch"]
    # A subclass may hold its numbers elsewhere (DTensor, FakeTensor) or compute
    # otherwise.
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(x).__name__}, no plain tensor"
    if torch.compiler.is_compiling():
        return "is being traced"
    if str(x.device) != device:
        return f"is on the device {x.device}"
    if x.layout is not torch.strided:
        return f"is sparse ({x.layout})"
    # The memory does not hold the numbers, but their conjugates or negatives.
    if x.is_conj() or x.is_neg():
        return "is a lazy view (conj or neg)"
    try:
        x.data_ptr()
    except RuntimeError:  # inside torch.func.vmap and the like
        return "has no memory of its own"
    return None


def _unwritable(x: Array) -> str | None:
    if isinstance(x, np.ndarray):
        return None if x.flags.writeable else "is read-only"
    return "is an inference tensor" if x.is_inference() else None


def _contiguous(x: Array) -> bool:
    if isinstance(x, np.ndarray):
        return x.flags.c_contiguous
    return x.is_contiguous()


def _order(x: Array) -> tuple[int, ...] | None:
    """Return the strides of the axes that have any; None if there are gaps."""
    strides = x.strides if isinstance(x, np.ndarray) else x.stride()
    unit = x.itemsize if isinstance(x, np.ndarray) else 1
    # The stride of an axis of size 1 is arbitrary and says nothing about the layout.
    axes = [(s // unit, n) for s, n in zip(strides, x.shape, strict=True) if n != 1]
    expected = 1
    for stride, size in sorted(axes):
        if stride != expected:
            return None
        expected *= size
    return tuple(stride for stride, _ in axes)
