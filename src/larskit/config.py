"""The hyper-parameters of LARS: their names, defaults and every validation message.

Only concrete numbers are checked. A tensor or a traced value passes as it is, so
that checking never waits for a device.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from numbers import Integral, Real
from textwrap import indent
from typing import Literal, Self, TypeGuard, TypeVar, get_args

from larskit.arrays import Scalar, cast, is_array, norm_dtype

Denominator = Literal["paper", "decayed_gradient", "gradient", "momentum"]
LrPlacement = Literal["inside", "outside"]
OnNonfinite = Literal["propagate", "skip", "raise"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one layer is stepped; the learning rate alone is passed beside it.

    Parameters
    ----------
    momentum : float or 0-d array, default=0.9
        mu, at least 0 and below 1.
    weight_decay : float or 0-d array, default=0.0
        wd, at least 0; ``wd * w`` is added to the gradient of the layers that are
        decayed.
    trust_coefficient : float or 0-d array, default=0.001
        eta, above 0: at a learning rate of 1, a step changes a layer by this fraction
        of its weight norm.
    eps : float or 0-d array, default=0.0
        At least 0; added to the denominator of the trust ratio only.
    denominator : {"paper", "decayed_gradient", "gradient", "momentum"}
        The norm that the weight norm is divided by: ``|g| + wd*|w|`` (default),
        ``|g + wd*w|``, ``|g|``, or the norm of the update itself.
    lr_placement : {"inside", "outside"}
        Whether the learning rate multiplies what enters the momentum buffer (default)
        or what leaves it.
    nesterov : bool, default=False
        Step along ``x + mu*v`` instead of the buffer v, where x is what entered it.
    dampening : float or 0-d array, default=0.0
        From 0 to 1; after the first step ``(1 - dampening) * x`` enters the buffer.
    clip : bool, default=False
        LARC: use ``min(ratio / lr, 1)`` as the trust ratio.
    threshold : float or 0-d array, default=0.0
        At least 0; a layer whose weight norm is not above it is not adapted.
    adapt : bool, default=True
        Whether this layer gets a trust ratio; else it steps at the raw rate.
    decay : bool, default=True
        Whether this layer is decayed.
    maximize : bool, default=False
        Ascend along the gradient instead of descending.
    zero_guard : bool, default=True
        Use a trust ratio of 1 where the norm of the gradient, or of the update, is 0.
        Chainer's hook has no such guard.
    """

    momentum: Scalar = 0.9
    weight_decay: Scalar = 0.0
    trust_coefficient: Scalar = 1e-3
    eps: Scalar = 0.0
    denominator: Denominator = "paper"
    lr_placement: LrPlacement = "inside"
    nesterov: bool = False
    dampening: Scalar = 0.0
    clip: bool = False
    threshold: Scalar = 0.0
    adapt: bool = True
    decay: bool = True
    maximize: bool = False
    zero_guard: bool = True

    @classmethod
    def pick(cls, values: Mapping[str, Scalar], **own: Scalar) -> Self:
        """Return the configuration that the arguments of an API describe.

        Parameters
        ----------
        values : mapping of str to object
            ``locals()`` at the top of a function, a parameter group, or the attributes
            of an optimizer. Only the names in `SHARED` are looked at.
        **own
            Hyper-parameters that take precedence.
        """
        return cls(**{name: values[name] for name in SHARED if name in values} | own)

    def at_step(self, count: Scalar) -> Self:
        """Return the configuration for the step after `count` steps.

        Dampening applies from the second step on. Where a first buffer is not None but
        zeros, the rule cannot tell the first step.
        """
        if is_zero(self.dampening) or self.denominator == "momentum":
            return self
        later = count > 0
        later = cast(later, norm_dtype(later)) if is_array(later) else later
        return replace(self, dampening=self.dampening * later)

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
                "the learning rate cannot be inside it: pass lr_placement='outside'"
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


def check_lr(lr: Scalar, name: str = "lr") -> None:
    """Refuse a concrete learning rate that is negative or not finite."""
    number(name, lr, "a finite number of at least 0", lambda x: 0 <= x < math.inf)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a concrete real number, so that it may be looked at."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_zero(value: object) -> bool:
    """Whether `value` is the concrete number 0."""
    return is_number(value) and value == 0


def number(
    name: str, value: Scalar, allowed: str, holds: Callable[[float], bool]
) -> None:
    """Refuse a concrete number for which `holds` is false, and what is no number."""
    if isinstance(value, (bool, str, bytes, list, tuple, dict)) or value is None:
        raise TypeError(f"{name} must be {allowed}, got {value!r}: pass a number")
    if is_number(value) and not holds(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def choice(name: str, value: object, options: object) -> None:
    """Refuse a value that is not among the strings of a ``Literal``."""
    allowed = get_args(options)
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
        )


def _flag(name: str, value: object) -> None:
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

NAMES = tuple(field.name for field in fields(Config))
PER_LAYER = ("adapt", "decay")  # selected for each layer, see `larskit.select`
SHARED = tuple(name for name in NAMES if name not in (*PER_LAYER, "zero_guard"))
_FLAGS = tuple(field.name for field in fields(Config) if field.type is bool)

T = TypeVar("T")
_PLACEHOLDER = re.compile(r"^( *)\{(\w+)(?::(\w+))?\}$", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+) : .*(?:\n {4}.*)+", re.MULTILINE)


def documented(target: T) -> T:
    """Fill the placeholders in a docstring with what `Config` says of its parameters.

    The line ``{momentum}`` becomes the description of that hyper-parameter, and
    ``{momentum:eps}`` those of all from the first to the last, both included.
    """
    if target.__doc__ and Config.__doc__:  # python -OO leaves none
        target.__doc__ = _PLACEHOLDER.sub(_described, target.__doc__)
    return target


def _described(placeholder: re.Match[str]) -> str:
    margin, first, last = placeholder.groups()
    names = NAMES[NAMES.index(first) : NAMES.index(last or first) + 1]
    return indent("\n".join(_entries()[name] for name in names), margin)


@cache
def _entries() -> dict[str, str]:
    """Return the description of each parameter of `Config`, by name."""
    text = inspect.cleandoc(Config.__doc__ or "")
    return {entry[1]: entry[0] for entry in _ENTRY.finditer(text)}
