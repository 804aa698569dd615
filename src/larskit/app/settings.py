"""The settings of a training run: names, defaults, help texts and validation."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from larskit import config
from larskit.app import InputError
from larskit.config import Config

Model = Literal["convnet", "convnet-plain", "resnet18", "resnet50"]
Optimizer = Literal["lars", "larc", "sgd", "adamw"]
Schedule = Literal["poly", "cosine", "constant"]
Precision = Literal["float32", "bfloat16", "float16"]
# Some fields of `Settings`, by name.
Arguments = dict[str, Any]


class Recipe(NamedTuple):
    """The defaults of an optimizer.

    `lr` is tuned for `trust_coefficient`. `lrs` is the grid of a study; it extends
    below and above the best learning rate.
    """

    lr: float
    weight_decay: float
    trust_coefficient: float | None
    lrs: tuple[float, ...]


# The trust coefficient of "larc" is that of NVIDIA Apex.
RECIPES: dict[str, Recipe] = {
    "lars": Recipe(4.0, 5e-4, 0.01, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)),
    "larc": Recipe(0.8, 5e-4, 0.02, (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)),
    "sgd": Recipe(0.2, 5e-4, None, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)),
    "adamw": Recipe(0.01, 1e-2, None, (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)),
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _defaults(field_name: str) -> str:
    """List the default of each optimizer that has one."""
    return ", ".join(
        f"{name} {getattr(recipe, field_name):g}"
        for name, recipe in RECIPES.items()
        if getattr(recipe, field_name) is not None
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a training run.

    Equal settings and equal data give bitwise identical weights on the same kind of
    machine.

    `lr`, `weight_decay` and `trust_coefficient` default to the values of the optimizer
    in `RECIPES`. A relative path in `data` becomes absolute. Raises `InputError` for an
    invalid value.
    """

    data: str = field(
        default="digits",
        metadata=_help(
            "digits (1,797 images of 8x8, included in scikit-learn), a folder with one "
            "folder of images per class, or an .npz file with x and y"
        ),
    )
    image_size: int | None = field(
        default=None,
        metadata=_help(
            "resize images to this height and width (default: 32 for a folder, else no "
            "resizing)"
        ),
    )
    model: Model = field(
        default="convnet",
        metadata=_help(
            "convnet-plain has no batch norm; the others normalize over the images "
            "that one process computes at once"
        ),
    )
    optimizer: Optimizer = field(
        default="lars", metadata=_help("larc is LARS with clipped trust ratios")
    )
    batch_size: int = field(
        default=64, metadata=_help("images per step, over all processes")
    )
    accumulate: int = field(
        default=1,
        metadata=_help("gradient accumulation: split each batch into N parts"),
    )
    lr: float = field(
        default=cast(float, None),
        metadata=_help(
            f"peak learning rate (default: {_defaults('lr')}; that of lars assumes a "
            f"trust coefficient of {RECIPES['lars'].trust_coefficient:g}: only their "
            "product matters)"
        ),
    )
    trust_coefficient: float = field(
        default=cast(float, None),
        metadata=_help(f"eta of LARS (default: {_defaults('trust_coefficient')})"),
    )
    momentum: float = field(
        default=Config.momentum, metadata=_help("momentum; beta1 of adamw")
    )
    weight_decay: float = field(
        default=cast(float, None),
        metadata=_help(
            "weight decay of parameters with two or more dimensions (default: "
            f"{_defaults('weight_decay')})"
        ),
    )
    schedule: Schedule = field(
        default="poly",
        metadata=_help("learning-rate decay after the warm-up; poly is quadratic"),
    )
    warmup: float = field(
        default=0.1, metadata=_help("fraction of the steps with a linear warm-up")
    )
    epochs: int = field(default=20, metadata=_help("passes over the training images"))
    seed: int = field(
        default=0,
        metadata=_help("random seed of the initial weights and the image order"),
    )
    precision: Precision = field(
        default="float32",
        metadata=_help("bfloat16 and float16 are mixed precision; float16 needs a GPU"),
    )
    device: str = field(
        default="auto",
        metadata=_help("cpu, cuda, cuda:1, ...; auto: a GPU if there is one"),
    )
    threads: int | None = field(
        default=None,
        metadata=_help(
            "CPU threads per process (default: the cores divided among the processes; "
            "1 in a study)"
        ),
    )

    def __post_init__(self) -> None:
        """Fill in the defaults of the optimizer and check every field."""
        try:
            self._check()
        except (TypeError, ValueError) as error:
            # Every message starts with the name of a field; name the option instead.
            raise InputError(f"--{error}".replace("_", "-", 1)) from error

    def _check(self) -> None:
        for name, options in _CHOICES.items():
            config.choice(name, getattr(self, name), options)
        self._fill_in()
        for name, (allowed, holds) in _NUMBERS.items():
            config.number(name, getattr(self, name), allowed, holds)
        Config(momentum=self.momentum, weight_decay=self.weight_decay)
        if self.trust_coefficient is not None:
            Config(trust_coefficient=self.trust_coefficient)
        for name in ("image_size", "threads"):
            if getattr(self, name) is not None:
                config.number(name, getattr(self, name), *_POSITIVE_INTEGER)
        if self.accumulate > self.batch_size:
            raise ValueError(
                "accumulate must be at most the batch size of "
                f"{self.batch_size}, got {self.accumulate}"
            )

    def _fill_in(self) -> None:
        recipe = RECIPES[self.optimizer]
        if recipe.trust_coefficient is None and self.trust_coefficient is not None:
            raise ValueError(
                f"trust_coefficient does not apply to {self.optimizer}, got "
                f"{self.trust_coefficient}: omit it, or pass --optimizer lars or larc"
            )
        for name in ("lr", "weight_decay", "trust_coefficient"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(recipe, name))
        if self.data != "digits":
            object.__setattr__(self, "data", str(Path(self.data).resolve()))


_CHOICES = {
    "model": Model,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "precision": Precision,
}


def _is_positive_integer(x: float) -> bool:
    return isinstance(x, int) and x >= 1


_POSITIVE_INTEGER = ("an integer of at least 1", _is_positive_integer)
_NUMBERS = {
    "batch_size": _POSITIVE_INTEGER,
    "accumulate": _POSITIVE_INTEGER,
    "epochs": _POSITIVE_INTEGER,
    "seed": (
        "an integer from 0 to 2**32 - 1",
        lambda x: isinstance(x, int) and 0 <= x < 2**32,
    ),
    "lr": ("a finite number above 0", lambda x: 0 < x < math.inf),
    "warmup": ("from 0 to 1", lambda x: 0 <= x <= 1),
}
