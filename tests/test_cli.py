import subprocess
import sys

import numpy as np
import pytest

from larskit.cli import main


def failing(capsys, *arguments: str) -> str:
    """Run a command that must exit with 2, and return its message of one line."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("larskit: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", [[], ["train"], ["study"]])
def test_help_lists_options_and_defaults(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    if command:
        assert "--trust-coefficient" in text
        assert "lars 0.01, larc 0.02" in text
    if command == ["train"]:
        assert "lars 4, larc" in text
        assert "that of lars assumes a trust coefficient of 0.01" in text


@pytest.mark.integration
def test_the_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "larskit", "train", "--lr", "0"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "larskit: --lr must be a finite number above 0, got 0.0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--data", "none.npz"], "none.npz does not exist"),
        (["train", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["train", "--lr", "-1"], "--lr must be a finite number above 0, got -1.0"),
        (["train", "--epochs", "-1"], "--epochs must be an integer"),
        (["train", "--epochs", "1.5"], "argument --epochs: invalid int value"),
        (["train", "--optimizer", "adam"], "invalid choice: 'adam'"),
        (["train", "--learning-rate", "1"], "unrecognized arguments"),
        (["train", "--epoch", "1"], "unrecognized arguments"),
        (["train", "--resume", "--overwrite"], "not allowed with"),
        (["train", "--batch-size", "5000"], "training images, 1437, got 5000"),
        (["train", "--resume", "--out", "none"], "none/checkpoint.pt does not exist"),
        (["train", "--best-of", "none.json"], "none.json cannot be read"),
        (["study", "--data", "none.npz"], "none.npz does not exist"),
        (["study", "--seeds", "0"], "--seeds: must be an integer of at least 1"),
        (["study", "--jobs", "none"], "--jobs: must be an integer of at least 1"),
        (["study", "--lrs", "sgd"], "must have the form sgd=0.1,0.2, got sgd"),
        (["study", "--lrs", "sgd=0.1,x"], "must have the form sgd=0.1,0.2"),
        (["study", "--lrs", "sgd=0"], "--lr must be a finite number above 0"),
        (["study", "--optimizers", "sgd", "--lrs", "lars=1"], "not among --optimizers"),
        (["study", "--batch-sizes", "64", "5000"], "1437, got 5000"),
        (["doctor", "--out", "x"], "unrecognized arguments: --out x"),
    ],
)
def test_invalid_input_is_an_error_of_one_line(
    capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in failing(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_training_prints_one_word(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("larskit.app.train.train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "larskit: stopped\n"


def test_an_error_of_the_operating_system_is_printed(capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("larskit.app.train.train", full)
    assert main(["train"]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_train_and_study_from_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = generator.normal(size=(60, 6, 6)) + y[:, None, None]
    np.savez("data.npz", x=x, y=y)
    shared = ["--data", "data.npz", "--epochs", "2", "--warmup", "0"]
    study = ["--optimizers", "sgd", "--lrs", "sgd=0.05,0.1", "--batch-sizes", "16"]
    assert main(["study", *shared, *study, "--seeds", "1", "--jobs", "1"]) == 0
    assert "Test accuracy in %" in capsys.readouterr().out
    best = ["--best-of", "runs/study/results.json", "--epochs", "3"]
    assert main(["train", *best]) == 0
    assert "epoch 3/3" in capsys.readouterr().out
    assert (tmp_path / "runs" / "train" / "checkpoint.pt").exists()
