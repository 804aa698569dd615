"""The rule in Triton's language: what runs on the device.

`measure` leaves the sums of squares of each block, `finish` adds them up, in a fixed
order, to the lengths and the ratio of each layer, and `move` moves each block, the last
one first, which the cache still holds. Addresses and hyper-parameters are read from
tables. Compile them without fused multiply-adds, and they round as the reference does.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

BLOCK = tl.constexpr(2048)  # elements that one program measures or moves
_FOLD = tl.constexpr(2048)  # sums of blocks that are added at a time

# The table of hyper-parameters.
NUMBERS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "trust_coefficient",
    "eps",
    "threshold",
)
_ANY = ["layers", "blocks", "rate", "scale", "permitted"]


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled for: dtypes, and the axes of the rule."""

    w: Any
    g: Any
    wide: Any  # the dtype of the arithmetic
    denominator: str
    inside: bool
    nesterov: bool
    clip: bool
    adapt: bool  # whether any layer is
    maximize: bool
    zero_guard: bool
    decays: bool  # whether any layer is
    keeps: bool  # whether there are momentum buffers
    scaled: bool  # whether the gradients are divided by the scale of a loss
    asks: bool  # whether a flag says if to move at all
    known: bool  # whether the squares of the weights were left by the last step
    carries: bool  # whether to leave them for the next

    # Rows of the table of layers: addresses (that of v is 0 where there is none yet),
    # the number of elements, the first block, whether it is adapted, and decayed.
    W, G, V, NEW_V, SIZE, FIRST, ADAPT, DECAY = range(8)

    # Places in the table of hyper-parameters, for `NUMBERS`.
    LR, MU, DAMPENING, WD, ETA, EPS, THRESHOLD = range(7)


@triton.jit
def probe(x):
    """Write a one: what runs this runs the others."""
    tl.store(x, 1.0)


@triton.jit
def _load(address, at, size, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Return a block of an array, with zeros where there is none; a whole one fast."""
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
def _number(numbers, place, x):
    """Return a hyper-parameter in the dtype of `x`."""
    return tl.load(numbers + place).to(x.dtype)


@triton.jit
def _descended(w, g, decay, numbers, scale, HOW: tl.constexpr):
    """Return the gradient without the scale of the loss, and what to descend along."""
    if HOW.scaled:  # in the steps of torch's GradScaler
        g *= (1.0 / tl.load(scale).to(tl.float64)).to(tl.float32).to(HOW.wide)
    u = g
    if HOW.maximize:
        u = -u
    if HOW.decays:
        u = tl.where(decay != 0, u + _number(numbers, HOW.WD, w) * w, u)
    return g, u


@triton.jit
def _accumulated(v, x, numbers, HOW: tl.constexpr):
    dampening = _number(numbers, HOW.DAMPENING, x)
    return _number(numbers, HOW.MU, x) * v + (1 - dampening) * x


@triton.jit
def _direction(new_v, x, numbers, HOW: tl.constexpr):
    y = new_v
    if HOW.nesterov:
        y = x + _number(numbers, HOW.MU, x) * new_v
    return y


@triton.jit
def _place(table, layers, layer, block, HOW: tl.constexpr):
    """Return the elements of a block, and whether it can be read in vectors."""
    row = table + layer
    size = tl.load(row + HOW.SIZE * layers)
    start = (block - tl.load(row + HOW.FIRST * layers)) * BLOCK
    addresses = tl.load(row + HOW.W * layers) | tl.load(row + HOW.G * layers)
    whole = start + BLOCK <= size
    if HOW.keeps:
        v_address = tl.load(row + HOW.V * layers)
        addresses |= v_address | tl.load(row + HOW.NEW_V * layers)
        whole &= v_address != 0
    whole &= addresses % 16 == 0
    return row, size, start + tl.arange(0, BLOCK), whole


@triton.jit
def _measured(
    row, layers, at, size, numbers, scale, HOW: tl.constexpr, WHOLE: tl.constexpr
):
    """Return the sums of squares of a block: of w, and of what is measured."""
    g = _load(tl.load(row + HOW.G * layers), at, size, HOW.g, WHOLE).to(HOW.wide)
    w = tl.zeros([BLOCK], HOW.wide)
    PLAIN: tl.constexpr = HOW.denominator == "paper" or HOW.denominator == "gradient"
    if not (HOW.known and PLAIN):
        w = _load(tl.load(row + HOW.W * layers), at, size, HOW.w, WHOLE).to(HOW.wide)
    q, u = _descended(w, g, tl.load(row + HOW.DECAY * layers), numbers, scale, HOW)
    if not PLAIN:
        q = u
        if HOW.denominator == "momentum" and HOW.keeps:
            v = _load(tl.load(row + HOW.V * layers), at, size, HOW.w, WHOLE)
            v = v.to(HOW.wide)
            q = _direction(_accumulated(v, u, numbers, HOW), u, numbers, HOW)
    w, q = w.to(tl.float64), q.to(tl.float64)
    return tl.sum(w * w), tl.sum(q * q)


@triton.jit(do_not_specialize=_ANY)
def measure(
    table, owners, layers, blocks, sums, lengths, rate, numbers, scale, permitted,
    HOW: tl.constexpr,
):  # fmt: skip
    """Leave the sums of squares of each block, of w and of what is measured."""
    block = tl.program_id(0).to(tl.int64)
    layer = tl.load(owners + block)
    row, size, at, whole = _place(table, layers, layer, block, HOW)
    if whole:
        of_w, of_q = _measured(row, layers, at, size, numbers, scale, HOW, True)
    else:
        of_w, of_q = _measured(row, layers, at, size, numbers, scale, HOW, False)
    if not HOW.known:
        tl.store(sums + block, of_w)
    tl.store(sums + blocks + block, of_q)


@triton.jit
def _lengths(sums, blocks, count):
    """Return the roots of two sums of `count` numbers, added in a fixed order."""
    of_w, of_q = tl.zeros([_FOLD], tl.float64), tl.zeros([_FOLD], tl.float64)
    for start in range(0, count, _FOLD):
        at = start + tl.arange(0, _FOLD)
        of_w += tl.load(sums + at, mask=at < count, other=0.0)
        of_q += tl.load(sums + blocks + at, mask=at < count, other=0.0)
    return tl.sqrt(tl.sum(of_w)), tl.sqrt(tl.sum(of_q))


@triton.jit(do_not_specialize=_ANY)
def finish(
    table, owners, layers, blocks, sums, lengths, rate, numbers, scale, permitted,
    HOW: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Find the lengths of each layer, unless they are given, and its trust ratio."""
    layer = tl.program_id(0)
    if not GIVEN:
        size = tl.load(table + HOW.SIZE * layers + layer)
        first = tl.load(table + HOW.FIRST * layers + layer)
        count = ((size + BLOCK - 1) // BLOCK).to(tl.int32)
        w_norm, q = _lengths(sums + first, blocks, count)
        tl.store(lengths + layer, w_norm)
        tl.store(lengths + layers + layer, q)
    else:
        w_norm = tl.load(lengths + layer)
        q = tl.load(lengths + layers + layer)
    ratio = tl.full([], 1.0, tl.float64)
    if HOW.adapt:
        decay = tl.load(table + HOW.DECAY * layers + layer)
        ratio = _trust_ratio(w_norm, q, decay, rate, numbers, HOW)
        ratio = tl.where(tl.load(table + HOW.ADAPT * layers + layer) != 0, ratio, 1.0)
    tl.store(lengths + 2 * layers + layer, ratio)


@triton.jit
def _trust_ratio(w_norm, q, decay, rate, numbers, HOW: tl.constexpr):
    d = q
    if HOW.denominator == "paper":
        d += tl.where(decay != 0, _number(numbers, HOW.WD, d), 0.0) * w_norm
    d += _number(numbers, HOW.EPS, d)
    ratio = _number(numbers, HOW.ETA, d) * w_norm
    ratio = ratio / tl.where(d <= 0, 1.0, d)
    if HOW.clip:
        lr = tl.load(rate).to(tl.float64)
        ratio = ratio / tl.where(lr <= 0, 1.0, lr)
        ratio = tl.where((ratio > 1) | (lr <= 0), 1.0, ratio)
    plain = w_norm <= _number(numbers, HOW.THRESHOLD, d)
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
    w_address = tl.load(row + HOW.W * layers)
    w = _load(w_address, at, size, HOW.w, WHOLE).to(HOW.wide)
    g = _load(tl.load(row + HOW.G * layers), at, size, HOW.g, WHOLE).to(HOW.wide)
    x = _descended(w, g, tl.load(row + HOW.DECAY * layers), numbers, scale, HOW)[1]
    if HOW.inside:
        x = (lr * ratio) * x
    elif HOW.denominator != "momentum":
        x = ratio * x
    y = x
    if HOW.keeps:
        v_address = tl.load(row + HOW.V * layers)
        v = _load(v_address, at, size, HOW.w, WHOLE).to(HOW.wide)
        new_v = _accumulated(v, x, numbers, HOW)
        if HOW.denominator != "momentum":  # whose first buffer is dampened, too
            new_v = tl.where(v_address != 0, new_v, x)
        _store(tl.load(row + HOW.NEW_V * layers), at, size, new_v.to(HOW.w), WHOLE)
        y = _direction(new_v, x, numbers, HOW)
    if HOW.denominator == "momentum":
        y = (lr * ratio) * y
    elif not HOW.inside:
        y = lr * y
    new_w = (w - y).to(HOW.w)
    _store(w_address, at, size, new_w, WHOLE)
    left = tl.where(at < size, new_w.to(tl.float64), 0.0)
    return tl.sum(left * left)


@triton.jit(do_not_specialize=_ANY)
def move(
    table, owners, layers, blocks, sums, lengths, rate, numbers, scale, permitted,
    HOW: tl.constexpr,
):  # fmt: skip
    """Move each block of weights and buffers, if that is permitted."""
    if HOW.asks:  # noqa: SIM102 -- the one is known when this is compiled
        if tl.load(permitted) == 0:
            return
    block = blocks - 1 - tl.program_id(0).to(tl.int64)
    layer = tl.load(owners + block)
    row, size, at, whole = _place(table, layers, layer, block, HOW)
    ratio = tl.load(lengths + 2 * layers + layer).to(HOW.wide)
    lr = tl.load(rate).to(HOW.wide)
    if whole:
        left = _moved(row, layers, at, size, ratio, lr, numbers, scale, HOW, True)
    else:
        left = _moved(row, layers, at, size, ratio, lr, numbers, scale, HOW, False)
    if HOW.carries:
        tl.store(sums + block, left)
