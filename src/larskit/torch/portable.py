"""The state of a LARS of PyTorch in the form that every framework reads."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from larskit.arrays import Scalar, from_numpy, to_numpy
from larskit.config import PER_LAYER
from larskit.norms import is_sharded
from larskit.state import Names, PortableState
from larskit.state.portable import Layer, LayerTable, described
from larskit.torch.options import ParamGroup, is_selected, settings_of
from larskit.torch.plan import name_of

# The parts of a state, and what they are called in `optimizer.state`.
KINDS = {"momentum": "momentum_buffer", "master": "master_weight"}


def portable_state(optimizer: torch.optim.Optimizer) -> PortableState:
    """Return the state in the form that every framework reads.

    Of sharded parameters it is that of the whole layers: every process must call this,
    and one of them may write what it returns.

    Returns
    -------
    PortableState
        A copy, for `larskit.state.write_state`; ``save_optimizer`` calls this. It
        does not say how many steps were taken.
    """
    layers = _layers(optimizer)
    arrays: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    for name, layer in layers.items():
        own = optimizer.state.get(layer.weight, {})
        for kind, key in KINDS.items():
            if key in own:
                arrays[kind][name] = _whole(own[key])
    described = {name: layer.described for name, layer in layers.items()}
    return PortableState(None, described, **arrays)


@torch.no_grad()
def load_portable_state(
    optimizer: torch.optim.Optimizer,
    state: PortableState,
    *,
    names: Names = None,
    convert: bool = False,
) -> None:
    """Take a state from any framework; ``load_optimizer`` calls this.

    Parameters
    ----------
    state, names, convert
        See `larskit.state.load_optimizer`. The learning rates of the groups become
        the saved ones.

    Raises
    ------
    ValueError, TypeError
        It does not fit. Nothing is set then.
    """
    layers, groups = _layers(optimizer), optimizer.param_groups
    found = state.fitted(
        {name: layer.described for name, layer in layers.items()},
        {name: layer.weight for name, layer in layers.items()},
        names=names,
        convert=convert,
        masters=[name for name, layer in layers.items() if layer.has_master],
    )
    rates = []
    for group in groups:
        own = (name for name, layer in layers.items() if layer.group is group)
        rates.append(found.resumed_lr(own, group["lr"]))
    new = _tensors(found.converted(_at(rates, groups, layers)), layers)
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    for p, own in new.items():
        former = optimizer.state.pop(p, {})
        kept = {key: x for key, x in former.items() if key not in KINDS.values()}
        if kept or own:
            optimizer.state[p] = {**kept, **own}


class _Layer(NamedTuple):
    group: ParamGroup
    weight: Any  # a Tensor, or a DTensor
    described: Layer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its state, in which it is stepped."""
        own = self.weight.dtype
        keeps_master = self.group.get("master_weights")
        return torch.promote_types(own, torch.float32) if keeps_master else own

    @property
    def has_master(self) -> bool:
        return self.dtype != self.weight.dtype


def _layers(optimizer: torch.optim.Optimizer) -> dict[str, _Layer]:
    rows = []
    for index, group in enumerate(optimizer.param_groups):
        config = settings_of(group).config
        for row, p in enumerate(group["params"]):
            adapt, decay = (is_selected(group, name, row) for name in PER_LAYER)
            own = replace(config, adapt=adapt, decay=decay)
            rows.append((name_of(index, group, row), group, p, own))
    table = described(
        ((name, group["lr"], own) for name, group, _, own in rows),
        "name the parameters as one model does",
    )
    return {name: _Layer(group, p, table[name]) for name, group, p, _ in rows}


def _at(
    rates: list[Scalar], groups: list[ParamGroup], layers: dict[str, _Layer]
) -> LayerTable:
    """Return the hyper-parameters of each layer at other rates of its group."""
    rate_of = {id(g): float(rate) for g, rate in zip(groups, rates, strict=True)}
    return {
        name: {**layer.described, "lr": rate_of[id(layer.group)]}
        for name, layer in layers.items()
    }


def _tensors(
    state: PortableState, layers: dict[str, _Layer]
) -> dict[Tensor, dict[str, Tensor]]:
    """Return the tensors of each parameter, under their names in the optimizer."""
    arrays = {"momentum": state.momentum, "master": state.master}
    return {
        layer.weight: {
            key: _state_tensor(arrays[kind][name], layer)
            for kind, key in KINDS.items()
            if name in arrays[kind]
        }
        for name, layer in layers.items()
    }


def _whole(x: Tensor) -> np.ndarray:
    """Copy a tensor to NumPy; a sharded one is gathered from all processes."""
    return to_numpy(x.full_tensor() if is_sharded(x) else x)


def _state_tensor(x: np.ndarray, layer: _Layer) -> Tensor:
    """Return an array as a tensor with the layout of the parameter."""
    p = layer.weight
    whole = from_numpy(x, torch.empty((), dtype=layer.dtype, device=p.device))
    if not is_sharded(p):
        return torch.empty_like(p, dtype=layer.dtype).copy_(whole)
    from torch.distributed.tensor import DTensor, Replicate

    from larskit.norms import dtensor

    mesh = p.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    replicated = DTensor.from_local(whole, mesh, everywhere, run_check=False)
    return dtensor.assemble(dtensor.shard(replicated, p), p)
