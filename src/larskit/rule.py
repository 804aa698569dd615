"""The LARS rule: one layer, one step, over any array that speaks the array API.

    u  = g + wd*w                                  (-g when maximizing)
    r  = eta*|w| / (|g| + wd*|w| + eps)            "paper": see `trust_ratio`
    x  = lr*r*u                                    "inside";  r*u  "outside"
    v' = mu*v + (1 - dampening)*x                  the first step: v' = x
    w' = w - v'                                    "inside";  w - lr*v'  "outside"

Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks",
arXiv 1708.03888, 2017. Every published variant differs from it along the axes that
`larskit.config.Config` names.

Lengths are sums of float64 squares, in an order that is fixed; the ratio is computed as
wide and rounded once. The update runs in float32 or wider, in the order written here,
and results return in the dtype they came in. Everything else in this package decides
only where this runs (engines), how lengths are found (norms), and who keeps v (the
faces).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import array_api_compat

from larskit.arrays import (
    cast,
    compiles,
    dtype_name,
    flat,
    namespace,
    norm_dtype,
    scalar,
    scaled_by_one,
    widen,
)
from larskit.config import Config, is_number

# One block of the sum of squares: 32 rows, added one after the other, of 32 lanes.
ROWS, LANES = 32, 32


class Lengths(NamedTuple):
    """What a step measured of one layer, or of a vector of layers."""

    weight: Any
    denominator: Any
    ratio: Any


def norm(x: Any) -> Any:
    """Return the Euclidean length of all elements of `x`, as a wide 0-d array."""
    return root(sum_of_squares(x))


def root(squares: Any) -> Any:
    """Return the square root; its gradient at zero is zero, not NaN."""
    xp = namespace(squares)
    zero = squares <= 0  # never below; and the == of Paddle is a fuzzy one
    root = xp.sqrt(xp.where(zero, xp.ones_like(squares), squares))
    return xp.where(zero, squares, root)


def sum_of_squares(x: Any) -> Any:
    """Add the squares of all elements of `x` in a fixed order, as a wide 0-d array.

    The elements, as they lie in memory and padded with zeros, are cut into blocks of
    `ROWS` by `LANES`. The rows of a block are added in turn; then the lanes, and last
    the blocks, are folded in halves. Where a compiler orders the sum, its own reduction
    is used.
    """
    xp = namespace(x)
    if dtype_name(x).startswith("complex"):
        return sum_of_squares(xp.real(x)) + sum_of_squares(xp.imag(x))
    if compiles(x):
        wide = cast(x, norm_dtype(x))
        return xp.sum(wide * wide)
    x = flat(x)
    blocks = max(1, -(-x.shape[0] // (ROWS * LANES)))
    used = ROWS if blocks > 1 else max(1, -(-x.shape[0] // LANES))
    x = xp.reshape(_pad(xp, x, blocks * used * LANES), (blocks, used, LANES))
    total = _wide_square(x[:, 0, :])
    for row in range(1, used):
        total = total + _wide_square(x[:, row, :])
    return _fold(xp, _fold(xp, total))


def _wide_square(x: Any) -> Any:
    x = cast(x, norm_dtype(x))
    return x * x


def _pad(xp: Any, x: Any, size: int) -> Any:
    missing = size - x.shape[0]
    if missing == 0:
        return x
    zeros = xp.zeros((missing,), dtype=x.dtype, device=array_api_compat.device(x))
    return xp.concat([x, zeros])


def _fold(xp: Any, x: Any) -> Any:
    """Add the last axis of `x` up by folding its upper half onto its lower one."""
    while (size := x.shape[-1]) > 1:
        half = (size + 1) // 2
        folded = x[..., : size - half] + x[..., half:]
        if size % 2:
            folded = xp.concat([folded, x[..., size - half : half]], axis=-1)
        x = folded
    return x[..., 0]


def weight_decay(config: Config) -> Any:
    """Return the decay that applies to this layer."""
    return config.weight_decay if config.decay else 0.0


def decayed(w: Any, g: Any, config: Config) -> Any:
    """Return u, the gradient to descend with the decay in it, in a wide dtype."""
    g = -widen(g) if config.maximize else widen(g)
    wd = weight_decay(config)
    if is_number(wd) and wd == 0:
        return g
    w = widen(w)
    return g + scalar(wd, w) * w


def _accumulate(v: Any, x: Any, config: Config) -> tuple[Any, Any]:
    """Return (v', y): the buffer that took x, and the direction to step along."""
    mu = scalar(config.momentum, x)
    new_v = x if v is None else mu * widen(v) + (1 - scalar(config.dampening, x)) * x
    return new_v, x + mu * new_v if config.nesterov else new_v


def _accumulate_plain(v: Any, u: Any, config: Config) -> tuple[Any, Any]:
    """Do what `_accumulate` does, from a buffer of zeros: nothing is scaled yet."""
    if v is None:
        v = namespace(u).zeros_like(u)
    return _accumulate(v, u, config)


def measured(w: Any, g: Any, v: Any, config: Config) -> Any:
    """Return the array whose length stands in the denominator of the ratio."""
    if config.denominator == "decayed_gradient":
        return decayed(w, g, config)
    if config.denominator == "momentum":
        return _accumulate_plain(v, decayed(w, g, config), config)[1]
    return g


def trust_ratio(w_norm: Any, q: Any, lr: Any, config: Config) -> Any:
    """Return how far a layer may move, relative to its own length.

    Parameters
    ----------
    w_norm, q : array of shape () or (n_layers,)
        The lengths of the weights and of what `measured` returns, wide.
    lr : float or array of shape ()
        Looked at only where `config.clip` is true.
    config : Config
        Its `denominator` decides whether ``wd*|w|`` is added to `q`.

    Returns
    -------
    array of the shape and dtype of `w_norm`
        ``eta*|w| / d``; 1 where the layer is not adapted, no longer than the threshold,
        or has no denominator. A NaN length gives a NaN ratio.
    """
    xp = namespace(w_norm)
    one = xp.ones_like(w_norm)
    if not config.adapt:
        return one
    d = q
    if config.denominator == "paper":
        d = d + scalar(weight_decay(config), w_norm) * w_norm
    d = d + scalar(config.eps, w_norm)
    ratio = scalar(config.trust_coefficient, w_norm) * w_norm
    ratio = ratio / xp.where(d <= 0, one, d)
    if config.clip:
        ratio = _clipped(xp, ratio, scalar(lr, w_norm), one)
    plain = w_norm <= scalar(config.threshold, w_norm)
    if config.zero_guard:
        plain = plain | (q <= 0)
    return xp.where(plain, one, ratio)


def _clipped(xp: Any, ratio: Any, lr: Any, one: Any) -> Any:
    """Return ``min(ratio / lr, 1)``, and 1 at a rate of 0; NaN stays NaN."""
    lr = lr * one
    ratio = ratio / xp.where(lr <= 0, one, lr)
    return xp.where((ratio > 1) | (lr <= 0), one, ratio)


def rounded(ratio: Any, like: Any) -> Any:
    """Round a wide ratio, once, to the real dtype that `like` is stepped in."""
    narrow = dtype_name(like) not in ("float64", "complex128")
    return cast(ratio, "float32" if narrow else norm_dtype(like))


def step(
    w: Any, g: Any, v: Any, ratio: Any, lr: Any, config: Config
) -> tuple[Any, Any]:
    """Move one layer: (w, v) -> (w', v'). Pure: the inputs are left alone.

    Parameters
    ----------
    w, g : array of shape S
        Weights and gradient.
    v : array of shape S, or None
        The momentum buffer; None on the first step.
    ratio : array of shape ()
        What `trust_ratio` returned.
    lr : float or array of shape ()
        The learning rate.
    config : Config
        The hyper-parameters.

    Returns
    -------
    w', v' : arrays of shape S
        In the dtype of w, and of v (of w on the first step).
    """
    y, new_v = descent(w, g, v, ratio, lr, config)
    new_w = cast(widen(w) - y, dtype_name(w))
    return new_w, cast(new_v, dtype_name(w if v is None else v))


def descent(
    w: Any, g: Any, v: Any, ratio: Any, lr: Any, config: Config
) -> tuple[Any, Any]:
    """Return what `step` subtracts from the weights, and v', both in a wide dtype."""
    u = decayed(w, g, config)
    ratio, lr = rounded(ratio, u), scalar(lr, u)
    if config.denominator == "momentum":
        new_v, y = _accumulate_plain(v, u, config)
        return (lr * ratio) * y, new_v
    if config.lr_placement == "inside":
        new_v, y = _accumulate(v, (lr * ratio) * u, config)
        return scaled_by_one(y), new_v
    new_v, y = _accumulate(v, ratio * u, config)
    return lr * y, new_v


def update(
    w: Any, g: Any, v: Any, lr: Any, config: Config, norms: Any = None
) -> tuple[Any, Any, Lengths]:
    """Measure one layer and move it: ``(w', v', lengths)``.

    `norms` is the pair ``(|w|, |measured|)`` where somebody has found it already, as
    for a layer of which this process holds a shard.
    """
    w_norm, q = norms or (norm(w), norm(measured(w, g, v, config)))
    ratio = trust_ratio(w_norm, q, lr, config)
    return *step(w, g, v, ratio, lr, config), Lengths(w_norm, q, ratio)


def scaled_gradient(
    w: Any, g: Any, config: Config, scale: Any = 1.0, norms: Any = None
) -> Any:
    """Return ``r*u`` in the dtype of `g`: the gradient an inner optimizer steps with.

    `scale` is what the loss, hence `g` and the result, was multiplied by; `norms` is as
    in `update`, and scaled as `g` is.
    """
    scaled = replace(config, weight_decay=weight_decay(config) * scale)
    w_norm, q = norms or (norm(w), norm(measured(w, g, None, scaled)))
    ratio = trust_ratio(w_norm, q / scalar(scale, w_norm), 0.0, config)
    u = decayed(w, g, scaled)
    return cast(rounded(ratio, u) * u, dtype_name(g))
