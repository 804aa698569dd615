"""The rule in C++: a whole step in one call, bitwise the reference's.

It takes NumPy arrays and torch CPU tensors that are dense and have one memory order for
all arrays of a layer. The loops exist once per instruction set, and the best that the
processor supports is chosen at the first call.
"""

import atexit
import os
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from larskit.arrays import Array, Scalar, dtype_name, framework
from larskit.config import Config, is_number, is_zero
from larskit.cores import usable_cores
from larskit.engines import contract, reference
from larskit.engines.conditional import unscaled
from larskit.engines.contract import DEFAULT, Arrays, Layers, Switches, Unsupported
from larskit.engines.layout import address, check, empty_like, new_buffers, size
from larskit.rule import LayerStats, Norms

try:
    import larskit._native as _native  # pyright: ignore[reportMissingModuleSource]
except ImportError as why:
    _native, _missing = None, str(why)
else:
    atexit.register(_native.end)

# The dtypes of gradients, by that of their weights.
_DTYPES = {
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64",),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
}
# The columns of the kernel's table of statistics; a norm of -1 is to be computed.
_WEIGHT_NORM, _GRADIENT_NORM, _TRUST_RATIO, _UPDATE_NORM, _RESULT_NORM = range(5)
_UNKNOWN = -1.0
_PLAIN = {float, int, bool, str}  # types of hyper-parameters that cannot change


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
    if why := unavailable():
        raise Unsupported(why)
    if switches.capturable:
        raise Unsupported(
            "the native engine reads lr on the host, so that no graph can capture it"
        )
    if switches.differentiable:
        raise Unsupported("autograd cannot record the steps of the native engine")
    group = Group(layers, config, switches.carry_norms, scales_gradients)
    if switches.carry_norms:
        for other in former:
            if isinstance(other, Group):
                group.adopt_carried_norms(other)
    return group


class Group:
    """Layers that were found fit for the kernel, which knows them by address.

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
        w_dtype, g_dtype = _checked(layers)
        results, buffers = _results(layers, config, scales_gradients)
        result_dtype = g_dtype if scales_gradients else w_dtype
        check("result", results, layers.weights, result_dtype, written=True)
        check("momentum buffer", buffers, layers.weights, w_dtype, written=True)
        assert _native is not None
        self._layers = layers
        self._results, self._new_buffers = results, buffers
        self.weights: list[Array] = list(layers.weights)
        self.buffers: list[Array | None] = list(layers.buffers)
        self._carries = carry_norms
        self._carried: Any = None  # marks of the weights, and their norms
        self._stats: Any = None
        self._gradients: list[Array] | None = list(layers.gradients)
        self._is_unscaled = False
        self._options_of: tuple[Any, Any] = None, None
        self._options: Any = None
        w = layers.weights[0]
        self._torch = sys.modules["torch"] if framework(w) == "torch" else None
        self._written = [x for x in (*results, *buffers) if x is not None]
        self._kernel = _native.Group(
            getattr(_native.Dtype, w_dtype),
            getattr(_native.Dtype, g_dtype),
            [*map(address, layers.weights)],
            [*map(address, layers.gradients)],
            [*map(address, layers.buffers)],
            [*map(address, results)],
            [*map(address, buffers)],
            [size(w) for w in layers.weights],
            list(layers.adapt),
            list(layers.decay),
            scales_gradients,
        )
        if self._kernel.collides():
            raise Unsupported(
                "two of the arrays share memory, where threads would collide"
            )
        self._single = [i for i, w in enumerate(layers.weights) if size(w) == 1]
        self._fixed = self._snapshot()

    def _snapshot(self) -> list[Array] | None:
        """Keep what `rebind` compares, if torch describes tensors to C++."""
        if self._torch is None:
            return None
        exchange = getattr(self._torch.Tensor, "__dlpack_c_exchange_api__", None)
        buffers = (v for v in self._new_buffers if v is not None)
        fixed = [*self.weights, *buffers]
        if exchange and self._kernel.snapshot(exchange, fixed, self._gradients or []):
            return fixed
        return None

    def rebind(self, gradients: Arrays) -> bool:
        """Use other gradients, if they and all else look as before.

        All that can change about a torch tensor from step to step is read again. Only a
        gradient of one element can be a lazy negation and yet be dense.
        """
        if self._fixed is None:
            return False
        gradients = list(gradients)
        try:
            fits = self._kernel.rebind(self._fixed, gradients)
        except (BufferError, RuntimeError):  # for example a sparse gradient
            return False
        if not fits or (
            self._single and any([gradients[i].is_neg() for i in self._single])
        ):
            return False
        self._gradients, self._is_unscaled = gradients, False
        return True

    def adopt_carried_norms(self, former: "Group") -> None:
        """Keep the norms that another group of some of the same weights carries."""
        if former._carried is None:
            return
        marks, norms = former._carried
        rows = zip(former.weights, marks, norms.tolist(), strict=True)
        known = {id(w): row for w, *row in rows}
        found = [known.get(id(w), (None, _UNKNOWN)) for w in self.weights]
        marks, numbers = zip(*found, strict=True)
        self._carried = list(marks), norms.new_tensor(numbers)

    def check(self, lr: Scalar, config: Config) -> None:
        """Accept every step: nothing on the CPU is captured."""

    def norms(self, config: Config, grad_scale: Array | None = None) -> Norms:
        """Return the norms of each layer, as two vectors."""
        self._unscale(grad_scale)
        table = self._table(None)
        self._call(self._kernel.measure, table, 0.0, config)
        return _column(table, _WEIGHT_NORM), _column(table, _GRADIENT_NORM)

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
        if grad_scale is not None:
            self._unscale(grad_scale)
        self._stats = table = self._table(norms)
        if not apply_if:
            self._call(self._kernel.measure, table, lr, config)
            table[:, _UPDATE_NORM] = 0.0
            self._gradients = None
            return
        self._call(self._kernel.step, table, lr, config, full_stats, self._carries)
        self._after_writing()
        self.weights, self.buffers = self._results, self._new_buffers
        if self._carries:
            self._carried = self._marks(), _column(table, _RESULT_NORM)

    @property
    def stats(self) -> LayerStats:
        """The statistics of the last step, as vectors."""
        table = self._stats
        update_norm = _column(table, _UPDATE_NORM)
        return LayerStats(
            _column(table, _WEIGHT_NORM),
            _column(table, _GRADIENT_NORM),
            _column(table, _TRUST_RATIO),
            self._layers.adapt,
            self._layers.decay,
            None if (update_norm < 0).all() else update_norm,
        )

    def scale_gradients(
        self,
        config: Config,
        norms: Norms | None = None,
        grad_scale: Array | None = None,
    ) -> Arrays:
        """Write ``r*u`` for each layer, see `larskit.rule.scaled_gradient`."""
        if grad_scale is not None:
            assert self._gradients is not None
            now = self._layers._replace(gradients=self._gradients, out=self._results)
            reference.bind(now, config).scale_gradients(config, norms, grad_scale)
        else:
            self._call(self._kernel.scale, self._table(norms), 0.0, config)
        self._after_writing()
        return self._results

    def _unscale(self, grad_scale: Array | None) -> None:
        """Divide the gradients by the scale of the loss, into copies, once."""
        if grad_scale is None or self._is_unscaled:
            return
        assert self._gradients is not None
        self._gradients = list(unscaled(self._gradients, grad_scale))
        self._is_unscaled = True
        self._kernel.point([*map(address, self._gradients)])

    def _table(self, norms: Norms | None) -> Any:
        """Return the kernel's table of statistics, with the norms that are known."""
        shape = len(self.weights), 5
        if self._torch is None:
            table = np.full(shape, _UNKNOWN)
        else:
            table = self._torch.full(shape, _UNKNOWN, dtype=self._torch.float64)
        if norms is not None:
            table[:, _WEIGHT_NORM], table[:, _GRADIENT_NORM] = norms
        elif self._carried is not None:
            table[:, _WEIGHT_NORM] = self._still_known()
        return table

    def _still_known(self) -> Any:
        """Return the carried norms of the weights that nobody else has written."""
        marks, norms = self._carried
        same = [a == b for a, b in zip(self._marks(), marks, strict=True)]
        return norms.where(norms.new_tensor(same) > 0, _UNKNOWN)

    def _marks(self) -> list[Any]:
        """Return what changes when another caller writes a weight or moves it."""
        return [(w.data_ptr(), w._version) for w in self.weights]

    def _call(
        self, kernel: Any, table: Any, lr: Scalar, config: Config, *how: bool
    ) -> None:
        assert self._gradients is not None, (
            "these gradients were used already: rebind the group before the next step"
        )
        if self._options_of[0] is not config or self._options_of[1] is not lr:
            self._set_options(lr, config)
        if self._torch is None:
            kernel(self._options, address(table), threads(), *how)
        else:
            count = self._torch.get_num_threads()
            kernel(self._options, table.data_ptr(), count, *how)

    def _set_options(self, lr: Scalar, config: Config) -> None:
        """Read the hyper-parameters, once unless they are tensors, which may change."""
        assert _native is not None
        self._options = _native.Options(config, float(lr))
        is_plain = {*map(type, vars(config).values()), type(lr)} <= _PLAIN
        self._options_of = (config, lr) if is_plain else (None, None)

    def _after_writing(self) -> None:
        """Let go of the gradients, and tell autograd what was written."""
        self._gradients = None
        if self._torch is not None:
            self._torch.autograd.graph.increment_version(self._written)


class ArrayScaler:
    """Scales NumPy gradients one by one, where to bind a group would take longer."""

    def __init__(self, config: Config) -> None:
        """Read the hyper-parameters."""
        numbers = (config.weight_decay, config.eps, config.threshold)
        fixed = _native is not None and all(map(is_number, numbers))
        self._options = _native.Options(config, 0.0) if fixed and _native else None

    def __call__(self, w: Array, g: Array) -> bool:
        """Scale `g` in place; return False, with nothing done, where that cannot be."""
        if self._options is None or type(w) is not np.ndarray or type(g) is not type(w):
            return False
        assert _native is not None
        count = 1 if w.size < _native.serial_below else threads()
        return _native.scale_array(self._options, w, g, count)


def _results(
    layers: Layers, config: Config, scales_gradients: bool
) -> tuple[list[Array], list[Array | None]]:
    """Return the arrays that receive new weights, or gradients, and new buffers."""
    receivers = layers.gradients if scales_gradients else layers.weights
    if layers.out is None:
        results = list(receivers)
    else:
        pairs = zip(receivers, layers.out, strict=True)
        results = [empty_like(x) if out is None else out for x, out in pairs]
    if scales_gradients:
        return results, [None] * len(results)
    if layers.out is not None:
        buffers = [None if v is None else empty_like(v) for v in layers.buffers]
        return results, buffers
    keeps = not is_zero(config.momentum)
    return results, new_buffers(layers.weights, layers.buffers, keeps)


def _checked(layers: Layers) -> tuple[str, str]:
    """Refuse arrays that the kernel cannot read; return the dtypes of w and g."""
    weights, gradients = layers.weights, layers.gradients
    w_dtype, g_dtype = dtype_name(weights[0]), dtype_name(gradients[0])
    if g_dtype not in _DTYPES.get(w_dtype, ()):
        raise Unsupported(f"weight 0 is {w_dtype} and its gradient {g_dtype}")
    check("weight", weights, weights, w_dtype)
    check("gradient", gradients, weights, g_dtype)
    check("momentum buffer", layers.buffers, weights, w_dtype)
    return w_dtype, g_dtype


def _column(table: Any, place: int) -> Any:
    return table[:, place]
