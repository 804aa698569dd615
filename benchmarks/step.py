"""Time one optimizer step: ours, torch's own SGD, and every LARS that can be installed.

Over the parameters of ResNet-50 and ViT-B/16 and over 200 small tensors, in one run
per set of shapes::

    make bench
    .venv/bin/python benchmarks/step.py --rounds 5 --shapes ResNet-50 --rows native SGD

Every round steps each row once (`worker.step` says how), in an order of its own, and
gives each row's ratio to ``torch.optim.SGD(fused=True)`` of the same round; the table
gives the medians. A peer runs in the environment of the package that it comes from, in
a process that waits while others step; those that are missing are made first, which
needs the network. All have the same cores, as many as ``--threads``. Linux only.

The memory limit is the time that the row's passes over the parameters would take at
the speed of a large copy, or of scaling a large array in place if that is faster. Both
are measured in the same rounds. The small tensors stay in the caches, which are faster
still, since a short step is repeated for 0.05 s. The extra memory is how far one step
raises the resident size of a process that does nothing else.

Threads of torch wait for each other, so that other work on the same cores slows them
down out of proportion: the run says how much there was. It needs 20 GB of memory for
ViT-B/16 and all rows.

Written to ``benchmarks/results``: ``step.md``, ``step.json`` and ``step.png``.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from measure import ROOT, Measured, make_environments, measure, peaks
from report import table, write
from rows import ANCHORS, ROWS
from shapes import SHAPES

IDLE = 0.1


def chosen(patterns: list[str] | None, with_peers: bool) -> list[str]:
    """Return the rows whose names contain a pattern, and the anchors."""
    own = {"torch", "jax", "numpy"}
    return [
        name
        for name, row in ROWS.items()
        if (with_peers or (row.kind != "peer" and row.environment in own))
        and (
            not patterns
            or name in ANCHORS
            or any(p.lower() in name.lower() for p in patterns)
        )
    ]


def run(names: list[str], rounds: int, shape_sets: list[str]) -> dict[str, Measured]:
    """Measure the rows over each set of shapes, and print each table at its end."""
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
    """Return the time that the cores have worked, and that part which was for us."""
    columns = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    ticks = [int(column) for i, column in enumerate(columns) if i not in (3, 4)]  # idle
    return sum(ticks) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


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
    parser.add_argument("--rows", nargs="+", help="parts of their names")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    for pattern in args.rows or []:
        if not any(pattern.lower() in name.lower() for name in ROWS):
            parser.error(f"no row has {pattern!r} in its name: {', '.join(ROWS)}")
    os.sched_setaffinity(0, cores[: args.threads])

    start, (all_before, own_before) = time.monotonic(), cpu_seconds()
    results = run(chosen(args.rows, not args.no_peers), args.rounds, args.shapes)
    all_after, own_after = cpu_seconds()
    others = (all_after - all_before) - (own_after - own_before)
    about: dict[str, Any] = {
        "CPU": model_name(),
        "threads": args.threads,
        "rounds": args.rounds,
        "cores busy with other work": round(others / (time.monotonic() - start), 2),
    }
    if about["cores busy with other work"] > IDLE:
        about["NOTE"] = "the machine was busy, so that these figures say little"
    write(results, args.out, about)


if __name__ == "__main__":
    main()
