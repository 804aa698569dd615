"""Takes steps up to the launch: binds the arguments and compiles for a GPU that is not.

Run by test_triton_compiled.py. Writes a JSON array: for each launch the kernel, whether
it was compiled for it, and the types of the arguments that may differ.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from larskit.config import Config
from larskit.engines.triton import group

LAUNCHES: list[Any] = []


class NoGpu:
    """What Triton asks a driver before it launches something."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launch(kernel: Any, programs: int, *arguments: Any) -> None:
    """Do what a launch does, but for the last thing."""
    before = sum(len(caches[0]) for caches in kernel.device_caches.values())
    options = {"num_warps": group._WARPS, "enable_fp_fusion": False}
    bound = kernel.warmup(*arguments, grid=(programs,), **options)
    after = sum(len(caches[0]) for caches in kernel.device_caches.values())
    types = [bound.src.signature[name] for name in ("rate", "scale", "permitted")]
    LAUNCHES.append([kernel.__name__, after > before, types])


def main() -> None:
    no_gpu: Any = NoGpu()
    driver.set_active(no_gpu)
    group.INTERPRETED = True  # CPU tensors stand for those of the GPU
    group.broken = lambda device: None
    group._launch = launch
    w, g = ([torch.ones(5000), torch.ones(3)] for _ in range(2))
    kept = [torch.empty_like(x) for x in w]
    layers = group.Group(w, g, [None, None], kept)
    flag, scale = torch.tensor(True), torch.tensor(8.0)
    layers.step_(0.5, Config())
    scaled: dict[str, Any] = {"permitted": flag, "scale": scale}
    steps = (0.25, {}), (torch.tensor(0.25), scaled), (torch.tensor(0.5), scaled)
    for lr, options in steps:
        assert layers.aim(g)
        layers.step_(lr, Config(), **options)
    json.dump(LAUNCHES, sys.stdout)


if __name__ == "__main__":
    main()
