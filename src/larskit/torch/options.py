"""The options of a parameter group: their validation, and what they select."""

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from larskit import config as _config
from larskit import engines
from larskit.config import SHARED, Config, OnNonfinite, check_lr, is_zero
from larskit.engines import Switches

if TYPE_CHECKING:
    from larskit.arrays import Scalar

ParamGroup = dict[str, Any]  # options by name, and the list "params"
Groups = Sequence[ParamGroup]
LayerState = dict[str, Tensor]  # what is kept of a parameter, by name
State = MutableMapping[Tensor, LayerState]
SWITCHES = Switches._fields


class Settings(NamedTuple):
    """What a parameter group says of its layers, beside the learning rate."""

    config: Config
    switches: Switches = engines.DEFAULT
    master_weights: bool = False

    @property
    def keeps_momentum(self) -> bool:
        """Whether momentum buffers are kept."""
        return not is_zero(self.config.momentum)

    @property
    def structure(self) -> tuple[Switches, bool, bool]:
        """What decides about the engine and about what is kept in the state."""
        return self.switches, self.master_weights, self.keeps_momentum


def settings_of(group: ParamGroup) -> Settings:
    """Check the hyper-parameters of a group, and return them."""
    check_rate(group["lr"])
    for name in SHARED:
        _check_one_number(name, group[name])
    return Settings(Config.pick(group), switches_of(group), group["master_weights"])


def switches_of(group: ParamGroup) -> Switches:
    """Return which engine a group asks for, and how it must work."""
    return Switches(*[group[name] for name in SWITCHES])


def check_rate(lr: "Scalar") -> None:
    """Refuse a learning rate; the contents of a tensor are not looked at."""
    check_lr(lr)
    _check_one_number("lr", lr)


def policy_of(groups: Groups) -> str:
    """Return what to do with a norm that is not finite: one thing for all groups."""
    policies = list(dict.fromkeys(group["on_nonfinite"] for group in groups))
    if len(policies) > 1:
        raise ValueError(
            f"on_nonfinite applies to the whole step, but the parameter groups have "
            f"{' and '.join(map(repr, policies))}: give all of them the same"
        )
    return policies[0]


def _check_one_number(name: str, x: "Scalar") -> None:
    if isinstance(x, Tensor) and x.numel() != 1:
        shape = tuple(x.shape)
        raise ValueError(f"{name} has the shape {shape}, expected one number")


def is_selected(group: ParamGroup, name: str, row: int) -> bool:
    """Whether a layer of a group is adapted, or decayed."""
    given = group[name]
    if given is None:
        return group["params"][row].ndim >= 2
    return given if isinstance(given, bool) else given[row]


def check_group(group: ParamGroup) -> None:
    """Refuse options that are out of range, of the wrong type or in conflict."""
    settings_of(group)
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.is_cpu:  # elsewhere this would synchronize
        check_lr(lr.item())
    _config.choice("on_nonfinite", group["on_nonfinite"], OnNonfinite)
    for name in (*SWITCHES, "master_weights"):
        optional = name in ("foreach", "fused")
        if group[name] not in ((True, False, None) if optional else (True, False)):
            allowed = "True, False or None" if optional else "True or False"
            raise TypeError(f"{name} must be {allowed}, got {group[name]!r}")
    for pair, why in _CONFLICTS:
        if all(group[name] == value for name, value in pair.items()):
            both = " and ".join(f"{name}={value!r}" for name, value in pair.items())
            raise RuntimeError(f"{both} conflict: {why}; omit one")


_FUSED_ONLY = "only a fused engine carries norms"
_IN_PLACE = "autograd sees only the steps of the reference engine"
_CONFLICTS: tuple[tuple[dict[str, object], str], ...] = (
    ({"foreach": True, "fused": True}, "they ask for two engines"),
    ({"carry_norms": True, "foreach": True}, _FUSED_ONLY),
    ({"carry_norms": True, "foreach": False}, _FUSED_ONLY),
    ({"carry_norms": True, "fused": False}, _FUSED_ONLY),
    (
        {"carry_norms": True, "capturable": True},
        "a graph cannot see whether another caller writes the weights",
    ),
    ({"carry_norms": True, "differentiable": True}, _FUSED_ONLY),
    ({"capturable": True, "on_nonfinite": "raise"}, "a captured step cannot raise"),
    ({"differentiable": True, "foreach": True}, _IN_PLACE),
    ({"differentiable": True, "fused": True}, _IN_PLACE),
    ({"differentiable": True, "master_weights": True}, _IN_PLACE),
    ({"differentiable": True, "on_nonfinite": "skip"}, _IN_PLACE),
    ({"differentiable": True, "on_nonfinite": "raise"}, _IN_PLACE),
)
