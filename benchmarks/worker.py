"""A process that holds the rows of one environment and steps the requested one.

It reads one JSON list per line, ``[command, arguments...]``, and answers each with a
line of JSON. Between commands it waits, and so takes no time from other processes. It
runs in the environments of other packages, and imports only NumPy and what its rows
need.
"""

import gc
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rows import ROWS, Work

VISIT, LEAST = 0.05, 3
LONG = 0.3  # seconds of a step that is not repeated
SETTLE = 0.2  # until the threads of a framework have freed their memory
works: dict[str, Work] = {}


def make(row: str, shapes: list[list[int]]) -> str | None:
    """Make a row ready to step, or return why that fails."""
    try:
        how = ROWS[row]
        module = importlib.import_module(f"rows.in_{how.environment}")
        maker = getattr(module, how.make)
        works[row] = maker(tuple(map(tuple, shapes)), **how.options)
        works[row].backward = module.backward
    except (ImportError, NotImplementedError) as why:
        reason = str(why).split(" (/")[0]  # without the path of a file
        return f"{type(why).__name__}: {reason}"
    return None


def step(row: str) -> tuple[float, float]:
    """Return the seconds of one step: in a training loop, and alone.

    In a training loop the work of a backward pass comes right before each step, and
    leaves its threads spinning and other data in the caches. Alone, a step follows the
    last one.
    """
    work = works[row]
    return _median_time(work, work.backward), _median_time(work, lambda: None)


def _median_time(work: Work, before: Callable[[], Any]) -> float:
    """Return the median of the steps that `VISIT` seconds allow, `before` each one.

    The first step starts with the caches and threads of the previous row; it counts
    only if it takes so long that it is the only one.
    """
    times: list[float] = []
    end = time.perf_counter() + VISIT
    while len(times) < LEAST or time.perf_counter() < end:
        work.restore()
        before()
        start = time.perf_counter()
        work.step()
        times.append(time.perf_counter() - start)
        if times[-1] > LONG:
            break
    return statistics.median(times[1:] or times)


def peak(row: str) -> int:
    """Return how many bytes one step adds to the resident memory.

    Linux records the highest resident size since the last reset. This works only if
    earlier steps have returned their memory to the system, see `measure.GIVE_BACK`.
    """
    work = works[row]
    for _ in range(2):
        work.restore()
        work.step()
    work.restore()
    gc.collect()
    time.sleep(SETTLE)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work.step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no line {name}: this needs Linux")


def versions(names: list[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_native(path: str) -> None:
    """Load the C++ kernel that was built for the development environment."""
    spec = importlib.util.spec_from_file_location("larskit._native", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


COMMANDS: dict[str, Any] = {
    "make": make,
    "step": step,
    "peak": peak,
    "versions": versions,
}


def main() -> None:
    """Answer until the input ends; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for native in sys.argv[1:]:
        load_native(native)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(COMMANDS[command](*arguments)), file=replies)


if __name__ == "__main__":
    main()
