"""The launches of the kernels, and the tables that tell them what to do."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from larskit import layout
from larskit.arrays import dtype_name
from larskit.config import Config, is_zero
from larskit.engines.triton import kernels
from larskit.layout import Unfit, address, check, kept_buffers
from larskit.rule import Lengths, weight_decay

_DTYPES = {
    "float64": tl.float64,
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "complex128": tl.float64,  # as pairs
    "complex64": tl.float32,
}
_FLAGS = ("nesterov", "clip", "adapt", "maximize", "zero_guard")
_WARPS = 8
INTERPRETED = not isinstance(kernels.move, triton.JITFunction)


def unavailable() -> str | None:
    """Say why this engine cannot run at all; None where it can."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built for the CPU alone"
    return "PyTorch finds no GPU"


@cache
def broken(device: torch.device) -> str | None:
    """Say why Triton cannot run kernels on a device; tried once.

    It needs a C compiler, for one, where its own were left out, and no old GPU.
    """
    try:
        with _current(device):
            kernels.probe[(1,)](torch.zeros(1, device=device))
    except Exception as why:
        first = str(why).partition("\n")[0]
        return f"Triton runs no kernels on {device}: {type(why).__name__}: {first}"
    return None


def lengths(arrays: Sequence[Tensor]) -> Tensor:
    """Return the length of each tensor, as a wide 1-d tensor."""
    group = Group(arrays, arrays, [None] * len(arrays))
    return group.norms(Config(momentum=0.0))[0]


def step_(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Any],
    lr: Any,
    config: Config,
    norms: tuple[Tensor, Tensor] | None = None,
) -> Lengths:
    """Move `weights` and `buffers` in place, see `larskit.engines`."""
    keep = not is_zero(config.momentum)
    kept = kept_buffers(weights, buffers, keep)
    group = Group(weights, gradients, buffers, new_buffers=kept)
    group.step_(lr, config, norms)
    if keep:
        buffers[:] = kept
    return group.lengths


class Group:
    """Layers of one device and dtype that were found fit for the kernels.

    Its tables lie on the device, so that a step waits for nothing. They belong to the
    stream on which they were written, or to one CUDA graph.

    Parameters
    ----------
    weights, gradients : sequences of Tensor
        One of each for a layer.
    buffers : sequence of Tensor or None
        The momentum buffers; None for a layer without one.
    new_buffers : sequence of Tensor or None, optional
        Receive the new buffers. Default: the buffers do.
    adapt, decay : sequence of bool, optional
        Which layers are adapted and decayed, where a configuration says that any are.
        Default: all.

    Raises
    ------
    Unfit
        Naming a tensor and what is wrong with it. Nothing has changed then.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        buffers: Sequence[Any],
        new_buffers: Sequence[Any] | None = None,
        *,
        adapt: Sequence[bool] | None = None,
        decay: Sequence[bool] | None = None,
    ) -> None:
        """Check the tensors, and write where they lie into the tables."""
        new_buffers = buffers if new_buffers is None else new_buffers
        _check(weights, gradients, buffers, new_buffers)
        self._gradients = list(gradients)
        self._written = [*weights, *(v for v in new_buffers if v is not None)]
        self._weights = self._written[: len(weights)]
        pairs = zip(buffers, new_buffers, strict=True)
        self._new = [v for old, v in pairs if old is None and v is not None]
        self._dtypes = dtype_name(weights[0]), dtype_name(gradients[0])
        self._gradient_dtype = gradients[0].dtype
        self._device = weights[0].device
        self._stream = _stream(self._device)
        self.captured = layout.is_capturing(self._device)
        self._strides = _strides(self._weights), _strides(gradients)
        self._places = _addresses(self._written)
        self._left: list[Any] | None = None  # the weights whose squares are known
        columns = weights, gradients, buffers, new_buffers
        flags = [x or [True] * len(weights) for x in (adapt, decay)]
        self._make_tables(columns, flags)

    def _make_tables(self, columns: Sequence[Any], flags: Sequence[Any]) -> None:
        weights = columns[0]
        rows = [[address(x) for x in column] for column in columns]
        sizes = [w.numel() * (2 if w.is_complex() else 1) for w in weights]
        blocks = [-(-size // kernels.BLOCK.value) for size in sizes]
        *firsts, self._blocks = accumulate(blocks, initial=0)
        rows += [sizes, firsts, *flags]
        table = layout.integers([x for row in rows for x in row], self._device)
        self._addresses = rows[kernels.Variant.G]
        self._table = table.view(len(rows), len(weights))
        every = torch.arange(self._blocks, device=self._device)
        firsts = self._table[kernels.Variant.FIRST]
        self._owners = torch.searchsorted(firsts, every, right=True).sub_(1)
        self._sums = self._empty(2, self._blocks)
        self._lengths = self._empty(3, len(weights))
        self._numbers = self._empty(len(kernels.NUMBERS)).zero_()
        self._held: list[Any] = [None] * len(kernels.NUMBERS)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._device)

    def aim(self, gradients: list[Any]) -> bool:
        """Take other gradients for the next step, if they and all else fit as before.

        What is part of a CUDA graph stays as it was captured, for good.
        """
        captures = layout.is_capturing(self._device)
        if not (
            not self.captured
            and (captures or _stream(self._device) == self._stream)
            and _are_plain(gradients, self._gradient_dtype)
            and (_strides(self._weights), _strides(gradients)) == self._strides
            and _addresses(self._written) == self._places
        ):
            return False
        addresses = _addresses(gradients)
        if addresses != self._addresses:
            if captures:
                return False
            row = self._table[kernels.Variant.G]
            row.copy_(layout.integers(addresses, self._device))
            self._addresses = addresses
        self.captured = captures
        self._gradients = gradients
        return True

    def step_(
        self,
        lr: Any,
        config: Config,
        norms: tuple[Tensor, Tensor] | None = None,
        *,
        carry: bool = False,
        scale: Tensor | None = None,
        permitted: Tensor | None = None,
    ) -> None:
        """Move every layer along the gradients that were given last, once.

        Parameters
        ----------
        lr : float or Tensor of one element
            The learning rate; a tensor is read on the device.
        config : Config
            The hyper-parameters; tensors in it are on the device.
        norms : pair of Tensor, optional
            The lengths of the weights and of what is measured, if known.
        carry : bool, default=False
            Measure the new weights on the way, so that the next step need not, if
            nobody else writes them until then.
        scale : Tensor of one element, optional
            What the loss, and hence the gradients, were multiplied by.
        permitted : Tensor of one bool, optional
            Nothing moves where it is false. The first buffers are then zeros, which
            differs from the rule where it would dampen what enters them.
        """
        assert self._gradients, "a group steps once along its gradients"
        arguments = self._arguments(lr, config, scale, permitted)
        how = self._variant(config, scale, permitted, carry)
        if permitted is not None:
            for v in self._new:
                v.zero_()
            self._begin()
        with _current(self._device):
            self._rate(arguments, how, norms)
            _launch(kernels.move, self._blocks, *arguments, how)
        self._begin()
        self._gradients = []
        torch.autograd.graph.increment_version(self._written)
        self._left = self._marks() if carry else None

    def norms(
        self, config: Config, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the lengths of the weights and of what is measured beside them.

        The step is still to be taken.
        """
        arguments = self._arguments(None, config, scale)
        how = self._variant(config, scale)
        with _current(self._device):
            self._rate(arguments, how)
        return self._lengths[0], self._lengths[1]

    def rated(self, lr: Any, config: Config, norms: tuple[Tensor, Tensor]) -> Lengths:
        """Return the trust ratios of a step that is not taken, to given lengths."""
        arguments = self._arguments(lr, config)
        with _current(self._device):
            self._rate(arguments, self._variant(config), norms)
        return self.lengths

    def _rate(
        self, arguments: Any, how: kernels.Variant, norms: Any | None = None
    ) -> None:
        if norms is None:
            _launch(kernels.measure, self._blocks, *arguments, how)
        else:
            for own, given in zip(self._lengths, norms, strict=False):
                own.copy_(given)
        given = norms is not None
        _launch(kernels.finish, len(self._weights), *arguments, how, given)

    @property
    def lengths(self) -> Lengths:
        """What the last step measured, until the next."""
        return Lengths(*self._lengths.unbind())

    def _begin(self) -> None:
        """Have new buffers count as buffers from now on."""
        if self._new:
            self._table[kernels.Variant.V].copy_(self._table[kernels.Variant.NEW_V])
            self._new = []

    def _arguments(
        self,
        lr: Any,
        config: Config,
        scale: Tensor | None = None,
        permitted: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Write the hyper-parameters that are new, and return what kernels get."""
        values = {**vars(config), "lr": lr, "weight_decay": weight_decay(config)}
        for i, name in enumerate(kernels.NUMBERS):
            value = values[name]
            if value is None or (value is lr and isinstance(lr, Tensor)):
                continue  # not asked for, or read where it is
            if isinstance(value, Tensor):
                self._numbers[i].copy_(value.view(()))
                self._held[i] = None
            elif value != self._held[i]:
                self._numbers[i].fill_(value)
                self._held[i] = value
        return (
            self._table,
            self._owners,
            len(self._weights),
            self._blocks,
            self._sums,
            self._lengths,
            lr if isinstance(lr, Tensor) else self._numbers,
            self._numbers,
            self._numbers if scale is None else scale,
            self._numbers if permitted is None else permitted,
        )

    def _variant(
        self,
        config: Config,
        scale: Tensor | None = None,
        permitted: Tensor | None = None,
        carry: bool = False,
    ) -> kernels.Variant:
        return _variant(
            *self._dtypes,
            config.denominator,
            config.lr_placement,
            *(bool(getattr(config, name)) for name in _FLAGS),
            not is_zero(weight_decay(config)),
            not is_zero(config.momentum),
            scale is not None,
            permitted is not None,
            self._left is not None and self._left == self._marks(),
            carry,
        )

    def _marks(self) -> list[Any]:
        """Return what changes when somebody writes a weight."""
        return [w._version for w in self._weights]


@cache
def _variant(
    w: str, g: str, denominator: str, placement: str, *flags: bool
) -> kernels.Variant:
    dtypes = _DTYPES[w], _DTYPES[g]
    wide = tl.float64 if tl.float64 in dtypes else tl.float32
    return kernels.Variant(*dtypes, wide, denominator, placement == "inside", *flags)


def _check(weights: Any, gradients: Any, buffers: Any, new_buffers: Any) -> None:
    if why := unavailable():
        raise Unfit(why)
    device = weights[0].device
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        raise Unfit(f"weight 0 is on the device {device}")
    if why := broken(device):
        raise Unfit(why)
    w_dtype, g_dtype = dtype_name(weights[0]), dtype_name(gradients[0])
    if not {w_dtype, g_dtype} <= {*_DTYPES} or (
        w_dtype != g_dtype and "complex" in w_dtype + g_dtype
    ):
        raise Unfit(f"weight 0 is {w_dtype} and its gradient {g_dtype}")
    where = str(device)
    check("weight", weights, weights, w_dtype, where, written=True)
    check("gradient", gradients, weights, g_dtype, where)
    check("momentum buffer", buffers, weights, w_dtype, where)
    check("new momentum buffer", new_buffers, weights, w_dtype, where, written=True)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


def _strides(tensors: Sequence[Tensor]) -> list[Any]:
    return [*map(Tensor.stride, tensors)]


def _are_plain(tensors: Sequence[Any], dtype: torch.dtype) -> bool:
    return (
        {*map(type, tensors)} == {Tensor}
        and {*map(attrgetter("dtype"), tensors)} == {dtype}
        and {*map(attrgetter("layout"), tensors)} == {torch.strided}
        and not any(map(Tensor.is_neg, tensors))
    )


def _launch(kernel: Any, programs: int, *arguments: Any) -> None:
    if programs:
        kernel[(programs,)](*arguments, num_warps=_WARPS, enable_fp_fusion=False)


def _stream(device: torch.device) -> int:
    """Name the stream on which the device works now."""
    on_gpu = device.type == "cuda"
    return torch.cuda.current_stream(device).cuda_stream if on_gpu else 0


def _current(device: torch.device) -> Any:
    """Return a context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
