"""The state of an optimizer without its framework, and the file that holds it.

Every API gives and takes a `PortableState`: ``portable_state()`` and
``load_portable_state(state, ...)``. docs/checkpoints.md describes the file.
"""

import json
import operator
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from larskit.arrays import Array, Scalar
from larskit.config import Config, check_lr
from larskit.names import check_same, listed
from larskit.state.files import atomic, deserialize, serialize

FORMAT = 1
Names = Mapping[str, str] | Callable[[str], str] | None  # from old names to new ones
Layer = Mapping[str, Any]  # the hyper-parameters of a layer: numbers, strings, bools
LayerTable = dict[str, dict[str, Any]]  # those of each layer, by its name

_UNSIGNED = b"0" * 64


@dataclass(frozen=True, eq=False)
class PortableState:
    """The state of an optimizer, without the framework.

    Parameters
    ----------
    step : int or None
        The number of steps taken; None where the optimizer does not count them, as that
        of PyTorch.
    layers : mapping of str to mapping
        For each layer, by name, the hyper-parameters of `larskit.config.Config`, and
        ``"lr"``: the learning rate of the next step, or None.
    momentum : mapping of str to numpy.ndarray
        The momentum buffers. A layer that has not stepped yet may be absent.
    master : mapping of str to numpy.ndarray, optional
        The float32 copies of low-precision weights, where there are any.

    Raises
    ------
    ValueError
        `step` is no count, a layer is no mapping, or an array belongs to no layer.
    """

    step: int | None
    layers: Mapping[str, Layer]
    momentum: Mapping[str, np.ndarray]
    master: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        if self.step is not None and (type(self.step) is not int or self.step < 0):
            raise ValueError(f"step must be None or an int >= 0, got {self.step!r}")
        for name, layer in self.layers.items():
            if not isinstance(layer, Mapping):
                raise ValueError(f"layer {name!r} must be a mapping, got {layer!r}")
        for kind, arrays in self._arrays().items():
            if strange := [name for name in arrays if name not in self.layers]:
                raise ValueError(f"{kind} has {listed(strange)}, which is no layer")

    def _arrays(self) -> dict[str, Mapping[str, np.ndarray]]:
        return {"momentum": self.momentum, "master": self.master}

    def renamed(self, names: Names) -> "PortableState":
        """Return the state under other names.

        Parameters
        ----------
        names : mapping or callable, or None
            From the present names to the new ones.

        Raises
        ------
        ValueError, TypeError
            Listing the layers that have no new name, or no name of their own.
        """
        new = _mapped(self.layers, names)
        parts = {"layers": self.layers, **self._arrays()}
        return replace(
            self,
            **{
                part: {new[name]: x for name, x in named.items()}
                for part, named in parts.items()
            },
        )

    def fitted(
        self,
        layers: Mapping[str, Layer],
        weights: Mapping[str, Array],
        *,
        names: Names = None,
        convert: bool = False,
        masters: Collection[str] = (),
    ) -> "PortableState":
        """Return the state under an optimizer's own names, if it fits the optimizer.

        Parameters
        ----------
        layers : mapping of str to mapping
            Those of the optimizer's layers, see `hyperparameters`. All but the
            learning rates must agree.
        weights : mapping of str to array
            The layers, of any framework: their shapes must agree.
        names, convert
            See `load_optimizer`.
        masters : collection of str
            The layers that can have a float32 copy of their weights.

        Raises
        ------
        ValueError, TypeError
            It does not fit, and why.
        """
        own = {saved: name for name, saved in _mapped(layers, names).items()}
        remedy = "expected the layers of the optimizer: pass names= to rename them"
        check_same("the saved state", self.layers, own, remedy)
        found = self.renamed(own)
        for name, layer in layers.items():
            _check_agreement(name, found.layers[name], layer, convert)
        for kind, arrays in found._arrays().items():
            for name, x in arrays.items():
                _check_alike(f"the saved {kind} of {name!r}", x, weights[name])
        if strange := [name for name in found.master if name not in masters]:
            raise ValueError(
                f"the saved state has master weights of {listed(strange)}, which the "
                "optimizer cannot take: load dataclasses.replace(state, master={}) and "
                "put them into the weights yourself"
            )
        return found

    def converted(self, layers: Mapping[str, Layer]) -> "PortableState":
        """Return the state with its momentum where `layers` have the learning rate.

        Inside the buffer is ``lr`` times that outside, with the ``lr`` of `layers`.

        Raises
        ------
        ValueError
            That is needed and is None or 0.
        """
        return replace(
            self,
            momentum={
                name: _converted(name, v, self.layers[name], layers[name])
                for name, v in self.momentum.items()
            },
        )

    def counted_by(self, owner: str, *, one_for_all: bool = False) -> int:
        """Return how many steps were taken, for an optimizer that counts them.

        Parameters
        ----------
        owner : str
            What counts them, for messages.
        one_for_all : bool, default=False
            Whether its count tells the first step, which is not dampened, from later
            ones. The buffers must then agree with it.

        Raises
        ------
        ValueError
            The state does not say it, or a buffer contradicts it.
        """
        if self.step is None:
            raise ValueError(
                "the saved state does not say how many steps were taken, which "
                f"{owner} counts: pass step= when you save or load it, or load "
                "dataclasses.replace(state, step=...)"
            )
        if one_for_all:
            for name, layer in self.layers.items():
                self._check_first_step(name, layer, owner)
        return self.step

    def _check_first_step(self, name: str, layer: Layer, owner: str) -> None:
        step, has_buffer = self.step or 0, name in self.momentum
        dampened = layer["dampening"] and layer["denominator"] != "momentum"
        if dampened and has_buffer != (step > 0):
            raise ValueError(
                f"{name!r} has {'a' if has_buffer else 'no'} momentum buffer after "
                f"{step} steps, but {owner} has one count for all layers, and "
                "dampening depends on it: correct the step, or go on in the framework "
                "that saved it"
            )

    def resumed_lr(self, names: Iterable[str], own: Scalar) -> Scalar:
        """Return the learning rate that layers go on with: the saved one, if any.

        Parameters
        ----------
        names : iterable of str
            Layers that share a learning rate.
        own : float, or array of one element
            What the optimizer has, for a state that does not say it.

        Raises
        ------
        ValueError
            They were saved with several, or with one that is negative or not finite.
        """
        found = {self.layers[name].get("lr"): name for name in names}
        if len(found) > 1:
            (one, a), (other, b), *_ = found.items()
            raise ValueError(
                f"the saved learning rate of {a!r} is {one} and that of {b!r} {other}, "
                "but here they share one: give them parameter groups of their own, or "
                "one rate before saving"
            )
        saved = next(iter(found), None)
        rate = own if saved is None else saved
        check_lr(rate, "the saved lr")
        return rate


class PortableOptimizer(Protocol):
    """What `save_optimizer` and `load_optimizer` need of an optimizer."""

    def portable_state(self) -> PortableState:
        """Return a copy of the state."""
        ...

    def load_portable_state(
        self, state: PortableState, *, names: Names, convert: bool
    ) -> None:
        """Set the state, or raise and leave it as it is."""
        ...


def described(rows: Iterable[tuple[str, Scalar, Config]], remedy: str) -> LayerTable:
    """Return the hyper-parameters of layers, by name.

    Parameters
    ----------
    rows : iterable of (str, float or None, Config)
        The name, the learning rate and the configuration of each layer.
    remedy : str
        What to do where two layers have one name, for the message.

    Raises
    ------
    ValueError
        Two layers have one name.
    """
    found: LayerTable = {}
    for name, lr, config in rows:
        if name in found:
            raise ValueError(
                f"two layers are called {name!r}, so that a file cannot tell them "
                f"apart: {remedy}"
            )
        found[name] = hyperparameters(lr, config)
    return found


def hyperparameters(lr: Scalar, config: Config) -> dict[str, Any]:
    """Return the hyper-parameters of a layer in plain numbers and strings."""
    values = {"lr": lr, **vars(config)}
    return {
        name: x if x is None or isinstance(x, (bool, str)) else float(x)
        for name, x in values.items()
    }


def save_optimizer(
    optimizer: PortableOptimizer,
    filename: str | os.PathLike[str],
    *,
    names: Names = None,
    step: int | None = None,
) -> None:
    """Write the state of an optimizer to a file that every framework can resume from.

    The weights are the model's and are not in it.

    Parameters
    ----------
    optimizer : larskit.torch.LARS, larskit.jax.LARS or larskit.keras.LARS
        Where its parameters are sharded over processes, every process must call.
    filename : path
        See `atomic`.
    names : mapping of str to str, or callable, optional
        From the optimizer's names of the layers to those in the file.
    step : int, optional
        The number of steps taken, for an optimizer that does not count them
        (PyTorch's); others need it to resume.

    Raises
    ------
    TypeError
        It is no such optimizer.
    ValueError
        `names` misses a layer or gives one name to two, or the optimizer has counted
        another number of steps.
    OSError
        As `atomic` does.

    Examples
    --------
    >>> import torch
    >>> from larskit.torch import LARS
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = LARS(model.named_parameters(), lr=2.0)
    >>> save_optimizer(optimizer, "optimizer.safetensors", step=0)
    >>> load_optimizer(optimizer, "optimizer.safetensors").step
    0
    """
    _check_portable(optimizer)
    state = _counted(optimizer.portable_state(), step)
    write_state(state.renamed(names), filename)


def load_optimizer(
    optimizer: PortableOptimizer,
    filename: str | os.PathLike[str],
    *,
    names: Names = None,
    step: int | None = None,
    convert: bool = False,
) -> PortableState:
    """Set an optimizer to the state in a file, written from any framework.

    Parameters
    ----------
    optimizer : larskit.torch.LARS, larskit.jax.LARS or larskit.keras.LARS
        Over layers of the saved shapes, and with the saved hyper-parameters. Its
        learning rates may differ and become the saved ones; a schedule stays.
    filename : path
        A file of `save_optimizer` or `write_state`.
    names : mapping of str to str, or callable, optional
        From the optimizer's names of the layers to those in the file.
    step : int, optional
        The number of steps taken, where the file does not say.
    convert : bool, default=False
        Whether the momentum may be converted if `lr_placement` is the other one.

    Returns
    -------
    PortableState
        What the file holds, with its ``step``.

    Raises
    ------
    ValueError, TypeError
        The file is damaged or of another kind or version, or does not fit the
        optimizer. The optimizer is as it was then.
    OSError
        It cannot be read.

    Notes
    -----
    A buffer becomes an array of the dtype of its weights.
    """
    _check_portable(optimizer)
    state = _counted(read_state(filename), step)
    optimizer.load_portable_state(state, names=names, convert=convert)
    return state


def write_state(state: PortableState, filename: str | os.PathLike[str]) -> None:
    """Write a state to a file, all of it or nothing.

    Parameters
    ----------
    state : PortableState
        What an optimizer's ``portable_state()`` or `larskit.state.to_portable`
        returned.
    filename : path
        See `atomic`.
    """
    about = {
        "format": FORMAT,
        "sha256": _UNSIGNED.decode(),
        "step": state.step,
        "layers": state.layers,
    }
    tensors = {
        f"{kind}/{name}": x
        for kind, arrays in state._arrays().items()
        for name, x in arrays.items()
    }
    data = serialize(tensors, {"larskit": json.dumps(about)})
    before, unsigned, after = data.partition(_UNSIGNED)
    with atomic(filename) as file:
        for part in (before, _checksum(before, unsigned, after).encode(), after):
            file.write(part)


def read_state(filename: str | os.PathLike[str]) -> PortableState:
    """Read what `write_state` or `save_optimizer` wrote.

    Parameters
    ----------
    filename : path

    Returns
    -------
    PortableState

    Raises
    ------
    ValueError
        The file is damaged, of another kind, or of a newer version of larskit.
    OSError
        It cannot be read.
    """
    data = Path(filename).read_bytes()
    tensors = deserialize(data, filename)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = header.get("__metadata__", {}).get("larskit")
    if about is None:
        raise ValueError(
            f"{filename} holds arrays, but not the state of an optimizer: name a file "
            "that save_optimizer or write_state has written"
        )
    try:
        return _state(json.loads(about), tensors, data)
    except ValueError as why:
        raise ValueError(f"{filename} cannot be used: {why}") from why
    except (AttributeError, KeyError, TypeError) as why:
        raise ValueError(
            f"{filename} breaks the rules of its format ({why!r}): write it again, see "
            "docs/checkpoints.md"
        ) from why


def _state(about: Any, tensors: dict[str, np.ndarray], data: bytes) -> PortableState:
    if about["format"] != FORMAT:
        raise ValueError(
            f"it has the format {about['format']}, this larskit reads {FORMAT}: update "
            "larskit"
        )
    before, signature, after = data.partition(about["sha256"].encode())
    if _checksum(before, _UNSIGNED, after) != signature.decode():
        raise ValueError("it was damaged after it was written: take another copy")
    arrays: dict[str, dict[str, np.ndarray]] = {"momentum": {}, "master": {}}
    for path, x in sorted(tensors.items()):
        kind, _, name = path.partition("/")
        arrays[kind][name] = x
    return PortableState(about["step"], about["layers"], **arrays)


def _checksum(*parts: bytes) -> str:
    found = sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _check_portable(optimizer: object) -> None:
    if not hasattr(optimizer, "load_portable_state"):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, expected a larskit.torch.LARS "
            "or that of larskit.jax or larskit.keras: for the state of "
            "larskit.functional see larskit.state.to_portable"
        )


def _counted(state: PortableState, step: int | None) -> PortableState:
    """Return the state with the number of steps that the user knows."""
    if step is None:
        return state
    step = operator.index(step)
    if state.step not in (None, step):
        raise ValueError(f"step={step}, but {state.step} steps were counted: omit step")
    return replace(state, step=step)


def _mapped(own: Iterable[str], names: Names) -> dict[str, str]:
    """Return the new name of each layer, all different."""
    if isinstance(names, Mapping):
        if missing := [name for name in own if name not in names]:
            raise ValueError(f"names has no entry for {listed(missing)}: add it")
        new = {name: names[name] for name in own}
    else:
        new = {name: names(name) if names else name for name in own}
    for name, other in new.items():
        if not isinstance(other, str):
            raise TypeError(f"names maps {name!r} to {other!r}, expected a string")
    if twice := [name for name, n in Counter(new.values()).items() if n > 1]:
        raise ValueError(
            f"names maps several layers to {listed(twice)}: give each its own name"
        )
    return new


def _check_agreement(name: str, saved: Layer, own: Layer, convert: bool) -> None:
    """Refuse hyper-parameters that differ in their effect, all but the rate."""
    saved, own = _effective(saved), _effective(own)
    for key in {**own, **saved}:
        a, b = own.get(key), saved.get(key)
        converts = key == "lr_placement" and b in ("inside", "outside")
        if a != b and not (converts and convert):
            remedy = (
                "pass convert=True to convert its momentum"
                if converts
                else "give the optimizer the saved value, which may be changed later"
            )
            raise ValueError(
                f"{name!r} has in effect {key}={a!r} here but {key}={b!r} in the saved "
                f"state: {remedy}"
            )


def _effective(layer: Layer) -> dict[str, Any]:
    found = {key: x for key, x in layer.items() if key not in ("lr", "decay")}
    return found if layer.get("decay") else {**found, "weight_decay": 0.0}


def _check_alike(what: str, x: np.ndarray, w: Array) -> None:
    if x.shape != tuple(w.shape):
        raise ValueError(
            f"{what} has the shape {x.shape}, expected {tuple(w.shape)}: nothing is "
            "transposed, the layers must have the same layout"
        )
    if ("complex" in x.dtype.name) != ("complex" in str(w.dtype)):
        raise ValueError(
            f"{what} has the dtype {x.dtype}, but the weights have {w.dtype}: make "
            "both complex or none"
        )


def _converted(name: str, v: np.ndarray, saved: Layer, own: Layer) -> np.ndarray:
    if saved["lr_placement"] == own["lr_placement"]:
        return v
    lr = own["lr"]
    if lr is None or not 0 < lr < np.inf:
        raise ValueError(
            f"the momentum of {name!r} cannot be converted at the learning rate {lr}: "
            "load it where the rate is known and above 0"
        )
    v = v.astype(np.result_type(v, np.float64))
    return v * lr if own["lr_placement"] == "inside" else v / lr
