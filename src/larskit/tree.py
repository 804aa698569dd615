"""Walk any container, leaf by leaf, and the two holders of arrays of our own.

optree does the walking. Dataclasses and mappings of other classes (ivy's, flax's)
become nodes the first time they are met.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from textwrap import indent
from typing import Any

import optree

from larskit.arrays import dtype_name, framework, is_array, namespace

NAMESPACE = "larskit"
Path = tuple[Any, ...]


def flatten(tree: Any) -> tuple[list[Path], list[Any], Any]:
    """Return the paths, the leaves and the structure of `tree`.

    A path holds the keys, indices and field names that lead to a leaf. None is no leaf.
    A field of a dataclass whose metadata say ``static=True`` (or, as flax has it,
    ``pytree_node=False``) is carried along and not walked into.
    """
    while True:
        accessors, leaves, structure = optree.tree_flatten_with_accessor(
            tree, namespace=NAMESPACE
        )
        unknown = {type(leaf) for leaf in leaves if _is_container(leaf)}
        if not unknown:
            return [_path(accessor) for accessor in accessors], leaves, structure
        for kind in unknown:
            with suppress(ValueError):  # another thread was faster
                _register(kind)


def _path(accessor: Iterable[Any]) -> Path:
    return tuple(getattr(entry, "field", entry.entry) for entry in accessor)


def unflatten(structure: Any, leaves: Iterable[Any]) -> Any:
    """Put `leaves` back into the structure that `flatten` returned."""
    return optree.tree_unflatten(structure, leaves)


def is_leaf(tree: Any) -> bool:
    """Whether `tree` is one leaf and no container."""
    return not _is_container(tree) and optree.tree_is_leaf(tree, namespace=NAMESPACE)


def dotted(path: Path) -> str:
    """Write a path as users write names: ``"encoder.0.weight"``."""
    return ".".join(map(str, path))


def spread(tree: Any, paths: list[Path], what: str) -> list[Any]:
    """Return the leaf of `tree` at each of `paths`; a lone leaf serves them all.

    Raises
    ------
    TypeError
        Where `tree` is a container but `paths` is that of one array.
    ValueError
        Naming the first path that `tree` misses, or has and should not.
    """
    if tree is None or is_leaf(tree):
        return [tree] * len(paths)
    if paths == [()]:
        raise TypeError(
            f"{what} is a {type(tree).__name__}, but the weights are one array: pass "
            "one value, not a container"
        )
    found_paths, leaves, _ = flatten(tree)
    found = dict(zip(found_paths, leaves, strict=True))
    expected = set(paths)
    for wrong, fault, remedy in (
        ([path for path in paths if path not in found], "misses", "add"),
        ([path for path in found if path not in expected], "has the extra", "remove"),
    ):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(
                f"{what} {fault} leaf {dotted(wrong[0])!r}{more}, expected the same "
                f"leaves as the weights: {remedy} it"
            )
    return [found[path] for path in paths]


def holder(leaf: Any) -> str | None:
    """Name the attribute in which a leaf holds its array; None for an array itself."""
    if isinstance(leaf, Array):
        return "native"
    return "data" if framework(leaf) == "ivy" else None


def unwrap(leaf: Any) -> Any:
    """Return the framework's own array in `leaf`."""
    held = holder(leaf)
    return getattr(leaf, held) if held else leaf


def rewrap(native: Any, like: Any) -> Any:
    """Hold `native` as `like` holds its array."""
    return type(like)(native) if holder(like) else native


def _is_container(x: Any) -> bool:
    if isinstance(x, type):
        return False
    return isinstance(x, Mapping) or dataclasses.is_dataclass(x)


def _register(kind: type) -> None:
    """Make a mapping or a dataclass a node that its constructor rebuilds."""
    how: Any = (_walk_dataclass, _build_dataclass, optree.GetAttrEntry)
    if issubclass(kind, Mapping):
        how = (_walk_mapping, _build_mapping, optree.MappingEntry)
    walk, build, entry = how
    optree.register_pytree_node(
        kind, walk, partial(build, kind), path_entry_type=entry, namespace=NAMESPACE
    )


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of a mapping in its own order; equal in any order, as mappings are."""

    order: tuple[Any, ...] = dataclasses.field(compare=False)
    known: frozenset[Any]

    def ranked(self) -> list[Any]:
        return sorted(self.order, key=lambda key: (type(key).__name__, str(key)))


def _walk_mapping(x: Mapping[Any, Any]) -> tuple[list[Any], _Keys, list[Any]]:
    keys = _Keys(tuple(x), frozenset(x))
    ranked = keys.ranked()
    return [x[key] for key in ranked], keys, ranked


def _build_mapping(kind: Any, keys: _Keys, values: Iterable[Any]) -> Any:
    found = dict(zip(keys.ranked(), values, strict=True))
    return kind({key: found[key] for key in keys.order})


def _walk_dataclass(x: Any) -> tuple[list[Any], Any, list[str]]:
    walked, static = [], []
    for field in dataclasses.fields(x):
        if field.init:
            data = field.metadata
            known = data.get("static", False) or not data.get("pytree_node", True)
            (static if known else walked).append((field.name, getattr(x, field.name)))
    names = [name for name, _ in walked]
    return [value for _, value in walked], (tuple(names), tuple(static)), names


def _build_dataclass(kind: Any, known: Any, values: Iterable[Any]) -> Any:
    names, static = known
    return kind(**dict(static), **dict(zip(names, values, strict=True)))


class Container(dict):
    """A dictionary of arrays whose items are attributes too.

    It is a pytree in JAX, and in optree under ``namespace="larskit"``. Two Containers
    are equal if they have the same keys, in any order, and equal items; arrays are
    equal if framework, shape, dtype and all elements are.

    Parameters
    ----------
    mapping : mapping or iterable of pairs, default=()
        The first items. Dictionaries among the items become Containers; those inside
        lists and tuples stay as they are.
    **items
        More items.

    Examples
    --------
    >>> from larskit import Container
    >>> weights = Container(encoder={"kernel": 1.0}, bias=2.0)
    >>> weights.encoder.kernel, weights["bias"]
    (1.0, 2.0)
    >>> weights
    Container(
      encoder: Container(
        kernel: 1.0
      ),
      bias: 2.0
    )
    """

    def __init__(self, mapping: Any = (), /, **items: Any) -> None:
        """Take the items of `mapping`, then the keyword arguments."""
        super().__init__()
        self.update(mapping, **items)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Set an item; a dictionary becomes a Container."""
        if isinstance(value, dict) and not isinstance(value, Container):
            value = Container(value)
        super().__setitem__(key, value)

    def update(self, mapping: Any = (), /, **items: Any) -> None:
        """Set the items of `mapping`, then the keyword arguments."""
        for key, value in dict(mapping, **items).items():
            self[key] = value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the item at `key`, after setting it to `default` where missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> "Container":
        """Return a Container of the same items."""
        return Container(self)

    def __or__(self, other: Any) -> Any:
        """Return a Container with the items of both, `other` winning."""
        return Container({**self, **other}) if _is_mapping(other) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        """Return a Container with the items of both, this one winning."""
        return Container({**other, **self}) if _is_mapping(other) else NotImplemented

    def __ior__(self, other: Any) -> "Container":
        """Take the items of `other`."""
        self.update(other)
        return self

    def __eq__(self, other: object) -> bool:
        """Whether the keys and all items are equal."""
        return _equal(self, other)

    def __ne__(self, other: object) -> bool:
        """Whether a key or an item differs."""
        return not _equal(self, other)

    def __getattr__(self, name: str) -> Any:
        """Return the item called `name`."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"Container has no item {name!r}, it has: {', '.join(map(repr, self))}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the item called `name`."""
        if hasattr(type(self), name):
            raise AttributeError(
                f"{name!r} is a method of Container: set it as an item, "
                f"container[{name!r}] = ..."
            )
        self[name] = value

    def __delattr__(self, name: str) -> None:
        """Delete the item called `name`."""
        self.__getattr__(name)
        del self[name]

    def __dir__(self) -> list[str]:
        """List the items among the attributes."""
        names = [key for key in self if isinstance(key, str) and key.isidentifier()]
        return [*super().__dir__(), *names]

    def __repr__(self) -> str:
        """Show one item a line."""
        if not self:
            return "Container()"
        lines = ",\n".join(f"{key}: {value!r}" for key, value in self.items())
        return "Container(\n" + indent(lines, "  ") + "\n)"

    def lars_update(
        self,
        dcdw: Any,
        lr: Any,
        /,
        *,
        decay_lambda: Any = 0,
        stop_gradients: bool = True,
        out: Any = None,
    ) -> "Container":
        """Move these weights as `larskit.lars_update` does.

        Parameters
        ----------
        dcdw : like this container, or one array
            Derivatives of the cost with respect to the weights.
        lr : float, 0-d array, or a container of them
            Learning rate, at least 0.
        decay_lambda : float, 0-d array, or a container of them, default=0
            Weight decay, at least 0.
        stop_gradients : bool, default=True
            Cut the result off from what it was computed from.
        out : like this container, optional
            Receives the result.

        Returns
        -------
        Container
            The new weights, or `out`.
        """
        return _lars_update(self, dcdw, lr, decay_lambda, stop_gradients, out)


class Array:
    """One array of any framework, with the method form of `larskit.lars_update`.

    Parameters
    ----------
    native : array, or Array
        The framework's own array, kept as `native`.

    Examples
    --------
    >>> import numpy as np
    >>> from larskit import Array
    >>> Array(np.array([3.0, 4.0])).lars_update(np.array([0.0, 2.0]), 0.1)
    Array(array([3. , 3.5]))
    """

    __slots__ = ("native",)

    def __init__(self, native: Any) -> None:
        """Hold `native`."""
        self.native = native.native if isinstance(native, Array) else native

    def __repr__(self) -> str:
        """Show the native array."""
        return f"Array({self.native!r})"

    def lars_update(
        self,
        dcdw: Any,
        lr: Any,
        /,
        *,
        decay_lambda: Any = 0,
        stop_gradients: bool = True,
        out: Any = None,
    ) -> "Array":
        """Move this array as `larskit.lars_update` does.

        Parameters
        ----------
        dcdw : Array, or native array
            Derivatives of the cost with respect to the weights.
        lr : float, or 0-d array
            Learning rate, at least 0.
        decay_lambda : float, or 0-d array, default=0
            Weight decay, at least 0.
        stop_gradients : bool, default=True
            Cut the result off from what it was computed from.
        out : Array, or native array, optional
            Receives the result. An Array whose native array cannot be written gets a
            new one.

        Returns
        -------
        Array
            The new weights, or `out`.
        """
        return _lars_update(self, dcdw, lr, decay_lambda, stop_gradients, out)


def _lars_update(
    w: Any, dcdw: Any, lr: Any, decay_lambda: Any, stop_gradients: bool, out: Any
) -> Any:
    from larskit.functional import lars_update  # it imports this module

    return lars_update(
        w, dcdw, lr, decay_lambda=decay_lambda, stop_gradients=stop_gradients, out=out
    )


def _is_mapping(x: Any) -> bool:
    return isinstance(x, Mapping)


def _equal(a: Any, b: Any) -> bool:
    """Whether two items, arrays or containers of them, are equal in every element."""
    if a is b:
        return True
    if type(a) is type(b):
        a, b = unwrap(a), unwrap(b)
    if isinstance(a, Mapping):
        same_keys = isinstance(b, Mapping) and a.keys() == b.keys()
        return same_keys and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        same_size = type(a) is type(b) and len(a) == len(b)
        return same_size and all(map(_equal, a, b))
    if is_array(a) or is_array(b):
        return _traits(a) == _traits(b) and bool(namespace(a).all(a == b))
    return bool(a == b)


def _traits(x: Any) -> Any:
    return is_array(x) and (framework(x), tuple(x.shape), dtype_name(x))


_register(Container)


class _WhenJaxLoads:
    """An import hook that makes Container a pytree of JAX once JAX was imported.

    JAX has no other way to learn of a class that was there before it.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find JAX as the other finders do, and have its loader register Container."""
        if name != "jax":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        loader: Any = spec and spec.loader
        if loader:
            load = loader.exec_module

            def exec_module(module: Any) -> None:
                del loader.exec_module
                load(module)
                self.register(module)

            loader.exec_module = exec_module
        return spec

    def register(self, jax: Any) -> None:
        """Make Container a pytree of `jax`."""
        jax.tree_util.register_pytree_with_keys(
            Container,
            lambda x: _walk_for_jax(jax, x),
            lambda keys, values: _build_mapping(Container, keys, values),
        )
        with suppress(ValueError):
            sys.meta_path.remove(self)


def _walk_for_jax(jax: Any, x: Container) -> tuple[list[Any], _Keys]:
    values, keys, ranked = _walk_mapping(x)
    entries = map(jax.tree_util.DictKey, ranked)
    return list(zip(entries, values, strict=True)), keys


if hasattr(sys.modules.get("jax"), "tree_util"):
    _WhenJaxLoads().register(sys.modules["jax"])
else:
    sys.meta_path.insert(0, _WhenJaxLoads())
