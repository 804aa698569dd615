"""The LARS rule: one layer, one step, over any array that speaks the array API.

    u  = g + wd*w                                  (-g when maximizing)
    r  = eta*|w| / (|g| + wd*|w| + eps)            "paper": see `trust_ratio`
    x  = lr*r*u                                    "inside";  r*u  "outside"
    v' = mu*v + (1 - dampening)*x                  the first step: v' = x
    w' = w - v'                                    "inside";  w - lr*v'  "outside"

Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks",
arXiv 1708.03888, 2017. Every published variant differs from it along the axes that
`larskit.config.Config` names.

A step is three calls: `measure` the norms, take the `trust_ratio`, `descend`. Norms
accumulate in float64; the ratio is computed in their dtype and rounded once. The update
runs in float32 or float64, in the order written here, and results return in the dtype
of the inputs. The rest of this package decides only where this runs (engines), how the
norms of sharded layers are found (norms), and who keeps v (the APIs).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from larskit.arrays import (
    Array,
    Namespace,
    Scalar,
    cast,
    dtype_name,
    namespace,
    norm_dtype,
    scalar,
    scaled_by_one,
    widen,
)
from larskit.config import Config, is_zero
from larskit.norm import norm

Flags = bool | Sequence[bool] | Array  # of one layer, or of several
Norms = tuple[Array, Array]  # |w|, and q: what `denominator` measures


class LayerStats(NamedTuple):
    """What one step computed for a layer, or vectors of it for several layers.

    Attributes
    ----------
    weight_norm : float or array
        |w| before the step.
    gradient_norm : float or array
        As the chosen `denominator` measures it: |g| for "paper" and "gradient",
        |g + wd*w| for "decayed_gradient", |y| for "momentum". It is no denominator:
        that contains ``wd*|w|`` and ``eps`` too.
    trust_ratio : float or array
        r.
    adapted, decayed : bool or sequence of bool
        Whether the layer has a trust ratio of its own, and whether it is decayed.
    update_norm : float or array, optional
        The norm of what the step subtracts from w; None unless it was asked for.
    """

    weight_norm: Scalar
    gradient_norm: Scalar
    trust_ratio: Scalar
    adapted: Flags = True
    decayed: Flags = True
    update_norm: Scalar | None = None


def trust_ratio(w_norm: Array, q: Array, lr: Scalar, config: Config) -> Array:
    """Return r, the factor of a layer's learning rate.

    Parameters
    ----------
    w_norm, q : array of any one shape
        The norms that `measure` returns.
    lr : float or array of shape ()
        Used only where `config.clip` is true.
    config : Config
        Its `denominator` decides whether ``wd*|w|`` is added to `q`.

    Returns
    -------
    array of the shape and dtype of `w_norm`
        ``eta*|w| / d``; 1 where the layer is not adapted, where ``|w| <= threshold``,
        or where q is 0. A NaN norm gives a NaN ratio.
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


def _clipped(xp: Namespace, ratio: Array, lr: Scalar, one: Array) -> Array:
    """Return ``min(ratio / lr, 1)``, and 1 at a rate of 0; NaN stays NaN."""
    lr = lr * one
    ratio = ratio / xp.where(lr <= 0, one, lr)
    return xp.where((ratio > 1) | (lr <= 0), one, ratio)


def measure(w: Array, g: Array, v: Array | None, config: Config) -> Norms:
    """Return ``(|w|, q)``, the norms that `trust_ratio` takes, as 0-d arrays."""
    return norm(w), norm(measured_gradient(w, g, v, config))


def measured_gradient(w: Array, g: Array, v: Array | None, config: Config) -> Array:
    """Return the array whose norm is q: g, ``g + wd*w`` or y, see `Config`."""
    if config.denominator == "decayed_gradient":
        return decayed(w, g, config)
    if config.denominator == "momentum":
        return _accumulate_plain(v, decayed(w, g, config), config)[1]
    return g


def descend(
    w: Array, g: Array, v: Array | None, ratio: Array, lr: Scalar, config: Config
) -> tuple[Array, Array]:
    """Return what a step subtracts from the weights, and v', in float32 or float64.

    Parameters
    ----------
    w, g : array of shape S
        Weights and gradient.
    v : array of shape S, or None
        The momentum buffer; None on the first step.
    ratio : array of shape (), or one that broadcasts to S
        What `trust_ratio` returned.
    lr : float or array of shape ()
        The learning rate.
    config : Config
        The hyper-parameters.
    """
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


def displacement(
    w: Array,
    g: Array,
    v: Array | None,
    lr: Scalar,
    config: Config,
    norms: Norms | None = None,
) -> tuple[Array, Array, LayerStats]:
    """Measure, take the ratio, descend: ``(w - w', v', stats)``.

    `norms` is what `measure` would return, where it is known already, as for a layer of
    which this process holds a shard.
    """
    w_norm, q = measure(w, g, v, config) if norms is None else norms
    ratio = trust_ratio(w_norm, q, lr, config)
    y, new_v = descend(w, g, v, ratio, lr, config)
    new_v = cast(new_v, dtype_name(w if v is None else v))
    return y, new_v, LayerStats(w_norm, q, ratio, config.adapt, config.decay)


def step(
    w: Array,
    g: Array,
    v: Array | None,
    lr: Scalar,
    config: Config,
    norms: Norms | None = None,
) -> tuple[Array, Array, LayerStats]:
    """Move one layer: ``(w', v', stats)``. Pure: the inputs are not written.

    Parameters
    ----------
    w, g, v, lr, config, norms
        See `descend` and `displacement`.

    Returns
    -------
    w', v' : arrays of shape S
        In the dtype of w, and of v (of w on the first step).
    stats : LayerStats
        Of arrays of shape ().
    """
    y, new_v, stats = displacement(w, g, v, lr, config, norms)
    return moved(w, y), new_v, stats


def moved(w: Array, y: Array) -> Array:
    """Return ``w - y`` in the dtype of w."""
    return cast(widen(w) - y, dtype_name(w))


def scaled_gradient(
    w: Array, g: Array, config: Config, scale: Scalar = 1.0, norms: Norms | None = None
) -> Array:
    """Return ``r*u`` in the dtype of `g`: the gradient an inner optimizer steps with.

    `scale` is what the loss, hence `g` and the result, was multiplied by; `norms` are
    as in `displacement`, with q scaled as `g` is.
    """
    scaled = replace(config, weight_decay=weight_decay(config) * scale)
    w_norm, q = measure(w, g, None, scaled) if norms is None else norms
    ratio = trust_ratio(w_norm, q / scalar(scale, w_norm), 0.0, config)
    u = decayed(w, g, scaled)
    return cast(rounded(ratio, u) * u, dtype_name(g))


def weight_decay(config: Config) -> Scalar:
    """Return the decay that applies to this layer."""
    return config.weight_decay if config.decay else 0.0


def decayed(w: Array, g: Array, config: Config) -> Array:
    """Return u, the gradient to descend with the decay in it, in float32 or float64."""
    g = -widen(g) if config.maximize else widen(g)
    wd = weight_decay(config)
    if is_zero(wd):
        return g
    w = widen(w)
    return g + scalar(wd, w) * w


def rounded(ratio: Array, like: Array) -> Array:
    """Round a ratio, once, to the real dtype that `like` is stepped in."""
    to_float32 = dtype_name(like) not in ("float64", "complex128")
    return cast(ratio, "float32" if to_float32 else norm_dtype(like))


def _accumulate(v: Array | None, x: Array, config: Config) -> tuple[Array, Array]:
    """Return (v', y): the buffer that took x, and the direction to step along."""
    mu = scalar(config.momentum, x)
    new_v = x if v is None else mu * widen(v) + (1 - scalar(config.dampening, x)) * x
    return new_v, x + mu * new_v if config.nesterov else new_v


def _accumulate_plain(v: Array | None, u: Array, config: Config) -> tuple[Array, Array]:
    """Do what `_accumulate` does, from a buffer of zeros: nothing is scaled yet."""
    if v is None:
        v = namespace(u).zeros_like(u)
    return _accumulate(v, u, config)
