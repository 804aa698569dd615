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
from larskit.app.train import prepare, stopping, train

GIVEN = {"epochs": 30, "batch_size": 8}


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(scope="module")
def done(few, tmp_path_factory) -> Path:
    """Name the folder of a training of two epochs."""
    out = tmp_path_factory.mktemp("done")
    given = {"data": few, "epochs": 2, "batch_size": 20}
    assert train(given, str(out), console=silent()) == 0
    return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return shutil.copytree(done, tmp_path / "copy")


def test_the_folder_holds_weights_and_metrics(done):
    assert sorted(contents(done)) == ["checkpoint.pt", "metrics.jsonl"]
    state = checkpoint(done)
    assert state["format"] == "larskit.train/1"
    assert state["classes"] == ("0", "1", "2")
    assert state["epoch"] == 2
    lines = (done / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [entry["epoch"] for entry in metrics] == [1, 2]
    measures = {"step", "lr", "train_loss", "train_accuracy", "test_loss"}
    spread = {"ratio_min", "ratio_median", "ratio_max"}
    assert measures | spread | {"epoch", "test_accuracy"} == metrics[0].keys()
    assert metrics == state["history"]


@pytest.mark.integration
def test_a_training_stopped_by_ctrl_c_goes_on_to_the_same_bits(start, few, tmp_path):
    stopped, through = tmp_path / "stopped", tmp_path / "through"
    process = start(
        *("-W", "error", "-m", "larskit", "train", "--data", few, "--out", stopped),
        *("--epochs", GIVEN["epochs"], "--batch-size", GIVEN["batch_size"]),
        until=stopped / "metrics.jsonl",  # which holds the first epoch
        OMP_NUM_THREADS="1",
        COLUMNS="200",
    )
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors == ""
    assert f"Go on with: larskit train --resume --out {stopped}" in output
    assert checkpoint(stopped)["epoch"] < GIVEN["epochs"]

    assert train({}, str(stopped), resume=True, console=silent()) == 0
    assert train({"data": few, **GIVEN}, str(through), console=silent()) == 0
    one, other = checkpoint(stopped), checkpoint(through)
    for name, w in other["model"].items():
        assert torch.equal(one["model"][name], w), name
    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in (stopped, through)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_an_epoch_saves(few, tmp_path, monkeypatch, number):
    from larskit.app.trainer import Trainer

    through, step = tmp_path / "through", Trainer._step
    given = {"data": few, "epochs": 2, "batch_size": 20}
    assert train(given, str(through), console=silent()) == 0

    def fatal(self, indices):
        step(self, indices)
        if self.epoch == 1 and self.batch == 1:
            os.kill(os.getpid(), number)

    console, out = silent(), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", fatal)
        assert train(given, str(out), console=console) == 128 + number
    assert "Stopped after step 6 of 8 and saved" in said(console)
    assert checkpoint(out)["batch"] == 2
    metrics = out / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 1
    metrics.write_text(metrics.read_text() + "{}\n")
    assert train(given, str(out), resume=True, console=silent()) == 0
    for name, w in checkpoint(through)["model"].items():
        assert torch.equal(checkpoint(out)["model"][name], w)
    assert metrics.read_bytes() == (through / "metrics.jsonl").read_bytes()


@pytest.fixture
def interruptible():
    """Let Ctrl-C interrupt, which a shell forbids to what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_is_not_held_back():
    with stopping() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_a_finished_training_changes_nothing(copy):
    before, console = contents(copy), silent()
    assert train({}, str(copy), resume=True, console=console) == 0
    assert "of the test images are right" in said(console)
    assert contents(copy) == before


def test_a_training_is_not_overwritten_unasked(few, copy):
    before = contents(copy)
    given = {"data": few, "epochs": 1, "batch_size": 20}
    with pytest.raises(InputError, match="holds a training already: pass --resume"):
        train(given, str(copy))
    assert contents(copy) == before
    assert train(given, str(copy), overwrite=True, console=silent()) == 0
    assert checkpoint(copy)["epoch"] == 1


def test_a_resumed_training_keeps_its_settings(few, copy):
    agreeing = {"data": few, "batch_size": 20, "lr": 4.0}
    assert train(agreeing, str(copy), resume=True, console=silent()) == 0
    with pytest.raises(InputError, match=r"--batch-size 40 is not what .* with, 20"):
        train({"batch_size": 40}, str(copy), resume=True)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=1)
    return file.getvalue()


def replaced(**changes):
    def spoil(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        torch.save({**state, **changes}, path)

    return spoil


SPOILT = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flipped,
    "text": lambda path: path.write_text("not a checkpoint"),
    "npz": lambda path: path.write_bytes(zipped()),
    "foreign": lambda path: torch.save({"model": {}}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "code": replaced(extra=Path("a")),
    "later format": replaced(format="larskit.train/2"),
    "strange settings": replaced(settings={"rate": 4}),
    "other weights": replaced(model={}),
    "no place": replaced(batch=None, epoch=None),
    "beyond the end": replaced(batch=99),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_truncated_or_foreign_checkpoint_is_refused(copy, spoil):
    spoil(copy / "checkpoint.pt")
    before = contents(copy)
    with pytest.raises(
        InputError, match="truncated or corrupt, or no checkpoint of larskit train"
    ):
        train({}, str(copy), resume=True, console=silent())
    assert contents(copy) == before


def test_resuming_needs_a_checkpoint_and_the_same_images(few, tmp_path):
    with pytest.raises(InputError, match=r"there is no .*checkpoint\.pt"):
        train({}, str(tmp_path), resume=True)
    data = shutil.copy(few, tmp_path / "data.npz")
    out = tmp_path / "out"
    given = {"data": str(data), "epochs": 1, "batch_size": 20}
    assert train(given, str(out), console=silent()) == 0
    with np.load(few) as file:
        np.savez(data, x=file["x"] + 1, y=file["y"])
    with pytest.raises(InputError, match="are not those that"):
        train({}, str(out), resume=True)


def test_a_divergence_is_said(few, tmp_path):
    given = {"data": few, "optimizer": "sgd", "lr": 1e20, "model": "convnet-plain"}
    console = silent()
    assert train({**given, "batch_size": 20}, str(tmp_path), console=console) == 1
    assert "no longer finite" in said(console)
    assert '"train_loss": null' in (tmp_path / "metrics.jsonl").read_text()


def test_bad_input_leaves_no_folder(few, tmp_path):
    out = tmp_path / "a" / "b"
    for given in ({"data": str(tmp_path / "none")}, {"data": few, "batch_size": 999}):
        with pytest.raises(InputError):
            train(given, str(out))
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match=r"--out .* cannot be made"):
            prepare(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="cannot be written"):
        prepare(tmp_path)


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(few, tmp_path):
    given = {"data": few, "epochs": 2, "batch_size": 20}
    for terminal, out in ((True, "a"), (False, "b")):
        console = Console(
            file=io.StringIO(), width=200, force_terminal=terminal, highlight=False
        )
        assert train(given, str(tmp_path / out), console=console) == 0
        text = said(console)
        for part in ("epoch 2/2", "loss 0", "accuracy", "lr ", "ratios ", "test "):
            assert part in text
        assert ("━" in text) == ("\x1b" in text) == terminal
        assert ("8/8" in text) == terminal
