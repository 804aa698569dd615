import io
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from larskit.app import InputError
from larskit.app.train import catch_signals, make_folder, train

GIVEN = {"epochs": 30, "batch_size": 8}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(scope="module")
def done(few, tmp_path_factory) -> Path:
    """Train for two epochs; return the folder."""
    out = tmp_path_factory.mktemp("done")
    given = {"data": few, "epochs": 2, "batch_size": 20}
    assert train(given, str(out), console=quiet()) == 0
    return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return shutil.copytree(done, tmp_path / "copy")


def test_the_folder_contains_weights_and_metrics(done):
    assert sorted(contents(done)) == ["checkpoint.pt", "metrics.jsonl"]
    state = checkpoint(done)
    assert state["format"] == "larskit.train/1"
    assert state["classes"] == ("0", "1", "2")
    assert state["epoch"] == 2
    lines = (done / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [entry["epoch"] for entry in metrics] == [1, 2]
    losses = {"step", "lr", "train_loss", "train_accuracy", "test_loss"}
    ratios = {"ratio_min", "ratio_median", "ratio_max"}
    assert losses | ratios | {"epoch", "test_accuracy"} == metrics[0].keys()
    assert metrics == state["history"]


@pytest.mark.integration
def test_a_run_stopped_by_ctrl_c_resumes_bitwise_identically(start, few, tmp_path):
    stopped, full = tmp_path / "stopped", tmp_path / "full"
    process = start(
        *("-W", "error", "-m", "larskit", "train", "--data", few, "--out", stopped),
        *("--epochs", GIVEN["epochs"], "--batch-size", GIVEN["batch_size"]),
        until=stopped / "metrics.jsonl",  # written after the first epoch
        OMP_NUM_THREADS="1",
        COLUMNS="200",
    )
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors == ""
    assert f"Resume with: larskit train --resume --out {stopped}" in output
    assert checkpoint(stopped)["epoch"] < GIVEN["epochs"]

    assert train({}, str(stopped), resume=True, console=quiet()) == 0
    assert train({"data": few, **GIVEN}, str(full), console=quiet()) == 0
    one, other = checkpoint(stopped), checkpoint(full)
    for name, w in other["model"].items():
        assert torch.equal(one["model"][name], w), name
    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in (stopped, full)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_an_epoch_saves_a_checkpoint(
    few, tmp_path, monkeypatch, number
):
    from larskit.app.trainer import Trainer

    full, step = tmp_path / "full", Trainer._step
    given = {"data": few, "epochs": 2, "batch_size": 20}
    assert train(given, str(full), console=quiet()) == 0

    def interrupted(self, indices):
        step(self, indices)
        if self.epoch == 1 and self.batch == 1:
            os.kill(os.getpid(), number)

    console, out = quiet(), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        assert train(given, str(out), console=console) == 128 + number
    assert "Stopped after step 6 of 8 and saved" in text_of(console)
    assert checkpoint(out)["batch"] == 2
    metrics = out / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 1
    metrics.write_text(metrics.read_text() + "{}\n")
    assert train(given, str(out), resume=True, console=quiet()) == 0
    for name, w in checkpoint(full)["model"].items():
        assert torch.equal(checkpoint(out)["model"][name], w)
    assert metrics.read_bytes() == (full / "metrics.jsonl").read_bytes()


@pytest.fixture
def interruptible():
    """Restore the default SIGINT handler, which shells disable in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_is_not_caught():
    with catch_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_a_finished_run_changes_nothing(copy):
    before, console = contents(copy), quiet()
    assert train({}, str(copy), resume=True, console=console) == 0
    assert "Test accuracy " in text_of(console)
    assert contents(copy) == before


def test_a_run_is_overwritten_only_on_request(few, copy):
    before = contents(copy)
    given = {"data": few, "epochs": 1, "batch_size": 20}
    with pytest.raises(
        InputError, match="already contains a training run: pass --resume"
    ):
        train(given, str(copy))
    assert contents(copy) == before
    assert train(given, str(copy), overwrite=True, console=quiet()) == 0
    assert checkpoint(copy)["epoch"] == 1


def test_a_resumed_run_keeps_its_settings(few, copy):
    agreeing = {"data": few, "batch_size": 20, "lr": 4.0}
    assert train(agreeing, str(copy), resume=True, console=quiet()) == 0
    with pytest.raises(
        InputError, match=r"--batch-size 40 differs from the stored value 20 of"
    ):
        train({"batch_size": 40}, str(copy), resume=True)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def npz_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=1)
    return file.getvalue()


def replaced(**changes):
    def corrupt(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        torch.save({**state, **changes}, path)

    return corrupt


CORRUPT = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped bit": flip_bit,
    "text": lambda path: path.write_text("not a checkpoint"),
    "npz": lambda path: path.write_bytes(npz_bytes()),
    "foreign": lambda path: torch.save({"model": {}}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "code": replaced(extra=Path("a")),
    "later format": replaced(format="larskit.train/2"),
    "unknown settings": replaced(settings={"rate": 4}),
    "other weights": replaced(model={}),
    "no position": replaced(batch=None, epoch=None),
    "beyond the end": replaced(batch=99),
}


@pytest.mark.parametrize("corrupt", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_or_foreign_checkpoint_is_an_error(copy, corrupt):
    corrupt(copy / "checkpoint.pt")
    before = contents(copy)
    with pytest.raises(
        InputError, match="truncated or corrupt, or is not a checkpoint"
    ):
        train({}, str(copy), resume=True, console=quiet())
    assert contents(copy) == before


def test_resuming_needs_a_checkpoint_and_the_same_images(few, tmp_path):
    with pytest.raises(InputError, match=r"checkpoint\.pt does not exist"):
        train({}, str(tmp_path), resume=True)
    data = shutil.copy(few, tmp_path / "data.npz")
    out = tmp_path / "out"
    given = {"data": str(data), "epochs": 1, "batch_size": 20}
    assert train(given, str(out), console=quiet()) == 0
    with np.load(few) as file:
        np.savez(data, x=file["x"] + 1, y=file["y"])
    with pytest.raises(InputError, match="differ from those that"):
        train({}, str(out), resume=True)


def test_divergence_is_reported(few, tmp_path):
    given = {"data": few, "optimizer": "sgd", "lr": 1e20, "model": "convnet-plain"}
    console = quiet()
    assert train({**given, "batch_size": 20}, str(tmp_path), console=console) == 1
    assert "The training diverged" in text_of(console)
    assert '"train_loss": null' in (tmp_path / "metrics.jsonl").read_text()


def test_invalid_input_creates_no_folder(few, tmp_path):
    out = tmp_path / "a" / "b"
    for given in ({"data": str(tmp_path / "none")}, {"data": few, "batch_size": 999}):
        with pytest.raises(InputError):
            train(given, str(out))
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_created_or_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match=r"--out .* cannot be created"):
            make_folder(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="is not writable"):
        make_folder(tmp_path)


def test_a_progress_bar_is_shown_on_a_terminal_only(few, tmp_path):
    given = {"data": few, "epochs": 2, "batch_size": 20}
    for terminal, out in ((True, "a"), (False, "b")):
        console = Console(
            file=io.StringIO(), width=200, force_terminal=terminal, highlight=False
        )
        assert train(given, str(tmp_path / out), console=console) == 0
        text = text_of(console)
        for part in ("epoch 2/2", "loss 0", "accuracy", "lr ", "ratios ", "test "):
            assert part in text
        assert ("━" in text) == ("\x1b" in text) == terminal
        assert ("8/8" in text) == terminal
