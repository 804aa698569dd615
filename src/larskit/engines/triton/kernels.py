"""The rule in Triton's language: what runs on the device.

`measure` leaves sums of squares of each block, and `finish` adds them, in a fixed
order, to the norms and the ratio of each layer. Then `move` steps each block, or
`scale` scales its gradient: the last block first, which the cache still holds.
Addresses and hyper-parameters are read from tables. Compile without fused multiply-adds
(``enable_fp_fusion=False``), and every operation rounds as the reference's does.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from dataclasses import dataclass, fields, make_dataclass

import triton
import triton.language as tl

from larskit.config import Config

BLOCK = tl.constexpr(2048)  # elements that one program measures or moves
_FOLD = tl.constexpr(2048)  # sums of blocks that are added at a time

# The table of layers: addresses (that of a buffer is 0 where there is none yet; `out`
# receives new buffers, or scaled gradients), the number of elements, the first block,
# and whether a layer is adapted and decayed.
ROWS = ("weights", "gradients", "out", "buffers", "size", "first", "adapt", "decay")

# A field of Config whose default is a float is read from the table of hyper-parameters;
# the kernels are compiled for the values of the others.
NUMBERS = ("lr", *(x.name for x in fields(Config) if isinstance(x.default, float)))
CHOICES = tuple(x.name for x in fields(Config) if x.name not in NUMBERS)

# Triton compiles a kernel again where a number is 1 or a multiple of 16, or an address
# aligned, unless told not to: `_ANY` are those for which it would gain nothing.
_POINTERS = ("lr_ptr", "scale_ptr", "apply_if_ptr")  # of the caller: aligned or not
_ANY = ["layers", "blocks", *_POINTERS]


def _indices(name: str, names: tuple[str, ...]) -> object:
    """Return an object whose attributes are the indices of the names."""
    kind = make_dataclass(name, [(x, int, i) for i, x in enumerate(names)], frozen=True)
    return kind()


_ROW, _NUMBER = _indices("Row", ROWS), _indices("Number", NUMBERS)


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled for: dtypes, and the axes of the rule.

    Its repr is part of the key of Triton's cache on disk, and so must be all that the
    kernels read from it: hence the places in the tables are fields too.
    """

    w: tl.dtype
    g: tl.dtype
    compute: tl.dtype  # the dtype of the arithmetic, float32 or float64
    denominator: str
    lr_placement: str
    nesterov: bool
    clip: bool
    adapt: bool  # whether any layer is
    decay: bool  # whether any layer is
    maximize: bool
    zero_guard: bool
    momentum: bool  # whether there are buffers
    unscales: bool = False  # whether gradients are divided by the scale of the loss
    keeps_scale: bool = False  # whether the decay is multiplied by that scale instead
    conditional: bool = False  # whether the device decides if the step is applied
    carried: bool = False  # whether the last step left the squares of the weights
    carries: bool = False  # whether to leave them for the next step
    full_stats: bool = False  # whether to leave the squares of the update
    row: object = _ROW
    number: object = _NUMBER


@triton.jit
def probe(x):
    """Write a one: a device that can run this can run the others."""
    tl.store(x, 1.0)


@triton.jit
def _load(address, at, size, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Return a block of an array, in vectors if it is whole, else padded with zeros."""
    start = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        x = tl.load(tl.multiple_of(start, 16) + at)
    else:
        size = tl.where(address != 0, size, 0)
        x = tl.load(start + at, mask=at < size, other=0.0)
    return x


@triton.jit
def _store(address, at, size, x, WHOLE: tl.constexpr):
    start = address.to(tl.pointer_type(x.dtype))
    if WHOLE:
        tl.store(tl.multiple_of(start, 16) + at, x)
    else:
        tl.store(start + at, x, mask=at < size)


@triton.jit
def _entry(layer_ptr, layers, row):
    """Return what a row of the table says about a layer."""
    return tl.load(layer_ptr + row * layers)


@triton.jit
def _number(numbers_ptr, index, x):
    """Return a hyper-parameter in the dtype of `x`."""
    return tl.load(numbers_ptr + index).to(x.dtype)


@triton.jit
def _descended(w, g, decay, numbers_ptr, scale_ptr, HOW: tl.constexpr):
    """Return the gradient without the scale of the loss, and what to descend along."""
    if HOW.unscales:  # in the steps of torch's GradScaler
        # Rounded as `conditional.unscaled` rounds.
        g *= (1.0 / tl.load(scale_ptr).to(tl.float64)).to(tl.float32).to(HOW.compute)
    u = g
    if HOW.maximize:
        u = -u
    if HOW.decay:
        wd = _number(numbers_ptr, HOW.number.weight_decay, w)
        if HOW.keeps_scale:  # the product has the dtype of the scale, as torch's has
            scale = tl.load(scale_ptr)
            wd = (wd.to(scale.dtype) * scale).to(HOW.compute)
        u = tl.where(decay != 0, u + wd * w, u)
    return g, u


@triton.jit
def _accumulated(v, x, numbers_ptr, HOW: tl.constexpr):
    dampening = _number(numbers_ptr, HOW.number.dampening, x)
    return _number(numbers_ptr, HOW.number.momentum, x) * v + (1 - dampening) * x


@triton.jit
def _direction(new_v, x, numbers_ptr, HOW: tl.constexpr):
    y = new_v
    if HOW.nesterov:
        y = x + _number(numbers_ptr, HOW.number.momentum, x) * new_v
    return y


@triton.jit
def _block(layer_ptr, layers, block, HOW: tl.constexpr):
    """Return the size of a layer, the elements of a block, and whether it is whole.

    That is where vectors of 16 bytes can be read and written in all of its arrays.
    """
    size = _entry(layer_ptr, layers, HOW.row.size)
    start = (block - _entry(layer_ptr, layers, HOW.row.first)) * BLOCK
    addresses = _entry(layer_ptr, layers, HOW.row.weights)
    addresses |= _entry(layer_ptr, layers, HOW.row.gradients)
    addresses |= _entry(layer_ptr, layers, HOW.row.out)  # 0 where nothing is written
    whole = start + BLOCK <= size
    if HOW.momentum:
        buffers = _entry(layer_ptr, layers, HOW.row.buffers)
        addresses |= buffers
        whole &= buffers != 0
    whole &= addresses % 16 == 0
    return size, start + tl.arange(0, BLOCK), whole


@triton.jit
def _measured(
    layer_ptr, layers, at, size, numbers_ptr, scale_ptr,
    HOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the sums of squares of a block: of w, and of what is measured."""
    g = _load(_entry(layer_ptr, layers, HOW.row.gradients), at, size, HOW.g, WHOLE)
    g = g.to(HOW.compute)
    w = tl.zeros([BLOCK], HOW.compute)
    PLAIN: tl.constexpr = HOW.denominator == "paper" or HOW.denominator == "gradient"
    # This is the memory pass that carried norms save.
    if not (HOW.carried and PLAIN):
        w = _load(_entry(layer_ptr, layers, HOW.row.weights), at, size, HOW.w, WHOLE)
        w = w.to(HOW.compute)
    decay = _entry(layer_ptr, layers, HOW.row.decay)
    q, u = _descended(w, g, decay, numbers_ptr, scale_ptr, HOW)
    if not PLAIN:
        q = u
        if HOW.denominator == "momentum" and HOW.momentum:
            buffer = _entry(layer_ptr, layers, HOW.row.buffers)
            v = _load(buffer, at, size, HOW.w, WHOLE).to(HOW.compute)
            q = _direction(_accumulated(v, u, numbers_ptr, HOW), u, numbers_ptr, HOW)
    w, q = w.to(tl.float64), q.to(tl.float64)
    return tl.sum(w * w), tl.sum(q * q)


@triton.jit(do_not_specialize=_ANY)
def measure(
    table_ptr, owners_ptr, layers, blocks, sums_ptr, stats_ptr,
    lr_ptr, numbers_ptr, scale_ptr, apply_if_ptr, HOW: tl.constexpr,
):  # fmt: skip
    """Leave the sums of squares of each block, of w and of what is measured."""
    # int64: an offset in a layer of more than 2**31 elements would overflow.
    block = tl.program_id(0).to(tl.int64)
    layer_ptr = table_ptr + tl.load(owners_ptr + block)
    size, at, whole = _block(layer_ptr, layers, block, HOW)
    if whole:
        of_w, of_q = _measured(
            layer_ptr, layers, at, size, numbers_ptr, scale_ptr, HOW, True
        )
    else:
        of_w, of_q = _measured(
            layer_ptr, layers, at, size, numbers_ptr, scale_ptr, HOW, False
        )
    if not HOW.carried:
        tl.store(sums_ptr + block, of_w)
    tl.store(sums_ptr + blocks + block, of_q)


@triton.jit
def _norm(sums_ptr, count):
    """Return the root of the sum of `count` numbers, added in a fixed order."""
    # No atomics: their order, and hence the rounding, would change from run to run.
    total = tl.zeros([_FOLD], tl.float64)
    for start in range(0, count, _FOLD):
        at = start + tl.arange(0, _FOLD)
        total += tl.load(sums_ptr + at, mask=at < count, other=0.0)
    return tl.sqrt(tl.sum(total))


@triton.jit
def _blocks_of(layer_ptr, layers, HOW: tl.constexpr):
    """Return the first block of a layer, and their number."""
    size = _entry(layer_ptr, layers, HOW.row.size)
    count = ((size + BLOCK - 1) // BLOCK).to(tl.int32)
    return _entry(layer_ptr, layers, HOW.row.first), count


@triton.jit(do_not_specialize=_ANY)
def finish(
    table_ptr, owners_ptr, layers, blocks, sums_ptr, stats_ptr,
    lr_ptr, numbers_ptr, scale_ptr, apply_if_ptr, HOW: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Find the norms of each layer, unless they are given, and its trust ratio."""
    layer = tl.program_id(0)
    layer_ptr, stats_ptr = table_ptr + layer, stats_ptr + layer
    if not GIVEN:
        first, count = _blocks_of(layer_ptr, layers, HOW)
        w_norm = _norm(sums_ptr + first, count)
        q = _norm(sums_ptr + blocks + first, count)
        tl.store(stats_ptr, w_norm)
        tl.store(stats_ptr + layers, q)
    else:
        w_norm = tl.load(stats_ptr)
        q = tl.load(stats_ptr + layers)
    ratio = tl.full([], 1.0, tl.float64)
    if HOW.adapt:
        if HOW.keeps_scale:
            q = q / tl.load(scale_ptr).to(tl.float64)
        decay = _entry(layer_ptr, layers, HOW.row.decay)
        own = _trust_ratio(w_norm, q, decay, lr_ptr, numbers_ptr, HOW)
        ratio = tl.where(_entry(layer_ptr, layers, HOW.row.adapt) != 0, own, ratio)
    tl.store(stats_ptr + 2 * layers, ratio)


@triton.jit
def _trust_ratio(w_norm, q, decay, lr_ptr, numbers_ptr, HOW: tl.constexpr):
    d = q
    if HOW.denominator == "paper":
        wd = _number(numbers_ptr, HOW.number.weight_decay, d)
        d += tl.where(decay != 0, wd, 0.0) * w_norm
    d += _number(numbers_ptr, HOW.number.eps, d)
    ratio = _number(numbers_ptr, HOW.number.trust_coefficient, d) * w_norm
    ratio = ratio / tl.where(d <= 0, 1.0, d)
    if HOW.clip:
        lr = tl.load(lr_ptr).to(tl.float64)
        ratio = ratio / tl.where(lr <= 0, 1.0, lr)
        ratio = tl.where((ratio > 1) | (lr <= 0), 1.0, ratio)
    plain = w_norm <= _number(numbers_ptr, HOW.number.threshold, d)
    if HOW.zero_guard:
        plain = plain | (q <= 0)
    return tl.where(plain, 1.0, ratio)


@triton.jit
def _moved(
    layer_ptr, layers, at, size, written, ratio, lr, numbers_ptr, scale_ptr,
    HOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Move a block, and return the sums of squares of its new weights and its update.

    Of the layer's elements the first `written` are moved: all, or none.
    """
    weights = _entry(layer_ptr, layers, HOW.row.weights)
    gradients = _entry(layer_ptr, layers, HOW.row.gradients)
    w = _load(weights, at, size, HOW.w, WHOLE).to(HOW.compute)
    g = _load(gradients, at, size, HOW.g, WHOLE).to(HOW.compute)
    decay = _entry(layer_ptr, layers, HOW.row.decay)
    x = _descended(w, g, decay, numbers_ptr, scale_ptr, HOW)[1]
    if HOW.lr_placement == "inside":
        x = (lr * ratio) * x
    elif HOW.denominator != "momentum":
        x = ratio * x
    y = x
    if HOW.momentum:
        buffer = _entry(layer_ptr, layers, HOW.row.buffers)
        v = _load(buffer, at, size, HOW.w, WHOLE).to(HOW.compute)
        new_v = _accumulated(v, x, numbers_ptr, HOW)
        if HOW.denominator != "momentum":  # whose first buffer is dampened, too
            new_v = tl.where(buffer != 0, new_v, x)
        out = _entry(layer_ptr, layers, HOW.row.out)
        _store(out, at, written, new_v.to(HOW.w), WHOLE)
        y = _direction(new_v, x, numbers_ptr, HOW)
    if HOW.denominator == "momentum":
        y = (lr * ratio) * y
    elif HOW.lr_placement == "outside":
        y = lr * y
    new_w = (w - y).to(HOW.w)
    _store(weights, at, written, new_w, WHOLE)
    # Behind the end of a layer a ratio of infinity makes NaN out of zeros.
    new_w = tl.where(at < size, new_w.to(tl.float64), 0.0)
    y = tl.where(at < size, y.to(tl.float64), 0.0)
    return tl.sum(new_w * new_w), tl.sum(y * y)


@triton.jit(do_not_specialize=_ANY)
def move(
    table_ptr, owners_ptr, layers, blocks, sums_ptr, stats_ptr,
    lr_ptr, numbers_ptr, scale_ptr, apply_if_ptr, HOW: tl.constexpr,
):  # fmt: skip
    """Move each block of weights and buffers, where the step is applied."""
    if HOW.conditional and not HOW.full_stats:  # noqa: SIM102 -- known when compiled
        if tl.load(apply_if_ptr) == 0:
            return
    block = blocks - 1 - tl.program_id(0).to(tl.int64)
    layer = tl.load(owners_ptr + block)
    layer_ptr = table_ptr + layer
    size, at, whole = _block(layer_ptr, layers, block, HOW)
    written, applied = size, True
    if HOW.conditional and HOW.full_stats:  # whose update is measured all the same
        applied = tl.load(apply_if_ptr) != 0
        written = tl.where(applied, size, 0)
        whole &= applied
    ratio = tl.load(stats_ptr + 2 * layers + layer).to(HOW.compute)
    lr = tl.load(lr_ptr).to(HOW.compute)
    if whole:
        of_w, of_y = _moved(
            layer_ptr, layers, at, size, written, ratio, lr, numbers_ptr, scale_ptr,
            HOW, True,
        )  # fmt: skip
    else:
        of_w, of_y = _moved(
            layer_ptr, layers, at, size, written, ratio, lr, numbers_ptr, scale_ptr,
            HOW, False,
        )  # fmt: skip
    if HOW.carries:
        # After a skipped step the sums of before are still those of the weights.
        tl.store(sums_ptr + block, of_w, mask=applied)
    if HOW.full_stats:
        tl.store(sums_ptr + 2 * blocks + block, of_y)


@triton.jit(do_not_specialize=_ANY)
def finish_update(
    table_ptr, owners_ptr, layers, blocks, sums_ptr, stats_ptr,
    lr_ptr, numbers_ptr, scale_ptr, apply_if_ptr, HOW: tl.constexpr,
):  # fmt: skip
    """Find the norm of what the step subtracted from each layer."""
    layer = tl.program_id(0)
    first, count = _blocks_of(table_ptr + layer, layers, HOW)
    update_norm = _norm(sums_ptr + 2 * blocks + first, count)
    tl.store(stats_ptr + 3 * layers + layer, update_norm)


@triton.jit
def _scaled(
    layer_ptr, layers, at, size, ratio, numbers_ptr, scale_ptr,
    HOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write the scaled gradient of a block."""
    g = _load(_entry(layer_ptr, layers, HOW.row.gradients), at, size, HOW.g, WHOLE)
    g = g.to(HOW.compute)
    w = tl.zeros([BLOCK], HOW.compute)
    if HOW.decay:
        w = _load(_entry(layer_ptr, layers, HOW.row.weights), at, size, HOW.w, WHOLE)
        w = w.to(HOW.compute)
    decay = _entry(layer_ptr, layers, HOW.row.decay)
    u = _descended(w, g, decay, numbers_ptr, scale_ptr, HOW)[1]
    out = _entry(layer_ptr, layers, HOW.row.out)
    _store(out, at, size, (ratio * u).to(HOW.g), WHOLE)


@triton.jit(do_not_specialize=_ANY)
def scale(
    table_ptr, owners_ptr, layers, blocks, sums_ptr, stats_ptr,
    lr_ptr, numbers_ptr, scale_ptr, apply_if_ptr, HOW: tl.constexpr,
):  # fmt: skip
    """Write the scaled gradient of each layer: r*u."""
    block = blocks - 1 - tl.program_id(0).to(tl.int64)
    layer = tl.load(owners_ptr + block)
    layer_ptr = table_ptr + layer
    size, at, whole = _block(layer_ptr, layers, block, HOW)
    ratio = tl.load(stats_ptr + 2 * layers + layer).to(HOW.compute)
    if whole:
        _scaled(layer_ptr, layers, at, size, ratio, numbers_ptr, scale_ptr, HOW, True)
    else:
        _scaled(layer_ptr, layers, at, size, ratio, numbers_ptr, scale_ptr, HOW, False)
