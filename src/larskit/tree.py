"""Walk any container, leaf by leaf.

optree does the walking. Dataclasses and mappings of other classes (ivy's, flax's)
become nodes the first time they are met.
"""

import dataclasses
import os
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from threading import RLock
from typing import Any

import optree

from larskit.arrays import Array, framework
from larskit.names import check_same

NAMESPACE = "larskit"
Path = tuple[Any, ...]
Tree = Any  # an array, or any nesting of containers
Leaf = Any  # an array, a wrapper of one, or a number

# A thread in optree holds a lock of optree's at moments when others may run. A child
# forked at such a moment would wait for it for ever, at the latest at its end.
_walking = RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_walking.acquire,
        after_in_parent=_walking.release,
        after_in_child=_walking.release,
    )


def flatten(tree: Tree) -> tuple[list[Path], list[Leaf], optree.PyTreeSpec]:
    """Return the paths, the leaves and the structure of `tree`.

    A path holds the keys, indices and field names that lead to a leaf. None is no leaf.
    A field of a dataclass whose metadata say ``static=True`` (or, as flax has it,
    ``pytree_node=False``) is carried along and not walked into.
    """
    while True:
        with _walking:
            accessors, leaves, structure = optree.tree_flatten_with_accessor(
                tree, namespace=NAMESPACE
            )
        unknown = {type(leaf) for leaf in leaves if _is_container(leaf)}
        if not unknown:
            return [_path(accessor) for accessor in accessors], leaves, structure
        for kind in unknown:
            with suppress(ValueError):  # another thread was faster
                register(kind)


def _path(accessor: optree.PyTreeAccessor) -> Path:
    return tuple(getattr(entry, "field", entry.entry) for entry in accessor)


def unflatten(structure: optree.PyTreeSpec, leaves: Iterable[Leaf]) -> Tree:
    """Put `leaves` back into the structure that `flatten` returned."""
    with _walking:
        return optree.tree_unflatten(structure, leaves)


def is_leaf(tree: Tree) -> bool:
    """Whether `tree` is one leaf and no container."""
    if _is_container(tree):
        return False
    with _walking:
        return optree.tree_is_leaf(tree, namespace=NAMESPACE)


def path_str(path: Path) -> str:
    """Write a path as users write names: ``"encoder.0.weight"``."""
    return ".".join(map(str, path))


def broadcast_leaves(tree: Tree, paths: list[Path], what: str) -> list[Leaf]:
    """Return the leaf of `tree` at each of `paths`; a lone leaf serves them all.

    Raises
    ------
    TypeError
        Where `tree` is a container but `paths` is that of one array.
    ValueError
        Listing the paths that `tree` misses, or has and should not.
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
    remedy = "expected the same leaves as the weights: give both one structure"
    check_same(what, found, dict.fromkeys(paths), remedy, text=path_str)
    return [found[path] for path in paths]


def wrapped_attribute(leaf: Leaf) -> str | None:
    """Name the attribute in which a wrapper holds its array; None for an array itself.

    A class of wrappers names it in ``__wrapped_attribute__``; ``ivy.Array`` has `data`.
    """
    if framework(leaf) == "ivy":
        return "data"
    return getattr(type(leaf), "__wrapped_attribute__", None)


def unwrap(leaf: Leaf) -> Array:
    """Return the framework's own array in `leaf`."""
    attribute = wrapped_attribute(leaf)
    return getattr(leaf, attribute) if attribute else leaf


def rewrap(array: Array, like: Leaf) -> Leaf:
    """Wrap `array` as `like` wraps its array."""
    return type(like)(array) if wrapped_attribute(like) else array


def _is_container(x: object) -> bool:
    if isinstance(x, type):
        return False
    return isinstance(x, Mapping) or dataclasses.is_dataclass(x)


def register(kind: type) -> None:
    """Make a mapping or a dataclass a node that its constructor rebuilds."""
    how: Any = (_walk_dataclass, _build_dataclass, optree.GetAttrEntry)
    if issubclass(kind, Mapping):
        how = (walk_mapping, build_mapping, optree.MappingEntry)
    walk, build, entry = how
    with _walking:
        optree.register_pytree_node(
            kind, walk, partial(build, kind), path_entry_type=entry, namespace=NAMESPACE
        )


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of a mapping in its own order; equal in any order, as mappings are."""

    order: tuple[Hashable, ...] = dataclasses.field(compare=False)
    known: frozenset[Hashable]

    def ranked(self) -> list[Hashable]:
        return sorted(self.order, key=lambda key: (type(key).__name__, str(key)))


def walk_mapping(x: Mapping[Any, Tree]) -> tuple[list[Tree], _Keys, list[Hashable]]:
    """Return the values of a mapping, what rebuilds it, and the keys of the values."""
    keys = _Keys(tuple(x), frozenset(x))
    ranked = keys.ranked()
    return [x[key] for key in ranked], keys, ranked


def build_mapping(kind: Any, keys: _Keys, values: Iterable[Tree]) -> Any:
    """Rebuild a mapping of the class `kind` from what `walk_mapping` returned."""
    found = dict(zip(keys.ranked(), values, strict=True))
    return kind({key: found[key] for key in keys.order})


# The names of the fields that are walked, and the others with their values.
_Fields = tuple[tuple[str, ...], tuple[tuple[str, object], ...]]


def _walk_dataclass(x: Any) -> tuple[list[Tree], _Fields, list[str]]:
    walked, static = [], []
    for field in dataclasses.fields(x):
        if field.init:
            data = field.metadata
            known = data.get("static", False) or not data.get("pytree_node", True)
            (static if known else walked).append((field.name, getattr(x, field.name)))
    names = [name for name, _ in walked]
    return [value for _, value in walked], (tuple(names), tuple(static)), names


def _build_dataclass(kind: Any, known: _Fields, values: Iterable[Tree]) -> Any:
    names, static = known
    return kind(**dict(static), **dict(zip(names, values, strict=True)))
