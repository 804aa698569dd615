"""The rule applied leaf by leaf, to any array that can be written: the oracle."""

from typing import Any

from larskit import rule
from larskit.arrays import namespace, write
from larskit.config import Config, is_number
from larskit.rule import Lengths


def lengths(arrays: list[Any]) -> Any:
    """Return the length of each array, as a wide 1-d array."""
    return _stack([rule.norm(x) for x in arrays])


def step_(
    weights: list[Any],
    gradients: list[Any],
    buffers: list[Any],
    lr: Any,
    config: Config,
    norms: tuple[Any, Any] | None = None,
) -> Lengths:
    """Move `weights` and `buffers` in place, see `larskit.engines`."""
    measured = []
    for i, (w, g, v) in enumerate(zip(weights, gradients, buffers, strict=True)):
        known = None if norms is None else (norms[0][i], norms[1][i])
        new_w, new_v, found = rule.update(w, g, v, lr, config, known)
        write(w, new_w, "a weight")
        if v is not None:
            write(v, new_v, "a momentum buffer")
        elif not (is_number(config.momentum) and config.momentum == 0):
            buffers[i] = new_v
        measured.append(found)
    return Lengths(*(_stack(list(column)) for column in zip(*measured, strict=True)))


def _stack(scalars: list[Any]) -> Any:
    return namespace(scalars[0]).stack(scalars)
