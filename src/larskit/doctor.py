"""What ``larskit doctor`` prints: the kernels, the engines, the packages.

An engine is imported, and its framework with it, since nothing else tells exactly why
it cannot run; of every other package only the version is read.
"""

import pkgutil
import platform
import re
import sys
from collections.abc import Iterator
from importlib import import_module, metadata

from larskit import engines

_FRAMEWORKS = (
    "brainpy", "chainer", "cupy", "flax", "ivy", "optax", "paddle", "tensorflow",
    "triton",
)  # fmt: skip

Row = tuple[str, str]


def report() -> str:
    """Return the table, one fact a line."""
    rows = [*_machine(), *_engines(), *_kernel(), *_gpus(), *_required(), *_others()]
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:{width}}  {' '.join(fact.split())}" for what, fact in rows)


def _machine() -> Iterator[Row]:
    yield "larskit", metadata.version("larskit")
    yield "Python", f"{platform.python_version()}, {sys.executable}"
    yield "platform", platform.platform()


def _engines() -> Iterator[Row]:
    for module in pkgutil.iter_modules(engines.__path__):
        why = _unavailable(module.name)
        fact = f"not available: {why}" if why else "available"
        yield f"engine {module.name}", fact


def _unavailable(engine: str) -> str | None:
    try:
        module = import_module(f"larskit.engines.{engine}")
    except ModuleNotFoundError as why:
        return f"{why.name} is not installed"
    except Exception as why:  # a broken framework raises what it likes
        return f"{type(why).__name__}: {why}"
    return module.unavailable() if hasattr(module, "unavailable") else None


def _kernel() -> Iterator[Row]:
    if _unavailable("native"):
        yield "kernel", "none: install larskit again where there is a C++ compiler"
        return
    from larskit.engines import native

    yield "kernel", native.variant()
    try:
        threads = f"{native.threads()} for NumPy arrays"
    except ValueError as why:
        threads = str(why)
    if torch := sys.modules.get("torch"):
        threads += f", {native.threads(torch.empty(0))} for torch tensors"
    yield "threads", threads


def _gpus() -> Iterator[Row]:
    """Yield the devices that Triton's kernels run on."""
    if _unavailable("triton"):
        return
    import torch

    from larskit.engines import triton

    if triton.INTERPRETED:
        yield "GPU", "none: TRITON_INTERPRET=1 has Triton run its kernels on the CPU"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        why = triton.broken(torch.device("cuda", index))
        yield (
            f"GPU {index}",
            f"{device.name}, {device.major}.{device.minor}, {memory}"
            + (f", but {why}" if why else ""),
        )


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
    """Yield the other frameworks that are there, whatever distribution brought them."""
    distributions = metadata.packages_distributions()
    for name in _FRAMEWORKS:
        if name in distributions:
            yield name, metadata.version(distributions[name][0])
