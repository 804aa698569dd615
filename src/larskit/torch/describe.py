"""What an optimizer does with each layer, in words: `repr` and `LARS.describe`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from larskit import config as _config
from larskit.config import PER_LAYER
from larskit.torch.options import Groups, ParamGroup, is_selected
from larskit.torch.plan import Plan, name_of

if TYPE_CHECKING:
    from larskit.arrays import Scalar

_SHOWN = 6  # names in a repr


class _Row(NamedTuple):
    name: str
    shape: str
    adapted: bool
    decayed: bool
    engine: str
    note: str


def summary(kind: str, groups: Groups) -> str:
    """Return what torch's optimizers show of a group, and the layers excluded.

    Of the hyper-parameters, those that are not the default.
    """
    lines = []
    for index, group in enumerate(groups):
        rows = list(_rows(index, group, {}))
        lines.append(f"Parameter Group {index}")
        lines += (f"    {name}: {x}" for name, x in _options(group))
        lines.append(f"    layers: {len(rows)}")
        for what, names in (
            ("not adapted", [row.name for row in rows if not row.adapted]),
            ("not decayed", [row.name for row in rows if not row.decayed]),
        ):
            if names:
                lines.append(f"    {what} ({len(names)}): {_listed(names)}")
    return "\n".join([f"{kind} (", *lines, ")"])


def table(groups: Groups, plans: list[Plan]) -> str:
    """Return one line for each layer, under a heading."""
    engines = {
        p: bucket.group.engine
        for plan in plans
        for bucket in plan.buckets
        for p in bucket.params
    }
    rows = [
        [
            row.name,
            row.shape,
            _yes(row.adapted),
            _yes(row.decayed),
            row.engine,
            row.note,
        ]
        for index, group in enumerate(groups)
        for row in _rows(index, group, engines)
    ]
    heading = ["layer", "shape", "adapted", "decayed", "engine", ""]
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = (
        "  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True))
        for row in (heading, *rows)
    )
    return "\n".join(map(str.rstrip, lines))


def _rows(index: int, group: ParamGroup, engines: dict[Tensor, str]) -> Iterator[_Row]:
    for place, p in enumerate(group["params"]):
        adapted, decayed = (is_selected(group, what, place) for what in PER_LAYER)
        yield _Row(
            name_of(index, group, place),
            "x".join(map(str, p.shape)) or "scalar",
            adapted,
            decayed,
            engines.get(p, "none yet"),
            "" if adapted else _at_raw_rate(group["lr"]),
        )


def _at_raw_rate(lr: "Scalar") -> str:
    """Warn of a rate that is made for adapted layers; a tensor is not looked at."""
    if isinstance(lr, Tensor) or lr <= 1:
        return ""
    return f"raw rate {lr:g}: lower it"


def _options(group: ParamGroup) -> "Iterator[tuple[str, Scalar]]":
    """Yield the learning rate, and what is not the default."""
    defaults = vars(_config.Config())
    yield "lr", group["lr"]
    for name, default in defaults.items():
        if name in (*PER_LAYER, "zero_guard"):
            continue
        if isinstance(group[name], Tensor) or group[name] != default:
            yield name, group[name]


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
