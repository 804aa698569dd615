"""What one training is determined by: names, defaults, help and every message."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast

from larskit import config
from larskit.app import InputError
from larskit.config import Config

Model = Literal["convnet", "convnet-plain", "resnet18", "resnet50"]
Optimizer = Literal["lars", "larc", "sgd", "adamw"]
Schedule = Literal["poly", "cosine", "constant"]
Precision = Literal["float32", "bfloat16", "float16"]


class Recipe(NamedTuple):
    """What an optimizer does where the user says nothing.

    `lr` goes with `trust_coefficient`; `lrs` is the grid of a study, from below to
    above the best rate.
    """

    lr: float
    weight_decay: float
    trust_coefficient: float | None
    lrs: tuple[float, ...]


# The trust coefficient of "larc" is the one of NVIDIA's apex.
RECIPES: dict[str, Recipe] = {
    "lars": Recipe(4.0, 5e-4, 0.01, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)),
    "larc": Recipe(0.8, 5e-4, 0.02, (0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)),
    "sgd": Recipe(0.2, 5e-4, None, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)),
    "adamw": Recipe(0.01, 1e-2, None, (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)),
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _each(what: str) -> str:
    return ", ".join(
        f"{name} {getattr(recipe, what):g}"
        for name, recipe in RECIPES.items()
        if getattr(recipe, what) is not None
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training. Equal settings and equal data give equal weights.

    None for `lr`, `weight_decay` or `trust_coefficient` is replaced by the optimizer's
    own value, see `RECIPES`; a path of data becomes absolute. Raises `InputError` for
    what is out of range.
    """

    data: str = field(
        default="digits",
        metadata=_help(
            "digits (1,797 images of 8x8, inside scikit-learn), a folder of class "
            "folders of images, or an .npz file with x and y"
        ),
    )
    image_size: int | None = field(
        default=None,
        metadata=_help("bring every image to this side (default: a folder's to 32)"),
    )
    model: Model = field(
        default="convnet",
        metadata=_help(
            "the plain one is without batch norm; each process normalises what it "
            "computes at a time"
        ),
    )
    optimizer: Optimizer = field(
        default="lars", metadata=_help("larc is lars with its ratios clipped")
    )
    batch_size: int = field(
        default=64, metadata=_help("images per step, of all processes")
    )
    accumulate: int = field(
        default=1,
        metadata=_help("parts in which a batch is computed, to save memory"),
    )
    lr: float = field(
        default=cast(float, None),
        metadata=_help(
            f"learning rate at its peak (default: {_each('lr')}; that of lars goes "
            f"with a trust coefficient of {RECIPES['lars'].trust_coefficient:g}: only "
            "their product counts)"
        ),
    )
    trust_coefficient: float = field(
        default=cast(float, None),
        metadata=_help(f"eta of LARS (default: {_each('trust_coefficient')})"),
    )
    momentum: float = field(
        default=Config.momentum, metadata=_help("of adamw: the first beta")
    )
    weight_decay: float = field(
        default=cast(float, None),
        metadata=_help(
            f"of what has two or more dimensions (default: {_each('weight_decay')})"
        ),
    )
    schedule: Schedule = field(
        default="poly", metadata=_help("how the rate falls; poly is a square")
    )
    warmup: float = field(
        default=0.1, metadata=_help("part of the steps over which the rate rises")
    )
    epochs: int = field(default=20, metadata=_help("passes over the training images"))
    seed: int = field(
        default=0, metadata=_help("of the weights and of the order of the images")
    )
    precision: Precision = field(
        default="float32", metadata=_help("the other two are mixed; float16: GPU only")
    )
    device: str = field(
        default="auto", metadata=_help("cpu, cuda, cuda:1, ...; auto: a GPU if any")
    )
    threads: int | None = field(
        default=None,
        metadata=_help(
            "of the CPU, for each process (default: all cores, shared; in a study: 1)"
        ),
    )

    def __post_init__(self) -> None:
        """Fill in what the optimizer decides, then check every field."""
        try:
            self._check()
        except (TypeError, ValueError) as why:
            raise InputError(f"--{why}".replace("_", "-", 1)) from why

    def _check(self) -> None:
        for name, options in _WORDS.items():
            config.choice(name, getattr(self, name), options)
        self._fill_in()
        for name, (allowed, holds) in _NUMBERS.items():
            config.number(name, getattr(self, name), allowed, holds)
        Config(momentum=self.momentum, weight_decay=self.weight_decay)
        if self.trust_coefficient is not None:
            Config(trust_coefficient=self.trust_coefficient)
        for name in ("image_size", "threads"):
            if getattr(self, name) is not None:
                config.number(name, getattr(self, name), *_COUNT)
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate {self.accumulate} is more than the {self.batch_size} "
                "images of a batch"
            )

    def _fill_in(self) -> None:
        recipe = RECIPES[self.optimizer]
        if recipe.trust_coefficient is None and self.trust_coefficient is not None:
            raise ValueError(f"trust_coefficient means nothing to {self.optimizer}")
        for name in ("lr", "weight_decay", "trust_coefficient"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(recipe, name))
        if self.data != "digits":
            object.__setattr__(self, "data", str(Path(self.data).resolve()))


_WORDS = {
    "model": Model,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "precision": Precision,
}


def _whole(x: float) -> bool:
    return isinstance(x, int) and x >= 1


_COUNT = ("a whole number of at least 1", _whole)
_NUMBERS = {
    "batch_size": _COUNT,
    "accumulate": _COUNT,
    "epochs": _COUNT,
    "seed": (
        "a whole number from 0 to 2**32",
        lambda x: isinstance(x, int) and 0 <= x < 2**32,
    ),
    "lr": ("a finite number above 0", lambda x: 0 < x < math.inf),
    "warmup": ("from 0 to 1", lambda x: 0 <= x <= 1),
}
