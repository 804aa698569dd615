"""The rule in C++: a whole step in one call, bitwise the reference's.

It takes NumPy arrays and torch CPU tensors that are dense and have one memory order for
all arrays of a layer. The loops exist once per instruction set, and the best that the
processor supports is chosen at the first call.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from larskit.arrays import Array, Scalar, dtype_name, framework, stop_gradient
from larskit.config import Config, is_number, is_zero
from larskit.cores import usable_cores
from larskit.engines import contract, reference
from larskit.engines.conditional import unscaled
from larskit.engines.contract import (
    DEFAULT,
    Arrays,
    Layers,
    Switches,
    Unsupported,
)
from larskit.engines.layout import address, check, empty_like, new_buffers, size
from larskit.rule import LayerStats, Norms

try:
    import larskit._native as _native  # pyright: ignore[reportMissingModuleSource]
except ImportError as why:
    _native, _missing = None, str(why)
else:
    # Waits for daemon threads in the kernel: after the interpreter's end none of them
    # could take its lock back.
    atexit.register(_native.end)

# The dtypes of gradients, by that of their weights.
_DTYPES = {
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64",),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
}
# In elements: only layers of more carry their norms. A smaller one is still in the
# cache of the thread that measured it when it moves: a known norm saves no read.
CARRIES_ABOVE = _native.undivided if _native else 0
# The columns of the kernel's `Stats`; it computes the norms that are unknown.
_WEIGHT_NORM, _GRADIENT_NORM, _TRUST_RATIO, _UPDATE_NORM, _RESULT_NORM = range(5)
_UNKNOWN = -1.0
_Mark = tuple[int, int]  # of a weight: its address and its version


def unavailable() -> str | None:
    """Say why this engine cannot run at all; None where it can."""
    if _native is None:
        return (
            f"larskit was installed without its C++ kernel ({_missing}): install a "
            "C++ compiler, then larskit again"
        )
    return None


def facts() -> dict[str, str]:
    """Return the instruction set of the kernel, and the number of threads."""
    try:
        count = f"{threads()} for NumPy arrays"
    except ValueError as why:
        count = str(why)
    if torch := sys.modules.get("torch"):
        count += f", {threads(torch.empty(0))} for torch tensors"
    return {"kernel": variant(), "threads": count}


def variant() -> str:
    """Name the instruction set that the loops are compiled for."""
    if why := unavailable():
        raise Unsupported(why)
    return _native.variant()  # pyright: ignore[reportOptionalMemberAccess]


def threads(like: Array | None = None) -> int:
    """Return how many threads a step may use.

    For torch tensors ``torch.get_num_threads()``; else ``LARSKIT_NUM_THREADS`` of the
    environment, or the number of cores that this process may use.
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
    return usable_cores()


def bind(
    layers: Layers,
    config: Config,
    switches: Switches = DEFAULT,
    *,
    scales_gradients: bool = False,
    former: Iterable[contract.Group] = (),
) -> "Group":
    """Bind layers of NumPy or torch, see `larskit.engines.contract.Engine`."""
    if why := unavailable() or _refusal(layers, switches):
        raise Unsupported(why)
    group = Group(layers, config, switches.carry_norms, scales_gradients)
    if switches.carry_norms:
        group.adopt_carried_norms(former)
    return group


class Group:
    """Layers whose arrays the kernel knows by their addresses.

    Parameters
    ----------
    layers, config, scales_gradients
        See `bind`.
    carry_norms : bool, default=False
        Whether a step computes the norms of the new weights.

    Raises
    ------
    Unsupported
        Naming an array and what is wrong with it. Nothing has changed then.
    """

    engine = "native"
    captured = False

    def __init__(
        self,
        layers: Layers,
        config: Config,
        carry_norms: bool = False,
        scales_gradients: bool = False,
    ) -> None:
        """Check the arrays, and make those that are missing."""
        dtypes = _checked_dtypes(layers, scales_gradients)
        self.weights: list[Array] = list(layers.weights)
        self.buffers: list[Array | None] = list(layers.buffers)
        self._results = _results(layers, scales_gradients)
        self._new_buffers = _new_buffers(layers, config, scales_gradients)
        self._flags = layers.adapt, layers.decay
        self._scales, self._in_place = scales_gradients, layers.out is None
        # Scaling writes no weights, whose new norms could be carried.
        self._carries = [  # the places of the layers that do
            i
            for i, w in enumerate(self.weights)
            if carry_norms and not scales_gradients and size(w) > CARRIES_ABOVE
        ]
        self._carried: Any = None  # the marks of these layers, and the norms of all
        self._table: Array = None  # the statistics of the last step
        self._full_stats = False
        self._gradients: list[Array] | None = list(layers.gradients)
        self._bound = self._gradients  # what the kernel reads: or unscaled copies
        self._unscaled: tuple[Array, list[Array]] | None = None
        self._torch = _torch_of(layers)
        self._threads, self._new_table = _environment(self._torch, len(self.weights))
        self._written = [
            x for x in (*self._results, *self._new_buffers) if x is not None
        ]
        self._kernel = self._make_kernel(dtypes)
        # A lazy negation can be dense only if it has a single element.
        self._single = [i for i, w in enumerate(self.weights) if size(w) == 1]
        self._fixed = self._snapshot()

    def _make_kernel(self, dtypes: tuple[str, str]) -> Any:
        assert _native is not None
        gradients, results = self._gradients or [], self._results
        buffers = [None] * len(results) if self._scales else self.buffers
        arrays = self.weights, gradients, buffers, results, self._new_buffers
        columns = (map(address, column) for column in arrays)
        large = set(self._carries)
        carries = [i in large for i in range(len(results))]
        flags = (map(bool, column) for column in (*self._flags, carries))
        rows = [*zip(*columns, map(size, self.weights), *flags, strict=True)]
        with_torch = self._torch is not None
        kernel = _native.Group(*dtypes, rows, self._scales, self._in_place, with_torch)
        if kernel.collides():
            raise Unsupported(
                "two of the arrays share memory, where threads would collide"
            )
        return kernel

    def _snapshot(self) -> list[Array] | None:
        """Return the arrays that must stay, after the kernel has described all of them.

        None where the group cannot be bound again: where the results of a step are not
        the weights of the next one, or arrays can be described by Python calls only.
        """
        if self._torch is None or not (self._in_place or self._scales):
            return None
        fixed = [*self.weights, *(v for v in self._new_buffers if v is not None)]
        if not self._in_place:
            fixed += self._results
        # Older versions of torch do not have it: each step then binds a new group.
        exchange = getattr(self._torch.Tensor, "__dlpack_c_exchange_api__", None)
        if exchange and self._kernel.snapshot(exchange, fixed, self._gradients or []):
            return fixed
        return None

    def rebind(self, gradients: Arrays) -> bool:
        """Use other gradients, if they and all else look as before.

        All that can change about a torch tensor from step to step is read again.
        """
        if self._fixed is None:
            return False
        gradients = list(gradients)
        try:
            fits = self._kernel.rebind(self._fixed, gradients)
        except (BufferError, RuntimeError):  # for example a sparse gradient
            return False
        # DLPack does not describe the neg bit.
        if not fits or (
            self._single and any([gradients[i].is_neg() for i in self._single])
        ):
            return False
        self._gradients = self._bound = gradients
        if self._scales and self._in_place:
            self._results = self._written = gradients
        return True

    def adopt_carried_norms(self, former: Iterable[contract.Group]) -> None:
        """Keep the norms that groups of the last step carry for the same weights."""
        carried: dict[int, tuple[Any, float]] = {}
        for group in former:
            if isinstance(group, Group) and group._carried is not None:
                marks, norms = group._carried
                # The former groups are alive and hold these weights: no id is reused.
                for i, mark in zip(group._carries, marks, strict=True):
                    carried[id(group.weights[i])] = mark, norms[i].item()
        if carried:
            known = [carried.get(id(w), (None, _UNKNOWN)) for w in self.weights]
            marks = [known[i][0] for i in self._carries]
            self._carried = marks, self._tensor([norm for _, norm in known])

    def check(self, lr: Scalar, config: Config) -> None:
        """Accept every step: nothing on the CPU is captured."""

    def norms(self, config: Config, grad_scale: Array | None = None) -> Norms:
        """Return the norms of each layer, as two vectors."""
        table = self._run(self._kernel.measure, 0.0, config, None, grad_scale)
        return table[:, _WEIGHT_NORM], table[:, _GRADIENT_NORM]

    def step_(
        self,
        lr: Scalar,
        config: Config,
        norms: Norms | None = None,
        *,
        grad_scale: Array | None = None,
        apply_if: bool | Array = True,
        full_stats: bool = False,
    ) -> None:
        """Move every layer along the gradients that were bound last, once."""
        self._full_stats = full_stats
        moves = bool(apply_if)
        run = self._kernel.step if moves else self._kernel.measure
        how = (full_stats,) if moves else ()
        self._table = self._run(run, lr, config, norms, grad_scale, *how)
        # Before the gradients are dropped, which it reads.
        if full_stats and not moves:
            self._table[:, _UPDATE_NORM] = self._update_norms(lr, config)
        self._drop_gradients()
        if not moves:
            return
        self._mark_written()
        self.weights, self.buffers = self._results, self._new_buffers
        # After `_mark_written`, or the group's own write would look like another
        # caller's.
        if self._carries:
            self._carried = self._marks(), self._table[:, _RESULT_NORM]

    @property
    def stats(self) -> LayerStats:
        """The statistics of the last step, as vectors."""
        w_norms, q, ratios, update_norms, _ = self._table.T
        update_norms = update_norms if self._full_stats else None
        return LayerStats(w_norms, q, ratios, *self._flags, update_norms)

    def scale_gradients(
        self,
        config: Config,
        norms: Norms | None = None,
        grad_scale: Array | None = None,
    ) -> Arrays:
        """Write ``r*u`` for each layer, see `larskit.rule.scaled_gradient`."""
        results = self._results
        if grad_scale is None:
            self._run(self._kernel.scale, 0.0, config, norms, None)
            self._mark_written()
        else:
            self._scale_by_the_rule(config, norms, grad_scale)
        # Last: in place it empties the list that `_mark_written` reads.
        self._drop_gradients()
        return results

    def _update_norms(self, lr: Scalar, config: Config) -> Array:
        """Return |y| of a step that is not taken, which the kernel does not compute."""
        weights = [stop_gradient(w) for w in self.weights]
        layers = Layers(weights, self._bound or [], self.buffers, *self._flags)
        norms = self._table[:, _WEIGHT_NORM], self._table[:, _GRADIENT_NORM]
        return reference.update_norms(layers, lr, config, norms)

    def _scale_by_the_rule(
        self, config: Config, norms: Norms | None, grad_scale: Array
    ) -> None:
        """Do what the kernel cannot: the decay is multiplied by the loss scale too."""
        weights = [stop_gradient(w) for w in self.weights]
        gradients = self._current_gradients()
        layers = Layers(
            weights, gradients, self.buffers, *self._flags, out=self._results
        )
        reference.bind(layers, config).scale_gradients(config, norms, grad_scale)

    def _run(
        self,
        run: Callable[..., None],
        lr: Scalar,
        config: Config,
        norms: Norms | None,
        grad_scale: Array | None,
        *how: bool,
    ) -> Array:
        """Call the kernel, and return the table that it has filled in."""
        assert _native is not None
        gradients = self._current_gradients()
        if grad_scale is not None:
            gradients = self._unscaled_gradients(gradients, grad_scale)
        # `rebind` has told the kernel: only unscaled copies are elsewhere.
        if gradients is not self._bound:
            self._bound = gradients
            self._kernel.use_gradients([*map(address, gradients)])
        # A new one each time: the vectors of `stats` are views of an older one.
        table = self._new_table()
        if norms is not None:
            table[:, _WEIGHT_NORM], table[:, _GRADIENT_NORM] = norms
        elif self._carried is not None:
            table[:, _WEIGHT_NORM] = self._still_known()
        options = _native.Options(config, lr)
        run(options, address(table), self._threads(), *how)
        return table

    def _current_gradients(self) -> list[Array]:
        assert self._gradients is not None, (
            "these gradients were used already: rebind the group before the next step"
        )
        return self._gradients

    def _unscaled_gradients(
        self, gradients: list[Array], grad_scale: Array
    ) -> list[Array]:
        """Return copies divided by the loss scale: once for the norms and the step."""
        # `norms` and then `step_` of one training step pass the same object.
        if self._unscaled is None or self._unscaled[0] is not grad_scale:
            self._unscaled = grad_scale, list(unscaled(gradients, grad_scale))
        return self._unscaled[1]

    def _drop_gradients(self) -> None:
        """Hold no gradient any longer: each is as large as its weights."""
        self._gradients = self._bound = self._unscaled = None
        if self._scales and self._in_place:
            self._results = self._written = []

    def _mark_written(self) -> None:
        """Tell autograd, which has not seen the kernel write."""
        if self._torch is not None:
            # Otherwise a backward pass through the old weights would silently use the
            # new ones.
            self._torch.autograd.graph.increment_version(self._written)

    def _still_known(self) -> Array:
        """Return the carried norms of the weights that nobody has written since."""
        marks, norms = self._carried
        now = self._marks()
        if now == marks:
            return norms
        norms = norms.clone()
        for i, *pair in zip(self._carries, now, marks, strict=True):
            if pair[0] != pair[1]:
                norms[i] = _UNKNOWN
        return norms

    def _marks(self) -> list[_Mark]:
        """Return what changes when another caller writes a weight or moves it."""
        # Both are needed: ``p.data = x`` changes no version, ``p.mul_(2)`` no address.
        weights = [self.weights[i] for i in self._carries]
        return [(w.data_ptr(), w._version) for w in weights]

    def _tensor(self, numbers: Iterable[float]) -> Array:
        return self._torch.tensor(numbers, dtype=self._torch.float64)


class ArrayScaler:
    """Scales NumPy gradients one by one, where to bind a group would take longer."""

    def __init__(self, config: Config) -> None:
        """Read the hyper-parameters, unless they are arrays, which may change."""
        self._options = None
        if _native is not None and all(map(is_number, _numbers(config))):
            self._options = _native.Options(config, 0.0)

    def __call__(self, w: Array, g: Array) -> bool:
        """Scale `g` in place; return False, with nothing done, where that cannot be."""
        # Not `isinstance`: masked arrays and matrices compute otherwise.
        if self._options is None or type(w) is not np.ndarray or type(g) is not type(w):
            return False
        assert _native is not None
        count = 1 if w.size < _native.serial_below else threads()
        return _native.scale_array(self._options, w, g, count)


def _numbers(config: Config) -> Iterable[Scalar]:
    return config.trust_coefficient, config.weight_decay, config.eps, config.threshold


def _refusal(layers: Layers, switches: Switches) -> str | None:
    """Say which switch this engine cannot honour."""
    if switches.capturable:
        return (
            "the native engine reads lr on the host, which a captured step cannot "
            "repeat"
        )
    if switches.differentiable:
        return "autograd cannot record the steps of the native engine"
    if switches.carry_norms and _torch_of(layers) is None:
        return "carry_norms needs the version counters of torch tensors"
    if switches.carry_norms and layers.out is not None:
        return "carry_norms needs weights that are stepped in place"
    return None


def _torch_of(layers: Layers) -> Any:
    """Return torch where the layers are its tensors."""
    return sys.modules["torch"] if framework(layers.weights[0]) == "torch" else None


def _environment(
    torch: ModuleType | None, count: int
) -> tuple[Callable[[], int], Callable[[], Array]]:
    """Return what counts threads, and what makes a table of statistics for layers."""
    shape = count, 5
    if torch is None:
        return threads, partial(np.full, shape, _UNKNOWN)
    new_table = partial(torch.full, shape, _UNKNOWN, dtype=torch.float64)
    return torch.get_num_threads, new_table


def _checked_dtypes(layers: Layers, scales: bool) -> tuple[str, str]:
    """Return the dtypes of weights and gradients; refuse arrays that do not fit."""
    weights, gradients = layers.weights, layers.gradients
    w_dtype, g_dtype = dtype_name(weights[0]), dtype_name(gradients[0])
    if g_dtype not in _DTYPES.get(w_dtype, ()):
        raise Unsupported(f"weight 0 is {w_dtype} and its gradient {g_dtype}")
    in_place = layers.out is None
    check("weight", weights, weights, w_dtype, written=in_place and not scales)
    check("gradient", gradients, weights, g_dtype, written=in_place and scales)
    if not scales:
        buffers = layers.buffers
        check("momentum buffer", buffers, weights, w_dtype, written=in_place)
    if layers.out is not None:
        dtype = g_dtype if scales else w_dtype
        check("result", layers.out, weights, dtype, written=True)
    return w_dtype, g_dtype


def _results(layers: Layers, scales: bool) -> list[Array]:
    """Return the arrays that receive the new weights, or the scaled gradients."""
    replaced = layers.gradients if scales else layers.weights
    if layers.out is None:
        return list(replaced)
    pairs = zip(replaced, layers.out, strict=True)
    return [empty_like(x) if out is None else out for x, out in pairs]


def _new_buffers(layers: Layers, config: Config, scales: bool) -> list[Array | None]:
    """Return the arrays that receive the momentum buffers; None where none is kept."""
    if scales:
        return [None] * len(layers.weights)
    keeps = not is_zero(config.momentum)
    if layers.out is None:
        return new_buffers(layers.weights, layers.buffers, keeps)
    pairs = zip(layers.weights, layers.buffers, strict=True)
    return [None if v is None and not keeps else empty_like(w) for w, v in pairs]
