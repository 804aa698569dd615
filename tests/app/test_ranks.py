"""Trainings of several processes, started by torchrun, against those of one."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from larskit.app import InputError
from larskit.app.ranks import Ranks
from larskit.app.settings import Settings
from larskit.app.train import train
from larskit.app.trainer import Trainer, check

LIVE = Path(__file__).parent / "live"
RANKS = 3
CPU = {"device": "cpu"}  # of GPUs there may be too few
PLAIN = {"model": "convnet-plain", "epochs": 2, "batch_size": 20} | CPU
FSDP2 = {"shard": "fsdp2"}
# The same as in one process that accumulates so many times as many parts.
ALIKE = {
    "ddp": PLAIN,
    "ddp accumulated": {**PLAIN, "accumulate": 2},
    "fsdp2": PLAIN | FSDP2,
    "fsdp2 accumulated": {**PLAIN, "accumulate": 2} | FSDP2,
    "fsdp2 sgd": {**PLAIN, "optimizer": "sgd"} | FSDP2,
    "fsdp2 adamw": {**PLAIN, "optimizer": "adamw"} | FSDP2,
    "fsdp2 larc bfloat16": {**PLAIN, "optimizer": "larc", "precision": "bfloat16"}
    | FSDP2,
    "batch norm ddp": {"data": "digits", "epochs": 1, "batch_size": 718},
    "batch norm fsdp2": {"data": "digits", "epochs": 1, "batch_size": 718} | FSDP2,
    "blocks": {"model": "resnet18", "epochs": 1, "batch_size": 80} | FSDP2,
}
ON_CPU = ("--device", "cpu")
SHARDS = {"ddp": {}, "fsdp2": FSDP2}
CROSSED = [
    ("ddp", "ddp"),
    ("fsdp2", "fsdp2"),
    ("ddp", "fsdp2"),
    ("fsdp2", "ddp"),
    ("one", "ddp"),
    ("one", "fsdp2"),
]


def torchrun(*arguments: object, ranks: int = 2) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command = [sys.executable, "-m", *launcher, *arguments]
    environment = os.environ | {
        "COLUMNS": "300",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "4",
    }
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[str, str, list[str]]:
    """Return stdout and stderr, and what larskit itself has said on stderr."""
    try:
        output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # which torchrun passes on
        process.communicate()
        raise
    said = [line for line in errors.splitlines() if line.startswith("larskit: ")]
    return output, errors, said


def quiet() -> Console:
    return Console(file=io.StringIO())


def alone(given: dict, out: Path, *, resume: bool = False) -> dict:
    """Train in this process."""
    assert train(given, str(out), resume=resume, console=quiet()) == 0
    return checkpoint(out)


def stopped(given: dict, out: Path) -> None:
    """Train in this process until a signal comes in the middle of an epoch."""
    step = Trainer._step

    def signalled(self, indices):
        step(self, indices)
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_step", signalled)
        assert train(given, str(out), console=quiet()) == 143


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(state: dict) -> dict[str, torch.Tensor]:
    """Return the weights by name, and the optimizer's state."""
    moments = state["optimizer"]["state"]
    return state["model"] | {
        f"{index}.{name}": x for index, s in moments.items() for name, x in s.items()
    }


def differing(one: dict, other: dict, rtol: float, atol: float) -> list[str]:
    first, second = flat(one), flat(other)
    assert first.keys() == second.keys()
    return [
        name
        for name, x in first.items()
        if type(x) is not torch.Tensor
        or not torch.allclose(x, second[name], rtol, atol)
    ]


@pytest.fixture(scope="module")
def trained(few, tmp_path_factory):
    """Train in three processes; return the folder, and how each training ended."""
    folder = tmp_path_factory.mktemp("ranks")
    stopped({**PLAIN, "data": few}, folder / "one stopped")
    plan: list[tuple[str, str | None, dict]] = []
    plan += [(name, None, given) for name, given in ALIKE.items()]
    plan += [(f"{k} stopped", "signal", PLAIN | shard) for k, shard in SHARDS.items()]
    plan += [(f"{a} to {b}", f"{a} stopped", SHARDS[b]) for a, b in CROSSED]
    plan = [(name, event, {"data": few} | given | CPU) for name, event, given in plan]
    (folder / "plan.json").write_text(json.dumps(plan))
    process = torchrun(LIVE / "trainings.py", folder, folder / "plan.json", ranks=RANKS)
    output, errors, _ = ended(process)
    assert process.returncode == 0, errors[-3000:]
    assert "Warning" not in errors
    return folder, json.loads((folder / "plan.json").read_text()), output


@pytest.mark.parametrize("name", ALIKE)
def test_several_processes_do_what_one_does(few, tmp_path, trained, name):
    folder, results, _ = trained
    given = {k: v for k, v in ALIKE[name].items() if k != "shard"}
    given["accumulate"] = given.get("accumulate", 1) * RANKS
    one = alone({"data": few} | given | CPU, tmp_path)
    several = checkpoint(folder / name)
    assert results[name] == [0, True]
    close = (2e-2, 2e-2) if "bfloat16" in name else (1e-3, 1e-4)
    wrong = differing(several, one, *close)
    if name == "blocks":  # so few images are measured in one part, or else in three
        wrong = [name for name in wrong if "running" not in name]
    assert [name for name in wrong if "num_batches" not in name] == []
    assert several["ranks"] == RANKS
    for entry, expected in zip(several["history"], one["history"], strict=True):
        if name == "blocks":
            del entry["test_loss"], expected["test_loss"]
        assert entry == pytest.approx(expected, rel=10 * close[0])


@pytest.mark.parametrize(("begun", "then"), CROSSED)
def test_any_number_of_processes_goes_on(trained, begun, then):
    folder, results, _ = trained
    state = checkpoint(folder / f"{begun} stopped")
    assert 0 < state["batch"] < 4
    assert results[f"{begun} to {then}"] == [0, True]
    through, resumed = (
        checkpoint(folder / then),
        checkpoint(folder / f"{begun} to {then}"),
    )
    exact = begun == then
    assert differing(resumed, through, *(2 * [0.0] if exact else (1e-3, 1e-4))) == []
    close = 0 if exact else 1e-3
    for entry, expected in zip(resumed["history"], through["history"], strict=True):
        assert entry == pytest.approx(expected, rel=close, abs=0)


@pytest.mark.parametrize("begun", ["ddp", "fsdp2"])
def test_one_process_goes_on(tmp_path, trained, begun):
    folder, results, _ = trained
    assert results[f"{begun} stopped"] == [143, True]
    out = shutil.copytree(folder / f"{begun} stopped", tmp_path / "out")
    resumed = alone({}, out, resume=True)
    assert resumed["ranks"] == 1
    assert differing(resumed, checkpoint(folder / begun), 1e-3, 1e-4) == []
    expected = checkpoint(folder / begun)["history"]
    for entry, other in zip(resumed["history"], expected, strict=True):
        assert entry == pytest.approx(other, rel=1e-3)


def test_one_process_alone_prints(trained):
    _, results, output = trained
    ends = [code for code, _ in results.values()]
    assert output.count("of the test images are right") == ends.count(0)
    assert output.count("Stopped after step") == ends.count(143) == len(SHARDS)


DEATHS = {
    "SIGKILL": "one of the 2 processes has died or does not answer, so the others end",
    "hangs": "the step at hand has not ended 1 s after a signal, perhaps as one of",
}


@pytest.mark.parametrize(
    ("event", "victim", "shard"),
    [("SIGKILL", 0, ()), ("SIGKILL", 1, ("--shard", "fsdp2")), ("hangs", 1, ())],
)
def test_a_lost_process_is_said_and_the_checkpoint_stays(
    few, tmp_path, event, victim, shard
):
    out = tmp_path / "out"
    flags = ["--data", few, "--model", "convnet-plain", "--batch-size", "20"]
    flags += ON_CPU
    flags += ["--epochs", "2", "--out", out, *shard]
    process = torchrun(LIVE / "cli.py", victim, 5, event, "train", *flags)
    if event == "hangs":
        while process.poll() is None and not (out / "hangs").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    output, errors, said = ended(process)
    assert process.returncode != 0
    assert len(said) == 1, errors[-3000:]
    assert DEATHS[event] in said[0]
    command = "torchrun --nproc-per-node 2 -m larskit train --resume --out"
    assert f"{out}/checkpoint.pt is whole, go on with {command} {out}" in said[0]
    assert output.count("epoch ") == 1
    state = checkpoint(out)
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert sorted(p.name for p in out.glob("*.*")) == ["checkpoint.pt", "metrics.jsonl"]
    resumed = alone({}, out, resume=True)
    through = alone({"data": few, **PLAIN}, tmp_path / "through")
    assert differing(resumed, through, 1e-3, 1e-4) == []


def test_ctrl_c_stops_all_at_one_step(few, tmp_path):
    flags = ["--data", few, "--model", "convnet-plain", "--batch-size", "20"]
    flags += ON_CPU
    flags += ["--epochs", "2000", "--out", tmp_path]
    process = torchrun("-m", "larskit", "train", *flags)
    while process.poll() is None and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _, said = ended(process)
    assert process.returncode != 0
    assert said == []
    (step,) = re.findall(r"Stopped after step (\d+) of 8000 and saved", output)
    state = checkpoint(tmp_path)
    assert state["epoch"] * 4 + state["batch"] == int(step)
    assert int(state["schedule"]["last_epoch"]) == int(step)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [LIVE / "cli.py", 1, 0, "is blind", "train", *ON_CPU],
            "larskit: nothing to be seen",
        ),
        (
            ["-m", "larskit", "study"],
            "larskit study starts processes of its own, see --jobs",
        ),
    ],
    ids=["of one", "of all"],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, sentence):
    out = tmp_path / "out"
    process = torchrun(*arguments, "--out", out)
    output, errors, said = ended(process)
    assert output == ""
    assert len(said) == 1
    assert sentence in said[0]
    assert re.findall(r"exitcode +: (-?\d+)", errors) == ["2", "2"]
    assert not out.exists()


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
    state = checkpoint(tmp_path)
    torch.save({**state, "ranks": 1}, path)
    with pytest.raises(InputError, match="--threads 1 is not what"):
        train({"threads": 1}, str(tmp_path), resume=True)
