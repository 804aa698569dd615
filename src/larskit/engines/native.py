"""The rule in C++: a whole step in one call, to the bit as the reference does it.

It takes NumPy arrays and torch CPU tensors whose elements lie densely, in one order for
all arrays of a layer. The loops exist once per instruction set, and the best that the
processor runs is chosen when they are needed.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from larskit.arrays import dtype_name, framework
from larskit.config import Config
from larskit.rule import Lengths, weight_decay

try:
    from larskit import _native  # pyright: ignore[reportMissingModuleSource]
except ImportError as why:
    _native, _missing = None, str(why)
else:
    atexit.register(_native.end)

_DTYPES = {
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64",),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
}
_SAME = ("nesterov", "clip", "adapt", "maximize", "zero_guard")
_NUMBERS = ("momentum", "trust_coefficient", "eps", "dampening", "threshold")
_UNKNOWN = -1.0  # of a length, in the kernel's table
_dtype, _version = attrgetter("dtype"), attrgetter("_version")


class Unfit(RuntimeError):
    """The kernel cannot step these layers; the message says why."""


def unavailable() -> str | None:
    """Say why this engine cannot run at all; None where it can."""
    if _native is None:
        return f"larskit was installed without its C++ kernel ({_missing})"
    return None


def variant() -> str:
    """Name the instruction set that the loops are compiled for."""
    if why := unavailable():
        raise Unfit(why)
    return _native.variant()  # pyright: ignore[reportOptionalMemberAccess]


def threads(like: Any = None) -> int:
    """Return how many threads a step may use.

    For torch tensors what ``torch.get_num_threads()`` says; else the environment's
    ``LARSKIT_NUM_THREADS``, or the cores that this process may run on.
    """
    if like is not None and framework(like) == "torch":
        return sys.modules["torch"].get_num_threads()
    if given := os.environ.get("LARSKIT_NUM_THREADS"):
        if not given.isdecimal() or int(given) < 1:
            raise ValueError(
                f"LARSKIT_NUM_THREADS is {given!r}, expected a whole number of at "
                "least 1: correct the environment or unset it"
            )
        return int(given)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lengths(arrays: Sequence[Any]) -> Any:
    """Return the length of each array, as a wide 1-d array."""
    nothing = [None] * len(arrays)
    return Group(arrays, arrays, nothing, results=nothing).measure()


def step_(
    weights: list[Any],
    gradients: list[Any],
    buffers: list[Any],
    lr: Any,
    config: Config,
    norms: tuple[Any, Any] | None = None,
    *,
    threads: int | None = None,
) -> Lengths:
    """Move `weights` and `buffers` in place, see `larskit.engines`."""
    kept = kept_buffers(weights, buffers, config)
    group = Group(weights, gradients, buffers, new_buffers=kept, threads=threads)
    found = group.step_(gradients, lr, config, norms)
    buffers[:] = kept
    return found


def kept_buffers(
    weights: Sequence[Any], buffers: Sequence[Any], config: Config
) -> list[Any]:
    """Return the buffers that a step in place leaves, making those it lacks."""
    if float(config.momentum) == 0:
        return list(buffers)
    pairs = zip(weights, buffers, strict=True)
    return [empty_like(w) if v is None else v for w, v in pairs]


def empty_like(x: Any) -> Any:
    """Return an array for results that lies in memory as `x` does."""
    if isinstance(x, np.ndarray):
        return np.empty_like(x, subok=False)
    return sys.modules["torch"].empty_like(x, requires_grad=False)


class Group:
    """Layers of one dtype that were found fit for the kernel.

    Parameters
    ----------
    weights, gradients : sequences of arrays
        One of each for a layer. The gradients are not held on to.
    buffers : sequence of arrays or None
        The momentum buffers; None for a layer without one.
    results : sequence of arrays, optional
        Receive the new weights, or the rescaled gradients. Default: the weights do.
    new_buffers : sequence of arrays or None, optional
        Receive the new buffers. Default: the buffers do.
    rescales : bool, default=False
        Whether gradients are rescaled, instead of weights moved.
    threads : int, optional
        How many threads to use, see `threads`.

    Raises
    ------
    Unfit
        Naming an array and what is wrong with it. Nothing has changed then.
    """

    def __init__(
        self,
        weights: Sequence[Any],
        gradients: Sequence[Any],
        buffers: Sequence[Any],
        results: Sequence[Any] | None = None,
        new_buffers: Sequence[Any] | None = None,
        *,
        rescales: bool = False,
        threads: int | None = None,
    ) -> None:
        """Check the arrays."""
        results = weights if results is None else results
        new_buffers = buffers if new_buffers is None else new_buffers
        if why := unavailable():
            raise Unfit(why)
        w_dtype, g_dtype = dtype_name(weights[0]), dtype_name(gradients[0])
        if g_dtype not in _DTYPES.get(w_dtype, ()):
            raise Unfit(f"weight 0 is {w_dtype} and its gradient {g_dtype}")
        _check("weight", weights, weights, w_dtype)
        _check("gradient", gradients, weights, g_dtype)
        _check("momentum buffer", buffers, weights, w_dtype)
        _check("result", results, weights, g_dtype if rescales else w_dtype, True)
        _check("new momentum buffer", new_buffers, weights, w_dtype, True)
        self.weights, self.buffers = weights, new_buffers
        self._results, self._threads = results, threads
        self._dtypes = w_dtype, g_dtype
        assert _native is not None
        self._address = _address
        if not isinstance(weights[0], np.ndarray):
            self._address = sys.modules["torch"].Tensor.data_ptr
        self._kernel = _native.Group(
            *map(_addresses, (weights, buffers, results, new_buffers)),
            [_size(w) for w in weights],
            weights[0].itemsize,
            gradients[0].itemsize,
            rescales,
        )
        if self._kernel.collides(self._found(gradients)):
            raise Unfit("two of the arrays share memory, where threads would collide")
        self._facts = self._read(gradients)
        self._carried: Any = None

    def holds(self, gradients: Sequence[Any]) -> bool:
        """Whether new gradients can be used with what was found of the torch tensors.

        What can change about a tensor from step to step is read anew. The dtype, the
        shape and the device of a gradient are those of its weight: torch sees to it.
        """
        try:
            still = self._read(gradients) == self._facts
            return still and not self._kernel.collides(self._found(gradients))
        except RuntimeError:  # a sparse gradient has no strides
            return False

    def _found(self, gradients: Sequence[Any]) -> list[int]:
        return [*map(self._address, gradients)]

    def _read(self, gradients: Sequence[Any]) -> Any:
        if isinstance(self.weights[0], np.ndarray):
            return None
        x = sys.modules["torch"].Tensor
        reads = (x.data_ptr, x.stride, x.size, _dtype)
        return (
            *([*map(read, self.weights)] for read in reads),
            *([*map(read, gradients)] for read in (type, *reads[1:], x.is_neg)),
            [v.data_ptr() for v in self.buffers if v is not None],
        )

    def step_(
        self,
        gradients: Sequence[Any],
        lr: Any,
        config: Config,
        norms: tuple[Any, Any] | None = None,
        *,
        carry: bool = False,
    ) -> Lengths:
        """Move every layer.

        With `carry` the lengths of the new weights are measured on the way, and used by
        the next step for the weights that nobody else has written until then.
        """
        table = self._table(*(norms or (self._still_known(), _UNKNOWN)))
        options = self._options(lr, config)
        options.measure_result = carry
        self._run(self._kernel.step, options, table, self._found(gradients))
        self._tell_autograd()
        weight, denominator, ratio, result = table.T
        versions = [*map(_version, self.weights)] if carry else None
        self._carried = (versions, result) if carry else None
        return Lengths(weight, denominator, ratio)

    def rescale_(self, gradients: Sequence[Any], config: Config) -> Lengths:
        """Write the rescaled gradients, see `larskit.rule.scaled_gradient`."""
        table = self._table(_UNKNOWN, _UNKNOWN)
        options = self._options(0.0, config)
        self._run(self._kernel.rescale, options, table, self._found(gradients))
        self._tell_autograd()
        return Lengths(*table.T[:3])

    def measure(self) -> Any:
        """Return the lengths of the weights, as a wide 1-d array."""
        table = self._table(_UNKNOWN, 0.0)
        self._run(self._kernel.measure, self._options(0.0, Config()), table)
        return table.T[0]

    def take_over(self, other: "Group") -> None:
        """Keep the lengths that another group of some of the same weights carries."""
        if other._carried is None:
            return
        versions, lengths = other._carried
        addresses = other._facts[0]
        known = {
            id(w): row
            for w, *row in zip(other.weights, addresses, versions, lengths, strict=True)
        }
        nothing = (None, None, _UNKNOWN)
        rows = [known.get(id(w), nothing) for w in self.weights]
        pairs = zip(rows, self._facts[0], strict=True)
        still = [row[1] if row[0] == address else None for row, address in pairs]
        self._carried = still, lengths.new_tensor([row[2] for row in rows])

    def _still_known(self) -> Any:
        """Return the lengths carried over of weights that are as they were left."""
        if self._carried is None:
            return _UNKNOWN
        versions, lengths = self._carried
        now = [*map(_version, self.weights)]
        if now == versions:
            return lengths
        same = [a == b for a, b in zip(now, versions, strict=True)]
        return lengths.where(lengths.new_tensor(same) > 0, _UNKNOWN)

    def _table(self, weight: Any, denominator: Any) -> Any:
        """Return the kernel's `Lengths` of every layer, with what is known of them."""
        shape = len(self.weights), 4
        if isinstance(self.weights[0], np.ndarray):
            table: Any = np.full(shape, _UNKNOWN)
        else:
            torch = sys.modules["torch"]
            table = torch.full(shape, _UNKNOWN, dtype=torch.float64)
        table[:, 0], table[:, 1] = weight, denominator
        return table

    def _options(self, lr: Any, config: Config) -> Any:
        assert _native is not None
        options = _native.Options()
        options.weights, options.gradients = (
            getattr(_native.Dtype, name) for name in self._dtypes
        )
        options.denominator = getattr(_native.Denominator, config.denominator)
        options.inside = config.lr_placement == "inside"
        options.lr, options.weight_decay = float(lr), float(weight_decay(config))
        for name in _SAME:
            setattr(options, name, bool(getattr(config, name)))
        for name in _NUMBERS:
            setattr(options, name, float(getattr(config, name)))
        return options

    def _run(self, kernel: Any, options: Any, table: Any, *addresses: Any) -> None:
        count = self._threads or threads(self.weights[0])
        kernel(options, *addresses, _address(table), count)

    def _tell_autograd(self) -> None:
        """Have autograd see that tensors changed behind its back."""
        if isinstance(self.weights[0], np.ndarray):
            return
        written = [v for v in self.buffers if v is not None]
        torch = sys.modules["torch"]
        torch.autograd.graph.increment_version([*self._results, *written])


def _check(
    what: str,
    arrays: Sequence[Any],
    weights: Sequence[Any],
    dtype: str,
    written: bool = False,
) -> None:
    for i, (x, w) in enumerate(zip(arrays, weights, strict=True)):
        if x is None:
            continue
        if why := _fault(x, w) or (written and _unwritable(x)):
            raise Unfit(f"{what} {i} {why}")
        if dtype_name(x) != dtype:
            raise Unfit(f"{what} {i} is {dtype_name(x)}, the first one {dtype}")


def _fault(x: Any, w: Any) -> str | None:
    """Say why the kernel cannot read an array that belongs to the weights `w`."""
    if framework(x) != framework(w):
        return f"is a {type(x).__name__}, its weight a {type(w).__name__}"
    if framework(x) == "torch":
        why = _tensor_fault(x)
    elif isinstance(x, np.ndarray):
        why = None if x.flags.aligned and x.dtype.isnative else "is not aligned"
    else:
        why = f"is a {type(x).__name__}, neither a NumPy array nor a torch tensor"
    if why:
        return why
    if tuple(x.shape) != tuple(w.shape):
        return f"has the shape {tuple(x.shape)}, its weight {tuple(w.shape)}"
    if _contiguous(x) and _contiguous(w):
        return None
    if (order := _order(x)) is None:
        return "is not contiguous"
    return None if order == _order(w) else "lies in memory otherwise than its weight"


def _tensor_fault(x: Any) -> str | None:
    torch = sys.modules["torch"]
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(x).__name__}, no plain tensor"
    if torch.compiler.is_compiling():
        return "is being traced"
    if x.device.type != "cpu":
        return f"is on the device {x.device}"
    if x.layout is not torch.strided:
        return f"is sparse ({x.layout})"
    if x.is_conj() or x.is_neg():
        return "is a lazy view (conj or neg)"
    try:
        x.data_ptr()
    except RuntimeError:  # inside torch.func.vmap and the like
        return "has no memory of its own"
    return None


def _unwritable(x: Any) -> str | None:
    if isinstance(x, np.ndarray):
        return None if x.flags.writeable else "is read-only"
    return "is an inference tensor" if x.is_inference() else None


def _contiguous(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return x.flags.c_contiguous
    return x.is_contiguous()


def _order(x: Any) -> tuple[int, ...] | None:
    """Return the strides of the axes that have any; None if there are gaps."""
    strides = x.strides if isinstance(x, np.ndarray) else x.stride()
    unit = x.itemsize if isinstance(x, np.ndarray) else 1
    axes = [(s // unit, n) for s, n in zip(strides, x.shape, strict=True) if n != 1]
    expected = 1
    for stride, size in sorted(axes):
        if stride != expected:
            return None
        expected *= size
    return tuple(stride for stride, _ in axes)


def _addresses(arrays: Sequence[Any]) -> list[int]:
    return [0 if x is None else _address(x) for x in arrays]


def _address(x: Any) -> int:
    if isinstance(x, np.ndarray):
        return x.__array_interface__["data"][0]
    return x.data_ptr()


def _size(x: Any) -> int:
    return x.size if isinstance(x, np.ndarray) else x.numel()
