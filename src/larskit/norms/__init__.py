"""The norms of layers that are sharded over processes or devices.

`dtensor` has those of torch, `mesh` those of JAX inside `jax.shard_map`.
"""

from typing import TYPE_CHECKING, TypeGuard

from larskit.arrays import Array, check_array, check_shape

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_sharded(x: object) -> "TypeGuard[DTensor]":
    """Whether `x` is a DTensor of torch: a shard of a layer, or a replica."""
    return type(x).__name__ == "DTensor"


def check_layer(p: "Tensor", name: str) -> None:
    """Refuse a torch parameter whose norm cannot be computed.

    Raises
    ------
    TypeError
        It is part of FSDP1's flat parameter, or a Partial DTensor.
    """
    if is_sharded(p) and any(placement.is_partial() for placement in p.placements):
        raise TypeError(
            f"{name} is a DTensor placed as {p.placements}, and a Partial tensor has "
            "no norm before it is reduced: shard or replicate it"
        )
    if getattr(p, "_fsdp_flattened", False):  # also with use_orig_params=True
        raise TypeError(
            f"{name} is part of FSDP1's flat parameter, which concatenates layers and "
            "cuts them anywhere, so that no layer has a norm of its own: use "
            "fully_shard (FSDP2)"
        )


def check_gradient(w: Array, g: Array, w_name: str, g_name: str) -> None:
    """Refuse a gradient that does not belong to its weights.

    Raises
    ------
    TypeError, ValueError
        One of them is no array of a floating dtype, or they differ in shape or in the
        mesh that they are distributed over.
    """
    check_array(w, w_name)
    check_array(g, g_name)
    check_shape(g, w, g_name, w_name)
    if _mesh(w) != _mesh(g):
        raise TypeError(
            f"{g_name} is a {type(g).__name__} on the mesh {_mesh(g)}, but {w_name} a "
            f"{type(w).__name__} on {_mesh(w)}: distribute both over one mesh"
        )


def _mesh(x: Array) -> "DeviceMesh | None":
    return x.device_mesh if is_sharded(x) else None
