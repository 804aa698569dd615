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
from larskit.engines import Layers
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
    """Do all of a launch except its last part."""
    before = sum(len(caches[0]) for caches in kernel.device_caches.values())
    options = {"num_warps": group._WARPS, "enable_fp_fusion": False}
    bound = kernel.warmup(*arguments, grid=(programs,), **options)
    after = sum(len(caches[0]) for caches in kernel.device_caches.values())
    types = [
        bound.src.signature[name] for name in ("lr_ptr", "scale_ptr", "apply_if_ptr")
    ]
    LAUNCHES.append([kernel.__name__, after > before, types])


def main() -> None:
    no_gpu: Any = NoGpu()
    driver.set_active(no_gpu)
    group.INTERPRETED = True  # CPU tensors replace those of the GPU
    group.refusal_of = lambda device: None
    group._launch = launch
    w, g = ([torch.ones(5000), torch.ones(3)] for _ in range(2))
    v = [torch.zeros_like(x) for x in w]
    every, config = [True, True], Config()
    bound = group.bind(Layers(w, g, v, every, every), config)
    flag, scale = torch.tensor(True), torch.tensor(8.0)
    bound.step_(0.5, config)
    scaled: dict[str, Any] = {"apply_if": flag, "grad_scale": scale}
    steps = (0.25, {}), (torch.tensor(0.25), scaled), (torch.tensor(0.5), scaled)
    for lr, options in steps:
        assert bound.rebind(g)
        bound.step_(lr, config, **options)
    json.dump(LAUNCHES, sys.stdout)


if __name__ == "__main__":
    main()
