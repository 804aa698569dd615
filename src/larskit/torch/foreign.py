"""What other optimizers call their options, and their state dicts."""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, ParamSpec

from torch import Tensor

from larskit.arrays import Scalar
from larskit.config import PER_LAYER, SHARED, LrPlacement, choice
from larskit.torch.bucket import MASTER, MOMENTUM
from larskit.torch.options import SWITCHES, Groups, ParamGroup

_States = dict[Hashable, Any]  # a dict for each parameter, by its key
StateDict = dict[str, Any]  # {"state": ..., "param_groups": ...}

# The buffer of MAE, MoCo v3, VISSL, Barlow Twins and VICReg.
_BUFFER = "mu"
# Names of hyper-parameters in timm, Barlow Twins and VICReg, and options of theirs that
# are dropped: which layers are adapted and decayed is decided by the optimizer.
_SYNONYMS = {
    "trust_coeff": "trust_coefficient",
    "eta": "trust_coefficient",
    "trust_clip": "clip",
}
# What to pass here instead of arguments of other implementations.
_INSTEAD = {
    **_SYNONYMS,
    "trust_coef": "trust_coefficient",
    "epsilon": "eps",
    "always_adapt": "adapt=True",
    "exclude_bias_n_norm": "nothing: adapt=None and decay=None exclude them",
    "weight_decay_filter": "nothing: decay=None excludes biases and norms",
    "lars_adaptation_filter": "nothing: adapt=None excludes biases and norms",
}
_DROPPED = ("always_adapt", "weight_decay_filter", "lars_adaptation_filter")
_OWN = (*SHARED, *PER_LAYER, *SWITCHES, "lr", "on_nonfinite", "master_weights")


_P = ParamSpec("_P")


def explains_names(init: Callable[_P, None]) -> Callable[_P, None]:
    """Have a constructor say what an argument of other implementations is called."""

    @wraps(init)
    def explaining(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for name in kwargs:
            if name in _INSTEAD:
                raise TypeError(f"LARS got {name}: pass {_INSTEAD[name]} instead")
        init(*args, **kwargs)

    return explaining


def convert_state_dict(
    state_dict: StateDict,
    lr_placement: LrPlacement,
    *,
    source: LrPlacement | None = None,
) -> StateDict:
    """Convert the momentum buffers of a state dict to a placement of the learning rate.

    A buffer with the rate inside is ``lr`` times the buffer with the rate outside, with
    the ``lr`` of its parameter group.

    Parameters
    ----------
    state_dict : dict
        Of `LARS`, `torch.optim.SGD`, timm's Lars, MAE, Barlow Twins and similar:
        ``{"state": ..., "param_groups": ...}``. It is not changed.
    lr_placement : {"inside", "outside"}
        The placement of the result, which its groups state.
    source : {"inside", "outside"}, optional
        The placement in `state_dict`. Default: what its groups state, else
        ``"outside"``, which all of the above but `LARS` use.

    Returns
    -------
    dict
        For `LARS.load_state_dict`.

    Raises
    ------
    ValueError
        The placement is unknown, or a buffer would be divided by a learning rate of 0.

    Examples
    --------
    >>> import torch
    >>> from larskit.torch import LARS
    >>> model = torch.nn.Linear(4, 2)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> sgd.step()
    >>> state = convert_state_dict(sgd.state_dict(), "inside")
    >>> LARS(model.parameters(), lr=0.5).load_state_dict(state)
    >>> state["state"][1]["momentum_buffer"]
    tensor([0.5000, 0.5000])
    """
    choice("lr_placement", lr_placement, LrPlacement)
    if source is not None:
        choice("source", source, LrPlacement)
    state, groups = _translated(state_dict)
    for group in groups:
        there = source or group.get("lr_placement", "outside")
        group["lr_placement"] = lr_placement
        if there == lr_placement:
            continue
        for key in group["params"]:
            if _has_buffer(state, key):
                factor = _factor(group["lr"], lr_placement)
                state[key][MOMENTUM] = state[key][MOMENTUM] * factor
    return {**state_dict, "state": state, "param_groups": groups}


def _factor(lr: Scalar, lr_placement: LrPlacement) -> Scalar:
    if lr_placement == "inside":
        return lr
    if lr == 0:
        raise ValueError(
            "lr is 0 in a parameter group, and its momentum buffers cannot be divided "
            "by it: convert the state of an earlier or later step"
        )
    return 1 / lr


def adapted(state_dict: StateDict, own_groups: Groups) -> StateDict:
    """Return a state dict that has every option of a `LARS` with `own_groups`."""
    state, groups = _translated(state_dict)
    _refuse_without_momentum(state)
    for group, own in zip(groups, own_groups, strict=False):  # torch counts
        unknown = "lr_placement" not in group and own["lr_placement"] == "inside"
        if unknown and any(_has_buffer(state, key) for key in group["params"]):
            raise ValueError(
                "the state dict does not say whether its momentum buffers contain the "
                "learning rate, and those of this optimizer do: load the result of "
                "larskit.torch.convert_state_dict(state_dict, 'inside'), or make the "
                "optimizer with lr_placement='outside'"
            )
        group.update({name: own[name] for name in _OWN if name not in group})
    return {**state_dict, "state": state, "param_groups": groups}


def _translated(state_dict: StateDict) -> tuple[_States, list[ParamGroup]]:
    """Return copies of state and groups, with the option names of larskit."""
    state = {
        key: {MOMENTUM if name == _BUFFER else name: x for name, x in kept.items()}
        if isinstance(kept, dict)
        else kept
        for key, kept in state_dict["state"].items()
    }
    groups: list[Any] = [
        {
            _SYNONYMS.get(name, name): value
            for name, value in group.items()
            if name not in _DROPPED
        }
        for group in state_dict["param_groups"]
    ]
    return state, groups


def _refuse_without_momentum(state: _States) -> None:
    """Refuse the state of an optimizer that keeps something other than momentum."""
    for key, kept in state.items():
        strange = sorted({*kept} - {MOMENTUM, MASTER}) if isinstance(kept, dict) else []
        if strange and MOMENTUM not in kept:
            raise ValueError(
                f"the state of parameter {key} has {', '.join(strange)} and no "
                f"{MOMENTUM}: it is of another kind of optimizer, which LARS cannot "
                "continue; load the weights of the model alone, and begin with a new "
                "optimizer"
            )


def _has_buffer(state: _States, key: Hashable) -> bool:
    return isinstance(state.get(key, {}).get(MOMENTUM), Tensor)
