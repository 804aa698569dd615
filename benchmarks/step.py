"""Time one optimizer step: larskit, torch's SGD, and every LARS that can be installed.

The parameters are those of ResNet-50 and ViT-B/16, and 200 small tensors; one run for
each set of shapes::

    make bench
    .venv/bin/python benchmarks/step.py --rounds 5 --shapes ResNet-50 --rows native SGD

Each round steps every row (see `worker.step`), in a new random order, and divides its
time by that of ``torch.optim.SGD(fused=True)`` in the same round. The table shows the
medians of these ratios: first as a training loop sees them, right after the kind of
work that a backward pass ends with, then alone, step after step. Each other
implementation runs in the environment of its package, in a process that waits while
others step. Missing environments are created first, which needs the network. All rows
use the same cores, as many as ``--threads``. Linux only.

The memory limit is the time that the memory passes of a row would take at the speed of
a large copy, or of scaling a large array in place if that is faster. Both speeds are
measured in the same rounds, and each row shows the speed of a copy in its rounds. The
small tensors stay in the caches, which are faster still, because a short step is
repeated for 0.05 s. The extra memory is the increase of the resident size of a fresh
process during one step.

Torch's threads wait for each other, so that other work on the same cores slows them
down more than in proportion; the result says how much other work there was. With
``--busy 1`` a process works all the time on one of the cores, as a data loader does.
ViT-B/16 with all rows needs 20 GB of memory.

Written to ``benchmarks/results``: ``step.md``, ``step.json`` and ``step.png``.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import ROOT, Measured, make_environments, measure, peaks
from report import table, write
from rows import ANCHORS, ROWS
from shapes import SHAPES

IDLE = 0.1


def chosen(patterns: list[str] | None, with_others: bool) -> list[str]:
    """Return the rows whose names contain a pattern, and the anchors."""
    own = {"torch", "jax", "numpy"}
    return [
        name
        for name, row in ROWS.items()
        if (with_others or (row.kind != "other" and row.environment in own))
        and (
            not patterns
            or name in ANCHORS
            or any(p.lower() in name.lower() for p in patterns)
        )
    ]


def run(names: list[str], rounds: int, shape_sets: list[str]) -> dict[str, Measured]:
    """Measure the rows over each set of shapes, and print each table once done."""
    refused = make_environments(names)
    results = {}
    for title in shape_sets:
        print(f"{title}: ...", flush=True)
        shapes = SHAPES[title]()
        found = measure([n for n in names if n not in refused], shapes, rounds)
        stepped = [name for name in found.times if ROWS[name].kind != "memory"]
        found.peaks = peaks(stepped, shapes)
        found.left_out |= refused
        results[title] = found
        print(table(title, found), flush=True)
    return results


def cpu_seconds() -> tuple[float, float]:
    """Return the time that all cores have worked, and that of this process."""
    columns = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    ticks = [int(column) for i, column in enumerate(columns) if i not in (3, 4)]  # idle
    return sum(ticks) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


@contextmanager
def other_work(count: int) -> Iterator[None]:
    """Run processes that never rest, as many as `count`."""
    command = [sys.executable, "-c", "while True: pass"]
    workers = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def model_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = [line.split(":")[1].strip() for line in lines if line.startswith("model n")]
    return found[0] if found else "unknown"


def main() -> None:
    """Parse the arguments, measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = sorted(os.sched_getaffinity(0))
    threads = range(1, len(cores) + 1)
    parser.add_argument("--threads", type=int, choices=threads, default=len(cores))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--rows", nargs="+", help="only rows with one in their name")
    parser.add_argument("--busy", type=int, default=0, help="cores with other work")
    parser.add_argument("--no-others", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    for pattern in args.rows or []:
        if not any(pattern.lower() in name.lower() for name in ROWS):
            parser.error(f"no row has {pattern!r} in its name: {', '.join(ROWS)}")
    os.sched_setaffinity(0, cores[: args.threads])

    start, (all_before, own_before) = time.monotonic(), cpu_seconds()
    with other_work(args.busy):
        results = run(chosen(args.rows, not args.no_others), args.rounds, args.shapes)
    all_after, own_after = cpu_seconds()
    others = (all_after - all_before) - (own_after - own_before)
    about: dict[str, Any] = {
        "CPU": model_name(),
        "threads": args.threads,
        "rounds": args.rounds,
        "cores busy with other work": round(others / (time.monotonic() - start), 2),
    }
    if about["cores busy with other work"] > IDLE + args.busy:
        about["NOTE"] = "other work ran on these cores: the figures are unreliable"
    write(results, args.out, about)


if __name__ == "__main__":
    main()
