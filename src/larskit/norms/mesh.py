"""The norms of layers inside `jax.shard_map`, where each device sees its own shard.

Nothing of this is needed under `jax.jit` with sharded arrays: there the compiler adds
the shards up.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[str, ...]


def summed(squares: Sequence[Any], axes: Sequence[Axes]) -> list[Any]:
    """Add sums of squares up over the mesh axes that their layers are sharded over.

    Parameters
    ----------
    squares : sequence of array
        Of the shards, of any shapes.
    axes : sequence of tuple of str
        For each the names of those axes; none for a layer that is whole everywhere.

    Returns
    -------
    list of array
        One all-reduce for each distinct set of axes.
    """
    found = list(squares)
    for names in dict.fromkeys(frozenset(own) for own in axes if own):
        rows = [i for i, own in enumerate(axes) if frozenset(own) == names]
        flat = jnp.concatenate([squares[i].reshape(-1) for i in rows])
        total = jax.lax.psum(flat, tuple(sorted(names)))
        ends = np.cumsum([squares[i].size for i in rows])[:-1]
        for i, part in zip(rows, jnp.split(total, ends), strict=True):
            found[i] = part.reshape(squares[i].shape)
    return found
