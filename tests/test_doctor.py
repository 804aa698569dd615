"""`larskit doctor`, where everything is there, and where it is not."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from larskit import __version__, _native  # pyright: ignore[reportMissingModuleSource]

SOURCE = Path(__file__).parents[1] / "src" / "larskit"
CORE = ("numpy", "array-api-compat", "optree", "typing_extensions")
BROKEN = "raise OSError('libtorch.so:\\n  no such file')"
COMMAND = ("-m", "larskit", "doctor")
PROGRAM = str(Path(__file__).parent / "live" / "doctor.py")
pytestmark = pytest.mark.integration


def doctor(*arguments: str, **variables: str) -> dict[str, str]:
    """Run it, check that it is one aligned table, and return that."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    column = len(lines[0]) - len(lines[0].partition("  ")[2].lstrip())
    names = [line[:column].rstrip() for line in lines]
    assert len(names) == len(set(names))
    for line in lines:
        assert line[column - 2 : column] == "  ", line
        assert line[column] != " ", line
    return {line[:column].rstrip(): line[column:] for line in lines}


@pytest.fixture
def bare(tmp_path):
    """Make a folder of packages: larskit without its kernel, and what it requires."""
    for name in CORE:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()}:
            if top not in ("..", "__pycache__"):
                (tmp_path / top).symlink_to(Path(str(distribution.locate_file(top))))
    record = f"larskit-{__version__}.dist-info"
    ours = metadata.distribution("larskit").locate_file(record)
    (tmp_path / record).symlink_to(Path(str(ours)))
    (tmp_path / "larskit").symlink_to(SOURCE)
    return tmp_path


def test_everything_is_there():
    table = doctor(
        *COMMAND, OMP_NUM_THREADS="1", LARSKIT_NUM_THREADS="3", TRITON_INTERPRET="1"
    )
    assert table["larskit"] == __version__
    assert sys.executable in table["Python"]
    for engine in ("reference", "foreach", "native"):
        assert table[f"engine {engine}"] == "available"
    assert table["kernel"] == _native.variant()
    assert table["engine triton"] == "available"
    assert table["GPU"].startswith("none: TRITON_INTERPRET=1 has")
    assert table["triton"] == metadata.version("triton")
    assert table["threads"] == "3 for NumPy arrays, 1 for torch tensors"
    assert table["numpy"].startswith(f"{np.__version__} (needs >=")
    assert table["torch"].startswith(f"{torch.__version__} (needs >=")
    assert table["tensorflow"] == metadata.version("tensorflow_cpu")
    assert table["paddle"] == metadata.version("paddlepaddle")
    assert "chainer" not in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_there_is_no_gpu():
    table = doctor(*COMMAND, TRITON_INTERPRET="0")
    why = "not available: this PyTorch was built for the CPU alone"
    assert table["engine triton"] in (why, "not available: PyTorch finds no GPU")
    assert "GPU" not in table


def test_nothing_but_the_core_is_there(bare):
    table = doctor("-S", *COMMAND, PYTHONPATH=str(bare))
    assert table["larskit"] == __version__
    assert table["engine reference"] == "available"
    assert table["engine foreach"] == "not available: torch is not installed"
    assert table["engine triton"] == "not available: torch is not installed"
    assert table["engine native"].startswith(
        "not available: larskit was installed without its C++ kernel (No module"
    )
    assert "kernel" not in table
    assert "threads" not in table
    assert table["numpy"].startswith(np.__version__)
    for package, extra in (
        ("torch", "torch"),
        ("jax", "jax"),
        ("safetensors", "jax"),
        ("keras", "keras"),
        ("scikit-learn", "app"),
    ):
        how = f"not installed: pip install 'larskit[{extra}]'"
        assert table[package] == how
    assert "tensorflow" not in table


def test_a_framework_that_breaks_is_quoted(bare):
    (bare / "torch.py").write_text(BROKEN)
    table = doctor("-S", *COMMAND, PYTHONPATH=str(bare))
    why = "OSError: libtorch.so: no such file"
    assert table["engine foreach"] == f"not available: {why}"


def test_the_kernel_needs_no_torch():
    table = doctor(PROGRAM, "without_torch", LARSKIT_NUM_THREADS="3")
    assert table["engine foreach"] == "not available: torch is not installed"
    assert table["engine native"] == "available"
    assert table["threads"] == "3 for NumPy arrays"


def test_a_wrong_number_of_threads_is_quoted():
    table = doctor(*COMMAND, LARSKIT_NUM_THREADS="many")
    assert table["threads"].startswith("LARSKIT_NUM_THREADS is 'many', expected")


def test_what_only_has_its_version_read_is_not_imported():
    assert doctor(PROGRAM, "imported") == {"imported": "[]"}
