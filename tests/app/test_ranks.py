"""What the processes of a training divide among themselves."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from larskit.app import InputError
from larskit.app.ranks import Ranks
from larskit.app.settings import Settings
from larskit.app.train import train
from larskit.app.trainer import check

PLAIN = {"model": "convnet-plain", "epochs": 2, "batch_size": 20, "device": "cpu"}


def alone(given: dict, out: Path, *, resume: bool = False) -> None:
    console = Console(file=io.StringIO())
    assert train(given, str(out), resume=resume, console=console) == 0


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"batch_size": 7}, Ranks(0, 4), "in 4 processes leaves 1 image at a time"),
        (
            {"batch_size": 7, "model": "convnet-plain", "accumulate": 2},
            Ranks(0, 4),
            "--accumulate 2 in 4 processes leaves 0 image at a time, but 1 is needed",
        ),
        ({"device": "cuda:1"}, Ranks(0, 2), "--device cuda:1 is not for 2 processes"),
        ({"device": "mps"}, Ranks(0, 2), "--device mps is not for 2 processes"),
        (
            {"device": "cuda", "batch_size": 1000},
            Ranks(0, 99, 0, 99),
            r"--device cuda has \d GPUs for 99 processes",
        ),
    ],
    ids=["too few images", "too few for the parts", "one GPU", "MPS", "too few GPUs"],
)
def test_what_so_many_processes_cannot_do_is_refused(digits, given, ranks, message):
    with pytest.raises(InputError, match=message):
        check(Settings(**given), digits, ranks)


def test_sharding_needs_torchrun(few, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"--shard fsdp2 spreads .* with torchrun"):
        train({"data": few}, str(out), shard="fsdp2")
    assert not out.exists()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_image_is_the_share_of_one_rank(size, parts):
    images = torch.arange(16)
    shares = [Ranks(rank, size).share(images, parts) for rank in range(size)]
    assert {len(share) for share in shares} == {parts}
    dealt = torch.cat([part for share in shares for part in share])
    assert sorted(dealt.tolist()) == images.tolist()
    sizes = {len(part) for share in shares for part in share}
    assert max(sizes) - min(sizes) <= 1


def test_the_cores_are_shared(monkeypatch):
    monkeypatch.setattr("larskit.app.ranks.usable_cores", lambda: 7)
    assert Ranks().threads is None
    assert [Ranks(0, n, 0, n).threads for n in (2, 3, 9)] == [3, 2, 1]


def test_a_stored_number_of_threads_is_for_as_many_processes(few, tmp_path):
    given = {"data": few, **PLAIN, "threads": 2}
    alone(given, tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), "ranks": 2}, path)
    alone({"threads": 1}, tmp_path, resume=True)
    torch.save({**torch.load(path, weights_only=True), "ranks": 1}, path)
    with pytest.raises(InputError, match="--threads 1 is not what"):
        train({"threads": 1}, str(tmp_path), resume=True)
