"""The norms of torch's sharded layers, with one all-reduce for a whole mesh.

A layer has a slot of its own in what is reduced, whether this process holds a shard of
it or not: the processes then always agree on what they reduce.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from larskit.arrays import norm_dtype
from larskit.engines import integers


class ShardedNorms:
    """Sharded layers whose norms the processes compute together.

    Every process contributes the norms of its own shards; one all-reduce for each mesh
    adds up their squares. Indices and masks are kept on the device of the layers, so
    that `all_reduce` waits for nothing.

    Parameters
    ----------
    layers : sequence of DTensor
        Parameters, in the same order on every process.
    """

    def __init__(self, layers: Sequence[DTensor]) -> None:
        """Find out which processes hold what."""
        like = layers[0].to_local()
        self.device = like.device
        self._dtype = getattr(torch, norm_dtype(like))
        self._count = len(layers)
        self._meshes = []
        for mesh in dict.fromkeys(layer.device_mesh for layer in layers):
            rows = [i for i, layer in enumerate(layers) if layer.device_mesh == mesh]
            dims = {dim for i in rows for dim in _sharded_dims(layers[i])}
            counted = [_is_counted_here(layers[i], dims) for i in rows]
            index, mask = (integers(x, self.device) for x in (rows, counted))
            self._meshes.append((mesh, tuple(sorted(dims)), index, mask > 0))

    def zeros(self) -> Tensor:
        """Return ``(|w|, q)`` of zero for each layer, as two rows."""
        shape = 2, self._count
        return torch.zeros(shape, dtype=self._dtype, device=self.device)

    def all_reduce(self, own: Tensor) -> Tensor:
        """Return the norms of whole layers, given those of the shards held here."""
        found = torch.empty_like(own)
        for mesh, dims, index, counted in self._meshes:
            squares = (own.index_select(1, index) ** 2).where(counted, 0.0)
            for group in _groups(mesh, dims):
                dist.all_reduce(squares, group=group)
            found.index_copy_(1, index, squares.sqrt())
        return found


def shard(x: DTensor, layer: DTensor) -> Tensor:
    """Return what this process holds of `x`, added up and placed as `layer` is.

    Raises
    ------
    ValueError
        If `x` is on another mesh.
    """
    if x.device_mesh != layer.device_mesh:
        raise ValueError(
            f"a gradient of the shape {tuple(x.shape)} is on {x.device_mesh}, but "
            f"its parameter on {layer.device_mesh}: distribute both over one mesh"
        )
    if x.placements != layer.placements:
        x = x.redistribute(placements=layer.placements)
    return x.to_local().contiguous()  # an uneven shard may have gaps


def assemble(shard: Tensor, layer: DTensor) -> DTensor:
    """Return the tensor, placed as `layer` is, of which this process holds `shard`."""
    whole = {"shape": layer.shape, "stride": layer.stride()}
    return DTensor.from_local(
        shard, layer.device_mesh, layer.placements, run_check=False, **whole
    )


def _sharded_dims(layer: DTensor) -> set[int]:
    """Return the dimensions of its mesh over which a layer is spread."""
    return {
        dim
        for dim, placement in enumerate(layer.placements)
        if not placement.is_replicate()  # FSDP2 has a kind of shards of its own
    }


def _is_counted_here(layer: DTensor, sharded: set[int]) -> bool:
    """Whether this process is the first of those that hold the same shard."""
    here = layer.device_mesh.get_coordinate()
    return here is not None and all(
        not placement.is_replicate() or here[dim] == 0
        for dim, placement in enumerate(layer.placements)
        if dim in sharded
    )


def _groups(mesh: DeviceMesh, dims: tuple[int, ...]) -> list[dist.ProcessGroup]:
    """Return the processes to sum over: one group, unless the mesh has no names."""
    names = mesh.mesh_dim_names
    if len(dims) < 2 or names is None:
        return [mesh.get_group(dim) for dim in dims]
    part = mesh if len(dims) == mesh.ndim else mesh[tuple(names[dim] for dim in dims)]
    return [part._flatten().get_group()]
