"""What loss scaling, skipped steps and CUDA graphs ask of the engines of torch."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, TypeVar

from larskit.arrays import Array, Scalar, framework
from larskit.config import Config, is_zero
from larskit.engines.contract import Arrays, Buffers, Layers, Switches

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


def beside(x: _T, like: Array) -> _T:
    """Return `x`, a tensor on the device of `like`; what is no tensor as it is."""
    if not _is_tensor(x) or x.device == like.device:
        return x
    # The stream orders this copy before whatever reads it: the host need not wait.
    return x.to(like.device, non_blocking=True)


def config_beside(config: Config, like: Array) -> Config:
    """Return `config` with its tensors on the device of `like`."""
    values = vars(config)
    if not any(map(_is_tensor, values.values())):
        return config
    return Config(**{name: beside(x, like) for name, x in values.items()})


def unscaled(gradients: Arrays, grad_scale: Array | None) -> Arrays:
    """Return new gradients, divided by the scale of the loss."""
    if grad_scale is None:
        return gradients
    # Rounded as in `torch.amp.GradScaler.unscale_`.
    torch = sys.modules["torch"]
    inverse = beside(grad_scale, gradients[0]).double().reciprocal().float()
    return torch._foreach_mul(list(gradients), inverse)


def decided(
    apply_if: bool | Array,
    layers: Layers,
    buffers: Buffers,
    config: Config,
    switches: Switches,
) -> bool | Array:
    """Return `apply_if` as a bool where the host may or must know it, else a tensor."""
    if not _is_tensor(apply_if):
        return bool(apply_if)
    # A flag on the CPU is read without waiting, but a captured step reads it only once.
    is_here = apply_if.device.type == "cpu" and not switches.capturable
    if is_here or dampens_first(buffers, config):
        return bool(apply_if)
    return beside(apply_if, layers.weights[0])


def dampens_first(buffers: Buffers, config: Config) -> bool:
    """Whether a first buffer differs from what one of zeros would become.

    The host must then know whether a step is applied. A step that the device skips has
    to make buffers of zeros, which the next step would dampen.
    """
    starts = not is_zero(config.momentum) and any(v is None for v in buffers)
    return starts and not is_zero(config.dampening)


def is_capturing(device: "torch.device") -> bool:
    """Whether the work that a torch device is given goes into a CUDA graph."""
    cuda = sys.modules["torch"].cuda
    return device.type == "cuda" and cuda.is_current_stream_capturing()


def integers(values: Sequence[int], device: "torch.device") -> Array:
    """Return whole numbers as a torch tensor, without waiting for its device.

    While a CUDA graph is captured they become part of it, by value: a copy would read
    host memory again whenever the graph is replayed.
    """
    torch = sys.modules["torch"]
    if not is_capturing(device):
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
    x = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(x), [int(value) for value in values])
    return x


def check_capture(
    layers: Layers, buffers: Buffers, lr: Scalar, config: Config, switches: Switches
) -> None:
    """Refuse a step that a CUDA graph could not repeat, see `contract.Group.check`."""
    w = layers.weights[0]
    # In every step, not only in a captured one: the first step must say so.
    if switches.capturable and _is_tensor(lr) and lr.device != w.device:
        raise RuntimeError(
            f"capturable=True, but lr is on the device {lr.device}, where a captured "
            f"step would read it only once: move it to {w.device}"
        )
    if framework(w) != "torch" or not is_capturing(w.device):
        return
    if not switches.capturable:
        raise RuntimeError(
            "the step is being captured in a CUDA graph, but capturable=False: make "
            "the optimizer with capturable=True"
        )
    if not is_zero(config.momentum) and any(v is None for v in buffers):
        raise RuntimeError(
            "the step is being captured in a CUDA graph before there are momentum "
            "buffers, which the first step makes: take one step before the capture"
        )


def _is_tensor(x: object) -> TypeGuard[Array]:
    # By name, because torch need not be installed.
    return framework(x) == "torch"
