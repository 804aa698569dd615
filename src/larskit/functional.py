"""The pure faces: `lars_update`, and `init` / `update` with momentum, for any array."""

from collections.abc import Callable
from typing import Any, NamedTuple

from larskit import rule
from larskit.arrays import (
    check_floating,
    check_writable,
    dtype_name,
    framework,
    is_array,
    stop_gradient,
    write,
)
from larskit.config import Config, check_lr
from larskit.tree import dotted, flatten, is_leaf, spread, unflatten, unwrap


class _Leaf(NamedTuple):
    where: str
    w: Any
    g: Any
    lr: Any
    decay_lambda: Any
    out: Any
    wrap: Callable[[Any], Any]


def lars_update(
    w: Any,
    dcdw: Any,
    lr: Any,
    /,
    *,
    decay_lambda: Any = 0,
    stop_gradients: bool = True,
    out: Any = None,
) -> Any:
    """Move weights along their gradients by layer-wise adaptive rate scaling.

    Each leaf is one layer: ``w - lr*r*(dcdw + decay_lambda*w)`` with the trust ratio
    ``r = |w| / (|dcdw| + decay_lambda*|w|)``, and 1 where either norm is 0.

    Parameters
    ----------
    w : array, or any nesting of containers
        Weights. Arrays of NumPy, CuPy, PyTorch, JAX, TensorFlow, Paddle, ivy or of the
        array API, of any shape, floating or complex. Dictionaries, lists, tuples,
        named tuples, dataclasses and `Container` nest.
    dcdw : like `w`, or one array
        Derivatives of the cost, of the shape and dtype of the weights. One array serves
        every leaf.
    lr : float, 0-d array, or a container of them like `w`
        Learning rate, at least 0.
    decay_lambda : float, 0-d array, or a container of them like `w`, default=0
        Weight decay, at least 0.
    stop_gradients : bool, default=True
        Cut the result off from what it was computed from. If False it can be
        differentiated in PyTorch, JAX and TensorFlow.
    out : like `w`, optional
        Receives the result, of the weights' shapes and dtypes; may be `w` itself. JAX
        arrays cannot be written.

    Returns
    -------
    like `w`
        The new weights, or `out`.

    Raises
    ------
    ValueError, TypeError
        Naming the leaf, before anything is written.

    Notes
    -----
    With ``decay_lambda=0`` this equals ``ivy.lars_update`` 1.0.0.5, except that there a
    layer of zeros stays at zero. With a decay L ivy computes ``w - (lr/L) * g/|g|``:
    the length of the weights drops out and nothing is decayed. Here the decay is the
    one of the LARS paper.

    Examples
    --------
    >>> import numpy as np
    >>> lars_update(np.array([3.0, 4.0]), np.array([0.0, 2.0]), 0.1)
    array([3. , 3.5])
    """
    paths, weights, structure = flatten(w)
    outs = [None] * len(paths) if out is None else _outs(out, w, paths)
    columns = (
        spread(dcdw, paths, "dcdw"),
        spread(lr, paths, "lr"),
        spread(decay_lambda, paths, "decay_lambda"),
        outs,
    )
    rows = zip(paths, weights, *columns, strict=True)
    leaves = [_checked(*row) for row in rows]
    results = [_moved(leaf, stop_gradients) for leaf in leaves]
    if out is None:
        wrapped = [leaf.wrap(new) for leaf, new in zip(leaves, results, strict=True)]
        return unflatten(structure, wrapped)
    for leaf, new in zip(leaves, results, strict=True):
        write(leaf.out, new, f"out{leaf.where}")
    return out


def _outs(out: Any, w: Any, paths: list[Any]) -> list[Any]:
    if is_leaf(out) and not is_leaf(w):
        raise TypeError(
            f"out is one {type(out).__name__}, but the weights are a "
            f"{type(w).__name__} of {len(paths)} leaves: pass a container like the "
            "weights"
        )
    return spread(out, paths, "out")


def _checked(path: Any, w: Any, g: Any, lr: Any, decay_lambda: Any, out: Any) -> _Leaf:
    """Return one leaf's own arrays, after checking that they fit together."""
    where = f" at {dotted(path)!r}" if path else ""
    w, wrap = unwrap(w)
    g, out = unwrap(g)[0], unwrap(out)[0]
    lr, decay_lambda = unwrap(lr)[0], unwrap(decay_lambda)[0]
    if not is_array(w):
        raise TypeError(f"w{where} is a {type(w).__name__}, expected an array")
    check_floating(w, f"w{where}")
    _check_like(w, g, "dcdw", where)
    if out is not None:
        _check_like(w, out, "out", where)
        check_writable(out, f"out{where}")
    for name, value in (("lr", lr), ("decay_lambda", decay_lambda)):
        _check_scalar(name + where, value)
    return _Leaf(where, w, g, lr, decay_lambda, out, wrap)


def _check_like(w: Any, x: Any, name: str, where: str) -> None:
    if not is_array(x) or framework(x) != framework(w):
        raise TypeError(
            f"{name}{where} is a {type(x).__name__}, expected an array of "
            f"{framework(w)} like the weights"
        )
    if tuple(x.shape) != tuple(w.shape):
        raise ValueError(
            f"{name}{where} has the shape {tuple(x.shape)}, expected that of the "
            f"weights, {tuple(w.shape)}"
        )
    if dtype_name(x) != dtype_name(w):
        raise TypeError(
            f"{name}{where} has the dtype {dtype_name(x)}, expected that of the "
            f"weights, {dtype_name(w)}: convert one of them"
        )


def _check_scalar(name: str, value: Any) -> None:
    if is_array(value):
        if tuple(value.shape) not in ((), (1,)):
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}, expected one number for "
                "the whole layer: pass a float, a 0-d array, or a container of them"
            )
        return
    check_lr(value, name)


def _moved(leaf: _Leaf, stop_gradients: bool) -> Any:
    config = Config(trust_coefficient=1.0, momentum=0.0, weight_decay=leaf.decay_lambda)
    new = rule.update(leaf.w, leaf.g, None, leaf.lr, config)[0]
    return stop_gradient(new) if stop_gradients else new
