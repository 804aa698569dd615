"""`larskit train`: train a classifier with checkpoints, and resume at any step."""

import json
import math
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from larskit.app import InputError
from larskit.app.data import read
from larskit.app.ranks import Ranks, Shard, current_ranks
from larskit.app.settings import Arguments, Settings
from larskit.app.trainer import Metrics, Trainer, select_device
from larskit.state import atomic

FORMAT = "larskit.train/1"
CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
REFRESH_SECONDS = 0.1


def train(
    given: Arguments,
    out: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    shard: Shard | None = None,
    console: Console | None = None,
) -> int:
    """Train a classifier, or resume, and write checkpoints and metrics to a folder.

    ``checkpoint.pt`` is written after every epoch and when a signal stops the run.
    ``metrics.jsonl`` gets one line per epoch.

    Parameters
    ----------
    given : dict
        Arguments of `Settings`. With `resume`, they must equal the stored settings.
    out : str
        The folder. It is created if it does not exist.
    resume : bool, default=False
        Continue the run whose checkpoint is in the folder.
    overwrite : bool, default=False
        Replace the run whose checkpoint is in the folder.
    shard : {"fsdp2"}, optional
        Shard the model over the processes of torchrun. A run can be resumed with
        another value, and with another number of processes.
    console : rich.console.Console, optional
        The console that shows the progress.

    Returns
    -------
    int
        0 if the run finished; 1 if it diverged; 128 plus the signal number if SIGINT or
        SIGTERM stopped it. The value is the same on all processes.

    Raises
    ------
    InputError
        The settings, data or folder cannot be used. Nothing has been written.
    """
    ranks, folder = current_ranks(), Path(out)
    console = console or Console(quiet=ranks.rank > 0)
    with ranks.raise_on_all():
        state = _read_checkpoint(folder, given, ranks) if resume else None
        settings = Settings(**(state["settings"] if state else given))
        _check_options(folder, resume or overwrite, shard, ranks)
        data = read(settings.data, settings.image_size)
        select_device(settings, data, ranks)
        if state and state.get("data") != data.fingerprint:
            raise InputError(
                f"--resume: the images in {settings.data} differ from those that "
                f"{folder / CHECKPOINT} was trained on: restore them, or pass "
                "--overwrite to start again"
            )
    with ranks.raise_on_all():
        if ranks.rank == 0:
            make_folder(folder)
    trainer = Trainer(settings, data, ranks=ranks, shard=shard)
    if state:
        _restore(trainer, state, folder / CHECKPOINT)
        ranks.recovery_hint = _recovery_hint(trainer, folder)
    number = _run(trainer, folder, console)
    return _report_end(trainer, folder, number, console)


def _check_options(
    folder: Path, replace: bool, shard: Shard | None, ranks: Ranks
) -> None:
    if not replace and (folder / CHECKPOINT).exists():
        raise InputError(
            f"--out {folder} already contains a training run: pass --resume to "
            "continue it, --overwrite to replace it, or another folder"
        )
    if shard is not None and not ranks.launched:
        raise InputError(
            f"--shard {shard} shards the model over several processes, but there is "
            "only one: run torchrun --nproc-per-node N -m larskit train ..."
        )


def _run(trainer: Trainer, folder: Path, console: Console) -> int:
    """Train and save until the end or a signal; return the signal number, or 0."""
    ranks = trainer.ranks
    with (
        catch_signals() as signals,
        ranks.detect_lost_ranks(),
        _progress(trainer, console) as show,
    ):
        for _ in trainer.run():
            epoch_ended = trainer.batch == 0
            show(epoch_ended)
            number = ranks.agreed_signal(signals)
            if epoch_ended or number:
                _save(trainer, folder)
            if number:
                return number
    return 0


def make_folder(folder: Path) -> None:
    """Create a writable folder, or raise `InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {folder} cannot be created: {error.strerror}; pass another folder"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"--out {folder} is not writable: change its permissions or pass another "
            "folder"
        )


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one takes its previous effect."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {
        number: signal.signal(number, catch)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def progress_bar(console: Console) -> Progress:
    """Build a progress bar with a line of text; it is hidden outside a terminal."""
    return Progress(
        "{task.description}",
        BarColumn(None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )


def _read_checkpoint(folder: Path, given: Arguments, ranks: Ranks) -> dict[str, Any]:
    """Read a checkpoint, and check that the given settings equal its own."""
    path = folder / CHECKPOINT
    try:
        state = _load_file(path)
        # Another number of processes divides the cores differently.
        if state.get("ranks", 1) != ranks.size:
            state["settings"]["threads"] = given.get("threads")
        stored = Settings(**state["settings"])
    except FileNotFoundError:
        raise InputError(
            f"--resume: {path} does not exist: pass the --out folder of the run, or "
            "omit --resume"
        ) from None
    except Exception as error:  # torch.load raises any exception on a foreign file
        raise _invalid_checkpoint(path) from error
    requested = Settings(**given)
    for name in given:
        if getattr(requested, name) != getattr(stored, name):
            raise InputError(
                f"--{name.replace('_', '-')} {given[name]} differs from the stored "
                f"value {getattr(stored, name)} of {folder}: omit it, or pass "
                "--overwrite instead of --resume to start again"
            )
    return state


def _load_file(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:
        if file.testzip() is not None:
            raise ValueError("a checksum does not match")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["format"] != FORMAT:
        raise ValueError(f"the format is {state['format']}")
    return state


def _invalid_checkpoint(path: Path) -> InputError:
    return InputError(
        f"--resume: {path} is truncated or corrupt, or is not a checkpoint of larskit "
        "train: pass --overwrite instead of --resume to start again"
    )


def _restore(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    try:
        trainer.load_state_dict(state)
    except Exception as error:  # load_state_dict raises any exception on bad values
        trainer.ranks.exit_if_rank_lost(error)
        raise _invalid_checkpoint(path) from error


def _save(trainer: Trainer, folder: Path) -> None:
    state = trainer.state_dict()
    if trainer.ranks.rank == 0:
        with atomic(folder / CHECKPOINT) as file:
            torch.save({"format": FORMAT, **state}, file)
        with atomic(folder / METRICS, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in trainer.history)
    trainer.ranks.barrier()
    trainer.ranks.recovery_hint = _recovery_hint(trainer, folder)


def _recovery_hint(trainer: Trainer, folder: Path) -> str:
    command = _resume_command(trainer, folder)
    return f"{folder / CHECKPOINT} is intact, resume with {command}"


def _resume_command(trainer: Trainer, folder: Path) -> str:
    shard = f" --shard {trainer.shard}" if trainer.shard else ""
    return f"{trainer.ranks.launch_command} train --resume --out {folder}{shard}"


def _report_end(trainer: Trainer, folder: Path, number: int, console: Console) -> int:
    if trainer.diverged:
        console.print(
            f"The training diverged: the loss of epoch {trainer.epoch} is not finite. "
            f"Pass a --lr below {trainer.settings.lr:g}."
        )
        return 1
    if not trainer.finished:
        console.print(
            f"Stopped after step {trainer.step} of {trainer.steps} and saved. Resume "
            f"with: {_resume_command(trainer, folder)}",
            soft_wrap=True,
        )
        return 128 + number
    console.print(
        f"Test accuracy {trainer.history[-1]['test_accuracy']:.2%}; the weights are in "
        f"{folder / CHECKPOINT}",
        soft_wrap=True,
    )
    return 0


@contextmanager
def _progress(trainer: Trainer, console: Console) -> Iterator[Callable[[bool], None]]:
    """Show one line per epoch and, on a terminal, a progress bar."""
    with progress_bar(console) as bar:
        task = bar.add_task("", total=trainer.steps, completed=trainer.step)
        refreshed = 0.0

        def show(epoch_ended: bool) -> None:
            nonlocal refreshed
            if epoch_ended:
                line = f"epoch {trainer.epoch}/{trainer.settings.epochs} "
                console.print(line + _status(trainer.history[-1]), soft_wrap=True)
                bar.update(task, completed=trainer.step)
            elif console.is_terminal and time.monotonic() - refreshed > REFRESH_SECONDS:
                refreshed = time.monotonic()
                text = _status(trainer.metrics())
                bar.update(task, completed=trainer.step, description=text)

        yield show


def _status(metrics: Metrics) -> str:
    """Format the metrics of an epoch on one line."""
    values = {name: math.nan if x is None else x for name, x in metrics.items()}
    text = (
        f"loss {values['train_loss']:.4f} accuracy {values['train_accuracy']:.1%} "
        f"lr {values['lr']:.3g}"
    )
    if "ratio_min" in values:
        ratios = (values[f"ratio_{name}"] for name in ("min", "median", "max"))
        text += " ratios " + "/".join(f"{ratio:.2g}" for ratio in ratios)
    if "test_accuracy" in values:
        text += f" test {values['test_accuracy']:.2%}"
    return text
