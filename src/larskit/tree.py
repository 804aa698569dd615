"""Walk any container, leaf by leaf, and the two holders of arrays of our own.

optree does the walking. Dataclasses and mappings of other classes (ivy's, flax's)
become nodes the first time they are met.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from textwrap import indent
from typing import Any, cast

import optree

from larskit.arrays import framework

NAMESPACE = "larskit"
Path = tuple[Any, ...]


def flatten(tree: Any) -> tuple[list[Path], list[Any], Any]:
    """Return the paths, the leaves and the structure of `tree`."""
    while True:
        paths, leaves, structure = optree.tree_flatten_with_path(
            tree, namespace=NAMESPACE
        )
        unknown = {type(leaf) for leaf in leaves if _is_container(leaf)}
        if not unknown:
            return paths, leaves, structure
        for kind in unknown:
            _register(kind)


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
    ValueError
        Naming the first path that `tree` misses, or has and should not.
    """
    if is_leaf(tree):
        return [tree] * len(paths)
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


def unwrap(leaf: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the framework's own array in `leaf`, and what wraps a result like it."""
    if isinstance(leaf, Array):
        return leaf.native, Array
    if framework(leaf) == "ivy":
        return leaf.data, type(leaf)
    return leaf, lambda native: native


def _is_container(x: Any) -> bool:
    if isinstance(x, type):
        return False
    return isinstance(x, Mapping) or dataclasses.is_dataclass(x)


def _register(kind: Any) -> None:
    """Make a mapping or a dataclass a node that its constructor rebuilds."""
    if issubclass(kind, Mapping):
        _register_node(kind, tuple, lambda x: list(x.values()), kind)
        return
    names = tuple(field.name for field in dataclasses.fields(kind) if field.init)
    _register_node(
        kind,
        lambda x: names,
        lambda x: [getattr(x, name) for name in names],
        lambda items: kind(**items),
    )


def _register_node(kind: Any, keys: Any, values: Any, build: Any) -> None:
    optree.register_pytree_node(
        kind,
        lambda x: (values(x), keys(x), keys(x)),
        lambda names, new: build(dict(zip(cast(Path, names), new, strict=True))),
        namespace=NAMESPACE,
    )


class Container(dict):
    """A dictionary of arrays whose items are attributes too.

    Nested dictionaries become Containers. It is a pytree in JAX, and in optree under
    ``namespace="larskit"``.

    Parameters
    ----------
    mapping : mapping or iterable of pairs, default=()
        The first items.
    **items
        More items.

    Examples
    --------
    >>> weights = Container(encoder={"kernel": 1.0}, bias=2.0)
    >>> weights.encoder.kernel, weights["bias"]
    (1.0, 2.0)
    """

    def __init__(self, mapping: Any = (), /, **items: Any) -> None:
        """Take the items of `mapping`, then the keyword arguments."""
        super().__init__()
        self.update(mapping, **items)
        _register_with_jax()

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
        """Return a Container of the same arrays; nested ones are copied too."""
        return Container(
            {k: v.copy() if isinstance(v, Container) else v for k, v in self.items()}
        )

    def __or__(self, other: Any) -> "Container":
        """Return a Container with the items of both."""
        new = self.copy()
        new.update(other)
        return new

    def __ior__(self, other: Any) -> "Container":
        """Take the items of `other`."""
        self.update(other)
        return self

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
        return [*super().__dir__(), *(key for key in self if isinstance(key, str))]

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
        """Do `larskit.lars_update` with these weights."""
        return _lars_update(self, dcdw, lr, decay_lambda, stop_gradients, out)


class Array:
    """One array of any framework, with the method form of `larskit.lars_update`.

    Parameters
    ----------
    native : array, or Array
        The framework's own array, kept as `native`.
    """

    __slots__ = ("native",)

    def __init__(self, native: Any) -> None:
        """Hold `native`."""
        self.native = native.native if isinstance(native, Array) else native

    @property
    def shape(self) -> Any:
        """The native shape."""
        return self.native.shape

    @property
    def dtype(self) -> Any:
        """The native dtype."""
        return self.native.dtype

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Convert to NumPy as the native array does."""
        return self.native.__array__(*args, **kwargs)

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
        """Do `larskit.lars_update` with this array as the weights."""
        return _lars_update(self, dcdw, lr, decay_lambda, stop_gradients, out)


def _lars_update(
    w: Any, dcdw: Any, lr: Any, decay_lambda: Any, stop_gradients: bool, out: Any
) -> Any:
    from larskit.functional import lars_update  # it imports this module

    return lars_update(
        w, dcdw, lr, decay_lambda=decay_lambda, stop_gradients=stop_gradients, out=out
    )


_register(Container)
_jax_knows_container = False


def _register_with_jax() -> None:
    """Make Container a pytree of JAX as soon as JAX is there."""
    global _jax_knows_container
    if _jax_knows_container or "jax" not in sys.modules:
        return
    tree_util = sys.modules["jax"].tree_util
    tree_util.register_pytree_with_keys(
        Container,
        lambda x: ([(tree_util.DictKey(k), v) for k, v in x.items()], tuple(x)),
        lambda keys, values: Container(zip(keys, values, strict=True)),
    )
    _jax_knows_container = True
