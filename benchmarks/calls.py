"""Count the Python calls of one steady step: what a step costs before any arithmetic.

::

    .venv/bin/python benchmarks/calls.py

A call counts if the function is larskit's own. In Python 3.11 comprehensions, and each
resumption of a generator, are calls too. The depth is the number of larskit's frames on
the stack. The eight parameters are the weights and biases of four linear layers.
Torch's fused SGD is measured for comparison, by the calls in `torch.optim`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import larskit
from larskit import GradientLARS
from larskit.torch import LARS

LARSKIT = str(Path(larskit.__file__).parent)
TORCH_OPTIM = str(Path(torch.__file__).parent / "optim")
WARM_UP = 3


def calls(step: Callable[[], Any], folder: str) -> tuple[int, int]:
    """Return the calls of functions in a folder, and their greatest depth."""
    count = deepest = depth = 0

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal count, deepest, depth
        if event not in ("call", "return"):
            return
        if not frame.f_code.co_filename.startswith(folder):
            return
        depth += 1 if event == "call" else -1
        count += event == "call"
        deepest = max(deepest, depth)

    sys.setprofile(look)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count, deepest


def optimizers(params: list[torch.nn.Parameter]) -> dict[str, tuple[Any, str]]:
    """Return the optimizers, and the folder whose functions count."""
    hooked = torch.optim.SGD(params, 1e-5, 0.9, fused=True)
    GradientLARS(weight_decay=1e-4).attach(hooked)
    sgd = torch.optim.SGD(params, 1e-5, 0.9, fused=True)
    return {
        "torch SGD (fused)": (sgd, TORCH_OPTIM),
        "larskit LARS (native)": (LARS(params, 1e-3, weight_decay=1e-4), LARSKIT),
        "larskit hook on torch SGD (fused)": (hooked, LARSKIT),
    }


def main() -> None:
    """Count the calls, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    params = [p for _ in range(4) for p in torch.nn.Linear(64, 64).parameters()]
    for p in params:
        p.grad = torch.ones_like(p)
    print("| a steady step over 8 parameters | calls | frames deep |\n|---|---|---|")
    for name, (optimizer, folder) in optimizers(params).items():
        for _ in range(WARM_UP):
            optimizer.step()
        print("| {} | {} | {} |".format(name, *calls(optimizer.step, folder)))


if __name__ == "__main__":
    main()
