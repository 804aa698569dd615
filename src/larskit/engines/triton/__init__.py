"""The rule on a GPU: all layers of a group in three kernels, without synchronization.

Norms and ratios are float64 and added in a fixed order, so that the results are those
of the reference within 2 ulp, and the same in every run. With ``TRITON_INTERPRET=1`` in
the environment before this is imported, Triton runs the same kernels on CPU tensors.
"""

from larskit.engines.triton.group import (
    INTERPRETED,
    Group,
    bind,
    facts,
    refusal_of,
    unavailable,
)

__all__ = ["INTERPRETED", "Group", "bind", "facts", "refusal_of", "unavailable"]
