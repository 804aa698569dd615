"""Where the rule runs: one contract, four engines, and the choice between them.

`choose` binds layers to the first engine that takes them and returns its `Group`. The
reference engine is the specification of the others: the rule, layer by layer, on any
array. foreach works on lists of torch tensors, native in C++ on the CPU, Triton in
kernels on the GPU. `larskit.engines.contract` says what each of them must do.
"""

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from larskit.arrays import Array, framework
from larskit.config import Config
from larskit.engines.conditional import integers
from larskit.engines.contract import (
    DEFAULT,
    Engine,
    Group,
    Layers,
    Switches,
    Unsupported,
)

__all__ = [
    "DEFAULT",
    "Engine",
    "Group",
    "Layers",
    "Switches",
    "Unsupported",
    "array_scaler",
    "availability",
    "choose",
    "divides_grad_scale",
    "facts",
    "integers",
    "is_traceable",
]

NAMES = ("reference", "foreach", "native", "triton")
GPU = "cuda"  # the type of the devices that Triton serves


def choose(
    layers: Layers,
    config: Config,
    switches: Switches = DEFAULT,
    *,
    scales_gradients: bool = False,
    former: Iterable[Group] = (),
) -> Group:
    """Bind layers to the engine that the switches ask for, else to the fastest.

    Parameters
    ----------
    layers, config, switches, scales_gradients, former
        See `larskit.engines.contract.Engine.bind`.

    Returns
    -------
    Group
        Of the reference engine where no other takes the layers, and where the switches
        permit it.

    Raises
    ------
    Unsupported
        With the reason of each engine that the switches permit. Nothing was written.
    """
    if _is_traced(layers.weights[0]):
        from larskit.engines import foreach  # its operations become part of the graph

        return foreach.bind(layers, config, switches, scales_gradients=scales_gradients)
    reasons: dict[str, str] = {}
    for name in _candidates(layers.weights[0], switches):
        try:
            return _engine(name).bind(
                layers,
                config,
                switches,
                scales_gradients=scales_gradients,
                former=former,
            )
        except Unsupported as why:
            reasons[name] = str(why)
    raise Unsupported(next(iter(reasons.values())), reasons)


def availability() -> dict[str, str | None]:
    """Return for each engine why it cannot run here at all; None where it can.

    Every engine is imported, and its framework with it: nothing else tells exactly.
    """
    return {name: _unavailable(name) for name in NAMES}


def facts() -> dict[str, str]:
    """Return what the engines that can run here use of the machine."""
    able = [name for name, why in availability().items() if why is None]
    return {what: fact for name in able for what, fact in _engine(name).facts().items()}


def divides_grad_scale(x: Array, switches: Switches) -> bool:
    """Whether a step of `x` divides by the scale of `torch.amp.GradScaler` itself.

    The scaler then waits for nothing: it leaves its scale, and whether a gradient is
    infinite, to the optimizer.
    """
    return bool(switches.fused) and _fused_engine(x) == "triton"


def is_traceable(x: Array, switches: Switches) -> bool:
    """Whether `torch.compile` may trace a step of `x`: if foreach is its engine."""
    if switches.fused or switches.carry_norms or switches.differentiable:
        return False
    if switches.foreach is None:
        return x.device.type != "cpu"  # where the native engine is the default
    return switches.foreach


def array_scaler(config: Config) -> Callable[[Array, Array], bool]:
    """Return a function that scales one NumPy gradient in place, without a group.

    It returns False, and has done nothing, where it cannot: bind a group then.
    """
    from larskit.engines import native

    return native.ArrayScaler(config)


def _candidates(w: Array, switches: Switches) -> tuple[str, ...]:
    """Return the engines to try, in order."""
    if framework(w) != "torch":
        return "native", "reference"
    if switches.fused or switches.carry_norms:
        return (_fused_engine(w),)
    if switches.differentiable or switches.foreach is False:
        return ("reference",)
    if switches.foreach:
        return ("foreach",)
    fused = () if switches.fused is False else (_fused_engine(w),)
    return (*fused, "foreach", "reference")


def _is_traced(w: Array) -> bool:
    return framework(w) == "torch" and sys.modules["torch"].compiler.is_compiling()


def _fused_engine(w: Array) -> str:
    return "triton" if w.device.type == GPU else "native"


def _engine(name: str) -> Engine:
    try:
        engine: Any = import_module(f"larskit.engines.{name}")
        return engine
    except ModuleNotFoundError as why:
        raise Unsupported(_not_installed(why)) from None


def _unavailable(name: str) -> str | None:
    try:
        return _engine(name).unavailable()
    except Exception as why:  # a framework that cannot be loaded raises what it likes
        return (
            str(why) if isinstance(why, Unsupported) else f"{type(why).__name__}: {why}"
        )


def _not_installed(why: ModuleNotFoundError) -> str:
    comes_with = {"triton": ", which comes with PyTorch for GPUs"}
    return f"{why.name} is not installed{comes_with.get(why.name or '', '')}"
