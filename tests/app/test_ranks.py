"""How ranks divide images, cores and devices, without starting processes."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from larskit.app import InputError
from larskit.app.ranks import Ranks
from larskit.app.settings import Settings
from larskit.app.train import train
from larskit.app.trainer import select_device

PLAIN = {"model": "convnet-plain", "epochs": 2, "batch_size": 20, "device": "cpu"}


def train_here(given: dict, out: Path, *, resume: bool = False) -> None:
    console = Console(file=io.StringIO())
    assert train(given, str(out), resume=resume, console=console) == 0


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"batch_size": 7}, Ranks(0, 4), "in 4 processes computes 1 images at a time"),
        (
            {"batch_size": 7, "model": "convnet-plain", "accumulate": 2},
            Ranks(0, 4),
            "--accumulate 2 in 4 processes computes 0 images at a time, but "
            "convnet-plain needs 1",
        ),
        (
            {"device": "cuda:1"},
            Ranks(0, 2),
            "--device cuda:1 cannot be used by 2 processes",
        ),
        ({"device": "mps"}, Ranks(0, 2), "--device mps cannot be used by 2 processes"),
        (
            {"device": "cuda", "batch_size": 1000},
            Ranks(0, 99, 0, 99),
            r"--device cuda has \d GPUs for 99 processes",
        ),
    ],
    ids=["too few images", "too few for the parts", "one GPU", "MPS", "too few GPUs"],
)
def test_settings_that_do_not_fit_the_processes_are_errors(
    digits, given, ranks, message
):
    with pytest.raises(InputError, match=message):
        select_device(Settings(**given), digits, ranks)


def test_sharding_needs_torchrun(few, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"--shard fsdp2 shards .* run torchrun"):
        train({"data": few}, str(out), shard="fsdp2")
    assert not out.exists()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_image_is_assigned_to_one_rank(size, parts):
    images = torch.arange(16)
    shares = [Ranks(rank, size).local_parts(images, parts) for rank in range(size)]
    assert {len(share) for share in shares} == {parts}
    assigned = torch.cat([part for share in shares for part in share])
    assert sorted(assigned.tolist()) == images.tolist()
    sizes = {len(part) for share in shares for part in share}
    assert max(sizes) - min(sizes) <= 1


def test_the_processes_divide_the_cores(monkeypatch):
    monkeypatch.setattr("larskit.app.ranks.usable_cores", lambda: 7)
    assert Ranks().threads is None
    assert [Ranks(0, n, 0, n).threads for n in (2, 3, 9)] == [3, 2, 1]


def test_stored_threads_apply_to_the_same_number_of_processes_only(few, tmp_path):
    given = {"data": few, **PLAIN, "threads": 2}
    train_here(given, tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), "ranks": 2}, path)
    train_here({"threads": 1}, tmp_path, resume=True)
    torch.save({**torch.load(path, weights_only=True), "ranks": 1}, path)
    with pytest.raises(InputError, match="--threads 1 differs from the stored value 2"):
        train({"threads": 1}, str(tmp_path), resume=True)
