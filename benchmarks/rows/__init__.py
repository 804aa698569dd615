"""The rows of the tables: each optimizer and engine that is compared.

Each module here makes the work of rows in the environment of its name. Every optimizer
has a momentum of 0.9, a weight decay of 1e-4 (which a hook applies in place of its
optimizer), and a learning rate so small that the weights stay nearly the same over all
steps. Everything is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Shapes = tuple[tuple[int, ...], ...]

SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}
LARS: dict[str, Any] = {"lr": 1e-3, **SGD}
SGD_LR = 1e-5
MOVED = 2**25  # float32 elements, for the memory limit
PRODUCT, ELEMENTWISE = 700, 2**22  # the rows of a matrix and the elements of `backward`


@dataclass
class Work:
    """A step, and what runs before it without being timed.

    `backward` is the kind of work that a backward pass ends with: a matrix product and
    an elementwise operation, on the threads of the framework.
    """

    step: Callable[[], Any]
    restore: Callable[[], Any] = lambda: None
    backward: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Row:
    """How the work of a row is made, and its least number of memory passes.

    Attributes
    ----------
    kind : {"sgd", "lars", "other", "memory"}
        "lars" is larskit, "other" another implementation; "memory" measures the memory
        limit.
    environment : str
        The worker that makes it.
    passes : int
        Reads and writes of arrays of the parameters' size, where the norms are computed
        before the update. SGD reads w, g, v and writes w, v. LARS first reads w and g;
        with carried norms, only g. Without momentum, and as a hook, it reads w and g
        twice and writes one of them. Reads of cache lines that are then overwritten do
        not count.
    make, options
        A function in the environment's module that takes the shapes and returns the
        `Work`, and its keyword arguments.
    """

    kind: Literal["sgd", "lars", "other", "memory"]
    environment: str
    passes: int
    make: str
    options: dict[str, Any] = field(default_factory=dict)


COPY, SCALE = "copy", "scale in place"
BASELINE = "torch SGD (fused)"
ANCHORS = COPY, SCALE, BASELINE  # which the ratios and the memory limit need
NATIVE = "larskit LARS (native)"
CARRIED = "larskit LARS (native, carried norms)"
FUNCTION, FUNCTION_OUT = "larskit lars_update", "larskit lars_update(out=w)"
HOOK = "larskit hook on torch SGD (fused)"
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
    HOOK: Row("lars", "torch", 5 + 5, "hook"),
    "larskit.jax LARS (jit)": Row("lars", "jax", 7, "larskit"),
    FUNCTION: Row("lars", "numpy", 5, "lars_update", {"in_place": False}),
    FUNCTION_OUT: Row("lars", "numpy", 5, "lars_update", {"in_place": True}),
    OUR_HOOK: Row("lars", "chainer", 5, "hook", {"ours": True}),
    "timm Lars": Row("other", "torch", 7, "timm", {"foreach": False}),
    "timm Lars (foreach)": Row("other", "torch", 7, "timm", {"foreach": True}),
    "pytorch-optimizer LARS": Row(
        "other", "torch", 7, "pytorch_optimizer", {"foreach": False}
    ),
    "pytorch-optimizer LARS (foreach)": Row(
        "other", "torch", 7, "pytorch_optimizer", {"foreach": True}
    ),
    "optax lars (jit)": Row("other", "jax", 7, "optax_lars"),
    "brainpy LARS (jit)": Row("other", "brainpy", 7, "lars"),
    THEIR_HOOK: Row("other", "chainer", 5, "hook", {"ours": False}),
    IVY: Row("other", "ivy", 5, "lars_update"),
}
