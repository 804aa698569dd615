"""The pure faces: `lars_update`, and `init` / `update` with momentum, for any array."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import array_api_compat
import numpy as np

from larskit import rule
from larskit.arrays import (
    cast,
    check_floating,
    check_writable,
    compiles,
    dtype_name,
    framework,
    is_array,
    namespace,
    norm_dtype,
    stop_gradient,
    unwritable,
    write,
)
from larskit.config import Config, Denominator, LrPlacement, check_lr, is_number
from larskit.engines import native
from larskit.layout import Unfit, empty_like
from larskit.select import Selection, check_matched, select
from larskit.tree import (
    dotted,
    flatten,
    holder,
    is_leaf,
    rewrap,
    spread,
    unflatten,
    unwrap,
)

if TYPE_CHECKING:
    from larskit.state import Names, PortableState


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
        array API, of any shape, floating or (but for TensorFlow and Paddle) complex.
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
        holder (`Array`, ``ivy.Array``) can take up new ones.

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
    computes ``w - (lr/L) * g/|g|``: the length of the weights drops out and nothing is
    decayed. Here the decay is the one of the LARS paper.

    Examples
    --------
    >>> import numpy as np
    >>> lars_update(np.array([3.0, 4.0]), np.array([0.0, 2.0]), 0.1)
    array([3. , 3.5])
    """
    layers = _Layers(w, "w")
    columns: Any = (
        layers.arrays,
        layers.like(dcdw, "dcdw"),
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
    moved = [new_w for new_w, _ in _moved(rows, [unwrap(x) for x in receivers])]
    if out is None:
        return layers.rebuilt(moved)
    for receiver, new in zip(receivers, moved, strict=True):
        _store(receiver, new, not stop_gradients)
    return out


def _receivers(layers: "_Layers", w: Any, out: Any, differentiable: bool) -> list[Any]:
    """Return the leaves of `out`, after checking that each can take its result."""
    if is_leaf(out) and not is_leaf(w):
        raise TypeError(
            f"out is one {type(out).__name__}, but the weights are a "
            f"{type(w).__name__}: pass a container like the weights"
        )
    leaves = spread(out, layers.paths, "out")
    arrays = layers.like(out, "out")
    taken: dict[int, str] = {}
    for leaf, array, what in zip(leaves, arrays, layers.named("out"), strict=True):
        if holder(leaf) is None:
            check_writable(array, what, differentiable)
        if id(array) in taken:
            raise ValueError(
                f"{what} is the same array as {taken[id(array)]}: one result would "
                "overwrite the other, pass an array for each"
            )
        taken[id(array)] = what
    return leaves


def _store(receiver: Any, new: Any, differentiable: bool) -> None:
    """Write a result into an array, or have its holder take it up."""
    held, array = holder(receiver), unwrap(receiver)
    if held and unwritable(array, differentiable):
        setattr(receiver, held, new)
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

    count: Any
    momentum: Any


def init(params: Any) -> State:
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
    layers = _Layers(params, "params")
    first = next(iter(layers.arrays), None)
    count = namespace(first).asarray(0) if compiles(first) else 0
    zeros = [namespace(w).zeros_like(stop_gradient(w)) for w in layers.arrays]
    return State(count, layers.rebuilt(zeros))


def update(
    params: Any,
    grads: Any,
    state: State,
    lr: Any,
    momentum: Any = Config.momentum,
    weight_decay: Any = Config.weight_decay,
    trust_coefficient: Any = Config.trust_coefficient,
    eps: Any = Config.eps,
    *,
    denominator: Denominator = Config.denominator,
    lr_placement: LrPlacement = Config.lr_placement,
    nesterov: bool = Config.nesterov,
    dampening: Any = Config.dampening,
    clip: bool = Config.clip,
    threshold: Any = Config.threshold,
    adapt: Selection = None,
    decay: Selection = None,
    maximize: bool = Config.maximize,
) -> tuple[Any, State]:
    """Take one step of LARS with momentum: ``params, state = update(...)``.

    Pure: nothing is written, and all of it can be traced (``jax.jit``,
    ``jax.lax.scan``, ``tf.function``) and differentiated. In PyTorch and Paddle call
    it under ``no_grad()`` where it shall not be.

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
    momentum, weight_decay, trust_coefficient, eps : float, or array of shape ()
        See `larskit.config.Config`, as for the keywords down to `threshold`.
    denominator : {"paper", "decayed_gradient", "gradient", "momentum"}
        What the length of a layer is divided by.
    lr_placement : {"inside", "outside"}
        Whether the rate multiplies what enters the momentum buffer or what leaves it.
    nesterov, dampening, clip, threshold
        Nesterov's momentum, dampening of the buffer, LARC's clipping of the ratio, and
        the length up to which a layer is not adapted.
    adapt, decay : None, bool, pattern, sequence of patterns, or callable
        Which layers get a trust ratio and which are decayed, see
        `larskit.select.select`; names are dotted paths, ``"encoder.0.weight"``. None
        (default): those of two or more dimensions.
    maximize : bool
        Climb instead of descend.

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
    config = Config(
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        denominator=denominator,
        lr_placement=lr_placement,
        nesterov=nesterov,
        dampening=dampening,
        clip=clip,
        threshold=threshold,
        maximize=maximize,
    )
    layers = _Layers(params, "params")
    rows = zip(
        layers.arrays,
        layers.like(grads, "grads"),
        layers.like(state.momentum, "state.momentum"),
        layers.rates(lr, "lr"),
        layers.configs(at_step(config, state.count), adapt, decay),
        strict=True,
    )
    moved = _moved(list(rows))
    new_params = layers.rebuilt(new_w for new_w, _ in moved)
    new_momentum = layers.rebuilt(new_v for _, new_v in moved)
    return new_params, State(state.count + 1, new_momentum)


def to_portable(
    params: Any,
    state: State,
    lr: Any = None,
    *,
    adapt: Selection = None,
    decay: Selection = None,
    **hyperparameters: Any,
) -> "PortableState":
    """Return the state in the form that the optimizers of all frameworks read.

    Parameters
    ----------
    params, state
        What the last `update` returned.
    lr : float, array of one element, or a container of them, optional
        The learning rate of the next step.
    adapt, decay, **hyperparameters
        Those that `update` is called with.

    Returns
    -------
    PortableState
        A copy, for `larskit.state.write_state`. The layers are named by their
        dotted paths.

    Raises
    ------
    ValueError, TypeError
        As `update` does.

    Examples
    --------
    >>> import numpy as np
    >>> from larskit.state import read_state, write_state
    >>> params, how = {"kernel": np.ones((2, 2))}, {"momentum": 0.8}
    >>> params, state = update(params, params, init(params), 1.0, **how)
    >>> write_state(to_portable(params, state, 1.0, **how), "state.safetensors")
    >>> state = from_portable(read_state("state.safetensors"), params, **how)
    """
    from larskit.state import PortableState

    layers = _Layers(params, "params")
    described = layers.described(lr, adapt, decay, hyperparameters)
    buffers = layers.like(state.momentum, "state.momentum")
    step = int(state.count)
    kept = zip(described, buffers, strict=True) if step else ()
    momentum = {name: _to_numpy(v) for name, v in kept}
    return PortableState(step, described, momentum)


def from_portable(
    portable: "PortableState",
    params: Any,
    lr: Any = None,
    *,
    names: "Names" = None,
    convert: bool = False,
    adapt: Selection = None,
    decay: Selection = None,
    **hyperparameters: Any,
) -> State:
    """Return the state with which `update` goes on where any optimizer stopped.

    Parameters
    ----------
    portable : PortableState
        What `larskit.state.read_state` or an optimizer's ``portable_state()``
        returned.
    params : array, or any nesting of containers
        The parameters, in the saved shapes.
    lr : float, array of one element, or a container of them, optional
        The learning rate of the next step; by default the saved one. Only `convert`
        looks at it.
    names, convert
        See `larskit.state.load_optimizer`.
    adapt, decay, **hyperparameters
        Those that `update` will be called with. They must agree with the saved ones.

    Returns
    -------
    State
        Arrays of the framework, dtypes and devices of the parameters.

    Raises
    ------
    ValueError, TypeError
        The state does not fit, or does not say how many steps were taken.
    """
    layers = _Layers(params, "params")
    described = layers.described(lr, adapt, decay, hyperparameters)
    weights = dict(zip(described, layers.arrays, strict=True))
    found = portable.fitted(described, weights, names=names, convert=convert)
    check_count(found)
    for name, layer in described.items():
        if layer["lr"] is None:
            layer["lr"] = found.layers[name].get("lr")
    found = found.converted(described)
    start = init(params)
    zeros = layers.like(start.momentum, "momentum")
    momentum = [
        _from_numpy(found.momentum[name], zero) if name in found.momentum else zero
        for name, zero in zip(described, zeros, strict=True)
    ]
    return State(start.count + found.step, layers.rebuilt(momentum))


def check_count(portable: "PortableState") -> None:
    """Refuse a state whose buffers and count do not tell first steps from later ones.

    They have to with dampening, which a first step goes without.
    """
    step = portable.step
    if step is None:
        raise ValueError(
            "the saved state does not say how many steps were taken, which State "
            "counts: pass step= to save_optimizer, or dataclasses.replace(state, step=)"
        )
    for name, layer in portable.layers.items():
        damped = layer["dampening"] and layer["denominator"] != "momentum"
        if damped and (name in portable.momentum) != (step > 0):
            has = "a" if name in portable.momentum else "no"
            raise ValueError(
                f"{name!r} has {has} momentum buffer after {step} steps, but State has "
                "one count for all layers, and dampening depends on it: correct the "
                "step, or go on in the framework that saved it"
            )


def _to_numpy(x: Any) -> np.ndarray:
    """Copy an array to NumPy, in its dtype."""
    from larskit.state.files import numpy_dtype

    name = dtype_name(x)
    x = cast(stop_gradient(x), "float32" if name == "bfloat16" else name)
    if framework(x) in ("torch", "cupy"):
        x = array_api_compat.to_device(x, "cpu")
    return np.asarray(x).astype(numpy_dtype(name))


def _from_numpy(x: np.ndarray, like: Any) -> Any:
    """Return an array of the framework, dtype and device of `like`."""
    x = x.astype(np.result_type(x, np.float32))  # only JAX knows NumPy's bfloat16
    new = cast(namespace(like).asarray(x), dtype_name(like))
    if framework(like) in ("torch", "cupy", "jax"):
        return array_api_compat.to_device(new, array_api_compat.device(like))
    return new


def at_step(config: Config, count: Any) -> Config:
    """Return `config` without its dampening where this is the first step."""
    dampening = config.dampening
    undamped = is_number(dampening) and dampening == 0
    if undamped or config.denominator == "momentum":
        return config
    later = count > 0
    later = cast(later, norm_dtype(later)) if is_array(later) else later
    return replace(config, dampening=dampening * later)


def _moved(rows: list[Any], results: Sequence[Any] = ()) -> list[Any]:
    """Return (w', v') for each row (w, g, v, lr, config).

    Layers of one kind go through the native engine at once where it takes them, and w'
    is then written into `results` where there are any; else the rule moves them.
    """
    kinds: dict[Any, list[int]] = {}
    for i, (w, *_, lr, config) in enumerate(rows):
        numbers = (lr, *vars(config).values())
        key = tuple(x if is_number(x) else id(x) for x in numbers)
        kinds.setdefault((framework(w), dtype_name(w), key), []).append(i)
    moved: list[Any] = [None] * len(rows)
    for kind in kinds.values():
        chosen = [rows[i] for i in kind]
        found = None
        if (
            len(kinds) == 1 or not results
        ):  # else one kind could write another's weights
            found = _moved_natively(chosen, [results[i] for i in kind if results])
        found = found or [rule.update(*row)[:2] for row in chosen]
        for i, pair in zip(kind, found, strict=True):
            moved[i] = pair
    return moved


def _moved_natively(rows: list[Any], results: list[Any]) -> list[Any] | None:
    w, g, v, (lr, *_), (config, *_) = zip(*rows, strict=True)
    w, g = ([cast(x, dtype_name(x)) for x in xs] for xs in (w, g))  # scalars of NumPy
    if not native.fits(w[0]) or any(map(_tracked, (*w, *g, *v, lr))):
        return None
    new_w = results or [empty_like(x) for x in w]
    new_v = [None if x is None else empty_like(x) for x in v]
    try:
        group = native.Group(w, g, v, results=new_w, new_buffers=new_v)
    except Unfit:
        return None
    group.step_(lr, config)
    return list(zip(new_w, new_v, strict=True))


def _tracked(x: Any) -> bool:
    """Whether PyTorch records what is computed from `x`."""
    recorded = framework(x) == "torch" and x.requires_grad
    return recorded and sys.modules["torch"].is_grad_enabled()


class _Layers:
    """The leaves of a container of weights, and what other containers have for them."""

    def __init__(self, tree: Any, what: str) -> None:
        self.paths, self.leaves, self.structure = flatten(tree)
        self.arrays = [unwrap(leaf) for leaf in self.leaves]
        for array, name in zip(self.arrays, self.named(what), strict=True):
            if not is_array(array):
                raise TypeError(
                    f"{name} is a {type(array).__name__}, expected an array"
                )
            check_floating(array, name)

    def named(self, what: str) -> list[str]:
        """Say for each leaf where it lies, for messages."""
        return [f"{what} at {dotted(path)!r}" if path else what for path in self.paths]

    def like(self, tree: Any, what: str) -> list[Any]:
        """Return the arrays of `tree`, which must be like the weights."""
        found = [unwrap(leaf) for leaf in spread(tree, self.paths, what)]
        for w, x, name in zip(self.arrays, found, self.named(what), strict=True):
            _check_like(w, x, name)
        return found

    def rates(self, tree: Any, what: str) -> list[Any]:
        """Return the one number that `tree` has for each leaf."""
        found = zip(
            spread(tree, self.paths, what), self.arrays, self.named(what), strict=True
        )
        return [_rate(unwrap(x), w, name) for x, w, name in found]

    def configs(
        self, config: Config, adapt: Selection, decay: Selection
    ) -> list[Config]:
        """Return the configuration of each layer."""
        names = [dotted(path) for path in self.paths]
        chosen = []
        for what, selection in (("adapt", adapt), ("decay", decay)):
            chosen.append(select(selection, names, self.arrays, what))
            check_matched(selection, chosen[-1], what)
        return [replace(config, adapt=a, decay=d) for a, d in zip(*chosen, strict=True)]

    def described(
        self, lr: Any, adapt: Selection, decay: Selection, hyperparameters: Any
    ) -> dict[str, dict[str, Any]]:
        """Return what a `PortableState` says of each layer."""
        from larskit.state.portable import hyperparameters

        configs = self.configs(Config(**hyperparameters), adapt, decay)
        rates = [None] * len(configs) if lr is None else self.rates(lr, "lr")
        found = {}
        for path, rate, config in zip(self.paths, rates, configs, strict=True):
            if dotted(path) in found:
                raise ValueError(
                    f"two leaves are called {dotted(path)!r}, so that a file cannot "
                    "tell them apart: rename one"
                )
            found[dotted(path)] = hyperparameters(rate, config)
        return found

    def rebuilt(self, arrays: Iterable[Any]) -> Any:
        """Return a container like that of the weights around `arrays`."""
        rows = zip(arrays, self.arrays, self.leaves, strict=True)
        new = [rewrap(_exact(array, w), leaf) for array, w, leaf in rows]
        return unflatten(self.structure, new)


def _check_like(w: Any, x: Any, name: str) -> None:
    if not is_array(x) or framework(x) != framework(w):
        raise TypeError(
            f"{name} is a {type(x).__name__}, expected an array of {framework(w)} "
            "like the weights: convert it"
        )
    if tuple(x.shape) != tuple(w.shape):
        raise ValueError(
            f"{name} has the shape {tuple(x.shape)}, expected that of the weights, "
            f"{tuple(w.shape)}"
        )
    if dtype_name(x) != dtype_name(w):
        raise TypeError(
            f"{name} has the dtype {dtype_name(x)}, expected that of the weights, "
            f"{dtype_name(w)}: convert one of them"
        )
    check_floating(x, name)


def _rate(value: Any, w: Any, name: str) -> Any:
    """Return a rate as a checked float, or as a 0-d array of the weights' framework."""
    if is_array(value):
        if math.prod(value.shape) != 1:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}, expected one number for "
                "the whole layer: pass a float, a 0-d array, or a container of them"
            )
        if dtype_name(value).startswith(("bool", "complex")):
            raise TypeError(f"{name} has the dtype {dtype_name(value)}: pass a number")
        value = namespace(value).reshape(value, ())
        if framework(value) == framework(w) != "numpy":
            return value
    else:
        check_lr(value, name)
    try:
        value = float(stop_gradient(value))
    except (TypeError, ValueError) as why:
        raise TypeError(
            f"{name} is a {type(value).__name__}, expected a number or an array of "
            f"{framework(w)} with one element"
        ) from why
    check_lr(value, name)
    return value


def _exact(new: Any, like: Any) -> Any:
    """Return `new` in the very dtype of `like`: NumPy's have a byte order too."""
    return new.astype(like.dtype, copy=False) if framework(new) == "numpy" else new
