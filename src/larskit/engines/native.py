"""The rule in C++: a whole step in one call, to the bit as the reference does it.

It takes whole, contiguous NumPy arrays and torch CPU tensors. The loops exist once per
instruction set, and the best that the processor runs is chosen when they are needed.
"""

import os
import sys
from itertools import pairwise
from typing import Any

import numpy as np

from larskit.arrays import dtype_name, framework
from larskit.config import Config
from larskit.rule import Lengths, weight_decay

try:
    from larskit import _native  # pyright: ignore[reportMissingModuleSource]
except ImportError as why:
    _native, _missing = None, str(why)

_DTYPES = {
    "float32": ("float32", "bfloat16", "float16"),
    "float64": ("float64",),
    "bfloat16": ("bfloat16",),
    "float16": ("float16",),
}
_SAME = ("nesterov", "clip", "adapt", "maximize", "zero_guard")
_NUMBERS = ("momentum", "trust_coefficient", "eps", "dampening", "threshold")


def unavailable() -> str | None:
    """Say why this engine cannot run at all; None where it can."""
    if _native is None:
        return f"larskit was installed without its C++ kernel ({_missing})"
    return None


def refusal(weights: list[Any], gradients: list[Any], buffers: list[Any]) -> str | None:
    """Say why this engine cannot step these layers; None where it can."""
    if why := unavailable():
        return why
    for i, (w, g, v) in enumerate(zip(weights, gradients, buffers, strict=True)):
        for x, what in ((w, "weight"), (g, "gradient"), (v, "momentum buffer")):
            if x is not None and (why := _fault(x, w)):
                return f"{what} {i} {why}"
        if dtype_name(g) not in _DTYPES.get(dtype_name(w), ()):
            return f"weight {i} is {dtype_name(w)} and its gradient {dtype_name(g)}"
        if v is not None and dtype_name(v) != dtype_name(w):
            return f"weight {i} is {dtype_name(w)} and its buffer {dtype_name(v)}"
    return _overlap([*weights, *gradients, *(v for v in buffers if v is not None)])


def _fault(x: Any, w: Any) -> str | None:
    if tuple(x.shape) != tuple(w.shape):
        return f"has the shape {tuple(x.shape)}, its weight {tuple(w.shape)}"
    if isinstance(x, np.ndarray):
        whole = x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative
        return None if whole else "is not contiguous"
    if framework(x) != "torch":
        return f"is a {type(x).__name__}, neither a NumPy array nor a torch tensor"
    torch = sys.modules["torch"]
    if type(x) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(x).__name__}, no plain tensor"
    if x.device.type != "cpu":
        return f"is on the device {x.device}"
    if x.layout is not torch.strided or not x.is_contiguous():
        return "is not contiguous"
    return "is a lazy view (conj or neg)" if x.is_conj() or x.is_neg() else None


def _overlap(arrays: list[Any]) -> str | None:
    spans = sorted((_address(x), x.nbytes) for x in arrays if x.nbytes)
    for (start, size), (following, _) in pairwise(spans):
        if start + size > following:
            return "two of the arrays share memory, where threads would collide"
    return None


def lengths(arrays: list[Any]) -> Any:
    """Return the length of each array, as a wide 1-d array."""
    zeros = [_empty_like(x) for x in arrays]
    config = Config(momentum=0.0, denominator="gradient", adapt=False)
    return step_(zeros, arrays, [None] * len(arrays), 0.0, config).denominator


def step_(
    weights: list[Any],
    gradients: list[Any],
    buffers: list[Any],
    lr: Any,
    config: Config,
    norms: tuple[Any, Any] | None = None,
) -> Lengths:
    """Move `weights` and `buffers` in place, see `larskit.engines`."""
    if why := refusal(weights, gradients, buffers):
        raise RuntimeError(f"the native engine cannot take this step: {why}")
    options = _options(weights[0], gradients[0], lr, config)
    first = [v is None for v in buffers]
    if options.has_momentum:
        buffers[:] = [
            _empty_like(w) if v is None else v
            for w, v in zip(weights, buffers, strict=True)
        ]
    assert _native is not None
    columns = _native.step(
        options,
        [_address(w) for w in weights],
        [_address(g) for g in gradients],
        [0 if v is None else _address(v) for v in buffers],
        first,
        [_size(w) for w in weights],
        _threads(weights[0]),
        *([[], []] if norms is None else [list(map(float, n)) for n in norms]),
    )
    _tell_autograd([*weights, *(v for v in buffers if v is not None)])
    return Lengths(*(_vector(column, weights[0]) for column in columns))


def _options(w: Any, g: Any, lr: Any, config: Config) -> Any:
    assert _native is not None
    options = _native.Options()
    options.weights = getattr(_native.Dtype, dtype_name(w))
    options.gradients = getattr(_native.Dtype, dtype_name(g))
    options.denominator = getattr(_native.Denominator, config.denominator)
    options.inside = config.lr_placement == "inside"
    options.lr, options.weight_decay = float(lr), float(weight_decay(config))
    for name in _SAME:
        setattr(options, name, bool(getattr(config, name)))
    for name in _NUMBERS:
        setattr(options, name, float(getattr(config, name)))
    options.has_momentum = options.momentum != 0
    return options


def _address(x: Any) -> int:
    if isinstance(x, np.ndarray):
        return x.__array_interface__["data"][0]
    return x.data_ptr()


def _size(x: Any) -> int:
    return x.size if isinstance(x, np.ndarray) else x.numel()


def _empty_like(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.empty_like(x)
    return sys.modules["torch"].empty_like(x)


def _vector(numbers: list[float], like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.array(numbers)
    torch = sys.modules["torch"]
    return torch.tensor(numbers, dtype=torch.float64)


def _threads(like: Any) -> int:
    if isinstance(like, np.ndarray):
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return sys.modules["torch"].get_num_threads()


def _tell_autograd(written: list[Any]) -> None:
    """Have autograd see that tensors changed behind its back."""
    if isinstance(written[0], np.ndarray):
        return
    increment_version = sys.modules["torch"].autograd.graph.increment_version
    for x in written:
        increment_version(x)
