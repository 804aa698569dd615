"""Takes a few steps on small layers of every kind: something to look at closely.

Run by ``make test-gpu`` under compute-sanitizer.
"""

import torch

from larskit.config import Config
from larskit.engines import Layers, Switches, triton

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
            w, g = (layers(dtype, aligned) for _ in range(2))
            every = [True] * len(w)
            bound = Layers(w, g, [None] * len(w), every, every)
            group = triton.bind(bound, config, Switches(carry_norms=True))
            group.step_(0.5, config, full_stats=True)
            assert group.rebind(g)
            group.step_(0.5, config, grad_scale=scale, apply_if=flag)
            scaler = triton.bind(
                bound._replace(out=[None] * len(w)), config, scales_gradients=True
            )
            scaled = scaler.scale_gradients(config, grad_scale=scale)
            v = [x for x in (*group.buffers, *scaled) if x is not None]
            assert all(bool(x.isfinite().all()) for x in w + v)


if __name__ == "__main__":
    main()
