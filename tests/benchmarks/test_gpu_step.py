"""The benchmark of the GPU, where there is none: its dry run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.integration
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = {"larskit LARS", "larskit LARS (carried norms)", "larskit LARS (foreach)"}
OTHERS = {"torch SGD (fused)", "torch SGD (foreach)", "larskit.jax.lars (jit)"}


def run(*arguments):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_step.py", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "ResNet-50", "--rows", "larskit", "SGD"],
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--dtype", "bfloat16"], marks=pytest.mark.slow),
    ],
)
def test_the_dry_run_comes_to_its_end(arguments):
    before = sorted(BENCHMARKS.glob("results/*"))
    done = run("--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    assert "these numbers mean nothing" in done.stdout
    tables = done.stdout.split("### ")[1:-1]
    assert len(tables) == (1 if "--shapes" in arguments else 5)
    for table in tables:
        rows = [line.split(" | ") for line in table.splitlines() if line[:2] == "| "]
        measured = {name[2:] for name, first, *_ in rows[1:] if first.endswith(" ms")}
        assert measured >= OURS | OTHERS
    assert sorted(BENCHMARKS.glob("results/*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 2
    assert "PyTorch finds no CUDA GPU here; --dry-run needs none." in done.stderr
