"""What ``larskit doctor`` prints: the machine, the engines, the packages.

Every engine is imported, and its framework with it; of other packages only the version
is read.
"""

import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata

from larskit import engines

_FRAMEWORKS = (
    "brainpy", "chainer", "cupy", "flax", "ivy", "optax", "paddle", "tensorflow",
    "triton",
)  # fmt: skip

Row = tuple[str, str]


def report() -> str:
    """Return the table, one fact a line."""
    # Two extras require the same package: one row.
    rows = dict([*_machine(), *_engines(), *_required(), *_others()])
    width = max(map(len, rows))
    lines = (f"{what:{width}}  {' '.join(fact.split())}" for what, fact in rows.items())
    return "\n".join(lines)


def _machine() -> Iterator[Row]:
    yield "larskit", metadata.version("larskit")
    yield "Python", f"{platform.python_version()}, {sys.executable}"
    yield "platform", platform.platform()


def _engines() -> Iterator[Row]:
    for name, why in engines.availability().items():
        yield f"engine {name}", f"not available: {why}" if why else "available"
    yield from engines.facts().items()


def _required() -> Iterator[Row]:
    """Yield what larskit and its extras require."""
    for line in metadata.requires("larskit") or ():
        requirement, _, marker = line.partition(";")
        name, needed = re.split(r"(?![\w.-])", requirement, maxsplit=1)
        if name == "larskit":
            continue
        try:
            yield name, f"{metadata.version(name)} (needs {needed.strip()})"
        except metadata.PackageNotFoundError:
            extra = re.search(r"extra == .([\w-]+)", marker)
            wanted = f"larskit[{extra[1]}]" if extra else requirement
            yield name, f"not installed: pip install '{wanted}'"


def _others() -> Iterator[Row]:
    """Yield the other installed frameworks, under any distribution name."""
    distributions = metadata.packages_distributions()
    for name in _FRAMEWORKS:
        if name in distributions:
            yield name, metadata.version(distributions[name][0])
