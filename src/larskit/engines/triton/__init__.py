"""The rule on a GPU: all layers of a group in three kernels, and no word to the host.

Sums and ratios are float64 and added in a fixed order, so that the results are those of
the reference but for a rounding of the last place, and the same from run to run. With
``TRITON_INTERPRET=1`` in the environment before this is imported, Triton runs the same
kernels on CPU tensors.
"""

from larskit.engines.triton.group import (
    INTERPRETED,
    Group,
    broken,
    lengths,
    step_,
    unavailable,
)

__all__ = ["INTERPRETED", "Group", "broken", "lengths", "step_", "unavailable"]
