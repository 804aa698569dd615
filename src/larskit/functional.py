"""The pure functions: `lars_update`, and `init` / `update` with momentum."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from larskit import engines
from larskit.arrays import (
    Array,
    Scalar,
    cast,
    check_writable,
    compiles,
    dtype_name,
    framework,
    namespace,
    stop_gradient,
    unwritable,
    write,
)
from larskit.config import Config, Denominator, LrPlacement, documented, is_number
from larskit.leaves import Leaves
from larskit.select import Selection
from larskit.tree import (
    Leaf,
    Tree,
    broadcast_leaves,
    is_leaf,
    unwrap,
    wrapped_attribute,
)


def lars_update(
    w: Tree,
    dcdw: Tree,
    lr: Scalar | Tree,
    /,
    *,
    decay_lambda: Scalar | Tree = 0,
    stop_gradients: bool = True,
    out: Tree = None,
) -> Tree:
    """Move weights along their gradients by layer-wise adaptive rate scaling.

    Each leaf is one layer: ``w - lr*r*(dcdw + decay_lambda*w)`` with the trust ratio
    ``r = |w| / (|dcdw| + decay_lambda*|w|)``, and 1 where either norm is 0.

    Parameters
    ----------
    w : array, or any nesting of containers
        Weights. Arrays of NumPy, CuPy, PyTorch, JAX, TensorFlow, Paddle, ivy or of the
        array API, of any shape, floating or complex (not in TensorFlow and Paddle).
        Dictionaries and other mappings, lists, tuples, named tuples, dataclasses and
        `Container` nest; None stays None, and so does a dataclass's field whose
        metadata say ``static=True``.
    dcdw : like `w`, or one array
        Derivatives of the cost, of the framework, shape and dtype of the weights. One
        array serves every leaf.
    lr : float, array of one element, or a container of them like `w`
        Learning rate, at least 0.
    decay_lambda : float, array of one element, or a container of them, default=0
        Weight decay, at least 0.
    stop_gradients : bool, default=True
        Cut the result off from what it was computed from. If False it can be
        differentiated in PyTorch, JAX, TensorFlow and Paddle.
    out : like `w`, optional
        Receives the result, of the weights' shapes and dtypes; may be `w` itself or
        overlap it. JAX arrays and TensorFlow's constants cannot be written, unless a
        wrapper (`Array`, ``ivy.Array``) can hold a new one.

    Returns
    -------
    like `w`
        The new weights in the dtypes of the old, or `out`.

    Raises
    ------
    ValueError, TypeError
        Naming the leaf, before anything is written.

    Notes
    -----
    A rate that is a number or a NumPy array must be finite and at least 0. The arrays
    of other frameworks pass unseen: looking at them would wait for their device, or
    fail while they are traced.

    With ``decay_lambda=0`` this equals ``ivy.lars_update`` 1.0.0.5, except that there a
    layer of zeros stays at zero and 1e-12 is added to ``|dcdw|``. With a decay L ivy
    computes ``w - (lr/L) * g/|g|``: the weight norm cancels and nothing is
    decayed. Here the decay is the one of the LARS paper.

    Examples
    --------
    >>> import numpy as np
    >>> lars_update(np.array([3.0, 4.0]), np.array([0.0, 2.0]), 0.1)
    array([3. , 3.5])
    """
    layers = Leaves(w, "w")
    columns: Any = (
        layers.arrays,
        layers.arrays_of(dcdw, "dcdw"),
        layers.rates(lr, "lr"),
        layers.rates(decay_lambda, "decay_lambda"),
    )
    receivers = [] if out is None else _receivers(layers, w, out, not stop_gradients)
    if stop_gradients:
        columns = ([stop_gradient(x) for x in column] for column in columns)
    config = Config(trust_coefficient=1.0, momentum=0.0)
    rows = [
        (w, g, None, lr, replace(config, weight_decay=decay))
        for w, g, lr, decay in zip(*columns, strict=True)
    ]
    results = [unwrap(x) for x in receivers]
    if any(unwritable(x, not stop_gradients) for x in results):
        results = []
    moved = [new_w for new_w, _ in _moved(rows, results)]
    if out is None:
        return layers.rebuilt(moved)
    for receiver, new in zip(receivers, moved, strict=True):
        if unwrap(receiver) is not new:
            _store(receiver, new, not stop_gradients)
    return out


def _receivers(layers: Leaves, w: Tree, out: Tree, differentiable: bool) -> list[Leaf]:
    """Return the leaves of `out`, after checking that each can take its result."""
    if is_leaf(out) and not is_leaf(w):
        raise TypeError(
            f"out is one {type(out).__name__}, but the weights are a "
            f"{type(w).__name__}: pass a container like the weights"
        )
    leaves = broadcast_leaves(out, layers.paths, "out")
    arrays = layers.arrays_of(out, "out")
    taken: dict[int, str] = {}
    for leaf, array, what in zip(leaves, arrays, layers.labels("out"), strict=True):
        if wrapped_attribute(leaf) is None:
            check_writable(array, what, differentiable)
        if id(array) in taken:
            raise ValueError(
                f"{what} is the same array as {taken[id(array)]}: one result would "
                "overwrite the other, pass an array for each"
            )
        taken[id(array)] = what
    return leaves


def _store(receiver: Leaf, new: Array, differentiable: bool) -> None:
    """Write a result into an array, or replace the array of a wrapper by it."""
    attribute, array = wrapped_attribute(receiver), unwrap(receiver)
    if attribute and unwritable(array, differentiable):
        setattr(receiver, attribute, new)
    else:
        write(array, new, "out")


class State(NamedTuple):
    """What `update` carries from step to step.

    Attributes
    ----------
    count : int, or array of shape ()
        The number of steps taken.
    momentum : like the parameters
        The momentum buffers, in the parameters' dtypes.
    """

    count: Scalar
    momentum: Tree


def init(params: Tree) -> State:
    """Return the state before the first step: no steps, and buffers of zeros.

    Parameters
    ----------
    params : array, or any nesting of containers
        As in `lars_update`.

    Returns
    -------
    State
        Its `count` is an array in frameworks that compile, so that it can be traced.
    """
    layers = Leaves(params, "params")
    first = next(iter(layers.arrays), None)
    count = namespace(first).asarray(0) if compiles(first) else 0
    zeros = [namespace(w).zeros_like(stop_gradient(w)) for w in layers.arrays]
    return State(count, layers.rebuilt(zeros))


@documented
def update(
    params: Tree,
    grads: Tree,
    state: State,
    lr: Scalar | Tree,
    momentum: Scalar = Config.momentum,
    weight_decay: Scalar = Config.weight_decay,
    trust_coefficient: Scalar = Config.trust_coefficient,
    eps: Scalar = Config.eps,
    *,
    denominator: Denominator = Config.denominator,
    lr_placement: LrPlacement = Config.lr_placement,
    nesterov: bool = Config.nesterov,
    dampening: Scalar = Config.dampening,
    clip: bool = Config.clip,
    threshold: Scalar = Config.threshold,
    adapt: Selection = None,
    decay: Selection = None,
    maximize: bool = Config.maximize,
) -> tuple[Tree, State]:
    """Take one step of LARS with momentum: ``params, state = update(...)``.

    Pure: nothing is written, and all of it can be traced (``jax.jit``,
    ``jax.lax.scan``, ``tf.function``) and differentiated. In PyTorch and Paddle call
    it under ``no_grad()`` if it should not be.

    Parameters
    ----------
    params : array, or any nesting of containers
        As in `lars_update`. One leaf is one layer.
    grads : like `params`
        Gradients, of the framework, shape and dtype of the parameters.
    state : State
        What `init` or the last `update` returned.
    lr : float, array of one element, or a container of them like `params`
        Learning rate, at least 0.
    {momentum:threshold}
    adapt, decay : None, bool, pattern, sequence of patterns, or callable
        Which layers get a trust ratio and which are decayed, see
        `larskit.select.select`; names are dotted paths, ``"encoder.0.weight"``. None
        (default): those of two or more dimensions.
    {maximize}

    Returns
    -------
    params : like `params`
        The new parameters.
    state : State
        The new state.

    Raises
    ------
    ValueError, TypeError
        Naming the leaf or the hyper-parameter.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"kernel": np.ones((2, 2)), "bias": np.zeros(2)}
    >>> grads = {"kernel": np.eye(2), "bias": np.array([0.5, -0.5])}
    >>> params, state = update(params, grads, init(params), lr=1.0)
    >>> params["bias"], state.count
    (array([-0.5,  0.5]), 1)
    """
    config = Config.pick(locals()).at_step(state.count)
    layers = Leaves(params, "params")
    rows = zip(
        layers.arrays,
        layers.arrays_of(grads, "grads"),
        layers.arrays_of(state.momentum, "state.momentum"),
        layers.rates(lr, "lr"),
        layers.configs(config, adapt, decay),
        strict=True,
    )
    moved = _moved(list(rows))
    new_params = layers.rebuilt(new_w for new_w, _ in moved)
    new_momentum = layers.rebuilt(new_v for _, new_v in moved)
    return new_params, State(state.count + 1, new_momentum)


def _moved(rows: list[Any], results: Sequence[Any] = ()) -> list[Any]:
    """Return (w', v') for each row (w, g, v, lr, config).

    Layers of one kind go through an engine at once. Where there is but one kind, w' may
    be written into `results` on the way; another kind could still have to read them.
    """
    kinds: dict[Any, list[int]] = {}
    for i, (w, *_, lr, config) in enumerate(rows):
        numbers = (lr, *vars(replace(config, adapt=True, decay=True)).values())
        key = tuple(x if is_number(x) else id(x) for x in numbers)
        kinds.setdefault((framework(w), dtype_name(w), key), []).append(i)
    moved: list[Any] = [None] * len(rows)
    for kind in kinds.values():
        out = [results[i] for i in kind] if results and len(kinds) == 1 else None
        pairs = _step([rows[i] for i in kind], out or [None] * len(kind))
        for i, pair in zip(kind, pairs, strict=True):
            moved[i] = pair
    return moved


def _step(rows: list[Any], out: list[Any]) -> Iterable[Any]:
    """Step layers that differ at most in whether they are adapted and decayed."""
    w, g, v, (lr, *_), configs = zip(*rows, strict=True)
    w, g = ([cast(x, dtype_name(x)) for x in xs] for xs in (w, g))  # scalars of NumPy
    flags = zip(*((config.adapt, config.decay) for config in configs), strict=True)
    recorded = any(map(_is_recorded, (*w, *g, *v, lr, *vars(configs[0]).values())))
    group = engines.choose(
        engines.Layers(w, g, v, *flags, out=out),
        configs[0],
        engines.Switches(differentiable=recorded),
    )
    group.step_(lr, configs[0])
    return zip(group.weights, group.buffers, strict=True)


def _is_recorded(x: Any) -> bool:
    """Whether PyTorch records what is computed from `x`."""
    recorded = framework(x) == "torch" and x.requires_grad
    return recorded and sys.modules["torch"].is_grad_enabled()
