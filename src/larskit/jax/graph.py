"""The graph of named objects that hold variables, as BrainPy has it: `Node`."""

import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from itertools import count
from os import PathLike
from typing import Any, NamedTuple, Self, TypeVar
from weakref import WeakValueDictionary

import jax
from jax.tree_util import register_pytree_node_class

from larskit.arrays import Array
from larskit.jax.variables import (
    AnyVariable,
    checked_like,
    if_loaded,
    native,
    read,
    trainable_types,
    variable_type,
    variable_types,
    write,
)
from larskit.names import check_same, listed, missing_and_extra
from larskit.state import files

AnyNode = Any  # a `Node`, or an object of BrainPy
Device = Any  # a `jax.Device`, or the name of a platform
StateDict = Mapping[str, Any]  # arrays by node and name ("v2"), or by name alone ("v1")
Types = type | tuple[type, ...] | None
T = TypeVar("T")

_owners: WeakValueDictionary[str, "Node"] = WeakValueDictionary()
_numbers: defaultdict[str, Iterable[int]] = defaultdict(count)


class StateLoadResult(NamedTuple):
    """What `Node.load_state_dict` could not match."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Node:
    """An object of a unique name that holds variables and other such objects.

    Its variables and nodes are its attributes of those kinds, and those registered as
    implicit. Objects of BrainPy are nodes too. A node and all that it holds is a
    pytree.
    """

    implicit_vars: dict[str, AnyVariable]
    implicit_nodes: dict[str, AnyNode]
    _name: str

    def __init__(self) -> None:
        """Hold nothing yet. A subclass sets `name` when nothing else can fail."""
        self.implicit_vars = {}
        self.implicit_nodes = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make every subclass a pytree."""
        super().__init_subclass__(**kwargs)
        register_pytree_node_class(cls)

    @property
    def name(self) -> str:
        """The name: of no other node. Set to None, it becomes an unused one."""
        return self._name

    @name.setter
    def name(self, name: str | None) -> None:
        name = self.unique_name(name)
        if _owners.get(getattr(self, "_name", "")) is self:
            del _owners[self._name]
        self._name = name
        _owners[name] = self

    def unique_name(self, name: str | None = None, type_: str | None = None) -> str:
        """Return an unused name, or `name` if this node may bear it.

        Parameters
        ----------
        name : str, optional
            The wanted name, a Python identifier.
        type_ : str, optional
            What an unused name begins with; by default the name of the class.

        Raises
        ------
        ValueError
            The name is that of another living node, or no identifier.
        """
        if name is None:
            kind = type_ or type(self).__name__
            names = (f"{kind}{number}" for number in _numbers[kind])
            return next(name for name in names if name not in _owners)
        if not name.isidentifier():
            raise ValueError(f"name must be a Python identifier, got {name!r}")
        if _owners.get(name, self) is not self:
            raise ValueError(
                f"the name {name!r} is taken by another {type(_owners[name]).__name__}:"
                " choose another, or omit it to get an unused one"
            )
        return name

    def nodes(
        self, method: str = "absolute", level: int = -1, include_self: bool = True
    ) -> dict[str, AnyNode]:
        """Collect this node and those below it.

        Parameters
        ----------
        method : {"absolute", "relative"}
            Key them by their names, or by their paths from here; that of this node is
            empty.
        level : int, default=-1
            How many levels to go down; below 0, all.
        include_self : bool, default=True
            Whether this node is among them.

        Returns
        -------
        dict of str to node
        """
        return _unique(
            (node.name if method == "absolute" else path, node)
            for path, node in self._walk(method, level, include_self)
        )

    def _walk(
        self, method: str, level: int, include_self: bool
    ) -> list[tuple[str, AnyNode]]:
        """Return the paths and nodes from here, after checking `method`."""
        if method not in ("absolute", "relative"):
            raise ValueError(f"method must be 'absolute' or 'relative', got {method!r}")
        found: list[tuple[str, AnyNode]] = [("", self)] if include_self else []
        queue, seen = deque([("", self, 0)]), set()
        while queue:
            path, node, depth = queue.popleft()
            if 0 <= level <= depth:
                break
            for key, child in _children(node).items():
                if (id(node), id(child)) not in seen:
                    seen.add((id(node), id(child)))
                    where = _joined(path, key)
                    found.append((where, child))
                    queue.append((where, child, depth + 1))
        return found

    def vars(
        self,
        method: str = "absolute",
        level: int = -1,
        include_self: bool = True,
        exclude_types: tuple[type, ...] | None = None,
    ) -> dict[str, AnyVariable]:
        """Collect the variables of this node and of those below it.

        Parameters
        ----------
        method, level, include_self
            Which nodes, and how they are keyed, see `nodes`. A variable's key is its
            node's, a dot, and its own name.
        exclude_types : tuple of type, optional
            Variables of these classes are omitted.

        Returns
        -------
        dict of str to variable
        """
        return _unique(
            (_joined(node.name if method == "absolute" else path, key), variable)
            for path, node in self._walk(method, level, include_self)
            for key, variable in _variables(node).items()
            if not isinstance(variable, exclude_types or ())
        )

    def train_vars(
        self, method: str = "absolute", level: int = -1, include_self: bool = True
    ) -> dict[str, AnyVariable]:
        """Collect the trainable variables of this node and of those below it.

        Parameters
        ----------
        method, level, include_self
            See `vars`.

        Returns
        -------
        dict of str to TrainVar, flax.nnx.Param or brainpy.math.TrainVar
        """
        found, types = self.vars(method, level, include_self), trainable_types()
        return {key: x for key, x in found.items() if isinstance(x, types)}

    def register_implicit_vars(
        self, *variables: Any, var_cls: Types = None, **named_variables: AnyVariable
    ) -> None:
        """Hold variables that are no attributes.

        Parameters
        ----------
        *variables : variable, or list, tuple or dict of variables
            Those without a name are called ``var0``, ``var1`` and so on.
        var_cls : type or tuple of type, optional
            What they must be instances of; by default variables of any type.
        **named_variables : variable
            More of them.

        Raises
        ------
        TypeError
            One of them is no variable. None is registered then.
        ValueError
            The name of one is that of another variable. None is registered then.
        """
        held = self.implicit_vars
        pairs = _pairs(variables, named_variables, var_cls or variable_types())
        named = [(key or f"var{i}", x) for i, (key, x) in enumerate(pairs, len(held))]
        held.update(_unique([*held.items(), *named]))

    def register_implicit_nodes(
        self, *nodes: Any, node_cls: Types = None, **named_nodes: AnyNode
    ) -> None:
        """Hold nodes that are no attributes.

        Parameters
        ----------
        *nodes : node, or list, tuple or dict of nodes
            Those that come without a key are keyed by their names.
        node_cls : type or tuple of type, optional
            What they must be instances of; by default nodes of ours or of BrainPy.
        **named_nodes : node
            More of them.

        Raises
        ------
        TypeError, ValueError
            As `register_implicit_vars` does.
        """
        held = self.implicit_nodes
        pairs = _pairs(nodes, named_nodes, node_cls or _node_types())
        named = [(key or node.name, node) for key, node in pairs]
        held.update(_unique([*held.items(), *named]))

    def state_dict(self) -> dict[str, dict[str, Array]]:
        """Return the arrays of all variables, by node.

        Returns
        -------
        dict of str to dict of str to array
            ``{node name: {absolute name of the variable: array}}``, as BrainPy has it.
        """
        return {
            node.name: {
                _joined(node.name, key): read(variable)
                for key, variable in _variables(node).items()
            }
            for _, node in self._walk("absolute", -1, True)
        }

    def load_state_dict(
        self,
        state_dict: StateDict,
        warn: bool = True,
        compatible: str = "v2",
    ) -> StateLoadResult:
        """Set the variables to what `state_dict` returned.

        Parameters
        ----------
        state_dict : mapping
            The arrays are found by the names of the nodes: give the node that is to
            continue the ``name`` of the one that was saved.
        warn : bool, default=True
            Whether to warn of missing and unexpected keys.
        compatible : {"v2", "v1"}
            "v1" is the flat form, ``{absolute name of the variable: array}``.

        Returns
        -------
        StateLoadResult
            The names of the variables that `state_dict` did not hold, which keep their
            values, and the names in it that no variable has.

        Raises
        ------
        ValueError, TypeError
            An array does not fit. Nothing is set then.
        """
        flat = _flattened(state_dict, compatible)
        own = self.vars()
        result = StateLoadResult(*missing_and_extra(flat, own))
        pairs = {key: (own[key], flat[key]) for key in own if key in flat}
        _assign(pairs, "state_dict: ")
        for problem, keys in zip(("misses", "has unexpected"), result, strict=True):
            if warn and keys:
                warnings.warn(f"state_dict {problem} {listed(keys)}", stacklevel=2)
        return result

    def save_states(
        self,
        filename: str | PathLike[str],
        variables: Mapping[str, AnyVariable | Array] | None = None,
    ) -> None:
        """Write variables to a safetensors file, all of them or none.

        Parameters
        ----------
        filename : path
            Its folder must exist.
        variables : mapping of str to variable or array, optional
            What to write; by default ``vars("relative")``, whose keys do not depend on
            this node's name. `load_states` reads ``train_vars("relative")`` as well.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        if variables is None:
            variables = self.vars("relative")
        files.save({key: native(x) for key, x in variables.items()}, filename)

    def load_states(self, filename: str | PathLike[str], verbose: bool = False) -> None:
        """Set the variables to what `save_states` wrote.

        Parameters
        ----------
        filename : path
            It must hold all of ``vars("relative")``, and may hold variables of
            ``train_vars("relative")``.
        verbose : bool, default=False
            Whether to print a line for each variable.

        Raises
        ------
        ValueError, TypeError
            The file is truncated, corrupt or of another kind, misses a variable, holds
            one that is unknown, or one of another shape or dtype. Nothing is set then.
        OSError
            It cannot be read.
        """
        tensors = files.load(filename)
        own = self.vars("relative")
        known = {**self.train_vars("relative"), **own}
        check_same(
            f"{filename} does not fit {self.name}, it",
            tensors,
            own,
            "expected the file that an object of the same variables has saved",
            optional=known,
        )
        _assign({key: (known[key], x) for key, x in tensors.items()}, f"{filename}: ")
        if verbose:
            for key, x in tensors.items():
                print(f"loaded {key}: {x.dtype} {x.shape}")

    def to(self, device: Device) -> Self:
        """Move all variables, those of `train_vars` too, to a device.

        Parameters
        ----------
        device : jax.Device or str
            A device, or a platform for its first device: "cpu", "gpu", "tpu".

        Returns
        -------
        Node
            Itself.

        Raises
        ------
        RuntimeError
            There is no such device. Nothing is moved then.
        """
        device = _device(device)
        found = [*self.vars().values(), *self.train_vars().values()]
        variables = {id(variable): variable for variable in found}.values()
        moved = [jax.device_put(read(variable), device) for variable in variables]
        for variable, value in zip(variables, moved, strict=True):
            write(variable, value)
        return self

    def cpu(self) -> Self:
        """Move all variables to the CPU, see `to`."""
        return self.to("cpu")

    def cuda(self) -> Self:
        """Move all variables to the first GPU, see `to`."""
        return self.to("gpu")

    def tpu(self) -> Self:
        """Move all variables to the first TPU, see `to`."""
        return self.to("tpu")

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Return what JAX may trace, and the rest.

        Returns
        -------
        dynamic_values : tuple
            The attributes that are arrays, variables or other pytrees.
        aux : tuple
            The names of those, and the names and values of all others.
        """
        own = self.__dict__
        dynamic = {key: x for key, x in own.items() if _is_dynamic(x)}
        static = tuple((key, x) for key, x in own.items() if key not in dynamic)
        return tuple(dynamic.values()), (tuple(dynamic), static)

    @classmethod
    def tree_unflatten(cls, aux: Any, dynamic_values: Iterable[Any]) -> Self:
        """Rebuild the object from what `tree_flatten` returned, under the same name."""
        names, static = aux
        self = object.__new__(cls)
        self.__dict__.update(zip(names, dynamic_values, strict=True))
        self.__dict__.update(static)
        return self


def _is_dynamic(x: Any) -> bool:
    return isinstance(x, jax.Array) or not jax.tree_util.all_leaves([x])


def _children(node: AnyNode) -> dict[str, AnyNode]:
    """Return the nodes directly below one of ours or of BrainPy."""
    if not isinstance(node, Node):
        return node.nodes("relative", 1, False)
    own = [(key, x) for key, x in node.__dict__.items() if isinstance(x, _node_types())]
    return _unique([*own, *node.implicit_nodes.items()])


def _variables(node: AnyNode) -> dict[str, AnyVariable]:
    """Return the variables that one node of ours or of BrainPy holds itself."""
    if not isinstance(node, Node):
        found = node.vars("relative", 0)
        return {key.removeprefix("."): x for key, x in found.items()}
    own = [(key, x) for key, x in node.__dict__.items() if variable_type(x)]
    return _unique([*own, *node.implicit_vars.items()])


def _unique(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Make a dictionary, but refuse a key of two things."""
    found: dict[str, T] = {}
    for key, x in pairs:
        if found.setdefault(key, x) is not x:
            raise ValueError(
                f"{key!r} is the name of more than one {type(x).__name__}: rename one"
            )
    return found


def _pairs(
    given: Iterable[Any], named: dict[str, Any], types: type | tuple[type, ...]
) -> list[tuple[str | None, Any]]:
    """List ``(key or None, x)`` for all that was given, singly or in containers."""
    pairs: list[tuple[str | None, Any]] = []
    for item in (*given, named):
        if isinstance(item, dict):
            pairs += item.items()
        else:
            items = item if isinstance(item, (list, tuple)) else [item]
            pairs += [(None, x) for x in items]
    for key, x in pairs:
        if not isinstance(x, types):
            raise TypeError(
                f"{key or 'an item'} to register is a {type(x).__name__}, "
                f"expected {types}"
            )
    return pairs


def _flattened(state_dict: StateDict, compatible: str) -> dict[str, Array]:
    """Return ``{absolute name: array}`` for a state_dict of either version."""
    if compatible not in ("v1", "v2"):
        raise ValueError(f"compatible must be 'v2' or 'v1', got {compatible!r}")
    if compatible == "v1":
        return dict(state_dict)
    for node, arrays in state_dict.items():
        if not isinstance(arrays, Mapping):
            raise TypeError(
                f"state_dict[{node!r}] is a {type(arrays).__name__}, expected the "
                "arrays of one node by name: pass compatible='v1' for a flat one"
            )
    return {key: x for arrays in state_dict.values() for key, x in arrays.items()}


def _assign(pairs: Mapping[str, tuple[AnyVariable, Array]], where: str) -> None:
    """Set each variable to its array, after all were found to fit."""
    fitted = [
        (variable, checked_like(x, read(variable), f"{where}{key!r}"))
        for key, (variable, x) in pairs.items()
    ]
    for variable, x in fitted:
        write(variable, x)


def _device(device: Device) -> Device:
    if isinstance(device, jax.Device):
        return device
    if not isinstance(device, str):
        raise TypeError(
            f"device must be a jax.Device or the name of a platform, got {device!r}"
        )
    try:
        return jax.devices(device)[0]
    except RuntimeError as why:
        seen = sorted({found.platform for found in jax.devices()} | {"cpu"})
        raise RuntimeError(
            f"there is no {device!r} device, JAX sees {listed(seen)}: move to one of "
            "those, or install JAX for it"
        ) from why


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _node_types() -> tuple[type, ...]:
    return (Node, *if_loaded("brainpy.math", "BrainPyObject"))
