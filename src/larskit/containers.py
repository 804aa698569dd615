"""`Container` and `Array`: a dictionary of arrays and a wrapper of one array.

Both have `larskit.lars_update` as a method. JAX learns of `Container` as a pytree when
one is made while JAX is loaded, or when `larskit.jax` is imported.
"""

import sys
from collections.abc import Hashable, Mapping
from contextlib import suppress
from functools import partial
from textwrap import indent
from typing import Any, Self

from larskit import arrays
from larskit.arrays import Scalar, dtype_name, framework, is_array, namespace
from larskit.functional import lars_update
from larskit.tree import Tree, build_mapping, register, unwrap, walk_mapping

Items = Any  # a mapping, or an iterable of pairs


class _Weights:
    """The method form of `larskit.lars_update`."""

    __slots__ = ()

    def lars_update(
        self,
        dcdw: Tree,
        lr: Scalar | Tree,
        /,
        *,
        decay_lambda: Scalar | Tree = 0,
        stop_gradients: bool = True,
        out: Tree = None,
    ) -> Self:
        """Move these weights as `larskit.lars_update` does.

        Parameters
        ----------
        dcdw : like these weights, or one array
            Derivatives of the cost with respect to the weights.
        lr : float, 0-d array, or a container of them
            Learning rate, at least 0.
        decay_lambda : float, 0-d array, or a container of them, default=0
            Weight decay, at least 0.
        stop_gradients : bool, default=True
            Cut the result off from what it was computed from.
        out : like these weights, optional
            Receives the result. An `Array` whose native array cannot be written gets a
            new one.

        Returns
        -------
        like these weights
            The new weights, or `out`.
        """
        return lars_update(
            self,
            dcdw,
            lr,
            decay_lambda=decay_lambda,
            stop_gradients=stop_gradients,
            out=out,
        )


class Container(_Weights, dict):
    """A dictionary of arrays whose items are attributes too.

    It is a pytree in JAX, and in optree under ``namespace="larskit"``. JAX learns of it
    when a Container is made while JAX is loaded, and from `larskit.jax`. Two Containers
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

    def __new__(cls, /, *items: Items, **named: Tree) -> Self:
        """Tell JAX of Containers where it is loaded."""
        register_in_jax()
        return super().__new__(cls)

    def __init__(self, mapping: Items = (), /, **items: Tree) -> None:
        """Take the items of `mapping`, then the keyword arguments."""
        super().__init__()
        self.update(mapping, **items)

    def __setitem__(self, key: Hashable, value: Tree) -> None:
        """Set an item; a dictionary becomes a Container."""
        if isinstance(value, dict) and not isinstance(value, Container):
            value = Container(value)
        super().__setitem__(key, value)

    def update(self, mapping: Items = (), /, **items: Tree) -> None:
        """Set the items of `mapping`, then the keyword arguments."""
        for key, value in dict(mapping, **items).items():
            self[key] = value

    def setdefault(self, key: Hashable, default: Tree = None) -> Tree:
        """Return the item at `key`, after setting it to `default` where missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> "Container":
        """Return a Container of the same items."""
        return Container(self)

    def __or__(self, other: object) -> "Container":
        """Return a Container with the items of both, `other` winning."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return Container({**self, **other})

    def __ror__(self, other: object) -> "Container":
        """Return a Container with the items of both, this one winning."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return Container({**other, **self})

    def __ior__(self, other: Items) -> Self:
        """Take the items of `other`."""
        self.update(other)
        return self

    def __eq__(self, other: object) -> bool:
        """Whether the keys and all items are equal."""
        return _equal(self, other)

    def __ne__(self, other: object) -> bool:
        """Whether a key or an item differs."""
        return not _equal(self, other)

    def __getattr__(self, name: str) -> Tree:
        """Return the item called `name`."""
        if name == "__jax_array__" and not _known_to_jax and sys.modules.get("jax"):
            # JAX asks every leaf that is no array. It replaces a TypeError by its own.
            raise RuntimeError(_TOO_OLD)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"Container has no item {name!r}, it has: {', '.join(map(repr, self))}"
            ) from None

    def __setattr__(self, name: str, value: Tree) -> None:
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


class Array(_Weights):
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
    __wrapped_attribute__ = "native"

    def __init__(self, native: arrays.Array) -> None:
        """Hold `native`."""
        self.native = native.native if isinstance(native, Array) else native

    def __repr__(self) -> str:
        """Show the native array."""
        return f"Array({self.native!r})"


def _equal(a: Tree, b: Tree) -> bool:
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


def _traits(x: Tree) -> object:
    return is_array(x) and (framework(x), tuple(x.shape), dtype_name(x))


register(Container)

_known_to_jax = False
_TOO_OLD = (
    "JAX does not know this Container as a pytree, because it was made before JAX was "
    "imported: import larskit.jax first"
)


def register_in_jax() -> None:
    """Make `Container` a pytree of JAX, if JAX is loaded."""
    global _known_to_jax
    tree_util = getattr(sys.modules.get("jax"), "tree_util", None)
    if _known_to_jax or tree_util is None:
        return
    with suppress(ValueError):  # another thread was faster
        tree_util.register_pytree_with_keys(
            Container,
            partial(_walk_with_keys, tree_util.DictKey),
            partial(build_mapping, Container),
        )
    _known_to_jax = True


def _walk_with_keys(
    key_type: type, x: Container
) -> tuple[list[tuple[object, Tree]], object]:
    values, keys, ranked = walk_mapping(x)
    return list(zip(map(key_type, ranked), values, strict=True)), keys
