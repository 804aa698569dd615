"""Triton's kernels, compiled for GPUs that need not be here."""

import json
from pathlib import Path

import pytest

LIVE = Path(__file__).parent / "live"


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(python, tmp_path_factory):
    """Return what runs a program where Triton is not told to interpret."""
    folder = str(tmp_path_factory.mktemp("triton"))
    variables = {"TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0"}
    return lambda program: json.loads(python(LIVE / program, **variables))


@pytest.fixture(scope="module")
def compiled(run):
    """Compile every kernel for every target."""
    return run("compiled.py")


def test_launches_are_bound_and_compiled_once(run):
    launches = run("bound.py")
    assert [name for name, *_ in launches] == ["measure", "finish", "move"] * 4
    assert [new for _, new, _ in launches] == [True] * 3 + [False] * 3 + (
        [True] * 3 + [False] * 3
    )
    assert launches[3][2] == ["*fp64", "*fp64", "*fp64"]
    assert launches[-1][2] == ["*fp32", "*fp32", "*u1"]


def test_every_target_and_variant_is_there(compiled):
    assert {row["target"] for row in compiled} == {"cuda 80", "cuda 90", "hip gfx942"}
    assert len(compiled) == 3 * (4 * 8 + 2)


def test_whole_blocks_are_read_and_written_in_vectors(compiled):
    """Of 16 bytes: a thread has eight elements of each array."""
    for row in compiled:
        if not row["target"].startswith("cuda") or row["kernel"].startswith("finish"):
            continue
        move = 3 if row["momentum"] else 2
        arrays = {"measure": 2, "scale": 2, "move": move}[row["kernel"]]
        if row["kernel"] == "measure" and row["denominator"] == "momentum":
            arrays += 1
        vectors = sum(n for op, n in row["loads"].items() if ".v" in op)
        assert vectors == sum(8 * size // 16 for size in row["bytes"][:arrays]), row


def test_a_move_adds_squares_only_if_asked(compiled):
    for row in compiled:
        in_float32 = max(row["bytes"]) <= 4
        if row["kernel"] == "move" and row["target"].startswith("cuda") and in_float32:
            assert bool(row["float64_sums"]) is row["leaves_squares"], row


def test_nothing_is_spilled(compiled):
    for row in compiled:
        if row["target"].startswith("cuda"):
            assert row["local"] == 0, row
            assert row["registers"] <= 128, row


def test_what_is_rounded_is_rounded_to_nearest(compiled):
    for row in compiled:
        if row["target"].startswith("cuda"):
            assert not {"fma", "ftz", "approx", "full"} & {*row["roundings"]}, row
            assert row["kernel"] != "finish" or "rn" in row["roundings"], row


def test_without_a_gpu_the_engine_says_so(python):
    sentences = {"this PyTorch was built for the CPU alone", "PyTorch finds no GPU"}
    said = python(LIVE / "no_gpu.py", TRITON_INTERPRET="0").splitlines()
    assert said == ["there is a GPU"] or (len(said) == 2 and {*said} <= sentences)
