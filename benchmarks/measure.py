"""Start one worker process for each environment, and measure with them."""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

from rows import ANCHORS, ROWS, Row, Shapes

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("worker.py")
sys.path.append(str(ROOT / "tests" / "interop"))

import environments  # noqa: E402

# Rows of these environments need more packages: the name and folder of requirements.
MORE = {"torch": environments.TORCH_OTHERS}

WARM_UP = 2
PAUSE = 0.01
SLOW, SLOW_EVERY = 1.0, 5
PACKAGES = (
    *("larskit", "numpy", "torch", "timm", "pytorch-optimizer", "jax", "optax"),
    *("brainpy", "chainer", "ivy"),
)
# Makes the C library return freed memory at once, so that a peak can be measured.
GIVE_BACK = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4096:glibc.malloc.mmap_max=9999999"
}
Times = dict[int, float]  # the seconds of a row's step by round
Both = tuple[float, float]  # in a training loop, and alone


@dataclass
class Measured:
    """The results for one set of shapes, and why rows were skipped."""

    size: int
    times: dict[str, Times] = field(default_factory=dict)  # in a training loop
    alone: dict[str, Times] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def ratios(self, row: str, other: str, alone: bool = False) -> list[float]:
        """Return the time of a row divided by that of another, round by round."""
        times = self.alone if alone else self.times
        a, b = times[row], times[other]
        return [a[i] / b[i] for i in sorted(a.keys() & b.keys())]

    def ratio(self, row: str, other: str, alone: bool = False) -> float:
        """Return the median of the paired ratios."""
        return median(self.ratios(row, other, alone))


def make_environments(names: list[str]) -> dict[str, str]:
    """Create missing environments; return the rows that have none, and why."""
    needed = {name: ROWS[name].environment for name in names if _is_apart(ROWS[name])}
    reasons = {environment: _make(environment) for environment in {*needed.values()}}
    return {
        name: reason
        for name, environment in needed.items()
        if (reason := reasons[environment])
    }


def _is_apart(row: Row) -> bool:
    other = row.kind == "other" and row.environment == "torch"
    return other or row.environment in environments.PORTED


def _make(environment: str) -> str | None:
    name, requirements = MORE.get(environment, (environment, environments.REQUIREMENTS))
    try:
        return environments.unsupported(name) or environments.make(name, requirements)
    except subprocess.CalledProcessError as why:
        return f"its environment could not be created: exit status {why.returncode}"


def measure(names: list[str], shapes: Shapes, rounds: int) -> Measured:
    """Step the rows in turn, in a new random order in each round."""
    found = Measured(4 * sum(map(math.prod, shapes)))
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for environment in dict.fromkeys(ROWS[name].environment for name in names):
            workers[environment] = stack.enter_context(Worker(environment))
            found.versions[environment] = workers[environment].ask("versions", PACKAGES)
        steps = {}
        for name in names:
            ask = workers[ROWS[name].environment].ask
            if why := ask("make", name, shapes):
                found.left_out[name] = why
            else:
                steps[name] = partial(ask, "step", name)
        if missing := [name for name in ANCHORS if name not in steps]:
            raise RuntimeError(
                f"{missing} could not be made, but all ratios need them: "
                f"{found.left_out}"
            )
        found.times, found.alone = _interleave(steps, rounds)
    return found


def _interleave(
    steps: dict[str, Callable[[], Both]], rounds: int
) -> tuple[dict[str, Times], dict[str, Times]]:
    """Return the times of each row; a slow one takes part in every fifth round."""
    warm = {name: min(step() for _ in range(WARM_UP)) for name, step in steps.items()}
    slow = {name for name in warm.keys() - {*ANCHORS} if min(warm[name]) > SLOW}
    times: dict[str, Times] = {name: {} for name in steps}
    alone: dict[str, Times] = {name: {} for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for i in range(rounds):
        shuffle(order)
        for name in order:
            if name not in slow or i % SLOW_EVERY == 0:
                time.sleep(PAUSE)  # the threads of the last row stop spinning
                times[name][i], alone[name][i] = steps[name]()
    return times, alone


def peaks(names: list[str], shapes: Shapes) -> dict[str, int]:
    """Return the extra memory of a step of each row, each in a fresh process."""
    found = {}
    for name in names:
        with Worker(ROWS[name].environment, **GIVE_BACK) as worker:
            worker.ask("make", name, shapes)
            found[name] = worker.ask("peak", name)
    return found


class Worker:
    """A process in an environment that runs commands line by line; see `worker`.

    It uses the cores of this process, with one thread for each.
    """

    def __init__(self, environment: str, **variables: str) -> None:
        """Start the process, with additional environment variables."""
        threads = str(len(os.sched_getaffinity(0)))
        limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        self._environment = environment
        self._folder = tempfile.TemporaryDirectory()  # ivy leaves a file behind
        command, paths = _command(environment)
        self._process = subprocess.Popen(
            command,
            cwd=self._folder.name,
            env={
                **os.environ,
                **dict.fromkeys(limits, threads),
                **variables,
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", *paths))),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, *command: Any) -> Any:
        """Send a command, wait for the answer and return it."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(command), file=process.stdin)
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the worker of {self._environment} ended at {command[:2]} with exit "
                f"status {process.wait()}; its own messages are above"
            )
        return json.loads(answer)

    def __enter__(self) -> Self:
        """Return the worker itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process."""
        self._process.communicate()
        self._folder.cleanup()


def _command(environment: str) -> tuple[list[str | Path], list[Path]]:
    """Return the command of a worker, and additional folders for its imports."""
    if environment in environments.PORTED:
        native = importlib.util.find_spec("larskit._native")
        kernel = [native.origin] if native and native.origin else []
        return [environments.python(environment), WORKER, *kernel], []
    if environment not in MORE:
        return [sys.executable, WORKER], []
    folder = environments.python(*MORE[environment]).parents[1]
    return [sys.executable, WORKER], [*folder.glob("lib/python*/site-packages")]
