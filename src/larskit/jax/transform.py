"""LARS as gradient transformations in optax's form, without optax."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.tree_util import keystr

from larskit import rule
from larskit.arrays import (
    Array,
    Scalar,
    cast,
    check_array,
    check_floating,
    check_shape,
    dtype_name,
    norm_dtype,
)
from larskit.config import (
    Config,
    Denominator,
    LrPlacement,
    check_lr,
    documented,
    is_zero,
)
from larskit.norm import root, sum_of_squares
from larskit.norms import mesh
from larskit.rule import LayerStats
from larskit.select import Selection, check_matched, select
from larskit.tree import Tree

Structure = Any  # a PyTreeDef of JAX
Schedule = Any  # a number, an array of shape (), or a callable of the step count
PerArray = Any  # a value for all arrays, one by pattern, or a callable (name, array)


class Transformation(NamedTuple):
    """The pair of functions that optax calls a gradient transformation."""

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


class LarsState(NamedTuple):
    """The state of `lars`.

    Attributes
    ----------
    count : array of shape ()
        The number of steps taken.
    momentum : like the parameters, or None
        The momentum buffers.
    stats : like the parameters, or None
        The `LayerStats` of the last step, of arrays, one for each parameter. Read them
        with `larskit.jax.layer_stats`.
    """

    count: Scalar
    momentum: Tree
    stats: Tree = None


class ScaleByLarsState(NamedTuple):
    """Nothing: `scale_by_lars` keeps no state."""


for _state in (LarsState, ScaleByLarsState, LayerStats):
    export.register_namedtuple_serialization(
        _state, serialized_name=f"larskit.jax.{_state.__name__}"
    )


@documented
def lars(
    learning_rate: Schedule,
    momentum: Scalar = Config.momentum,
    weight_decay: Schedule = Config.weight_decay,
    trust_coefficient: Scalar = Config.trust_coefficient,
    eps: Scalar = Config.eps,
    *,
    denominator: Denominator = Config.denominator,
    lr_placement: LrPlacement = Config.lr_placement,
    nesterov: bool = Config.nesterov,
    dampening: Scalar = Config.dampening,
    clip: bool = Config.clip,
    threshold: Scalar = Config.threshold,
    adapt: Selection | Tree = None,
    decay: Selection | Tree = None,
    maximize: bool = Config.maximize,
    accumulator_dtype: Any = None,
    layer_axis: PerArray = None,
    axis_names: PerArray = None,
    layer_stats: bool = False,
) -> Transformation:
    """Return LARS in optax's form: ``(init, update)``.

    Every array of a tree of parameters is one layer.

    Parameters
    ----------
    learning_rate : float, array of shape (), or callable
        At least 0; a callable gets the number of steps taken, from 0.
    {momentum}
    weight_decay : float, 0-d array, or callable, default=0.0
        wd, at least 0; a callable as for `learning_rate`.
    {trust_coefficient:threshold}
    adapt, decay : None, bool, pattern, sequence of patterns, callable, or tree of bool
        Which layers get a trust ratio and which are decayed, see
        `larskit.select.select`; names are paths, ``"encoder.0.kernel"``. None
        (default): those of two or more dimensions. A tree of bools is a prefix of the
        parameters'.
    {maximize}
    accumulator_dtype : dtype, optional
        Of the momentum; by default that of the parameters.
    layer_axis : int, mapping of pattern to int, or callable, optional
        The axis along which an array stacks several layers, as those of a scanned block
        do: each slice gets a ratio of its own. An int is for all arrays; a callable
        gets ``(name, array)`` and returns an int or None.
    axis_names : sequence of str, mapping of pattern to such, or callable, optional
        Inside `jax.shard_map`: the mesh axes over which an array is sharded, so that
        the norms are those of whole layers. As `layer_axis` for several kinds of
        arrays. Under `jax.jit` with sharded arrays nothing is needed.
    layer_stats : bool, default=False
        Keep the statistics of the last step in the state, for
        `larskit.jax.layer_stats`.

    Returns
    -------
    Transformation
        ``init(params) -> state`` and ``update(grads, state, params) -> (updates,
        state)``, as `optax.GradientTransformation` has them.

    Raises
    ------
    ValueError, TypeError
        For a hyper-parameter out of range; from ``init`` and ``update``, naming the
        array, for what does not fit.

    Examples
    --------
    >>> import jax, larskit.jax
    >>> params = {"kernel": jax.numpy.ones((2, 2)), "bias": jax.numpy.zeros(2)}
    >>> optimizer = larskit.jax.lars(10.0, weight_decay=1e-4)
    >>> state = optimizer.init(params)
    >>> grads = jax.tree.map(jax.numpy.ones_like, params)
    >>> updates, state = optimizer.update(grads, state, params)
    >>> params = jax.tree.map(jax.numpy.add, params, updates)  # optax.apply_updates
    """
    fixed = {"weight_decay": 0.0} if callable(weight_decay) else {}
    config = Config.pick(locals(), **fixed)
    if not callable(learning_rate):
        check_lr(learning_rate, "learning_rate")
    keeps = not is_zero(momentum)
    layers = partial(_layers, adapt, decay, layer_axis, axis_names)

    def init(params: Tree) -> LarsState:
        zeros = partial(jnp.zeros_like, dtype=accumulator_dtype)
        found, structure = layers(params)
        buffers = [zeros(layer.array) for layer in found]
        kept = structure.unflatten(buffers) if keeps else None
        stats = structure.unflatten(map(_no_stats, found)) if layer_stats else None
        return LarsState(jnp.zeros((), jnp.int32), kept, stats)

    def update(
        updates: Tree, state: LarsState, params: Tree = None
    ) -> tuple[Tree, LarsState]:
        rate, wd = (_now(x, state.count) for x in (learning_rate, weight_decay))
        now = replace(config, weight_decay=wd).at_step(state.count)
        found, structure = layers(params)
        grads = _matched(found, structure, updates, "updates")
        buffers = [None] * len(found)
        if keeps:
            buffers = _matched(found, structure, state.momentum, "state.momentum")
        y, kept, stats = _descent(found, grads, buffers, rate, now)
        new = [None if x is None else -x for x in y]
        buffers = structure.unflatten(kept) if keeps else None
        stats = _kept_stats(structure, stats, state.stats) if layer_stats else None
        return structure.unflatten(new), LarsState(state.count + 1, buffers, stats)

    return Transformation(init, update)


@documented
def scale_by_lars(
    weight_decay: Scalar = Config.weight_decay,
    trust_coefficient: Scalar = Config.trust_coefficient,
    eps: Scalar = Config.eps,
    *,
    denominator: Denominator = Config.denominator,
    threshold: Scalar = Config.threshold,
    adapt: Selection | Tree = None,
    decay: Selection | Tree = None,
    layer_axis: PerArray = None,
    axis_names: PerArray = None,
) -> Transformation:
    """Return the trust ratios alone: each gradient becomes ``r * (g + wd*w)``.

    For a chain in which others bring the learning rate, its sign, and momentum:
    ``optax.chain(scale_by_lars(1e-4), optax.sgd(1.0, momentum=0.9))`` has the rate
    outside the buffer.

    Parameters
    ----------
    {weight_decay:denominator}
    {threshold}
    adapt, decay, layer_axis, axis_names
        As those of `lars`.

    Returns
    -------
    Transformation

    Raises
    ------
    ValueError, TypeError
        As `lars` does, and for ``denominator="momentum"``.
    """
    config = Config.pick(locals(), momentum=0.0, lr_placement="outside")
    if denominator == "momentum":
        raise ValueError(
            "denominator='momentum' measures a buffer, but scale_by_lars keeps none: "
            "use larskit.jax.lars, or denominator='decayed_gradient'"
        )
    layers = partial(_layers, adapt, decay, layer_axis, axis_names)

    def init(params: Tree) -> ScaleByLarsState:
        layers(params)
        return ScaleByLarsState()

    def update(
        updates: Tree, state: ScaleByLarsState, params: Tree = None
    ) -> tuple[Tree, ScaleByLarsState]:
        found, structure = layers(params)
        grads = _matched(found, structure, updates, "updates")
        y, *_ = _descent(found, grads, [None] * len(found), 1.0, config)
        return structure.unflatten(y), state

    return Transformation(init, update)


def rescaling(config: Callable[[], Config]) -> Transformation:
    """Return `larskit.GradientLARS` as a transformation; it has no state.

    Parameters
    ----------
    config : callable
        Returns the hyper-parameters; called at each update.
    """

    def init(params: Tree) -> tuple[()]:
        return ()

    def update(
        updates: Tree, state: tuple[()], params: Tree = None
    ) -> tuple[Tree, tuple[()]]:
        _check_given(params)
        now = config()

        def rescaled(path: Any, g: Array, w: Array) -> Array:
            if g is None:
                return None
            g_name, w_name = (f"{tree}{keystr(path)}" for tree in ("updates", "params"))
            check_array(w, w_name)
            check_array(g, g_name)
            check_shape(g, w, g_name, w_name)
            return rule.scaled_gradient(w, g, now)

        new = jax.tree_util.tree_map_with_path(
            rescaled, updates, params, is_leaf=lambda x: x is None
        )
        return new, state

    return Transformation(init, update)


def _check_given(params: Tree) -> None:
    if params is None:
        raise ValueError(
            "params is None, but LARS measures the parameters: call "
            "update(grads, state, params)"
        )


def layer_stats(state: Tree) -> dict[str, LayerStats]:
    """Return the statistics of the last step of `lars`, by layer.

    Parameters
    ----------
    state : LarsState, or any tree with one in it
        Such as the state of an ``optax.chain``, of an optimizer made with
        ``lars(..., layer_stats=True)``.

    Returns
    -------
    dict of str to LayerStats
        By the path of the parameter, ``"encoder.0.kernel"``: the floats
        ``weight_norm`` (before the step), ``gradient_norm`` and ``trust_ratio``, and
        the bools ``adapted`` and ``decayed``; arrays of one number for each layer where
        `layer_axis` stacks them. Empty before the first step.

    Raises
    ------
    ValueError
        There is no such state, or it keeps no statistics.

    Notes
    -----
    This waits for the device. `larskit.rule.LayerStats` says what each number is.
    """
    of_lars = [x for x in _leaves(state, LarsState) if isinstance(x, LarsState)]
    kept = [x for x in of_lars if x.stats is not None]
    if not kept:
        raise ValueError(
            f"state has {len(of_lars)} states of lars, none of which keeps statistics: "
            "make the optimizer with larskit.jax.lars(..., layer_stats=True)"
        )
    if int(kept[0].count) == 0:
        return {}
    paths, _ = jax.tree_util.tree_flatten_with_path(
        kept[0].stats, is_leaf=lambda x: isinstance(x, LayerStats)
    )
    return {
        keystr(path, simple=True, separator="."): LayerStats(*map(_plain, stats[:5]))
        for path, stats in paths
    }


def _leaves(tree: Tree, kind: type) -> list[Any]:
    return jax.tree_util.tree_leaves(tree, is_leaf=lambda x: isinstance(x, kind))


def _plain(x: Array) -> Any:
    """Return one number as Python's, several as a NumPy array."""
    return np.asarray(x).item() if x.ndim == 0 else np.asarray(x)


def _now(value: Schedule, count: Scalar) -> Scalar:
    return value(count) if callable(value) else value


class _Layer(NamedTuple):
    """An array of parameters: one layer, or several along an axis."""

    name: str
    array: Array
    axis: int | None
    mesh_axes: tuple[str, ...]
    adapt: bool
    decay: bool


def _layers(
    adapt: Selection | Tree,
    decay: Selection | Tree,
    layer_axis: PerArray,
    axis_names: PerArray,
    params: Tree,
) -> tuple[list[_Layer], Structure]:
    """Return the layers of a tree of parameters, and its structure."""
    _check_given(params)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [keystr(path, simple=True, separator=".") for path, _ in leaves]
    arrays = [w for _, w in leaves]
    for name, w in zip(names, arrays, strict=True):
        check_floating(w, f"params at {name!r}")
    axes = _chosen(layer_axis, names, arrays, "layer_axis")
    slices = list(map(_slice, names, arrays, axes))
    flags = [
        _flags(choice, params, names, slices, what)
        for choice, what in ((adapt, "adapt"), (decay, "decay"))
    ]
    mesh_axes = [
        (own,) if isinstance(own, str) else tuple(own or ())
        for own in _chosen(axis_names, names, arrays, "axis_names")
    ]
    return list(map(_Layer, names, arrays, axes, mesh_axes, *flags)), structure


def _chosen(
    choice: PerArray, names: list[str], arrays: list[Array], what: str
) -> list[Any]:
    """Return what is chosen for each array: for all, by pattern, or by a call."""
    if callable(choice):
        return list(map(choice, names, arrays))
    if not isinstance(choice, Mapping):
        return [choice] * len(names)
    found: list[Any] = [None] * len(names)
    for pattern, value in choice.items():
        selected = select(pattern, names, arrays, what)
        check_matched(pattern, selected, what)
        for i in np.flatnonzero(selected):
            found[i] = value
    return found


def _slice(name: str, w: Array, axis: int | None) -> jax.ShapeDtypeStruct:
    """Return the shape of one layer of an array."""
    shape = jnp.shape(w)
    if axis is None:
        return jax.ShapeDtypeStruct(shape, w.dtype)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"layer_axis is {axis} for {name!r}, which has the shape {shape}: pass a "
            "mapping or a callable that leaves it out"
        )
    rest = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    return jax.ShapeDtypeStruct(tuple(rest), w.dtype)


def _flags(
    choice: Selection | Tree,
    params: Tree,
    names: list[str],
    slices: list[jax.ShapeDtypeStruct],
    what: str,
) -> Sequence[bool]:
    if _is_mask(choice):
        return jax.tree_util.tree_leaves(
            jax.tree_util.tree_map(
                lambda flag, part: jax.tree_util.tree_map(lambda _: bool(flag), part),
                choice,
                params,
            )
        )
    selected = select(choice, names, slices, what)
    check_matched(choice, selected, what)
    return selected


def _is_mask(choice: Selection | Tree) -> bool:
    leaves = jax.tree_util.tree_leaves(choice)
    flags = [isinstance(x, (bool, np.bool_)) for x in leaves]
    return bool(flags) and all(flags) and not isinstance(choice, bool)


def _matched(
    layers: list[_Layer], structure: Structure, tree: Tree, what: str
) -> list[Array]:
    """Return the arrays that a tree has for the layers; None where it has none."""
    try:
        leaves = structure.flatten_up_to(tree)
    except ValueError as why:
        raise ValueError(f"{what} must have the structure of params: {why}") from why
    for layer, x in zip(layers, leaves, strict=True):
        if x is not None:
            check_shape(x, layer.array, f"{what} at {layer.name!r}", "the parameter")
    return leaves


def _descent(
    layers: list[_Layer],
    grads: list[Array],
    buffers: list[Array],
    lr: Scalar,
    config: Config,
) -> tuple[list[Array], list[Array], list[LayerStats | None]]:
    """Return what to subtract from the parameters, the new momentum and statistics."""
    configs = [replace(config, adapt=x.adapt, decay=x.decay) for x in layers]
    new, kept = [None] * len(layers), list(buffers)
    found: list[LayerStats | None] = [None] * len(layers)
    rows = [i for i, g in enumerate(grads) if g is not None]
    norms = _norms(rows, layers, grads, buffers, configs)
    for i, own in zip(rows, norms, strict=True):
        w, g, v = layers[i].array, grads[i], buffers[i]
        y, kept[i], found[i] = rule.displacement(w, g, v, lr, configs[i], own)
        new[i] = cast(y, dtype_name(g))
    return new, kept, found


def _no_stats(layer: _Layer) -> LayerStats:
    """Return the statistics before the first step: zeros of the shapes to come."""
    shape = () if layer.axis is None else (layer.array.shape[layer.axis],)
    zeros = jnp.zeros(shape, norm_dtype(layer.array))
    flags = jnp.asarray(layer.adapt), jnp.asarray(layer.decay)
    return LayerStats(zeros, zeros, zeros, *flags)


def _kept_stats(structure: Structure, found: list[Any], former: Tree) -> Tree:
    """Return the statistics of a step; those of before where there was no gradient."""
    kept = structure.flatten_up_to(former)
    for i, stats in enumerate(found):
        if stats is not None:
            shape = kept[i].weight_norm.shape
            numbers = (x.reshape(shape) for x in stats[:3])
            kept[i] = LayerStats(*numbers, *kept[i][3:])
    return structure.unflatten(kept)


def _norms(
    rows: list[int],
    layers: list[_Layer],
    grads: list[Array],
    buffers: list[Array],
    configs: list[Config],
) -> list[rule.Norms]:
    """Return the norms of whole layers, which broadcast to their arrays."""
    w = [layers[i].array for i in rows]
    measured = [
        rule.measured_gradient(layers[i].array, grads[i], buffers[i], configs[i])
        for i in rows
    ]
    axes = [layers[i].axis for i in rows] * 2
    squares = list(map(_squares, axes, (*w, *measured)))
    squares = mesh.summed(squares, [layers[i].mesh_axes for i in rows] * 2)
    norms = [
        _along(axis, root(x), w)
        for axis, x, w in zip(axes, squares, w * 2, strict=True)
    ]
    return list(zip(norms[: len(rows)], norms[len(rows) :], strict=True))


def _squares(axis: int | None, x: Array) -> Array:
    """Return the sum of squares of a layer, or of each along an axis."""
    if axis is None:
        return sum_of_squares(x)
    return jax.vmap(sum_of_squares, axis)(x)


def _along(axis: int | None, norms: Array, w: Array) -> Array:
    """Return a norm for each layer along an axis, which broadcasts to the array."""
    if axis is None:
        return norms
    return jnp.expand_dims(norms, [i for i in range(w.ndim) if i != axis % w.ndim])
