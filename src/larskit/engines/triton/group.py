"""The launches of the kernels, and the tables that tell them what to do."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from larskit.arrays import Array, Scalar, dtype_name
from larskit.config import Config, is_zero
from larskit.engines import conditional, contract
from larskit.engines.conditional import beside, check_capture, dampens_first
from larskit.engines.contract import DEFAULT, Arrays, Layers, Switches, Unsupported
from larskit.engines.layout import address, check, new_buffers
from larskit.engines.triton import kernels
from larskit.engines.triton.kernels import CHOICES, NUMBERS, ROWS, Variant
from larskit.rule import LayerStats, Norms

_DTYPES = {
    "float64": tl.float64,
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "complex128": tl.float64,  # as pairs
    "complex64": tl.float32,
}
_WARPS = 8
_Arguments = tuple[Tensor | int, ...]  # of every kernel, see `Group._arguments`
_GRADIENTS, _OUT, _BUFFERS = map(ROWS.index, ("gradients", "out", "buffers"))
_FLAGS = ("adapt", "decay")  # of Config; those of the layers take their place
INTERPRETED = not isinstance(kernels.move, triton.JITFunction)


def unavailable() -> str | None:
    """Say why this engine cannot run at all; None where it can."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built for the CPU alone"
    return "PyTorch finds no GPU"


def facts() -> dict[str, str]:
    """Return the GPUs, and why Triton runs no kernels on one of them, if so."""
    if INTERPRETED:
        return {"GPU": "none: TRITON_INTERPRET=1 has Triton run its kernels on the CPU"}
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        why = refusal_of(torch.device("cuda", index))
        found[f"GPU {index}"] = (
            f"{device.name}, {device.major}.{device.minor}, {memory}"
            + (f", but {why}" if why else "")
        )
    return found


@cache
def refusal_of(device: torch.device) -> str | None:
    """Say why Triton cannot run kernels on a device; tried once.

    For example without a C compiler, or on an old GPU.
    """
    try:
        with _current(device):
            kernels.probe[(1,)](torch.zeros(1, device=device))
    # What fails may be a driver, a C compiler or Triton: there is no common class.
    except Exception as why:
        first = str(why).partition("\n")[0]
        return f"Triton runs no kernels on {device}: {type(why).__name__}: {first}"
    return None


def bind(
    layers: Layers,
    config: Config,
    switches: Switches = DEFAULT,
    *,
    scales_gradients: bool = False,
    former: Iterable[contract.Group] = (),
) -> "Group":
    """Bind layers of torch tensors, see `larskit.engines.contract.Engine`."""
    del former  # carried norms are computed again where the groups change
    if switches.differentiable:
        raise Unsupported("autograd cannot record the steps of Triton's kernels")
    if layers.out is not None and not scales_gradients:
        raise Unsupported("Triton's kernels move weights in place only")
    return Group(layers, config, switches, scales_gradients)


class Group:
    """Layers of one device and dtype that were found fit for the kernels.

    Its tables are on the device, so that a step waits for nothing. They belong to the
    stream on which they were written, or to one CUDA graph.

    Parameters
    ----------
    layers, config, switches, scales_gradients
        See `bind`.

    Raises
    ------
    Unsupported
        Naming a tensor and what is wrong with it. Nothing has changed then.
    """

    engine = "triton"

    def __init__(
        self,
        layers: Layers,
        config: Config,
        switches: Switches = DEFAULT,
        scales_gradients: bool = False,
    ) -> None:
        """Check the tensors, and write their addresses into the tables."""
        self._dtypes = _checked(layers, scales_gradients)
        self._in_place = scales_gradients and layers.out is None
        self._out = [] if self._in_place else _out(layers, config, scales_gradients)
        _check_out(layers, self._out, self._dtypes, scales_gradients)
        # Nothing keeps gradients after the call that uses them, nor their memory.
        self._layers, self._switches = layers._replace(gradients=()), switches
        self._gradients: list[Tensor] = list(layers.gradients)
        self.weights: list[Tensor] = list(layers.weights)
        self.buffers: list[Tensor | None] = list(layers.buffers)
        self._scales = scales_gradients
        # Without momentum too, buffers are written if all layers have one.
        has_out = all(x is not None for x in self._out)
        self._has_buffers = has_out and not scales_gradients
        self._missing = [] if scales_gradients else self._new_buffers()
        self._summed: list[int] | None = None  # see `_knows_squares`
        self._full_stats = False
        self._keep_places()
        self._make_tables()

    def _new_buffers(self) -> list[Tensor]:
        """Return the buffers that the first step will write."""
        pairs = zip(self.buffers, self._out, strict=True)
        return [new for old, new in pairs if old is None and new is not None]

    def _keep_places(self) -> None:
        """Keep what must be as it is when other gradients are bound."""
        self._device = self.weights[0].device
        self._stream = _stream(self._device)
        self.captured = conditional.is_capturing(self._device)
        # By address, not by identity: ``p.data = x`` keeps the object and moves it.
        self._fixed = [*self.weights, *(x for x in self._out if x is not None)]
        self._places = _addresses(self._fixed)
        self._strides = _strides(self.weights), _strides(self._gradients)
        self._gradient_dtype = self._gradients[0].dtype

    def _make_tables(self) -> None:
        layers, gradients = self._layers, self._gradients
        buffers = [None] * len(self.weights) if self._scales else layers.buffers
        columns = layers.weights, gradients, self._out or gradients, buffers
        addresses = [[address(x) for x in column] for column in columns]
        sizes = [w.numel() * (2 if w.is_complex() else 1) for w in self.weights]
        blocks = [-(-size // kernels.BLOCK.value) for size in sizes]
        *firsts, self._blocks = accumulate(blocks, initial=0)
        flags = [[int(x) for x in column] for column in (layers.adapt, layers.decay)]
        rows = [*addresses, sizes, firsts, *flags]
        # One transfer for the whole table.
        table = conditional.integers([x for row in rows for x in row], self._device)
        self._table = table.view(len(rows), len(self.weights))
        self._addresses = addresses[_GRADIENTS]
        # Which layer each block belongs to, so that a program finds its own.
        every = torch.arange(self._blocks, device=self._device)
        firsts = self._table[ROWS.index("first")]
        # right=True: an empty layer has the first block of the next one, and owns none.
        self._owners = torch.searchsorted(firsts, every, right=True).sub_(1)
        self._sums = self._empty(3, self._blocks)
        self._stats = self._empty(4, len(self.weights))
        self._numbers = self._empty(len(NUMBERS)).zero_()
        self._held: list[Scalar] = [None] * len(NUMBERS)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._device)

    def rebind(self, gradients: Arrays) -> bool:
        """Use other gradients, if they and all else fit as before.

        What is part of a CUDA graph stays as it was captured, for good.
        """
        gradients = list(gradients)
        # A replay reads these tables: once captured, nothing may write them. A capture
        # has a stream of its own, and may use the tables of another.
        captures = conditional.is_capturing(self._device)
        if not (
            not self.captured
            and (captures or _stream(self._device) == self._stream)
            and _are_plain(gradients, self._gradient_dtype)
            and (_strides(self.weights), _strides(gradients)) == self._strides
            and _addresses(self._fixed) == self._places
        ):
            return False
        addresses = _addresses(gradients)
        if addresses != self._addresses:
            # The write would be replayed, too. A new group writes its tables in the
            # graph.
            if captures:
                return False
            self._write_addresses(addresses)
        self.captured = captures
        self._gradients = gradients
        return True

    def _write_addresses(self, addresses: list[int]) -> None:
        row = conditional.integers(addresses, self._device)
        self._table[_GRADIENTS].copy_(row)
        if self._in_place:
            self._table[_OUT].copy_(row)
        self._addresses = addresses

    def check(self, lr: Scalar, config: Config) -> None:
        """Refuse what a CUDA graph could not repeat."""
        check_capture(self._layers, self.buffers, lr, config, self._switches)

    def norms(self, config: Config, grad_scale: Array | None = None) -> Norms:
        """Return the norms of each layer, as two vectors."""
        how = self._variant(config, unscales=grad_scale is not None)
        arguments = self._arguments(None, config, grad_scale)
        with _current(self._device):
            self._measure(arguments, how)
        # Copies, because the next call writes into `_stats`.
        w_norms, q = self._stats[:2].clone()
        return w_norms, q

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
        applies = self._decided(apply_if, config)
        flag = self._flag(applies, full_stats)
        how = self._variant(
            config,
            unscales=grad_scale is not None,
            conditional=flag is not None,
            carries=self._switches.carry_norms,
            full_stats=full_stats,
        )
        arguments = self._arguments(lr, config, grad_scale, flag)
        if isinstance(applies, Tensor):  # a step that the device skips leaves zeros
            for v in self._missing:
                v.zero_()
            self._begin()
        with _current(self._device):
            self._measure(arguments, how, norms)
            if applies is not False or full_stats:
                self._move(arguments, how)
        if applies is not False:
            self._note_written(applies)
        self._gradients, self._full_stats = [], full_stats

    def _decided(self, apply_if: bool | Array, config: Config) -> bool | Tensor:
        """Return whether to apply a step: a bool, or a tensor that the device reads."""
        if isinstance(apply_if, Tensor) and not dampens_first(self.buffers, config):
            return beside(apply_if, self.weights[0])
        return bool(apply_if)

    def _flag(self, applies: bool | Tensor, full_stats: bool) -> Tensor | None:
        """Return what tells `move` to write nothing, if something does."""
        if applies is False and full_stats:  # the update is measured all the same
            return torch.zeros((), dtype=torch.bool, device=self._device)
        return applies if isinstance(applies, Tensor) else None

    def _measure(
        self, arguments: _Arguments, how: Variant, norms: Norms | None = None
    ) -> None:
        """Compute the norms, unless they are given, and the trust ratios."""
        if norms is None:
            _launch(kernels.measure, self._blocks, *arguments, how)
            # As they are now: `move` writes the weights and, to carry, their sums.
            self._summed = self._versions()
        else:
            for own, given in zip(self._stats[:2], norms, strict=True):
                own.copy_(given)
        given = norms is not None
        _launch(kernels.finish, len(self.weights), *arguments, how, given)

    def _move(self, arguments: _Arguments, how: Variant) -> None:
        _launch(kernels.move, self._blocks, *arguments, how)
        if how.full_stats:
            _launch(kernels.finish_update, len(self.weights), *arguments, how)

    def _note_written(self, applies: bool | Tensor) -> None:
        """Take account of the weights and buffers that a step writes."""
        # Where the device skips the step, the squares are those of before.
        known = applies is True or self._knows_squares()
        # The kernels write by address, which autograd does not see.
        torch.autograd.graph.increment_version(self._fixed)
        self._summed = self._versions() if known else None
        self._begin()

    def _begin(self) -> None:
        """Use the new buffers from now on."""
        if self._missing:
            # From device to device: no address goes through the host.
            self._table[_BUFFERS].copy_(self._table[_OUT])
            self._missing = []
            self.buffers = self._out

    @property
    def stats(self) -> LayerStats:
        """The statistics of the last step, until the next."""
        w_norms, q, ratios, update_norms = self._stats.unbind()
        return LayerStats(
            w_norms,
            q,
            ratios,
            self._layers.adapt,
            self._layers.decay,
            update_norms if self._full_stats else None,
        )

    def scale_gradients(
        self,
        config: Config,
        norms: Norms | None = None,
        grad_scale: Array | None = None,
    ) -> Arrays:
        """Write ``r*u`` for each layer, see `larskit.rule.scaled_gradient`."""
        how = self._variant(config, keeps_scale=grad_scale is not None)
        arguments = self._arguments(0.0, config, grad_scale)
        with _current(self._device):
            self._measure(arguments, how, norms)
            _launch(kernels.scale, self._blocks, *arguments, how)
        results = [x for x in self._out or self._gradients if x is not None]
        torch.autograd.graph.increment_version(results)
        self._gradients = []
        return results

    def _arguments(
        self,
        lr: Scalar | None,
        config: Config,
        grad_scale: Array | None = None,
        apply_if: Tensor | None = None,
    ) -> _Arguments:
        """Write the hyper-parameters that are new, and return what kernels get.

        A tensor is read where it is, at each step; what comes from another device is
        copied without waiting.
        """
        assert self._gradients, (
            "these gradients were used already: rebind the group before the next step"
        )
        w = self.weights[0]
        lr, grad_scale = beside(lr, w), beside(grad_scale, w)
        for i, name in enumerate(NUMBERS):
            value = lr if name == "lr" else getattr(config, name)
            if value is None or (value is lr and isinstance(lr, Tensor)):
                continue  # not needed, or read where it is
            # The host does not know the value, so that the next number is written in
            # any case.
            if isinstance(value, Tensor):
                self._numbers[i].copy_(value.view(()), non_blocking=True)
                self._held[i] = None
            # `fill_` passes the number to a kernel by value: no host memory is read
            # later.
            elif value != self._held[i]:
                self._numbers[i].fill_(value)
                self._held[i] = value
        # Where a kernel needs a pointer that it does not follow, it gets `_numbers`.
        # Its first entry is lr.
        return (
            self._table,
            self._owners,
            len(self.weights),
            self._blocks,
            self._sums,
            self._stats,
            lr if isinstance(lr, Tensor) else self._numbers,
            self._numbers,
            self._numbers if grad_scale is None else grad_scale,
            self._numbers if apply_if is None else apply_if,
        )

    def _variant(self, config: Config, **how: bool) -> Variant:
        """Return what the kernels are compiled for."""
        layers = self._layers
        decays = not is_zero(config.weight_decay) and any(layers.decay)
        choices = {name: getattr(config, name) for name in CHOICES}
        choices |= {"adapt": any(layers.adapt), "decay": decays}
        # Gradients are scaled as in a first step: the kernels read buffers of zeros.
        starts = config.denominator == "momentum" and not is_zero(config.momentum)
        return _variant(
            *self._dtypes,
            tuple(choices.values()),
            momentum=starts if self._scales else self._has_buffers,
            carried=self._knows_squares(),
            **how,
        )

    def _knows_squares(self) -> bool:
        """Whether the table of sums has the squares of the weights as they are."""
        return self._switches.carry_norms and self._summed == self._versions()

    def _versions(self) -> list[int] | None:
        """Return what changes when another caller writes a weight, if it matters."""
        if not self._switches.carry_norms:
            return None
        return [w._version for w in self.weights]


@cache
def _variant(
    w: str, g: str, choices: tuple[object, ...], *, momentum: bool, **how: bool
) -> Variant:
    dtypes = _DTYPES[w], _DTYPES[g]
    compute = tl.float64 if tl.float64 in dtypes else tl.float32
    named: dict[str, Any] = dict(zip(CHOICES, choices, strict=True))
    named |= {"momentum": momentum, **how}
    return Variant(*dtypes, compute, **named)


def _checked(layers: Layers, scales: bool) -> tuple[str, str]:
    """Refuse tensors that the kernels cannot use; return the dtypes of w and g."""
    if why := unavailable():
        raise Unsupported(why)
    weights, gradients = layers.weights, layers.gradients
    device = weights[0].device
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        raise Unsupported(f"weight 0 is on the device {device}")
    if why := refusal_of(device):
        raise Unsupported(why)
    w_dtype, g_dtype = dtype_name(weights[0]), dtype_name(gradients[0])
    if not {w_dtype, g_dtype} <= {*_DTYPES} or (
        w_dtype != g_dtype and "complex" in w_dtype + g_dtype
    ):
        raise Unsupported(f"weight 0 is {w_dtype} and its gradient {g_dtype}")
    where = str(device)
    in_place = scales and layers.out is None
    check("weight", weights, weights, w_dtype, where, written=not scales)
    check("gradient", gradients, weights, g_dtype, where, written=in_place)
    check("momentum buffer", layers.buffers, weights, w_dtype, where)
    return w_dtype, g_dtype


def _out(layers: Layers, config: Config, scales: bool) -> list[Tensor | None]:
    """Return what is written beside the weights: new buffers, or scaled gradients."""
    if not scales:
        keeps = not is_zero(config.momentum)
        return new_buffers(layers.weights, layers.buffers, keeps)
    pairs = zip(layers.gradients, layers.out or (), strict=True)
    return [torch.empty_like(g) if out is None else out for g, out in pairs]


def _check_out(
    layers: Layers, out: list[Tensor | None], dtypes: tuple[str, str], scales: bool
) -> None:
    what, dtype = ("result", dtypes[1]) if scales else ("momentum buffer", dtypes[0])
    if out:
        where = str(layers.weights[0].device)
        check(what, out, layers.weights, dtype, where, written=True)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


def _strides(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [*map(Tensor.stride, tensors)]


def _are_plain(tensors: Sequence[Array], dtype: torch.dtype) -> bool:
    return (
        {*map(type, tensors)} == {Tensor}
        and {*map(attrgetter("dtype"), tensors)} == {dtype}
        and {*map(attrgetter("layout"), tensors)} == {torch.strided}
        # The memory of a lazily negated tensor holds the negatives.
        and not any(map(Tensor.is_neg, tensors))
    )


def _launch(kernel: Any, programs: int, *arguments: object) -> None:
    if programs:
        kernel[(programs,)](*arguments, num_warps=_WARPS, enable_fp_fusion=False)


def _stream(device: torch.device) -> int:
    """Name the stream on which the device works now."""
    on_gpu = device.type == "cuda"
    return torch.cuda.current_stream(device).cuda_stream if on_gpu else 0


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on a device."""
    # Triton launches on the current device, wherever the tensors are.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
