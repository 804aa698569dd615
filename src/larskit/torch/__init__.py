"""LARS for PyTorch: the optimizer, and what helps to use it."""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as why:
    raise ImportError(
        "larskit.torch needs PyTorch: pip install 'larskit[torch]'"
    ) from why

from larskit.torch.backward import StepInBackward, step_in_backward
from larskit.torch.foreign import convert_state_dict
from larskit.torch.groups import param_groups
from larskit.torch.optimizer import LARS

__all__ = [
    "LARS",
    "StepInBackward",
    "convert_state_dict",
    "param_groups",
    "step_in_backward",
]
