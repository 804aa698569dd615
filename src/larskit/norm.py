"""Sums of squares in a fixed order, and the norms of whole arrays.

Norms accumulate in float64, or in the widest dtype that the framework has, and every
engine that orders its own sums adds the blocks as `sum_of_squares` does.
"""

import array_api_compat

from larskit.arrays import (
    Array,
    Namespace,
    cast,
    compiles,
    dtype_name,
    flat,
    namespace,
    norm_dtype,
)

# One block of the sum of squares: 32 rows, added one after the other, of 32 lanes.
ROWS, LANES = 32, 32


def norm(x: Array) -> Array:
    """Return the Euclidean norm of all elements of `x`, as a 0-d array."""
    return root(sum_of_squares(x))


def root(squares: Array) -> Array:
    """Return the square root; its gradient at zero is zero, not NaN."""
    xp = namespace(squares)
    zero = squares <= 0  # never below; and the == of Paddle compares with a tolerance
    root = xp.sqrt(xp.where(zero, xp.ones_like(squares), squares))
    return xp.where(zero, squares, root)


def sum_of_squares(x: Array) -> Array:
    """Add the squares of all elements of `x` in a fixed order, as a 0-d array.

    The elements, in memory order and padded with zeros, are cut into blocks of `ROWS`
    by `LANES`. The rows of a block are added in turn; then the lanes, and last the
    blocks, are folded in halves. Where a compiler orders the sum, its own reduction is
    used.
    """
    xp = namespace(x)
    if dtype_name(x).startswith("complex"):
        return sum_of_squares(xp.real(x)) + sum_of_squares(xp.imag(x))
    if compiles(x):
        x = cast(x, norm_dtype(x))
        return xp.sum(x * x)
    x = flat(x)
    blocks = max(1, -(-x.shape[0] // (ROWS * LANES)))
    used = ROWS if blocks > 1 else max(1, -(-x.shape[0] // LANES))
    x = xp.reshape(_pad(xp, x, blocks * used * LANES), (blocks, used, LANES))
    total = _wide_square(x[:, 0, :])
    for row in range(1, used):
        total = total + _wide_square(x[:, row, :])
    return _fold(xp, _fold(xp, total))


def _wide_square(x: Array) -> Array:
    x = cast(x, norm_dtype(x))
    return x * x


def _pad(xp: Namespace, x: Array, size: int) -> Array:
    missing = size - x.shape[0]
    if missing == 0:
        return x
    zeros = xp.zeros((missing,), dtype=x.dtype, device=array_api_compat.device(x))
    return xp.concat([x, zeros])


def _fold(xp: Namespace, x: Array) -> Array:
    """Add the last axis of `x` up by folding its upper half onto its lower one."""
    while (size := x.shape[-1]) > 1:
        half = (size + 1) // 2
        folded = x[..., : size - half] + x[..., half:]
        if size % 2:
            folded = xp.concat([folded, x[..., size - half : half]], axis=-1)
        x = folded
    return x[..., 0]
