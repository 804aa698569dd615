"""Time one optimizer step on a GPU: ours, torch's SGD, and every LARS that is there.

On one GPU, in less than eight minutes::

    make bench-gpu
    PYTHONPATH=src python3 benchmarks/gpu_step.py --dtype bfloat16 --shapes ViT-L/16
    .venv/bin/python benchmarks/gpu_step.py --dry-run

The peers are those of the Python that runs this, else those of the environment that
``make environments`` makes. A row whose package is missing, or that fails, says so in
the table. Where Triton's kernels cannot run, "larskit LARS" is our foreach engine, and
the row with carried norms says why. A dry run goes the same way on the CPU in a minute
or two, with tiny shapes, Triton's interpreter and no CUDA graphs. What it says of the
time means nothing, so that it writes no files.

Each row is measured beside ``torch.optim.SGD(fused=True)``: both take turns, in an
order of their own in each round, for the row's share of the ``--seconds`` of a model.
The table gives the medians, and the ratios to this yardstick in the same round; its own
row shows what noise does. A turn is many steps, enqueued one after the other and each
between two CUDA events, of which the median counts. So a step that the host takes
longer to enqueue than the GPU to do has the host's time. As a CUDA graph the same step
is replayed, beside a replayed yardstick; a step that waits for the device cannot be
captured. JAX's rows are compiled, with weights and state donated, and have no events: a
turn is a chain of steps with one wait at its end, divided by their number.

All rows of a model step the same weights along the same gradients, at a rate so small
that the weights stay what they are. Only the state is a row's own, and given back after
its measurement, so that 1.3 billion float32 parameters should fit in 80 GB. Some peers
write into the gradients: these are restored before each of their steps, outside of what
is timed, which hides a little of the host's time, in their favour.

The speed is that of the passes over the parameters that a row needs at least (see
`rows.Row`), as a share of what a large copy reads and writes. Nothing is flushed from
the caches between steps. A model whose weights, gradients and state fit in the L2 cache
stays there, and can be faster than a copy; of a larger one the cache holds what was
touched last.

Written to ``benchmarks/results`` after each model: ``gpu.md`` and ``gpu.json``.
"""

import argparse
import gc
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

# Before Triton is imported, as some parts of torch do.
os.environ["TRITON_INTERPRET"] = "1" if "--dry-run" in sys.argv else "0"

import numpy as np
import torch
from measure import MORE, PACKAGES, ROOT, WARM_UP, environments
from rows import SGD, Shapes
from shapes import GPT, LARGE, RESNET, SHAPES, SMALL, VIT, VIT_L
from sharded import pytorch_optimizer, timm
from step import IDLE, cpu_seconds, model_name
from torch import Tensor
from worker import versions

from larskit.torch import LARS as OurLARS

LR = 1e-6
BASELINE = "torch SGD (fused)"
OURS = "larskit LARS"
EAGER, GRAPH = "eager", "graph"
MODELS = {
    title: {**SHAPES, **LARGE}[title] for title in (RESNET, VIT, SMALL, VIT_L, GPT)
}
DTYPES = ("float32", "bfloat16", "float16")
LEAST_ROUNDS = 3

AT_MOST, AT_MOST_IN_CACHE = 1.4, 1.1  # times the yardstick
OF_COPY = {VIT_L: 0.85}
TIMES_FASTER = {RESNET: 5.0}  # than the fastest peer's LARS

Params = list[Tensor]
Step = Callable[[], Any]
Clock = Callable[[int], list[float]]  # takes so many steps, returns seconds of a step
Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """How an optimizer is made, and what it must do at least.

    Attributes
    ----------
    kind : {"sgd", "lars", "peer"}
        "lars" are ours.
    passes : int
        How often a step must read or write an array of the parameters' size.
    make : callable
        Takes the parameters, and whether a graph will capture the step; in JAX nothing.
    jax : bool
        Whether it makes a gradient transformation.
    writes : bool
        Whether a step writes into the gradients.
    """

    kind: Literal["sgd", "lars", "peer"]
    passes: int
    make: Callable[..., Any]
    jax: bool = False
    writes: bool = False


def sgd(params: Params, _: bool, **switch: bool) -> Any:
    return torch.optim.SGD(params, LR, **SGD, **switch)


def ours(params: Params, capturable: bool, **switch: Any) -> Any:
    return OurLARS(params, LR, **SGD, capturable=capturable, **switch)


def optax_sgd() -> Any:
    import optax

    momentum = optax.sgd(LR, momentum=SGD["momentum"])
    return optax.chain(optax.add_decayed_weights(SGD["weight_decay"]), momentum)


def optax_lars() -> Any:
    import optax
    from jax_step import matrices

    masks: Any = {"weight_decay_mask": matrices, "trust_ratio_mask": matrices}
    return optax.lars(LR, **SGD, **masks)


def jax_lars() -> Any:
    from larskit.jax import lars

    return lars(LR, **SGD)


ROWS = {
    BASELINE: Row("sgd", 5, partial(sgd, fused=True)),
    "torch SGD (foreach)": Row("sgd", 5, partial(sgd, foreach=True)),
    OURS: Row("lars", 7, ours),
    "larskit LARS (carried norms)": Row("lars", 6, partial(ours, carry_norms=True)),
    "larskit LARS (foreach)": Row("lars", 7, partial(ours, foreach=True)),
    "timm Lars": Row("peer", 7, lambda p, _: timm(p, False)),
    "timm Lars (foreach)": Row("peer", 7, lambda p, _: timm(p, True)),
    "pytorch-optimizer LARS": Row(
        "peer", 7, lambda p, _: pytorch_optimizer(p, False), writes=True
    ),
    "pytorch-optimizer LARS (foreach)": Row(
        "peer", 7, lambda p, _: pytorch_optimizer(p, True), writes=True
    ),
    "optax.sgd (jit)": Row("sgd", 5, optax_sgd, jax=True),
    "optax.lars (jit)": Row("peer", 7, optax_lars, jax=True),
    "larskit.jax.lars (jit)": Row("lars", 7, jax_lars, jax=True),
}


def on_gpu(step: Step, before: Step, count: int) -> list[float]:
    """Return the seconds of each of so many steps, by CUDA events."""
    pairs = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)
    ]
    for start, end in pairs:
        before()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def on_host(step: Step, before: Step, count: int) -> list[float]:
    """Return the seconds of each of so many steps, by the host's clock."""
    times = []
    for _ in range(count):
        before()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Run:
    """How to measure; the defaults are those of a GPU."""

    dtype: torch.dtype
    seconds: float  # for a model
    device: str = "cuda"
    timed: Callable[..., list[float]] = on_gpu
    modes: tuple[str, ...] = (EAGER, GRAPH)
    rounds: int = 100
    turn: float = 0.05  # seconds
    least: int = 5  # steps in a turn
    copied: int = 2**30  # bytes

    def copy_speed(self) -> float:
        """Return the bytes per second that a large copy reads and writes."""
        source = torch.ones(self.copied // 4, device=self.device)
        target = torch.zeros_like(source)
        times = self.timed(lambda: target.copy_(source), nothing, 30)
        return 2 * self.copied / median(times)

    def steps(self, clock: Clock) -> int:
        """Return how many steps fill a turn."""
        return max(self.least, math.ceil(self.turn / median(clock(self.least))))


def dry_run(dtype: torch.dtype) -> Run:
    """Have the GPU's engine at work on the CPU, and measure as little as can be."""
    from larskit import engines

    os.environ["JAX_PLATFORMS"] = "cpu"
    engines.GPU = "cpu"
    return Run(dtype, math.inf, "cpu", on_host, (EAGER,), 2, 0.0, 1, 2**16)


def tiny(shapes: Shapes) -> Shapes:
    """Return a few of the shapes, cut to 16 along each axis."""
    some = shapes[:: max(1, len(shapes) // 10)]
    return tuple(tuple(min(n, 16) for n in shape) for shape in some)


class Model:
    """The weights and gradients that all rows share."""

    def __init__(self, shapes: Shapes, run: Run) -> None:
        """Draw them."""
        torch.manual_seed(0)
        like: Any = {"dtype": run.dtype, "device": run.device}
        self._kept = [0.01 * torch.randn(shape, **like) for shape in shapes]
        self.params = [5 * g for g in self._kept]
        self.grads = [g.clone() for g in self._kept]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        self.size = sum(p.nbytes for p in self.params)

    def restore(self) -> None:
        """Undo what was written into the gradients."""
        torch._foreach_copy_(self.grads, self._kept)


class Replay:
    """A step as a CUDA graph; it keeps alive what the graph works on."""

    def __init__(self, step: Step) -> None:
        """Warm up on a side stream, as a capture demands, and capture the step."""
        self._step, self._graph = step, torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
            self._refuse_waits()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph):
            step()

    def _refuse_waits(self) -> None:
        """Fail before a capture does, which would leave torch's allocator broken."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def __call__(self) -> None:
        """Step once."""
        self._graph.replay()


def torch_clock(row: Row, model: Model, mode: str, run: Run) -> Clock:
    """Return the clock of an optimizer of torch, warmed up."""
    optimizer = row.make(model.params, mode == GRAPH)
    for group in optimizer.param_groups:
        group["lr"] = LR
    step = Replay(optimizer.step) if mode == GRAPH else optimizer.step
    before = model.restore if row.writes else nothing
    run.timed(step, before, WARM_UP)
    return partial(run.timed, step, before)


def jax_clock(row: Row, model: Model, run: Run) -> Clock:
    """Return the clock of a gradient transformation, compiled."""
    import jax
    from jax import numpy as jnp
    from jax_step import transformed

    if run.device == "cuda" and jax.default_backend() != "gpu":
        raise RuntimeError(f"JAX sees no GPU, only {jax.devices()}")
    grads = [jnp.from_dlpack(g) for g in model.grads]
    params = [jnp.array(jnp.from_dlpack(w), copy=True) for w in model.params]
    init, step = transformed(row.make())
    given = params, jax.tree.map(jnp.asarray, init(params))
    del params
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(*given, grads).compile()

    def clock(count: int) -> list[float]:
        nonlocal given
        start = time.perf_counter()
        for _ in range(count):
            given = compiled(*given, grads)
        jax.block_until_ready(given)
        return [(time.perf_counter() - start) / count]

    clock(WARM_UP)
    return clock


def clock_of(row: Row, model: Model, mode: str, run: Run) -> Clock:
    """Make a row ready to be timed."""
    model.restore()
    if row.jax:
        release()  # what torch holds, and once it is through
        return jax_clock(row, model, run)
    return torch_clock(row, model, mode, run)


def release() -> None:
    """Give back the memory that nobody uses, once the GPU is through."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass
class Measured:
    """What one model gave: its bytes, those that a copy moves a second, the rows.

    A row has figures for each mode, or the reason why it has none.
    """

    size: int
    copy: float
    rows: dict[str, dict[str, Figures]] = field(default_factory=dict)

    def get(self, name: str, mode: str, figure: str) -> float | None:
        """Return a figure of a row, if there is one."""
        return self.rows.get(name, {}).get(mode, {}).get(figure)


def measure(shapes: Shapes, names: list[str], run: Run) -> Measured:
    """Measure each row beside the yardstick, in its share of the time."""
    end = time.monotonic() + run.seconds
    release()
    copy, model = run.copy_speed(), Model(shapes, run)
    found = Measured(model.size, copy, {name: {} for name in names})
    entries = [
        (n, m) for n in names for m in run.modes if m == EAGER or not ROWS[n].jax
    ]
    yardsticks: dict[str, Clock] = {}
    for i, (name, mode) in enumerate(entries):
        if "failed" in found.rows[name].get(EAGER, {}):
            continue
        now = time.monotonic()
        until = now + (end - now) / (len(entries) - i)
        try:
            release()
            if mode not in yardsticks:
                yardsticks[mode] = clock_of(ROWS[BASELINE], model, mode, run)
            clock = clock_of(ROWS[name], model, mode, run)
            figures = compare(clock, yardsticks[mode], run, until)
            speed = ROWS[name].passes * model.size / figures["median_ms"] * 1e3
            found.rows[name][mode] = {**figures, "of_copy": speed / copy}
        except Exception as why:
            found.rows[name][mode] = {"failed": reason(why)}
        clock = None  # and the state of the row with it
    return found


def compare(clock: Clock, yardstick: Clock, run: Run, until: float) -> Figures:
    """Take turns with the yardstick until the time is over."""
    clocks = clock, yardstick
    counts = [run.steps(each) for each in clocks]
    times: list[list[float]] = [[], []]
    for i in range(run.rounds):
        if i >= LEAST_ROUNDS and time.monotonic() > until:
            break
        for j in random.Random(i).sample(range(2), 2):
            times[j].append(median(clocks[j](counts[j])))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
    return {
        "median_ms": 1e3 * median(times[0]),
        "ratio": float(middle),
        "ratio_p10": float(low),
        "ratio_p90": float(high),
        "rounds": len(ratios),
        "steps_a_round": counts[0],
    }


def reason(why: BaseException) -> str:
    if isinstance(why, ModuleNotFoundError):
        return f"{why.name} is not installed"
    first = str(why).partition("\n")[0].split(" (/")[0].replace("|", "/")
    return f"{type(why).__name__}: {first[:150]}"


def table(title: str, found: Measured) -> str:
    """Return the figures in Markdown."""
    figures = "10 % to 90 % | of a copy's speed"
    lines = [
        f"### {title}: {found.size / 1e6:,.4g} MB of parameters",
        "",
        f"| optimizer | step | against fused SGD | {figures} "
        f"| as a CUDA graph | against its graph | {figures} |",
        "|---|" + "---:|" * 8,
    ]
    for name in sorted(found.rows, key=lambda name: _order(found, name)):
        modes = (_cells(found.rows[name].get(mode, {})) for mode in (EAGER, GRAPH))
        lines.append(f"| {name} | {' | '.join(modes)} |")
    lines += ["", f"A copy reads and writes {found.copy / 1e9:,.0f} GB/s."]
    return "\n".join(lines)


def _order(found: Measured, name: str) -> float:
    return found.get(name, EAGER, "ratio") or math.inf


def _cells(row: Figures) -> str:
    if "ratio" not in row:
        why = f"-: {row['failed']}" if row else "-"
        return f"{why} | | |"
    return (
        f"{row['median_ms']:.3g} ms | {row['ratio']:.3g} "
        f"| {row['ratio_p10']:.3g} to {row['ratio_p90']:.3g} "
        f"| {100 * row['of_copy']:.0f} %"
    )


def verdicts(title: str, found: Measured, mode: str, cache: int) -> Iterator[str]:
    """Say of each figure to reach on this model whether it was."""
    head = f"{title}, {mode}, {OURS}"
    ratio = found.get(OURS, mode, "ratio")
    limit = AT_MOST if 3 * found.size > cache else AT_MOST_IN_CACHE
    yield _verdict(f"{head}, time / fused SGD", ratio, limit, -1)
    if least := OF_COPY.get(title):
        share = found.get(OURS, mode, "of_copy")
        yield _verdict(f"{head}, share of a copy's speed", share, least)
    if least := TIMES_FASTER.get(title):
        peers = {
            theirs: name
            for name in found.rows
            if ROWS[name].kind == "peer" and (theirs := found.get(name, mode, "ratio"))
        }
        faster = min(peers) / ratio if peers and ratio else None
        peer = f" ({peers[min(peers)]})" if peers else ""
        what = f"{head}, times faster than the fastest peer's LARS{peer}"
        yield _verdict(what, faster, least)


def _verdict(what: str, value: float | None, limit: float, sign: int = 1) -> str:
    wish = f"at {'least' if sign > 0 else 'most'} {limit:g}"
    if value is None:
        return f"- not measured: {what} ({wish})"
    met = "met" if sign * value >= sign * limit else "MISSED"
    return f"- {met}: {what}: {value:.3g} ({wish})"


def described(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    about: dict[str, Any] = {}
    if not args.dry_run:
        gpu = torch.cuda.get_device_properties(0)
        about = {
            "GPU": gpu.name,
            "GPU memory": f"{gpu.total_memory / 1e9:.0f} GB",
            "L2 cache": f"{gpu.L2_cache_size / 2**20:.0f} MiB",
        }
    found = versions([*PACKAGES, "triton"])
    return {**about, "CPU": model_name(), **found, "dtype": args.dtype}


def sentence(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in facts.items()) + "."


def write(results: dict[str, Measured], said: list[str], out: Path, facts: Any) -> None:
    """Write what was found so far as Markdown and JSON."""
    out.mkdir(parents=True, exist_ok=True)
    tables = [table(*item) for item in results.items()]
    page = [sentence(facts), *tables, "### Figures to reach", "\n".join(said)]
    (out / "gpu.md").write_text("\n\n".join(page) + "\n")
    shapes = {
        title: {
            "MB": found.size / 1e6,
            "copy_GB_per_s": found.copy / 1e9,
            "rows": found.rows,
        }
        for title, found in results.items()
    }
    numbers = {**facts, "shapes": shapes, "figures to reach": said}
    (out / "gpu.json").write_text(json.dumps(numbers, indent=1) + "\n")


def run_all(args: argparse.Namespace, names: list[str]) -> None:
    """Measure model after model; print, and keep, what is found."""
    dtype, cache = getattr(torch, args.dtype), 0
    if args.dry_run:
        run = dry_run(dtype)
        print("DRY RUN on the CPU, over tiny shapes: these numbers mean nothing.")
    else:
        run = Run(dtype, args.seconds)
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    about, results, said = described(args), {}, []
    facts: dict[str, Any] = {}
    start, before = time.monotonic(), cpu_seconds()
    for title in args.shapes:
        shapes = MODELS[title]()
        found = measure(tiny(shapes) if args.dry_run else shapes, names, run)
        results[title] = found
        for mode in run.modes:
            said += verdicts(title, found, mode, cache)
        took = time.monotonic() - start
        facts = {**about, **load(before, took)}
        print(f"\n{table(title, found)}\n\nAfter {took:.0f} s.", flush=True)
        if not args.dry_run:
            write(results, said, args.out, facts)
    meaning = ": a dry run says nothing of them" if args.dry_run else ""
    print(f"\n### Figures to reach{meaning}\n", *said, "", sentence(facts), sep="\n")


def load(before: tuple[float, float], seconds: float) -> dict[str, Any]:
    """Say how busy other work has kept the host's cores."""
    everything, own = (b - a for a, b in zip(before, cpu_seconds(), strict=True))
    found = {"cores busy with other work": round((everything - own) / seconds, 2)}
    if found["cores busy with other work"] > IDLE:
        return {**found, "NOTE": "the host was busy, so that its times say little"}
    return found


def add_peers() -> None:
    """Have the peers found that this Python lacks, where their environment is made."""
    folder = environments.python(*MORE["torch"]).parents[1]
    sys.path += map(str, folder.glob("lib/python*/site-packages"))


def main() -> None:
    """Parse the arguments, measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--seconds", type=float, default=70.0, help="for each model")
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rows", nargs="+", help="parts of their names")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    patterns = [pattern.lower() for pattern in args.rows or [""]]
    names = [name for name in ROWS if any(p in name.lower() for p in patterns)]
    if not names:
        parser.error(f"no row has {args.rows} in its name: {', '.join(ROWS)}")
    if not (args.dry_run or torch.cuda.is_available()):
        parser.exit(2, "PyTorch finds no CUDA GPU here; --dry-run needs none.\n")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    add_peers()
    run_all(args, names)


if __name__ == "__main__":
    main()
