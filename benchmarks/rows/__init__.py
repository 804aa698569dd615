"""What is compared: one row of the table for each optimizer and engine.

The modules here make the work of the rows, each in the environment of its name. Every
optimizer has a momentum of 0.9 and a weight decay of 1e-4, and rates so small that the
weights stay what they are however often it steps. Everything is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Shapes = tuple[tuple[int, ...], ...]

SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
LARS: dict[str, Any] = {"lr": 1e-3, **SGD}
SGD_LR = 1e-5
MOVED = 2**25  # floats, for the memory limit


@dataclass
class Work:
    """A step, and what is done before it without being timed."""

    step: Callable[[], Any]
    restore: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Row:
    """How the work of a row is made, and what it must do at least.

    Attributes
    ----------
    kind : {"sgd", "lars", "peer", "memory"}
        "lars" are ours; "memory" is what the limit is measured by.
    environment : str
        Which worker makes it.
    passes : int
        How often a step must read or write an array of the parameters' size, where
        lengths are found before the move. SGD reads w, g, v and writes w, v. LARS reads
        w and g before that; with carried norms, g alone. Without momentum, or as a
        hook, it reads w and g twice and writes one of them. The cache lines that an
        array of its own takes, which are read before they are written, do not count.
    make, options
        A function of the environment's module, and its keyword arguments. It takes the
        shapes and returns the `Work`.
    """

    kind: Literal["sgd", "lars", "peer", "memory"]
    environment: str
    passes: int
    make: str
    options: dict[str, Any] = field(default_factory=dict)


COPY, SCALE = "copy", "scale in place"
BASELINE = "torch SGD (fused)"
ANCHORS = COPY, SCALE, BASELINE  # what all others are measured by
NATIVE = "larskit LARS (native)"
CARRIED = "larskit LARS (native, carried norms)"
FUNCTION, FUNCTION_OUT = "larskit lars_update", "larskit lars_update(out=w)"
OUR_HOOK, THEIR_HOOK = "larskit hook in Chainer", "Chainer hook"
IVY = "ivy lars_update"

CARRY = {"fused": True, "carry_norms": True}
ROWS = {
    COPY: Row("memory", "torch", 2, "copy"),
    SCALE: Row("memory", "torch", 2, "scale"),
    BASELINE: Row("sgd", "torch", 5, "sgd", {"fused": True}),
    "torch SGD (foreach)": Row("sgd", "torch", 5, "sgd", {"foreach": True}),
    "optax sgd (jit)": Row("sgd", "jax", 5, "optax_sgd"),
    NATIVE: Row("lars", "torch", 7, "larskit", {"fused": True}),
    CARRIED: Row("lars", "torch", 6, "larskit", CARRY),
    "larskit LARS (foreach)": Row("lars", "torch", 7, "larskit", {"foreach": True}),
    "larskit LARS (reference)": Row("lars", "torch", 7, "larskit", {"foreach": False}),
    "larskit hook on torch SGD (fused)": Row("lars", "torch", 5 + 5, "hook"),
    "larskit.jax LARS (jit)": Row("lars", "jax", 7, "larskit"),
    FUNCTION: Row("lars", "numpy", 5, "lars_update", {"in_place": False}),
    FUNCTION_OUT: Row("lars", "numpy", 5, "lars_update", {"in_place": True}),
    OUR_HOOK: Row("lars", "chainer", 5, "hook", {"ours": True}),
    "timm Lars": Row("peer", "torch", 7, "timm", {"foreach": False}),
    "timm Lars (foreach)": Row("peer", "torch", 7, "timm", {"foreach": True}),
    "pytorch-optimizer LARS": Row(
        "peer", "torch", 7, "pytorch_optimizer", {"foreach": False}
    ),
    "pytorch-optimizer LARS (foreach)": Row(
        "peer", "torch", 7, "pytorch_optimizer", {"foreach": True}
    ),
    "optax lars (jit)": Row("peer", "jax", 7, "optax_lars"),
    "brainpy LARS (jit)": Row("peer", "brainpy", 7, "lars"),
    THEIR_HOOK: Row("peer", "chainer", 5, "hook", {"ours": False}),
    IVY: Row("peer", "ivy", 5, "lars_update"),
}
