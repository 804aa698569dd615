"""The rule on a GPU: all layers of a group in three kernels, without a word to the host.

The layers are cut into blocks. `_measure` leaves the sums of squares of each block,
`_finish` adds them up, in a fixed order, to the lengths and the ratio of each layer, and
`_move` moves each block, the last one first, which the cache still holds. Addresses and
hyper-parameters are read from tables on the device.

Sums and ratios are float64, so that the results are those of the reference but for a
rounding of the last place, and the same from run to run.

With ``TRITON_INTERPRET=1`` in the environment before this is imported, Triton runs the
same kernels on CPU tensors.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from larskit.arrays import dtype_name
from larskit.config import Config, is_number
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
_BLOCK = 4096  # elements that one program measures or moves
_FOLD = 1024  # sums of blocks that are added at a time
_WARPS = 8

# The table of layers: addresses (that of v is 0 where there is none yet), the number of
# elements, the first block.
_W, _G, _V, _NEW_V, _SIZE, _FIRST = (tl.constexpr(i) for i in range(6))

# The table of hyper-parameters.
_NUMBERS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "trust_coefficient",
    "eps",
    "threshold",
)
_LR, _MU, _DAMPENING, _WD, _ETA, _EPS, _THRESHOLD = (tl.constexpr(i) for i in range(7))


@dataclass(frozen=True)
class _Variant:
    """What the kernels are compiled for: dtypes, and the axes of the rule."""

    w: Any
    g: Any
    wide: Any  # the dtype of the arithmetic
    denominator: str
    inside: bool
    nesterov: bool
    clip: bool
    adapt: bool
    maximize: bool
    zero_guard: bool
    decays: bool
    keeps: bool  # whether there are momentum buffers
    scaled: bool  # whether the gradients are divided by the scale of a loss
    stops: bool  # whether a flag can call the step off
    known: bool  # whether the squares of the weights were left by the last step
    carries: bool  # whether to leave them for the next
    block: int = _BLOCK


@triton.jit
def _load(address, at, size, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Return a block of an array: all of it, in vectors, or with zeros at its end."""
    start = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        return tl.load(tl.multiple_of(start, 16) + at)
    else:
        return tl.load(start + at, mask=at < size, other=0.0)


@triton.jit
def _store(address, at, size, x, WHOLE: tl.constexpr):
    start = address.to(tl.pointer_type(x.dtype))
    if WHOLE:
        tl.store(tl.multiple_of(start, 16) + at, x)
    else:
        tl.store(start + at, x, mask=at < size)


@triton.jit
def _number(numbers, place, x):
    """Return a hyper-parameter in the dtype of `x`."""
    return tl.load(numbers + place).to(x.dtype)


@triton.jit
def _descended(w, g, numbers, scale, HOW: tl.constexpr):
    """Return the gradient without the scale of the loss, and u."""
    if HOW.scaled:  # in the steps of torch's GradScaler
        g *= (1.0 / tl.load(scale).to(tl.float64)).to(tl.float32).to(HOW.wide)
    u = g
    if HOW.maximize:
        u = -u
    if HOW.decays:
        u += _number(numbers, _WD, w) * w
    return g, u


@triton.jit
def _accumulated(v, x, numbers):
    dampening = _number(numbers, _DAMPENING, x)
    return _number(numbers, _MU, x) * v + (1 - dampening) * x


@triton.jit
def _direction(new_v, x, numbers, HOW: tl.constexpr):
    if HOW.nesterov:
        return x + _number(numbers, _MU, x) * new_v
    else:
        return new_v


@triton.jit
def _buffer(address, at, size, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """Return a block of a momentum buffer, zeros where there is none."""
    v = tl.zeros([HOW.block], HOW.w)
    if address != 0:
        v = _load(address, at, size, HOW.w, WHOLE)
    return v.to(HOW.wide)


@triton.jit
def _place(table, owners, layers, block, HOW: tl.constexpr):
    """Return the layer of a block, its elements, and whether it can go in vectors."""
    row = table + tl.load(owners + block)
    size = tl.load(row + _SIZE * layers)
    start = (block - tl.load(row + _FIRST * layers)) * HOW.block
    addresses = tl.load(row + _W * layers) | tl.load(row + _G * layers)
    if HOW.keeps:
        addresses |= tl.load(row + _V * layers) | tl.load(row + _NEW_V * layers)
    whole = (addresses % 16 == 0) & (start + HOW.block <= size)
    return row, size, start + tl.arange(0, HOW.block), whole


@triton.jit
def _measured(
    row, layers, at, size, numbers, scale, HOW: tl.constexpr, WHOLE: tl.constexpr
):
    """Return the sums of squares of a block: of w, and of what is measured beside it."""
    g = _load(tl.load(row + _G * layers), at, size, HOW.g, WHOLE).to(HOW.wide)
    w = tl.zeros([HOW.block], HOW.wide)
    PLAIN: tl.constexpr = HOW.denominator == "paper" or HOW.denominator == "gradient"
    if not (HOW.known and PLAIN):
        w = _load(tl.load(row + _W * layers), at, size, HOW.w, WHOLE).to(HOW.wide)
    q, u = _descended(w, g, numbers, scale, HOW)
    if not PLAIN:
        q = u
        if HOW.denominator == "momentum" and HOW.keeps:
            v = _buffer(tl.load(row + _V * layers), at, size, HOW, WHOLE)
            q = _direction(_accumulated(v, u, numbers), u, numbers, HOW)
    w, q = w.to(tl.float64), q.to(tl.float64)
    return tl.sum(w * w), tl.sum(q * q)


@triton.jit(do_not_specialize=["layers", "blocks"])
def _measure(table, owners, layers, blocks, sums, numbers, scale, HOW: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    row, size, at, whole = _place(table, owners, layers, block, HOW)
    if whole:
        of_w, of_q = _measured(row, layers, at, size, numbers, scale, HOW, True)
    else:
        of_w, of_q = _measured(row, layers, at, size, numbers, scale, HOW, False)
    if not HOW.known:
        tl.store(sums + block, of_w)
    tl.store(sums + blocks + block, of_q)


@triton.jit
def _length(sums, count, FOLD: tl.constexpr):
    """Return the square root of the sum of `count` numbers, added in a fixed order."""
    total = tl.zeros([FOLD], tl.float64)
    for start in range(0, count, FOLD):
        at = start + tl.arange(0, FOLD)
        total += tl.load(sums + at, mask=at < count, other=0.0)
    return tl.sqrt(tl.sum(total))


@triton.jit(do_not_specialize=["layers", "blocks"])
def _finish(
    table, layers, blocks, sums, lengths, rate, numbers,
    HOW: tl.constexpr, GIVEN: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Find the lengths of each layer, unless they are given, and its trust ratio."""
    layer = tl.program_id(0)
    if not GIVEN:
        size = tl.load(table + _SIZE * layers + layer)
        first = tl.load(table + _FIRST * layers + layer)
        count = ((size + HOW.block - 1) // HOW.block).to(tl.int32)
        w_norm = _length(sums + first, count, FOLD)
        q = _length(sums + blocks + first, count, FOLD)
        tl.store(lengths + layer, w_norm)
        tl.store(lengths + layers + layer, q)
    else:
        w_norm = tl.load(lengths + layer)
        q = tl.load(lengths + layers + layer)
    ratio = tl.full([], 1.0, tl.float64)
    if HOW.adapt:
        ratio = _trust_ratio(w_norm, q, rate, numbers, HOW)
    tl.store(lengths + 2 * layers + layer, ratio)


@triton.jit
def _trust_ratio(w_norm, q, rate, numbers, HOW: tl.constexpr):
    d = q
    if HOW.denominator == "paper":
        d += _number(numbers, _WD, d) * w_norm
    d += _number(numbers, _EPS, d)
    ratio = _number(numbers, _ETA, d) * w_norm
    ratio = ratio / tl.where(d <= 0, 1.0, d)
    if HOW.clip:
        lr = tl.load(rate).to(tl.float64)
        ratio = ratio / tl.where(lr <= 0, 1.0, lr)
        ratio = tl.where((ratio > 1) | (lr <= 0), 1.0, ratio)
    plain = w_norm <= _number(numbers, _THRESHOLD, d)
    if HOW.zero_guard:
        plain = plain | (q <= 0)
    return tl.where(plain, 1.0, ratio)


@triton.jit
def _moved(
    row,
    layers,
    at,
    size,
    ratio,
    lr,
    numbers,
    scale,
    HOW: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Move a block, and return the sum of squares of its new weights."""
    w_address = tl.load(row + _W * layers)
    w = _load(w_address, at, size, HOW.w, WHOLE).to(HOW.wide)
    g = _load(tl.load(row + _G * layers), at, size, HOW.g, WHOLE).to(HOW.wide)
    x = _descended(w, g, numbers, scale, HOW)[1]
    if HOW.inside:
        x = (lr * ratio) * x
    elif HOW.denominator != "momentum":
        x = ratio * x
    y = x
    if HOW.keeps:
        v_address = tl.load(row + _V * layers)
        new_v = x
        if v_address != 0 or HOW.denominator == "momentum":
            v = _buffer(v_address, at, size, HOW, WHOLE)
            new_v = _accumulated(v, x, numbers)
        _store(tl.load(row + _NEW_V * layers), at, size, new_v.to(HOW.w), WHOLE)
        y = _direction(new_v, x, numbers, HOW)
    if HOW.denominator == "momentum":
        y = (lr * ratio) * y
    elif not HOW.inside:
        y = lr * y
    new_w = (w - y).to(HOW.w)
    _store(w_address, at, size, new_w, WHOLE)
    left = tl.where(at < size, new_w.to(tl.float64), 0.0)
    return tl.sum(left * left)


@triton.jit(do_not_specialize=["layers", "blocks"])
def _move(
    table, owners, layers, blocks, sums, lengths, rate, numbers, scale, stop,
    HOW: tl.constexpr,
):  # fmt: skip
    """Move each block of weights and buffers, unless the flag `stop` is not zero."""
    if HOW.stops:
        if tl.load(stop) != 0:
            return
    block = blocks - 1 - tl.program_id(0).to(tl.int64)
    row, size, at, whole = _place(table, owners, layers, block, HOW)
    ratio = tl.load(lengths + 2 * layers + (row - table)).to(HOW.wide)
    lr = tl.load(rate).to(HOW.wide)
    if whole:
        left = _moved(row, layers, at, size, ratio, lr, numbers, scale, HOW, True)
    else:
        left = _moved(row, layers, at, size, ratio, lr, numbers, scale, HOW, False)
    if HOW.carries:
        tl.store(sums + block, left)


_INTERPRETED = not isinstance(_move, triton.JITFunction)


def unavailable() -> str | None:
    """Say why this engine cannot run at all; None where it can."""
    if _INTERPRETED or torch.cuda.is_available():
        return None
    return "there is no GPU that this PyTorch can use"


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
    keep = not _is_zero(config.momentum)
    kept = kept_buffers(weights, buffers, keep)
    group = Group(weights, gradients, buffers, new_buffers=kept)
    group.step_(lr, config, norms)
    if keep:
        buffers[:] = kept
    return group.lengths


class Group:
    """Layers of one device and dtype that were found fit for the kernels.

    Its tables lie on the device, and what steps it took is read nowhere else, so that
    a step waits for nothing.

    Parameters
    ----------
    weights, gradients : sequences of Tensor
        One of each for a layer.
    buffers : sequence of Tensor or None
        The momentum buffers; None for a layer without one.
    new_buffers : sequence of Tensor or None, optional
        Receive the new buffers. Default: the buffers do.

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
    ) -> None:
        """Check the tensors, and write where they lie into the tables."""
        new_buffers = buffers if new_buffers is None else new_buffers
        _check(weights, gradients, buffers, new_buffers)
        self._gradients = list(gradients)
        self._written = [*weights, *(v for v in new_buffers if v is not None)]
        self._weights = self._written[: len(weights)]
        self._dtypes = dtype_name(weights[0]), dtype_name(gradients[0])
        self._device = weights[0].device
        self._stream = _stream(self._device)
        self.captured = _is_capturing(self._device)
        self._places = _places(self._written)
        self._looks = [(g.dtype, g.layout, g.stride()) for g in gradients]
        self._addresses = [g.data_ptr() for g in gradients]
        self._starts = any(v is None for v in buffers)
        self._left: list[Any] | None = None  # the weights that `_sums` is about

        sizes = [w.numel() * (2 if w.is_complex() else 1) for w in weights]
        blocks = [-(-size // _BLOCK) for size in sizes]
        firsts = [*accumulate(blocks, initial=0)]
        self._blocks = firsts.pop()
        rows = [[address(x) for x in xs] for xs in (weights, buffers, new_buffers)]
        rows = [rows[0], self._addresses, *rows[1:], sizes, firsts]
        self._table = self._empty(len(rows), len(weights), dtype=torch.int64)
        self._write(self._table, [x for row in rows for x in row])
        self._owners = torch.searchsorted(
            self._table[_FIRST.value],
            torch.arange(self._blocks, device=self._device),
            right=True,
        ).sub_(1)
        self._sums = self._empty(2, self._blocks)
        self._lengths = self._empty(3, len(weights))
        self._numbers = self._empty(len(_NUMBERS))
        self._held: list[Any] = [None] * len(_NUMBERS)

    def aim(self, gradients: list[Any]) -> bool:
        """Take other gradients for the next step, if they and all else fit as before.

        What is part of a CUDA graph stays as it was captured, for good.
        """
        captures = _is_capturing(self._device)
        looks = [(g.dtype, g.layout, g.stride()) for g in gradients]
        if not (
            (captures or (not self.captured and _stream(self._device) == self._stream))
            and looks == self._looks
            and all(type(g) is Tensor and not g.is_neg() for g in gradients)
            and _places(self._written) == self._places
        ):
            return False
        addresses = [g.data_ptr() for g in gradients]
        if addresses != self._addresses:
            if captures:
                return False
            self._write(self._table[_G.value], addresses)
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
        stop: Tensor | None = None,
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
        stop : Tensor of one element, optional
            Nothing moves where it is not zero.
        """
        assert self._gradients, "a group steps once along its gradients"
        rate = self._set(lr, config)
        how = self._variant(config, carry=carry, scale=scale, stop=stop)
        with _current(self._device):
            if norms is None:
                self._measure(how, scale)
            else:
                for own, given in zip(self._lengths, norms, strict=False):
                    own.copy_(given)
            self._finish(how, rate, given=norms is not None)
            if self._blocks:
                _move[(self._blocks,)](
                    self._table,
                    self._owners,
                    len(self._weights),
                    self._blocks,
                    self._sums,
                    self._lengths,
                    rate,
                    self._numbers,
                    self._numbers if scale is None else scale,
                    self._numbers if stop is None else stop,
                    how,
                    num_warps=_WARPS,
                    enable_fp_fusion=False,
                )
        self._gradients = []
        torch.autograd.graph.increment_version(self._written)
        self._left = self._marks() if carry else None
        if self._starts and how.keeps:
            self._table[_V.value].copy_(self._table[_NEW_V.value])
            self._starts = False

    def norms(
        self, config: Config, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the lengths of the weights and of what is measured beside them.

        The step is still to be taken.
        """
        rate = self._set(0.0, config)
        how = self._variant(config, scale=scale)
        with _current(self._device):
            self._measure(how, scale)
            self._finish(how, rate, given=False)
        return self._lengths[0], self._lengths[1]

    @property
    def lengths(self) -> Lengths:
        """What the last step measured, until the next."""
        return Lengths(*self._lengths.unbind())

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _write(self, target: Tensor, values: list[int]) -> None:
        """Write a table; as part of a CUDA graph, which must not read host memory."""
        if self.captured:
            target.zero_()
            torch._foreach_add_(list(target.view(-1)), values)
        else:
            source = torch.tensor(values).view_as(target)
            target.copy_(source, non_blocking=True)

    def _set(self, lr: Any, config: Config) -> Tensor:
        """Write the hyper-parameters that are new, and return where the rate stands."""
        values = {**vars(config), "lr": lr, "weight_decay": weight_decay(config)}
        for i, name in enumerate(_NUMBERS):
            value = values[name]
            if not isinstance(value, Tensor):
                if value != self._held[i]:
                    self._numbers[i].fill_(value)
                    self._held[i] = value
            elif name != "lr":
                self._numbers[i].copy_(value.view(()), non_blocking=True)
                self._held[i] = None
        return lr if isinstance(lr, Tensor) else self._numbers

    def _variant(
        self,
        config: Config,
        *,
        carry: bool = False,
        scale: Tensor | None = None,
        stop: Tensor | None = None,
    ) -> _Variant:
        known = self._left is not None and self._left == self._marks()
        decays = not _is_zero(weight_decay(config))
        keeps = not _is_zero(config.momentum)
        return _variant(
            *self._dtypes,
            config.denominator,
            config.lr_placement,
            *(bool(getattr(config, name)) for name in _FLAGS),
            decays,
            keeps,
            scale is not None,
            stop is not None,
            known,
            carry,
        )

    def _marks(self) -> list[Any]:
        """Return what changes when somebody writes a weight."""
        return [w._version for w in self._weights]

    def _measure(self, how: _Variant, scale: Tensor | None) -> None:
        if not self._blocks:
            return
        _measure[(self._blocks,)](
            self._table,
            self._owners,
            len(self._weights),
            self._blocks,
            self._sums,
            self._numbers,
            self._numbers if scale is None else scale,
            how,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )

    def _finish(self, how: _Variant, rate: Tensor, *, given: bool) -> None:
        _finish[(len(self._weights),)](
            self._table,
            len(self._weights),
            self._blocks,
            self._sums,
            self._lengths,
            rate,
            self._numbers,
            how,
            given,
            _FOLD,
            enable_fp_fusion=False,
        )


_FLAGS = ("nesterov", "clip", "adapt", "maximize", "zero_guard")


@cache
def _variant(
    w: str, g: str, denominator: str, placement: str, *flags: bool
) -> _Variant:
    wide = tl.float64 if "64" in (w[-2:], g[-2:]) and "complex64" != w else tl.float32
    return _Variant(
        _DTYPES[w], _DTYPES[g], wide, denominator, placement == "inside", *flags
    )


def _check(weights: Any, gradients: Any, buffers: Any, new_buffers: Any) -> None:
    if why := unavailable():
        raise Unfit(why)
    device = weights[0].device
    if device.type != ("cpu" if _INTERPRETED else "cuda"):
        raise Unfit(f"weight 0 is on the device {device}")
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


def _places(tensors: list[Tensor]) -> list[Any]:
    return [(x.data_ptr(), x.stride()) for x in tensors]


def _stream(device: torch.device) -> int:
    """Name the stream on which the device works now."""
    on_gpu = device.type == "cuda"
    return torch.cuda.current_stream(device).cuda_stream if on_gpu else 0


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> Any:
    """Return a context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_zero(value: Any) -> bool:
    return is_number(value) and value == 0
