"""Compare runs of several processes, started by torchrun, with those of one."""

import io
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from larskit.app.train import train
from larskit.app.trainer import Trainer

pytestmark = pytest.mark.distributed
LIVE = Path(__file__).parent / "live"
RANKS = 3
CPU = {"device": "cpu"}  # a machine may have fewer GPUs than ranks
PLAIN = {"model": "convnet-plain", "epochs": 2, "batch_size": 20} | CPU
FSDP2 = {"shard": "fsdp2"}
# One process gives the same result with RANKS times the accumulation.
EQUIVALENT = {
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
RESUMED = [
    ("ddp", "ddp"),
    ("fsdp2", "fsdp2"),
    ("ddp", "fsdp2"),
    ("fsdp2", "ddp"),
    ("one", "ddp"),
    ("one", "fsdp2"),
]


@pytest.fixture(scope="module")
def torchrun(start):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    variables = {"COLUMNS": "300", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "4"}

    def run(*arguments: object, ranks: int = 2, until: Path | None = None):
        return start(*launcher, ranks, *arguments, until=until, **variables)

    return run


def outputs(process: subprocess.Popen[str]) -> tuple[str, str, list[str]]:
    """Wait; return stdout, stderr, and the lines on stderr that larskit printed."""
    output, errors = process.communicate(timeout=300)
    messages = [line for line in errors.splitlines() if line.startswith("larskit: ")]
    return output, errors, messages


def quiet() -> Console:
    return Console(file=io.StringIO())


def train_here(given: dict, out: Path, *, resume: bool = False) -> dict:
    """Train in this process."""
    assert train(given, str(out), resume=resume, console=quiet()) == 0
    return checkpoint(out)


def train_until_signal(given: dict, out: Path) -> None:
    """Train in this process, and stop it by a signal within an epoch."""
    step = Trainer._step

    def step_and_signal(self, indices):
        step(self, indices)
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_step", step_and_signal)
        assert train(given, str(out), console=quiet()) == 143


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(state: dict) -> dict[str, torch.Tensor]:
    """Return the weights and the optimizer state in one dict."""
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
def trained(torchrun, few, tmp_path_factory):
    """Train in three processes; return the folder, the exit codes and the output."""
    folder = tmp_path_factory.mktemp("ranks")
    train_until_signal({**PLAIN, "data": few}, folder / "one stopped")
    plan: list[tuple[str, str | None, dict]] = []
    plan += [(name, None, given) for name, given in EQUIVALENT.items()]
    plan += [(f"{k} stopped", "signal", PLAIN | shard) for k, shard in SHARDS.items()]
    plan += [(f"{a} to {b}", f"{a} stopped", SHARDS[b]) for a, b in RESUMED]
    plan = [(name, event, {"data": few} | given | CPU) for name, event, given in plan]
    (folder / "plan.json").write_text(json.dumps(plan))
    process = torchrun(LIVE / "trainings.py", folder, folder / "plan.json", ranks=RANKS)
    output, errors, _ = outputs(process)
    assert process.returncode == 0, errors[-3000:]
    assert "Warning" not in errors
    return folder, json.loads((folder / "plan.json").read_text()), output


@pytest.mark.parametrize("name", EQUIVALENT)
def test_several_processes_give_the_result_of_one(few, tmp_path, trained, name):
    folder, results, _ = trained
    given = {k: v for k, v in EQUIVALENT[name].items() if k != "shard"}
    given["accumulate"] = given.get("accumulate", 1) * RANKS
    one = train_here({"data": few} | given | CPU, tmp_path)
    several = checkpoint(folder / name)
    assert results[name] == [0, True]
    tolerances = (2e-2, 2e-2) if "bfloat16" in name else (1e-3, 1e-4)
    wrong = differing(several, one, *tolerances)
    # Batch norm is updated with so few images in one part here, in three parts there.
    if name == "blocks":
        wrong = [name for name in wrong if "running" not in name]
    assert [name for name in wrong if "num_batches" not in name] == []
    assert several["ranks"] == RANKS
    for entry, expected in zip(several["history"], one["history"], strict=True):
        if name == "blocks":
            del entry["test_loss"], expected["test_loss"]
        assert entry == pytest.approx(expected, rel=10 * tolerances[0])


@pytest.mark.parametrize(("first", "second"), RESUMED)
def test_any_number_of_processes_resumes(trained, first, second):
    folder, results, _ = trained
    state = checkpoint(folder / f"{first} stopped")
    assert 0 < state["batch"] < 4
    assert results[f"{first} to {second}"] == [0, True]
    full = checkpoint(folder / second)
    resumed = checkpoint(folder / f"{first} to {second}")
    exact = first == second
    assert differing(resumed, full, *(2 * [0.0] if exact else (1e-3, 1e-4))) == []
    tolerance = 0 if exact else 1e-3
    for entry, expected in zip(resumed["history"], full["history"], strict=True):
        assert entry == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize("first", ["ddp", "fsdp2"])
def test_one_process_resumes(tmp_path, trained, first):
    folder, results, _ = trained
    assert results[f"{first} stopped"] == [143, True]
    out = shutil.copytree(folder / f"{first} stopped", tmp_path / "out")
    resumed = train_here({}, out, resume=True)
    assert resumed["ranks"] == 1
    assert differing(resumed, checkpoint(folder / first), 1e-3, 1e-4) == []
    expected = checkpoint(folder / first)["history"]
    for entry, other in zip(resumed["history"], expected, strict=True):
        assert entry == pytest.approx(other, rel=1e-3)


def test_only_one_process_prints(trained):
    _, results, output = trained
    codes = [code for code, _ in results.values()]
    assert output.count("Test accuracy ") == codes.count(0)
    assert output.count("Stopped after step") == codes.count(143) == len(SHARDS)


LOSSES = {
    "SIGKILL": "one of the 2 processes has died or stopped responding, so the others",
    "hangs": "the current step has not finished 1 s after a signal; one of the 2",
}


@pytest.mark.parametrize(
    ("event", "victim", "shard"),
    [("SIGKILL", 0, ()), ("SIGKILL", 1, ("--shard", "fsdp2")), ("hangs", 1, ())],
)
def test_a_lost_process_is_reported_and_the_checkpoint_is_kept(
    torchrun, few, tmp_path, event, victim, shard
):
    out = tmp_path / "out"
    flags = ["--data", few, "--model", "convnet-plain", "--batch-size", "20"]
    flags += ON_CPU
    flags += ["--epochs", "2", "--out", out, *shard]
    hangs = out / "hangs" if event == "hangs" else None
    process = torchrun(LIVE / "cli.py", victim, 5, event, "train", *flags, until=hangs)
    if hangs:
        process.send_signal(signal.SIGTERM)
    output, errors, messages = outputs(process)
    assert process.returncode != 0
    assert len(messages) == 1, errors[-3000:]
    assert LOSSES[event] in messages[0]
    command = "torchrun --nproc-per-node 2 -m larskit train --resume --out"
    assert f"{out}/checkpoint.pt is intact, resume with {command} {out}" in messages[0]
    assert output.count("epoch ") == 1
    state = checkpoint(out)
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert sorted(p.name for p in out.glob("*.*")) == ["checkpoint.pt", "metrics.jsonl"]
    resumed = train_here({}, out, resume=True)
    full = train_here({"data": few, **PLAIN}, tmp_path / "full")
    assert differing(resumed, full, 1e-3, 1e-4) == []


def test_ctrl_c_stops_all_processes_after_the_same_step(torchrun, few, tmp_path):
    flags = ["--data", few, "--model", "convnet-plain", "--batch-size", "20"]
    flags += ON_CPU
    flags += ["--epochs", "2000", "--out", tmp_path]
    first_epoch = tmp_path / "metrics.jsonl"
    process = torchrun("-m", "larskit", "train", *flags, until=first_epoch)
    process.send_signal(signal.SIGINT)
    output, _, messages = outputs(process)
    assert process.returncode != 0
    assert messages == []
    (step,) = re.findall(r"Stopped after step (\d+) of 8000 and saved", output)
    state = checkpoint(tmp_path)
    assert state["epoch"] * 4 + state["batch"] == int(step)
    assert int(state["schedule"]["last_epoch"]) == int(step)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [LIVE / "cli.py", 1, 0, "cannot read", "train", *ON_CPU],
            "larskit: the data cannot be read",
        ),
        (
            ["-m", "larskit", "study"],
            "larskit study was started by torchrun, but it starts its own processes",
        ),
    ],
    ids=["on one rank", "on all ranks"],
)
def test_invalid_input_is_one_message(torchrun, tmp_path, arguments, expected):
    out = tmp_path / "out"
    process = torchrun(*arguments, "--out", out)
    output, errors, messages = outputs(process)
    assert output == ""
    assert len(messages) == 1
    assert expected in messages[0]
    assert re.findall(r"exitcode +: (-?\d+)", errors) == ["2", "2"]
    assert not out.exists()
