"""The layers of a container of weights, and what other containers have for them."""

import math
from collections.abc import Iterable
from dataclasses import replace

from larskit.arrays import (
    Array,
    Scalar,
    check_array,
    check_floating,
    check_shape,
    dtype_name,
    framework,
    is_array,
    namespace,
    stop_gradient,
)
from larskit.config import Config, check_lr
from larskit.select import Selection, check_matched, select
from larskit.tree import (
    Leaf,
    Tree,
    broadcast_leaves,
    flatten,
    path_str,
    rewrap,
    unflatten,
    unwrap,
)


class Leaves:
    """The leaves of a container of weights: each is one layer.

    Parameters
    ----------
    tree : array, or any nesting of containers
        The weights, of floating or complex dtypes.
    what : str
        Names the container in messages.

    Attributes
    ----------
    paths : list of tuple
        Where each layer is in the container.
    names : list of str
        The same as text: ``"encoder.0.weight"``.
    leaves, arrays : list
        The leaves, and the arrays themselves where leaves are wrappers.

    Raises
    ------
    TypeError
        Naming a leaf that is no array, or has another dtype.
    """

    def __init__(self, tree: Tree, what: str) -> None:
        """Flatten the container and check its leaves."""
        self.paths, self.leaves, self._structure = flatten(tree)
        self.names = list(map(path_str, self.paths))
        self.arrays: list[Array] = list(map(unwrap, self.leaves))
        for array, label in zip(self.arrays, self.labels(what), strict=True):
            check_array(array, label)

    def labels(self, what: str) -> list[str]:
        """Return for each leaf what messages call that of the container `what`."""
        names = zip(self.paths, self.names, strict=True)
        return [f"{what} at {name!r}" if path else what for path, name in names]

    def arrays_of(self, tree: Tree, what: str) -> list[Array]:
        """Return the arrays of `tree`, which must be like the weights."""
        found = list(map(unwrap, broadcast_leaves(tree, self.paths, what)))
        for w, x, label in zip(self.arrays, found, self.labels(what), strict=True):
            _check_like(w, x, label)
        return found

    def rates(self, tree: Scalar | Tree, what: str) -> list[Scalar]:
        """Return the one number that `tree` has for each leaf."""
        found = map(unwrap, broadcast_leaves(tree, self.paths, what))
        rows = zip(found, self.arrays, self.labels(what), strict=True)
        return [_rate(*row) for row in rows]

    def configs(
        self, config: Config, adapt: Selection, decay: Selection
    ) -> list[Config]:
        """Return the configuration of each layer."""
        chosen = []
        for what, selection in (("adapt", adapt), ("decay", decay)):
            chosen.append(select(selection, self.names, self.arrays, what))
            check_matched(selection, chosen[-1], what)
        return [replace(config, adapt=a, decay=d) for a, d in zip(*chosen, strict=True)]

    def rebuilt(self, arrays: Iterable[Array]) -> Tree:
        """Return a container like that of the weights around `arrays`."""
        rows = zip(arrays, self.arrays, self.leaves, strict=True)
        new: list[Leaf] = [rewrap(_exact(array, w), leaf) for array, w, leaf in rows]
        return unflatten(self._structure, new)


def _check_like(w: Array, x: Array, name: str) -> None:
    if not is_array(x) or framework(x) != framework(w):
        raise TypeError(
            f"{name} is a {type(x).__name__}, expected an array of {framework(w)} "
            "like the weights: convert it"
        )
    check_shape(x, w, name, "the weights")
    if dtype_name(x) != dtype_name(w):
        raise TypeError(
            f"{name} has the dtype {dtype_name(x)}, expected that of the weights, "
            f"{dtype_name(w)}: convert one of them"
        )
    check_floating(x, name)


def _rate(value: Scalar, w: Array, name: str) -> Scalar:
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


def _exact(new: Array, like: Array) -> Array:
    """Return `new` in the very dtype of `like`: NumPy's have a byte order too."""
    return new.astype(like.dtype, copy=False) if framework(new) == "numpy" else new
