"""Compare an ordinary training step with one that steps in the backward pass.

A network of `LAYERS` linear layers and a batch of `BATCH`: forward, backward, step.
Each way runs in its own process, so that its peak resident memory (Linux) is its own.
The processes take turns, and the ratio is the median over the turns::

    .venv/bin/python benchmarks/backward.py

The C library (glibc) is set to return freed memory to the system. By default it keeps
freed memory between other allocations, which then counts as resident.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

LAYERS, WIDTH, BATCH = 24, 2048, 32
WAYS = ("ordinary", "in backward")


def serve(way: str, pipe: Any) -> None:
    """Train one step per message; answer with its seconds and the peak memory."""
    import torch

    from larskit.torch import LARS, step_in_backward

    torch.set_num_threads(2)
    torch.manual_seed(0)
    linear = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*linear)
    optimizer = LARS(model.parameters(), lr=0.01)
    if way == "in backward":
        step_in_backward(optimizer)
    x = torch.randn(BATCH, WIDTH)
    while pipe.recv() == "step":
        start = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((time.perf_counter() - start, peak()))


def peak() -> int:
    """Return the highest resident size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM"))


def measure(rounds: int) -> dict[str, list[tuple[float, int]]]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    pipes = {}
    for way in WAYS:
        pipes[way], theirs = context.Pipe()
        context.Process(target=serve, args=(way, theirs), daemon=True).start()
    for _ in range(rounds):
        for way, pipe in pipes.items():
            pipe.send("step")
            found[way].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send("stop")
    return found


def main() -> None:
    """Measure both ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    found = measure(parser.parse_args().rounds)
    gradients = LAYERS * (WIDTH + 1) * WIDTH * 4
    print(f"{LAYERS} layers, batch {BATCH}, gradients of {gradients / 2**20:.0f} MiB")
    ordinary = [seconds for seconds, _ in found["ordinary"]][2:]
    for way, steps in found.items():
        times = [seconds for seconds, _ in steps][2:]
        ratio = statistics.median(b / a for a, b in zip(ordinary, times, strict=True))
        print(
            f"{way:12} {statistics.median(times) * 1e3:8.1f} ms {ratio:6.2f} x, "
            f"peak {steps[-1][1] / 2**20:7.0f} MiB"
        )


if __name__ == "__main__":
    main()
