"""LARS as gradient transformations in optax's form, without optax."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.tree_util import keystr

from larskit import rule
from larskit.arrays import cast, check_floating, dtype_name
from larskit.config import Config, Denominator, LrPlacement, check_lr, is_number
from larskit.functional import at_step
from larskit.hook import Transformation
from larskit.norms import mesh
from larskit.select import Selection, check_matched, select

Schedule = Any  # a number, an array of shape (), or a callable of the step count


class LarsState(NamedTuple):
    """The number of steps taken, and the momentum of each layer."""

    count: Any
    momentum: Any


export.register_namedtuple_serialization(
    LarsState, serialized_name="larskit.jax.LarsState"
)


def lars(
    learning_rate: Schedule,
    momentum: Any = Config.momentum,
    weight_decay: Schedule = Config.weight_decay,
    trust_coefficient: Any = Config.trust_coefficient,
    eps: Any = Config.eps,
    *,
    denominator: Denominator = Config.denominator,
    lr_placement: LrPlacement = Config.lr_placement,
    nesterov: bool = Config.nesterov,
    dampening: Any = Config.dampening,
    clip: bool = Config.clip,
    threshold: Any = Config.threshold,
    adapt: Any = None,
    decay: Any = None,
    maximize: bool = Config.maximize,
    accumulator_dtype: Any = None,
    layer_axis: Any = None,
    axis_names: Any = None,
) -> Transformation:
    """Return LARS in optax's form: ``(init, update)``.

    Every array of a tree of parameters is one layer.

    Parameters
    ----------
    learning_rate : float, array of shape (), or callable
        At least 0; a callable gets the number of steps taken, from 0.
    momentum, trust_coefficient, eps : float, or array of shape ()
        See `larskit.config.Config`, as for the keywords down to `threshold`.
    weight_decay : float, array of shape (), or callable
        As `learning_rate`.
    denominator : {"paper", "decayed_gradient", "gradient", "momentum"}
        What the length of a layer is divided by.
    lr_placement : {"inside", "outside"}
        Whether the rate multiplies what enters the momentum buffer or what leaves it.
    nesterov, dampening, clip, threshold
        Nesterov's momentum, dampening of the buffer, LARC's clipping of the ratio, and
        the length up to which a layer is not adapted.
    adapt, decay : None, bool, pattern, sequence of patterns, callable, or tree of bool
        Which layers get a trust ratio and which are decayed, see
        `larskit.select.select`; names are paths, ``"encoder.0.kernel"``. None
        (default): those of two or more dimensions. A tree of bools is a prefix of the
        parameters'.
    maximize : bool
        Climb instead of descend.
    accumulator_dtype : dtype, optional
        Of the momentum; by default that of the parameters.
    layer_axis : int, mapping of pattern to int, or callable, optional
        The axis along which an array stacks several layers, as those of a scanned block
        do: each slice gets a ratio of its own. An int is for all arrays; a callable
        gets ``(name, array)`` and returns an int or None.
    axis_names : sequence of str, mapping of pattern to such, or callable, optional
        Inside `jax.shard_map`: the mesh axes over which an array is sharded, so that the
        lengths are those of whole layers. As `layer_axis` for several kinds of arrays.
        Under `jax.jit` with sharded arrays nothing is needed.

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
    config = Config(
        momentum=momentum,
        weight_decay=0.0 if callable(weight_decay) else weight_decay,
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
    if not callable(learning_rate):
        check_lr(learning_rate, "learning_rate")
    keeps = not (is_number(momentum) and momentum == 0)
    layers_of = partial(
        _Layers,
        adapt=adapt,
        decay=decay,
        layer_axis=layer_axis,
        axis_names=axis_names,
    )

    def init(params: Any) -> LarsState:
        zeros = partial(jnp.zeros_like, dtype=accumulator_dtype)
        buffers = layers_of(params).map(zeros) if keeps else None
        return LarsState(jnp.zeros((), jnp.int32), buffers)

    def update(
        updates: Any, state: LarsState, params: Any = None
    ) -> tuple[Any, LarsState]:
        layers = layers_of(params)
        rate, wd = (_at(x, state.count) for x in (learning_rate, weight_decay))
        now = at_step(replace(config, weight_decay=wd), state.count)
        y, momentum = layers.descent(updates, state.momentum, rate, now)
        new = jax.tree_util.tree_map(jnp.negative, y)
        return new, LarsState(state.count + 1, momentum)

    return Transformation(init, update)


def _at(value: Schedule, count: Any) -> Any:
    return value(count) if callable(value) else value


class _Layers:
    """The arrays of a tree of parameters, and how each of them is stepped."""

    def __init__(
        self, params: Any, *, adapt: Any, decay: Any, layer_axis: Any, axis_names: Any
    ) -> None:
        if params is None:
            raise ValueError(
                "params is None, but LARS measures the parameters: call "
                "update(grads, state, params)"
            )
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(params)
        self.names = [keystr(path, simple=True, separator=".") for path, _ in leaves]
        self.arrays = [w for _, w in leaves]
        for name, w in zip(self.names, self.arrays, strict=True):
            check_floating(w, f"params at {name!r}")
        self.axes = self._chosen(layer_axis, "layer_axis")
        layers = list(map(_layer, self.arrays, self.axes, self.names))
        self.adapt = self._flags(adapt, params, layers, "adapt")
        self.decay = self._flags(decay, params, layers, "decay")
        self.mesh_axes = list(map(_words, self._chosen(axis_names, "axis_names")))

    def _chosen(self, choice: Any, what: str) -> list[Any]:
        """Return what is chosen for each array: for all, by pattern, or by a call."""
        if callable(choice):
            return list(map(choice, self.names, self.arrays))
        if not isinstance(choice, Mapping):
            return [choice] * len(self.names)
        found: list[Any] = [None] * len(self.names)
        for pattern, value in choice.items():
            selected = select(pattern, self.names, self.arrays, what)
            check_matched(pattern, selected, what)
            for i in np.flatnonzero(selected):
                found[i] = value
        return found

    def _flags(self, choice: Any, params: Any, layers: Any, what: str) -> Any:
        if _is_mask(choice):
            spread = jax.tree_util.tree_map(
                lambda flag, tree: jax.tree_util.tree_map(lambda _: bool(flag), tree),
                choice,
                params,
            )
            return jax.tree_util.tree_leaves(spread)
        selected = select(choice, self.names, layers, what)
        check_matched(choice, selected, what)
        return selected

    def map(self, function: Callable[[Any], Any]) -> Any:
        """Return a tree like that of the parameters."""
        return self._tree(map(function, self.arrays))

    def _tree(self, leaves: Iterable[Any]) -> Any:
        return jax.tree_util.tree_unflatten(self._structure, list(leaves))

    def descent(
        self, updates: Any, momentum: Any, lr: Any, config: Config
    ) -> tuple[Any, Any]:
        """Return what to subtract from the parameters, and the new momentum."""
        grads, buffers = (
            self._like(updates, "updates"),
            self._like(momentum, "momentum"),
        )
        new, kept = list(grads), list(buffers)
        moved = [i for i, g in enumerate(grads) if g is not None]
        configs = {
            i: replace(config, adapt=self.adapt[i], decay=self.decay[i]) for i in moved
        }
        w = [self.arrays[i] for i in moved]
        q = [
            rule.measured(self.arrays[i], grads[i], buffers[i], configs[i])
            for i in moved
        ]
        for i, w_norm, q_norm in zip(moved, *self._norms(moved, w, q), strict=True):
            ratio = rule.trust_ratio(w_norm, q_norm, lr, configs[i])
            if (axis := self.axes[i]) is not None:
                n = self.arrays[i].ndim
                others = [k for k in range(n) if k != axis % n]
                ratio = jnp.expand_dims(ratio, others)
            layer = self.arrays[i], grads[i], buffers[i], ratio
            y, v = rule.descent(*layer, lr, configs[i])
            new[i] = cast(y, dtype_name(grads[i]))
            kept[i] = v if buffers[i] is None else cast(v, dtype_name(buffers[i]))
        return self._tree(new), momentum if momentum is None else self._tree(kept)

    def _norms(self, rows: list[int], w: list[Any], q: list[Any]) -> Any:
        """Return the lengths of weights, and of what is measured beside them."""
        axes = [self.axes[i] for i in rows] * 2
        squares = list(map(_squares, (*w, *q), axes))
        mesh_axes = [self.mesh_axes[i] for i in rows] * 2
        if any(mesh_axes):
            squares = mesh.summed(squares, mesh_axes)
        norms = list(map(rule.root, squares))
        return norms[: len(rows)], norms[len(rows) :]

    def _like(self, tree: Any, what: str) -> list[Any]:
        """Return the arrays of `tree`; None where it has none."""
        if tree is None:
            return [None] * len(self.arrays)
        try:
            leaves = self._structure.flatten_up_to(tree)
        except ValueError as why:
            raise ValueError(f"{what} is no tree like params: {why}") from why
        for name, x, w in zip(self.names, leaves, self.arrays, strict=True):
            if x is not None and jnp.shape(x) != jnp.shape(w):
                raise ValueError(
                    f"{what} at {name!r} has the shape {jnp.shape(x)}, expected that of "
                    f"the parameter, {jnp.shape(w)}"
                )
        return leaves


def _is_mask(choice: Any) -> bool:
    leaves = jax.tree_util.tree_leaves(choice)
    flags = leaves and all(isinstance(x, (bool, np.bool_)) for x in leaves)
    return bool(flags) and not isinstance(choice, (bool, np.bool_))


def _layer(w: Any, axis: int | None, name: str) -> Any:
    """Return the shape of one layer of a stack."""
    shape = jnp.shape(w)
    if axis is None:
        return jax.ShapeDtypeStruct(shape, w.dtype)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"layer_axis is {axis} for {name!r}, which has the shape {shape}: pass a "
            "mapping or a callable that says None for it"
        )
    rest = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    return jax.ShapeDtypeStruct(tuple(rest), w.dtype)


def _squares(x: Any, axis: int | None) -> Any:
    """Return the sum of squares of each layer in a stack, or of the only one."""
    if axis is None:
        return rule.sum_of_squares(x)
    return jax.vmap(rule.sum_of_squares, axis)(x)


def _words(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
