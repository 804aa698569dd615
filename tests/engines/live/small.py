"""Takes a few steps on small layers of every kind: something to look at closely.

Run by ``make test-gpu`` under compute-sanitizer.
"""

import torch

from larskit.config import Config
from larskit.engines import triton

DEVICE = "cpu" if triton.INTERPRETED else "cuda"
SIZES = [5000, 2048, 17, 1, 0]


def layers(dtype: torch.dtype, aligned: bool) -> list[torch.Tensor]:
    """Return layers that begin where a vector may, or one element later."""
    skip = 0 if aligned else 1
    return [torch.randn(n + skip).to(DEVICE, dtype)[skip:] for n in SIZES]


def main() -> None:
    config = Config(weight_decay=0.01, nesterov=True)
    flag = torch.ones((), dtype=torch.bool, device=DEVICE)
    scale = torch.full((), 8.0, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for aligned in (True, False):
            w, g, v = (layers(dtype, aligned) for _ in range(3))
            nothing = [None] * len(w)
            group = triton.Group(w, g, nothing, new_buffers=v)
            group.step_(0.5, config, carry=True)
            assert group.aim(g)
            group.step_(0.5, config, scale=scale, permitted=flag)
            assert all(bool(x.isfinite().all()) for x in w + v)


if __name__ == "__main__":
    main()
