"""The rule in C++: a whole step in one call, to the bit as the reference does it.

It takes NumPy arrays and torch CPU tensors whose elements lie densely, in one order for
all arrays of a layer. The loops exist once per instruction set, and the best that the
processor runs is chosen when they are needed.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from larskit.arrays import dtype_name, framework
from larskit.config import Config
from larskit.layout import Unfit, address, check, fault, kept_buffers, size
from larskit.rule import Lengths, weight_decay

try:
    import larskit._native as _native  # pyright: ignore[reportMissingModuleSource]
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
_FLAGS = ("nesterov", "clip", "adapt", "maximize", "zero_guard")
_NUMBERS = ("momentum", "trust_coefficient", "eps", "dampening", "threshold")
_UNKNOWN = -1.0  # of a length, in the kernel's table


def unavailable() -> str | None:
    """Say why this engine cannot run at all; None where it can."""
    if _native is None:
        return (
            f"larskit was installed without its C++ kernel ({_missing}): install a "
            "C++ compiler, then larskit again"
        )
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
    kept = kept_buffers(weights, buffers, float(config.momentum) != 0)
    group = Group(weights, gradients, buffers, new_buffers=kept, threads=threads)
    group.step_(lr, config, norms)
    buffers[:] = kept
    return group.lengths


def fits(x: Any) -> bool:
    """Whether the kernel can read an array, whatever else belongs to its layer."""
    return unavailable() is None and fault(x, x) is None


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
        check("weight", weights, weights, w_dtype)
        check("gradient", gradients, weights, g_dtype)
        check("momentum buffer", buffers, weights, w_dtype)
        result_dtype = g_dtype if rescales else w_dtype
        check("result", results, weights, result_dtype, written=True)
        check("new momentum buffer", new_buffers, weights, w_dtype, written=True)
        self.weights, self.buffers = list(weights), list(new_buffers)
        self._numpy = isinstance(weights[0], np.ndarray)
        self._threads = threads
        assert _native is not None
        self._dtypes = [getattr(_native.Dtype, name) for name in (w_dtype, g_dtype)]
        self._kernel = _native.Group(
            [*map(address, weights)],
            [*map(address, gradients)],
            [*map(address, buffers)],
            [*map(address, results)],
            [*map(address, new_buffers)],
            [size(w) for w in weights],
            weights[0].itemsize,
            gradients[0].itemsize,
            rescales,
        )
        if self._kernel.collides():
            raise Unfit("two of the arrays share memory, where threads would collide")
        self._written = [x for x in (*results, *new_buffers) if x is not None]
        self._gradients: list[Any] | None = list(gradients)
        self._fixed: list[Any] | None = None
        self._single = [i for i, w in enumerate(weights) if size(w) == 1]
        self._carried: Any = None
        self._measured: Any = None

    def aim(self, gradients: list[Any]) -> bool:
        """Take other gradients for the next step, if they and all else fit as before.

        What can change about a torch tensor from step to step is read anew. Only a
        gradient of one element can be a lazy negation and yet lie densely.
        """
        if self._fixed is None:
            return False
        try:
            fits = self._kernel.aim(self._fixed, gradients)
        except (BufferError, RuntimeError):  # a sparse gradient, for one
            return False
        if not fits or any(gradients[i].is_neg() for i in self._single):
            return False
        self._gradients = gradients
        return True

    def remember(self) -> None:
        """Prepare for `aim`, where torch can be asked without a call through Python."""
        tensor = sys.modules["torch"].Tensor
        exchange = getattr(tensor, "__dlpack_c_exchange_api__", None)
        fixed = [*self.weights, *(v for v in self.buffers if v is not None)]
        if exchange and self._kernel.remember(exchange, fixed, self._gradients or []):
            self._fixed = fixed

    def step_(
        self,
        lr: Any,
        config: Config,
        norms: tuple[Any, Any] | None = None,
        *,
        carry: bool = False,
    ) -> None:
        """Move every layer along the gradients that were given last, once.

        With `carry` the lengths of the new weights are measured on the way, and used by
        the next step for the weights that nobody else has written until then.
        """
        table = self._table()
        if norms is not None:
            table[:, 0], table[:, 1] = norms
        elif self._carried is not None:
            table[:, 0] = self._still_known()
        self._run(self._kernel.step, table, lr, config, carry)
        self._carried = (self._marks(), _columns(table)[3]) if carry else None
        self._measured = table

    @property
    def lengths(self) -> Lengths:
        """What the last step measured."""
        return Lengths(*_columns(self._measured)[:3])

    def rescale_(self, config: Config, norms: tuple[Any, Any] | None = None) -> None:
        """Write the rescaled gradients, see `larskit.rule.scaled_gradient`."""
        table = self._table()
        if norms is not None:
            table[:, 0], table[:, 1] = norms
        self._run(self._kernel.rescale, table, 0.0, config)

    def measure(self) -> Any:
        """Return the lengths of the weights, as a wide 1-d array."""
        table = self._table()
        table[:, 1] = 0.0  # which is not asked for
        self._run(self._kernel.measure, table, 0.0, Config())
        return _columns(table)[0]

    def norms(self, config: Config) -> tuple[Any, Any]:
        """Return the lengths of the weights and of what is measured beside them.

        The step is still to be taken.
        """
        table = self._table()
        if self._carried is not None:
            table[:, 0] = self._still_known()
        self._call(self._kernel.measure, table, 0.0, config)
        return _columns(table)[:2]

    def take_over(self, other: "Group") -> None:
        """Keep the lengths that another group of some of the same weights carries."""
        if other._carried is None:
            return
        marks, lengths = other._carried
        rows = zip(other.weights, marks, lengths.tolist(), strict=True)
        known = {id(w): row for w, *row in rows}
        found = [known.get(id(w), (None, _UNKNOWN)) for w in self.weights]
        marks, numbers = zip(*found, strict=True)
        self._carried = list(marks), lengths.new_tensor(numbers)

    def _still_known(self) -> Any:
        """Return the carried lengths of the weights that are as they were left."""
        marks, lengths = self._carried
        same = [a == b for a, b in zip(self._marks(), marks, strict=True)]
        return lengths.where(lengths.new_tensor(same) > 0, _UNKNOWN)

    def _marks(self) -> list[Any]:
        """Return what changes when somebody writes a weight or puts it elsewhere."""
        return [(w.data_ptr(), w._version) for w in self.weights]

    def _table(self) -> Any:
        """Return the kernel's `Lengths` of every layer, unknown yet."""
        shape = len(self.weights), 4
        if self._numpy:
            return np.full(shape, _UNKNOWN)
        torch = sys.modules["torch"]
        return torch.full(shape, _UNKNOWN, dtype=torch.float64)

    def _run(
        self, kernel: Any, table: Any, lr: Any, config: Config, carry: bool = False
    ) -> None:
        self._call(kernel, table, lr, config, carry)
        self._gradients = None
        if not self._numpy:  # autograd shall see what changed behind its back
            sys.modules["torch"].autograd.graph.increment_version(self._written)

    def _call(
        self, kernel: Any, table: Any, lr: Any, config: Config, carry: bool = False
    ) -> None:
        assert self._gradients is not None, "a group steps once along its gradients"
        options = _options(self._dtypes, lr, config, carry)
        kernel(options, address(table), self._threads or threads(self.weights[0]))


class Rescaler:
    """Rescales NumPy gradients one by one, where a group would take longer to make."""

    def __init__(self, config: Config) -> None:
        """Take over the hyper-parameters."""
        self._options = None
        if _native is not None:
            dtypes = [_native.Dtype.float32] * 2  # the kernel looks for itself
            self._options = _options(dtypes, 0.0, config, False)

    def __call__(self, w: Any, g: Any) -> bool:
        """Rescale `g` in place; False, and nothing done, if that cannot be here."""
        if self._options is None or type(w) is not np.ndarray or type(g) is not type(w):
            return False
        assert _native is not None
        count = 1 if w.size < _native.alone else threads()
        return _native.rescale_array(self._options, w, g, count)


def _options(dtypes: list[Any], lr: Any, config: Config, carry: bool) -> Any:
    assert _native is not None
    options: dict[str, Any] = {name: bool(getattr(config, name)) for name in _FLAGS}
    options |= {name: float(getattr(config, name)) for name in _NUMBERS}
    return _native.Options(
        weights=dtypes[0],
        gradients=dtypes[1],
        denominator=getattr(_native.Denominator, config.denominator),
        inside=config.lr_placement == "inside",
        measure_result=carry,
        lr=float(lr),
        weight_decay=float(weight_decay(config)),
        **options,
    )


def _columns(table: Any) -> Any:
    return table.T if isinstance(table, np.ndarray) else table.unbind(1)
