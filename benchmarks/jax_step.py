"""Time one compiled step of JAX's optimizers, and their compilation.

    make bench-jax
    .venv/bin/python benchmarks/jax_step.py --rounds 10 --shapes ResNet-50

Parameters and state are donated. Each round steps every row once, in a new random
order, and divides its time by that of ``optax.sgd`` in the same round; the table shows
the medians of these ratios. Momentum is 0.9 and weight decay 1e-4 (none for the
baseline); arrays of one dimension are neither adapted nor decayed. Written to
``benchmarks/results``: ``jax.md``, ``jax.json``.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import ROOT
from rows import Shapes
from shapes import RESNET, SHAPES, VIT
from step import IDLE, cpu_seconds, model_name

import larskit.jax
from larskit import functional

LR, DECAY = 1e-3, 1e-4
BASELINE = "optax.sgd"
Step = Callable[..., tuple[Any, Any]]


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def transformed(optimizer: Any) -> tuple[Any, Step]:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return optimizer.init, step


def function() -> tuple[Any, Step]:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return functional.update(params, grads, state, LR, weight_decay=DECAY)

    return functional.init, step


def rows() -> dict[str, tuple[Any, Step]]:
    masks = {"weight_decay_mask": matrices, "trust_ratio_mask": matrices}
    ours = larskit.jax.lars
    found = {
        BASELINE: optax.sgd(LR, momentum=0.9),
        "optax.lars": optax.lars(LR, DECAY, **masks),
        "larskit.jax.lars": ours(LR, weight_decay=DECAY),
        "larskit.jax.lars, rate outside": ours(
            LR, weight_decay=DECAY, lr_placement="outside"
        ),
        "larskit.jax.lars, the arithmetic of optax.lars": ours(
            LR, weight_decay=DECAY, denominator="decayed_gradient"
        ),
    }
    made = {name: transformed(optimizer) for name, optimizer in found.items()}
    return {**made, "larskit.functional.update": function()}


class Row:
    """An optimizer with its own arrays."""

    def __init__(self, init: Any, step: Step, shapes: Shapes, grads: Any) -> None:
        rng = np.random.default_rng(0)
        params = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
        self.given = params, jax.tree.map(jnp.asarray, init(params))
        self.grads = grads
        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.compiled = jitted.lower(*self.given, grads).compile()
        self.compilation = time.perf_counter() - start
        self.seconds: list[float] = []

    def take(self) -> None:
        """Step once, and record the time."""
        start = time.perf_counter()
        self.given = jax.block_until_ready(self.compiled(*self.given, self.grads))
        self.seconds.append(time.perf_counter() - start)


def measure(shapes: Shapes, rounds: int, warm_up: int = 3) -> dict[str, Any]:
    grads = [jnp.full(shape, 1e-3) for shape in shapes]
    made = {name: Row(*row, shapes, grads) for name, row in rows().items()}
    names = list(made)
    for i in range(rounds + warm_up):
        random.Random(i).shuffle(names)
        for name in names:
            made[name].take()
    base = made[BASELINE].seconds[warm_up:]
    return {
        name: {
            "median_ms": 1e3 * median(row.seconds[warm_up:]),
            "ratio": median(
                a / b for a, b in zip(row.seconds[warm_up:], base, strict=True)
            ),
            "compilation_s": row.compilation,
        }
        for name, row in made.items()
    }


def table(name: str, found: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    lines = [
        f"### {name}",
        "",
        "| optimizer | median | against optax.sgd | compilation |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row} | {x['median_ms']:.3g} ms | {x['ratio']:.3g} "
        f"| {x['compilation_s']:.2g} s |"
        for row, x in sorted(found.items(), key=lambda item: item[1]["ratio"])
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[RESNET, VIT])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    start, (all_before, own_before) = time.monotonic(), cpu_seconds()
    results = {name: measure(SHAPES[name](), args.rounds) for name in args.shapes}
    all_after, own_after = cpu_seconds()
    others = (all_after - all_before) - (own_after - own_before)
    busy = round(others / (time.monotonic() - start), 2)
    about = {
        "CPU": model_name(),
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "rounds": args.rounds,
        "cores busy with other work": busy,
    }
    if busy > IDLE:
        about["NOTE"] = "other work ran on these cores: the times are unreliable"
    head = ", ".join(f"{key}: {value}" for key, value in about.items()) + "."
    text = "\n\n".join([head, *(table(*item) for item in results.items())]) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "jax.md").write_text(text)
    (args.out / "jax.json").write_text(
        json.dumps({**about, "shapes": results}, indent=1)
    )
    print(text)


if __name__ == "__main__":
    main()
