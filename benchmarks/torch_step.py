"""Time one optimizer step over ResNet-50's tensors, side by side in one run.

Every round steps each optimizer once, in turn; the table gives the median of the
rounds and its ratio to torch's own SGD with momentum. Peers that are installed are
timed too: pytorch-optimizer's LARS.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable

import torch

from larskit.app.models import build
from larskit.torch import LARS

Optimizer = torch.optim.Optimizer
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
OURS = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4}


def rows() -> dict[str, Callable[[list[torch.Tensor]], Optimizer]]:
    """Return what is compared; the first row is the measure of the others."""
    found: dict[str, Callable[[list[torch.Tensor]], Optimizer]] = {
        "torch SGD (fused)": lambda p: torch.optim.SGD(p, **SGD, fused=True),
        "torch SGD (foreach)": lambda p: torch.optim.SGD(p, **SGD, foreach=True),
        "larskit LARS (native)": lambda p: LARS(p, **OURS, fused=True),
        "larskit LARS (foreach)": lambda p: LARS(p, **OURS, foreach=True),
        "larskit LARS (reference)": lambda p: LARS(p, **OURS, foreach=False),
    }
    try:
        peer = importlib.import_module("pytorch_optimizer")
    except ModuleNotFoundError:
        return found
    found["pytorch-optimizer LARS"] = lambda p: peer.LARS(p, **OURS, foreach=True)
    return found


def parameters() -> list[torch.Tensor]:
    """Return ResNet-50's parameters with random gradients."""
    torch.manual_seed(0)
    found = list(build("resnet50", channels=3, classes=1000, size=224).parameters())
    for p in found:
        p.grad = torch.randn_like(p) * 1e-2
    return found


def measure(rounds: int) -> dict[str, float]:
    """Return the median seconds of one step of each row."""
    optimizers = {name: make(parameters()) for name, make in rows().items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds + 2):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(all_[2:]) for name, all_ in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    medians = measure(args.rounds)
    measure_of_all = next(iter(medians.values()))
    print(f"ResNet-50, float32, CPU, {args.threads} threads, {args.rounds} rounds")
    for name, median in medians.items():
        print(f"{name:26} {median * 1e3:8.1f} ms {median / measure_of_all:7.2f} x")


if __name__ == "__main__":
    main()
