"""The state of `larskit.functional.update` in the form that every framework reads."""

from larskit import functional
from larskit.arrays import Array, Scalar, from_numpy, to_numpy
from larskit.config import Config
from larskit.functional import State
from larskit.leaves import Leaves
from larskit.select import Selection
from larskit.state.portable import (
    LayerTable,
    Names,
    PortableState,
    described,
)
from larskit.tree import Tree


def to_portable(
    params: Tree,
    state: State,
    lr: Scalar | Tree = None,
    *,
    adapt: Selection = None,
    decay: Selection = None,
    **hyperparameters: Scalar,
) -> PortableState:
    """Return the state in the form that the optimizers of all frameworks read.

    Parameters
    ----------
    params, state
        What the last `larskit.functional.update` returned.
    lr : float, array of one element, or a container of them, optional
        The learning rate of the next step.
    adapt, decay, **hyperparameters
        Those that `update` is called with.

    Returns
    -------
    PortableState
        A copy, for `write_state`. The layers are named by their dotted paths.

    Raises
    ------
    ValueError, TypeError
        As `update` does.

    Examples
    --------
    >>> import numpy as np
    >>> from larskit.functional import init, update
    >>> from larskit.state import read_state, write_state
    >>> params, how = {"kernel": np.ones((2, 2))}, {"momentum": 0.8}
    >>> params, state = update(params, params, init(params), 1.0, **how)
    >>> write_state(to_portable(params, state, 1.0, **how), "state.safetensors")
    >>> state = from_portable(read_state("state.safetensors"), params, **how)
    """
    layers = Leaves(params, "params")
    table = _table(layers, lr, adapt, decay, hyperparameters)
    buffers = layers.arrays_of(state.momentum, "state.momentum")
    step = int(state.count)
    kept = zip(table, buffers, strict=True) if step else ()
    return PortableState(step, table, {name: to_numpy(v) for name, v in kept})


def from_portable(
    portable: PortableState,
    params: Tree,
    lr: Scalar | Tree = None,
    *,
    names: Names = None,
    convert: bool = False,
    adapt: Selection = None,
    decay: Selection = None,
    **hyperparameters: Scalar,
) -> State:
    """Return the state with which `update` resumes where any optimizer stopped.

    Parameters
    ----------
    portable : PortableState
        What `read_state` or an optimizer's ``portable_state()`` returned.
    params : array, or any nesting of containers
        The parameters, in the saved shapes.
    lr : float, array of one element, or a container of them, optional
        The learning rate of the next step; by default the saved one. Only `convert`
        looks at it.
    names, convert
        See `load_optimizer`.
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
    layers = Leaves(params, "params")
    table = _table(layers, lr, adapt, decay, hyperparameters)
    weights = dict(zip(table, layers.arrays, strict=True))
    found = portable.fitted(table, weights, names=names, convert=convert)
    step = found.counted_by("State", one_for_all=True)
    for name, layer in table.items():
        if layer["lr"] is None:
            layer["lr"] = found.layers[name].get("lr")
    saved = found.converted(table).momentum
    start = functional.init(params)
    zeros = dict(zip(table, layers.arrays_of(start.momentum, "momentum"), strict=True))
    momentum: list[Array] = [
        from_numpy(saved[name], zero) if name in saved else zero
        for name, zero in zeros.items()
    ]
    return State(start.count + step, layers.rebuilt(momentum))


def _table(
    layers: Leaves,
    lr: Scalar | Tree,
    adapt: Selection,
    decay: Selection,
    hyperparameters: dict[str, Scalar],
) -> LayerTable:
    configs = layers.configs(Config(**hyperparameters), adapt, decay)
    rates = [None] * len(configs) if lr is None else layers.rates(lr, "lr")
    rows = zip(layers.names, rates, configs, strict=True)
    return described(rows, "rename one of the leaves")
