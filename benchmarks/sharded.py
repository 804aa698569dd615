"""Time one step over sharded layers, and count what it sends.

The parameters of ResNet-50 under ``fully_shard`` (FSDP2), in processes that communicate
through gloo on this machine::

    make bench-sharded
    .venv/bin/python benchmarks/sharded.py --rounds 5 --processes 2

Each round steps every row once, in a new random order, and divides its time by that of
``torch.optim.SGD(foreach=True)`` in the same round; the table shows the medians of
these ratios. A step ends when the slowest process is done. The processes have one
thread each and share the cores, so compare ratios, not times. Every optimizer has a
momentum of 0.9 and a weight decay of 1e-4, which the hook applies itself. Other
implementations come from the environment that ``step.py`` creates; if it is missing it
is created first, which needs the network.

Torch's ``CommDebugMode`` counts the collectives; their bytes are those that one process
passes to them. `seconds` estimates their time among many more processes.

Written to ``benchmarks/results``: ``sharded.md`` and ``sharded.json``.
"""

import argparse
import importlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import distribution
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from measure import MORE, PAUSE, ROOT, WARM_UP, environments
from rows import LARS, SGD, SGD_LR
from step import IDLE, cpu_seconds, model_name
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves

from larskit import GradientLARS
from larskit.app.models import build
from larskit.torch import LARS as OurLARS

BASELINE = "torch SGD (foreach)"
# The latency of a message and the time of each byte: 5 microseconds and 25 GB/s, as
# between two accelerators over InfiniBand HDR.
ALPHA, BETA = 5e-6, 1 / 25e9
RANKS = (8, 64, 512, 4096)

Params = list[nn.Parameter]


def ours(params: Params) -> Any:
    return OurLARS(params, **LARS)


def hook(params: Params) -> Any:
    optimizer = torch.optim.SGD(params, SGD_LR, SGD["momentum"], foreach=True)
    GradientLARS(weight_decay=1e-4).attach(optimizer)
    return optimizer


def timm(params: Params, foreach: bool) -> Any:
    """Import one file of timm: the whole package needs torchvision."""
    package = ModuleType("timm_optim")
    package.__path__ = [str(distribution("timm").locate_file("timm/optim"))]
    sys.modules[package.__name__] = package
    lars = importlib.import_module("timm_optim.lars")
    return lars.Lars(params, **LARS, foreach=foreach)


def pytorch_optimizer(params: Params, foreach: bool) -> Any:
    lars = importlib.import_module("pytorch_optimizer").LARS
    return lars(params, **LARS, foreach=foreach)


ROWS: dict[str, Callable[[Params], Any]] = {
    BASELINE: lambda p: torch.optim.SGD(p, SGD_LR, **SGD, foreach=True),
    "torch SGD (fused)": lambda p: torch.optim.SGD(p, SGD_LR, **SGD, fused=True),
    "larskit LARS": ours,
    "larskit hook on torch SGD (foreach)": hook,
    "timm Lars": lambda p: timm(p, False),
    "timm Lars (foreach)": lambda p: timm(p, True),
    "pytorch-optimizer LARS": lambda p: pytorch_optimizer(p, False),
    "pytorch-optimizer LARS (foreach)": lambda p: pytorch_optimizer(p, True),
}


def seconds(messages: float, size: float, ranks: int) -> dict[str, float]:
    """Estimate the time of all-reduces of `size` bytes in total, by algorithm.

    The alpha-beta model: a message of n bytes takes ``ALPHA + n*BETA``. A ring sends
    ``2*(ranks - 1)`` messages in sequence, each of ``1/ranks`` of the bytes; a tree
    sends all bytes up and down, in ``log2(ranks)`` stages each.
    """
    stages = math.ceil(math.log2(ranks))
    ring = 2 * (ranks - 1) * (messages * ALPHA + size / ranks * BETA)
    return {"ring": ring, "tree": 2 * stages * (messages * ALPHA + size * BETA)}


class Traffic(CommDebugMode):
    """Counts the collectives of this process, and the bytes that it passes to them."""

    def __enter__(self) -> Any:
        self.bytes = 0
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = self.get_total_counts()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            sent = (x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            self.bytes += sum(x.nbytes for x in sent)
        return result


@dataclass
class Row:
    """An optimizer with its own weights, and gradients that are restored."""

    params: Params
    grads: list[torch.Tensor]
    optimizer: Any

    def step(self) -> float:
        """Return the seconds of one step of the slowest process."""
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad.copy_(g)  # some implementations write into it
        time.sleep(PAUSE)
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.step()
        took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return took.item()


def make(name: str) -> Row:
    """Make a row, and step it to find out whether it works."""
    torch.manual_seed(0)
    model = build("resnet50", channels=3, classes=1000, size=224)
    fully_shard(model)
    params = list(model.parameters())
    grads = [0.01 * torch.randn_like(p.detach()) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    row = Row(params, grads, ROWS[name](params))
    for _ in range(WARM_UP):
        row.step()
    return row


def measure(rounds: int) -> dict[str, Any]:
    """Step the rows in turn, in a new random order in each round."""
    rows, left_out, traffic = {}, {}, {}
    for name in ROWS:
        try:
            rows[name] = make(name)
        except (ImportError, NotImplementedError, RuntimeError) as why:
            left_out[name] = f"{type(why).__name__}: {str(why).splitlines()[0][:150]}"
            continue
        with Traffic() as sent:
            rows[name].optimizer.step()
        traffic[name] = sent.get_total_counts(), sent.bytes
    times: dict[str, list[float]] = {name: [] for name in rows}
    order, shuffle = list(rows), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(rows[name].step())
    return {"rows": dict(summary(times, traffic)), "left_out": left_out}


def summary(times: Any, traffic: Any) -> Iterator[tuple[str, dict[str, float]]]:
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[BASELINE], strict=True)]
        collectives, size = traffic[name]
        yield (
            name,
            {
                "median_ms": 1e3 * median(own),
                "ratio": median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
                "collectives": collectives,
                "bytes": size,
            },
        )


def serve(rank: int, processes: int, rounds: int, paths: list[str], out: Path) -> None:
    """Measure as one of several processes; the first one writes the results."""
    sys.path += paths
    store = dist.FileStore(str(out.with_suffix(".store")), processes)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=5),
    )
    torch.set_num_threads(1)
    found = measure(rounds)
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def table(processes: int, found: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    lines = [
        f"### {processes} processes",
        "",
        "| optimizer | median | against SGD | least to most | collectives | bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(found["rows"].items(), key=lambda item: item[1]["ratio"]):
        lines.append(
            f"| {name} | {short(row['median_ms'])} ms | {row['ratio']:.3g} "
            f"| {row['ratio_least']:.3g} to {row['ratio_most']:.3g} "
            f"| {row['collectives']} | {row['bytes']:,} |"
        )
    lines += [""] + [f"Skipped: {n} ({why})." for n, why in found["left_out"].items()]
    return "\n".join(lines)


def short(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def model_table(rows: dict[str, Any]) -> str:
    """Return the estimates of `seconds` for the counted collectives, in Markdown."""
    head = " | ".join(f"{ranks:,} processes" for ranks in RANKS)
    lines = [
        "### Estimated milliseconds of the collectives, ring / tree",
        "",
        f"| optimizer | {head} |",
        "|---|" + "---:|" * len(RANKS),
    ]
    for name, row in rows.items():
        if row["collectives"]:
            model = (seconds(row["collectives"], row["bytes"], n) for n in RANKS)
            cells = " | ".join(
                f"{short(1e3 * x['ring'])} / {short(1e3 * x['tree'])}" for x in model
            )
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def run(counts: Iterable[int], rounds: int, out: Path) -> dict[int, Any]:
    environment = MORE["torch"]
    environments.make(*environment)
    folder = environments.python(*environment).parents[1]
    paths = [str(x) for x in folder.glob("lib/python*/site-packages")]
    results = {}
    for processes in counts:
        file = out / f"sharded-{os.getpid()}-{processes}.json"
        arguments = processes, rounds, paths, file
        multiprocessing.spawn(serve, arguments, nprocs=processes)
        results[processes] = json.loads(file.read_text())
        file.unlink()
        file.with_suffix(".store").unlink()
        print(table(processes, results[processes]), flush=True)
    return results


def main() -> None:
    """Parse the arguments, measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start, (all_before, own_before) = time.monotonic(), cpu_seconds()
    results = run(args.processes, args.rounds, args.out)
    all_after, own_after = cpu_seconds()
    others = (all_after - all_before) - (own_after - own_before)
    about = {
        "CPU": model_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "cores busy with other work": round(others / (time.monotonic() - start), 2),
    }
    if about["cores busy with other work"] > IDLE:
        about["NOTE"] = "other work ran on these cores: the times are unreliable"
    facts = ", ".join(f"{key}: {value}" for key, value in about.items()) + "."
    last = results[args.processes[-1]]["rows"]
    pages = [facts, *(table(*item) for item in results.items()), model_table(last)]
    (args.out / "sharded.md").write_text("\n\n".join(pages) + "\n")
    numbers = {**about, "processes": results}
    (args.out / "sharded.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(pages[-1])


if __name__ == "__main__":
    main()
