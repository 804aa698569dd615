"""Run one fit in every integration, and write the differences: docs/matrix.md.

Each row runs a program of `integrations`, in the environment that it needs. A row
fails if its difference from `larskit.functional` is above `BOUND`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import environments

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "matrix.md"
PROGRAMS = Path(__file__).parent / "integrations"
BOUND = 1e-5
LIMIT = 300  # seconds, of one program
VARIABLES = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

HEAD = """# One fit in every integration

Each row takes ten steps of one fit on a CPU in float32, with the network, gradients and
training loop of the framework where it has them. The model is two dense layers with the
mean squared error (Transformers: a small Llama).

The difference compares the weights with those of `larskit.functional` on NumPy in
float64, whose gradients are written out by hand (Transformers: its own gradients). It
is the largest of any step, relative to the distance that the layer moves: an optimizer
that does nothing would differ by 1, and {bound:g} is allowed. The time is that of the
process, imports included, while others run. `make matrix` writes this page.

| integration | version | what ran | largest difference | time |
|---|---|---|---|---|
"""


class Row(NamedTuple):
    """A run of a program."""

    integration: str
    program: Path
    ran: str
    environment: str = ""  # by default the development environment
    backend: str = ""  # of Keras
    on_gpu: str = ""  # the package that needs a GPU
    impossible: str = ""  # why it cannot run anywhere


class Result(NamedTuple):
    """The figures of a row, or why there are none."""

    row: Row
    version: str = ""
    difference: float = float("nan")
    seconds: float = 0.0
    absent: str = ""
    failed: str = ""


def rows_of(integration: str, program: str, *names: str, **more: str) -> list[Row]:
    """Return the rows of one program."""
    file = PROGRAMS / f"{program}.py"
    return [Row(integration, file, name, **more) for name in names]


ROWS = [
    *rows_of("NumPy", "on_numpy", "lars_update"),
    *rows_of("array-api-strict", "on_array_api_strict", "lars_update"),
    *rows_of("CuPy", "on_cupy", "lars_update", on_gpu="cupy"),
    *rows_of(
        "PyTorch",
        "on_torch",
        "lars_update",
        "GradientLARS on torch.optim.SGD",
        "GradientLARS on torch.optim.Adam",
        "GradientLARS on torch.optim.AdamW",
        "larskit.torch.LARS",
    ),
    *rows_of("PyTorch Lightning", "on_lightning", "larskit.torch.LARS"),
    *rows_of("Accelerate", "on_accelerate", "larskit.torch.LARS"),
    *rows_of(
        "Transformers",
        "on_transformers",
        "larskit.torch.LARS in Trainer",
        environment="transformers",
    ),
    *rows_of(
        "JAX",
        "on_jax",
        "lars_update",
        "larskit.jax.LARS, its own variables",
        "larskit.jax.lars in optax.chain",
        "GradientLARS in optax.chain",
    ),
    *rows_of(
        "Flax",
        "on_flax",
        "larskit.jax.lars in nnx.Optimizer",
        "larskit.jax.LARS on nnx variables",
        "larskit.jax.lars in Linen's TrainState",
    ),
    *rows_of("Equinox", "on_equinox", "larskit.jax.lars"),
    *rows_of("BrainPy", "on_brainpy", "larskit.jax.LARS", environment="brainpy"),
    *rows_of("Keras", "on_keras", "larskit.keras.LARS on jax", backend="jax"),
    *rows_of("Keras", "on_keras", "larskit.keras.LARS on torch", backend="torch"),
    *rows_of(
        "Keras", "on_keras", "larskit.keras.LARS on tensorflow", backend="tensorflow"
    ),
    *rows_of("TensorFlow", "on_tensorflow", "lars_update"),
    *rows_of("Paddle", "on_paddle", "lars_update"),
    *rows_of(
        "Chainer", "on_chainer", "GradientLARS on MomentumSGD", environment="chainer"
    ),
    *rows_of(
        "ivy",
        "on_ivy",
        *(f"lars_update on {backend}" for backend in ("numpy", "torch", "jax")),
        environment="ivy",
    ),
    *rows_of("ivy", "on_ivy", "lars_update on paddle", environment="ivy-paddle"),
    *rows_of(
        "ivy",
        "on_ivy",
        "lars_update on tensorflow",
        impossible="to_numpy of ivy 1.0.0.5 fails on the tensors of TensorFlow 2.21",
    ),
    *rows_of(
        "ivy",
        "on_ivy",
        "lars_update on mxnet",
        impossible="MXNet is retired and has no wheel for this Python",
    ),
]


def absent(row: Row) -> str:
    """Say why a row cannot run on this machine; nothing where it can."""
    if row.impossible:
        return f"not run: {row.impossible}"
    if row.on_gpu and not find_spec(row.on_gpu):
        return f"not run: {row.on_gpu}, which needs a GPU, is not installed"
    if why := environments.unsupported(row.environment):
        return f"not run: {why}"
    return ""


def execute(row: Row) -> Result:
    """Run one program."""
    if why := absent(row):
        return Result(row, absent=why)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [_python(row), row.program, row.ran],
            env=_variables(row),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=True,
        )
        line = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as why:
        return Result(row, failed=why.stderr[-3000:])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as why:
        return Result(row, failed=f"no line: {why}")
    found = Result(
        row, line["version"], line["difference"], time.perf_counter() - start
    )
    if not found.difference <= BOUND:  # a NaN fails too
        return found._replace(failed=f"{found.difference} is more than {BOUND}")
    return found


def _python(row: Row) -> str:
    if not row.environment:
        return sys.executable
    return str(environments.python(row.environment))


def _variables(row: Row) -> dict[str, str]:
    variables = {**os.environ, **VARIABLES}
    if row.environment:
        variables["PYTHONPATH"] = str(ROOT / "src")
    if row.backend:
        variables["KERAS_BACKEND"] = row.backend
    return variables


def table(results: Iterable[Result]) -> str:
    """Return the page."""
    lines = [HEAD.format(bound=BOUND)]
    for row, version, difference, seconds, absent, failed in results:
        number = f"{difference:.1e}" if version else ""
        number = f"**failed** {number}".strip() if failed else absent or number
        took = f"{seconds:.1f} s" if seconds else ""
        cells = row.integration, version, row.ran, number, took
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def main(rows: Iterable[Row] = ROWS, page: Path = PAGE) -> int:
    """Run the rows, print and write the page; 1 if one has failed."""
    rows = list(rows)
    for name in sorted({row.environment for row in rows} - {""}):
        if not environments.unsupported(name):
            environments.make(name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(execute, rows))
    page.write_text(table(results), encoding="utf-8")
    print(page.read_text(encoding="utf-8"))
    failures = [found for found in results if found.failed]
    for found in failures:
        print(
            f"{found.row.integration}, {found.row.ran}:\n{found.failed}",
            file=sys.stderr,
        )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
