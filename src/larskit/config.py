"""The hyper-parameters of LARS: their names, defaults and every validation message.

Only concrete numbers are checked. A tensor or a traced value passes as it is, so
that checking never waits for a device.
"""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

Denominator = Literal["paper", "decayed_gradient", "gradient", "momentum"]
LrPlacement = Literal["inside", "outside"]
OnNonfinite = Literal["propagate", "skip", "raise"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one layer is stepped; the learning rate alone is passed beside it.

    Parameters
    ----------
    momentum : float, default=0.9
        mu, at least 0 and below 1.
    weight_decay : float, default=0.0
        wd, at least 0; added to the gradient as ``wd * w`` where `decay` is true.
    trust_coefficient : float, default=1e-3
        eta, above 0: the part of a layer's length that it moves at a rate of 1.
    eps : float, default=0.0
        At least 0; stands in the denominator only, and 0 stays 0.
    denominator : {"paper", "decayed_gradient", "gradient", "momentum"}
        What the layer's length is divided by: ``|g| + wd*|w|`` (default),
        ``|g + wd*w|``, ``|g|``, or the length of the update itself.
    lr_placement : {"inside", "outside"}
        Whether the learning rate multiplies what enters the momentum buffer
        (default) or what leaves it.
    nesterov : bool, default=False
        Step along ``x + mu*v'`` instead of ``v'``.
    dampening : float, default=0.0
        From 0 to 1; the buffer takes ``(1 - dampening) * x`` after its first step.
    clip : bool, default=False
        LARC: the ratio is ``min(ratio / lr, 1)``.
    threshold : float, default=0.0
        At least 0; a layer no longer than this is not adapted.
    adapt : bool, default=True
        Whether this layer gets a trust ratio; else it steps at the raw rate.
    decay : bool, default=True
        Whether this layer is decayed.
    maximize : bool, default=False
        Climb the gradient instead of descending.
    zero_guard : bool, default=True
        A denominator without length gives a ratio of 1. Chainer's hook has no
        such guard.
    """

    momentum: Any = 0.9
    weight_decay: Any = 0.0
    trust_coefficient: Any = 1e-3
    eps: Any = 0.0
    denominator: Denominator = "paper"
    lr_placement: LrPlacement = "inside"
    nesterov: bool = False
    dampening: Any = 0.0
    clip: bool = False
    threshold: Any = 0.0
    adapt: bool = True
    decay: bool = True
    maximize: bool = False
    zero_guard: bool = True

    def __post_init__(self) -> None:
        """Check every field, then the combinations."""
        for name, (allowed, holds) in _NUMBERS.items():
            number(name, getattr(self, name), allowed, holds)
        for name in _FLAGS:
            _flag(name, getattr(self, name))
        choice("denominator", self.denominator, Denominator)
        choice("lr_placement", self.lr_placement, LrPlacement)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.denominator == "momentum" and self.lr_placement == "inside":
            raise ValueError(
                "denominator='momentum' measures the buffer after it was updated, so "
                "the learning rate cannot stand inside it: pass lr_placement='outside'"
            )
        without_momentum = is_zero(self.momentum)
        if without_momentum and self.nesterov:
            raise ValueError(
                "nesterov=True needs a momentum above 0, got momentum=0: raise the "
                "momentum or pass nesterov=False"
            )
        if without_momentum and is_number(self.dampening) and self.dampening != 0:
            raise ValueError(
                f"dampening={self.dampening} needs a momentum above 0, got momentum=0: "
                "raise the momentum or pass dampening=0"
            )


def check_lr(lr: Any, name: str = "lr") -> None:
    """Refuse a concrete learning rate that is negative or not finite."""
    number(name, lr, "a finite number of at least 0", lambda x: 0 <= x < math.inf)


def is_number(value: Any) -> bool:
    """Whether `value` is a concrete real number, so that it may be looked at."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_zero(value: Any) -> bool:
    """Whether `value` is the concrete number 0."""
    return is_number(value) and value == 0


def number(name: str, value: Any, allowed: str, holds: Any) -> None:
    """Refuse a concrete number for which `holds` is false, and what is no number."""
    if isinstance(value, (bool, str, bytes, list, tuple, dict)) or value is None:
        raise TypeError(f"{name} must be {allowed}, got {value!r}: pass a number")
    if is_number(value) and not holds(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def choice(name: str, value: Any, options: Any) -> None:
    """Refuse a value that is not among the strings of a ``Literal``."""
    allowed = get_args(options)
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
        )


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, Integral)) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _at_least_zero(x: float) -> bool:
    return 0 <= x < math.inf


_NUMBERS = {
    "momentum": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "weight_decay": ("a finite number of at least 0", _at_least_zero),
    "trust_coefficient": ("a finite number above 0", lambda x: 0 < x < math.inf),
    "eps": ("a finite number of at least 0", _at_least_zero),
    "dampening": ("between 0 and 1", lambda x: 0 <= x <= 1),
    "threshold": ("a number of at least 0", lambda x: x >= 0),
}
_FLAGS = ("nesterov", "clip", "adapt", "decay", "maximize", "zero_guard")

NAMES = tuple(field.name for field in fields(Config))
