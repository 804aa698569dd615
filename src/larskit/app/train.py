"""`larskit train`: train a classifier, keep it on disk, stop and go on at any step."""

import json
import math
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from larskit.app import InputError
from larskit.app.data import read
from larskit.app.ranks import Ranks, Shard, here
from larskit.app.settings import Settings
from larskit.app.trainer import Trainer, check
from larskit.state import atomic

FORMAT = "larskit.train/1"
CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
SHOWN_EVERY = 0.1


def train(
    given: dict[str, Any],
    out: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    shard: Shard | None = None,
    console: Console | None = None,
) -> int:
    """Train, or go on training, and keep the result in a folder.

    The folder gets ``checkpoint.pt`` after every epoch and when the training is
    stopped, and ``metrics.jsonl`` with one line per epoch.

    Parameters
    ----------
    given : dict
        Arguments of `Settings`. On resuming, they must agree with the stored ones.
    out : str
        The folder; made if need be.
    resume : bool, default=False
        Go on with the training that is stored there.
    overwrite : bool, default=False
        Replace the training that is stored there.
    shard : {"fsdp2"}, optional
        Spread the model over the processes of torchrun. It may differ on resuming, as
        their number may.
    console : rich.console.Console, optional
        Where to show the progress.

    Returns
    -------
    int
        0 when the training is done; 1 when it diverged; 128 plus the signal's number
        when SIGINT or SIGTERM stopped it. The same on all processes.

    Raises
    ------
    InputError
        Before anything is written.
    """
    ranks, folder = here(), Path(out)
    console = console or Console(quiet=ranks.rank > 0)
    with ranks.agreed():
        state = _stored(folder, given, ranks) if resume else None
        settings = Settings(**(state["settings"] if state else given))
        _check_flags(folder, resume or overwrite, shard, ranks)
        data = read(settings.data, settings.image_size)
        check(settings, data, ranks)
        if state and state.get("data") != data.fingerprint:
            raise InputError(
                f"--resume: the images in {settings.data} are not those that "
                f"{folder / CHECKPOINT} was begun with"
            )
    with ranks.agreed():
        if ranks.rank == 0:
            prepare(folder)
    trainer = Trainer(settings, data, ranks=ranks, shard=shard)
    if state:
        _restore(trainer, state, folder / CHECKPOINT)
        ranks.advice = _after_loss(trainer, folder)
    number = _run(trainer, folder, console)
    return _conclude(trainer, folder, number, console)


def _check_flags(
    folder: Path, replace: bool, shard: Shard | None, ranks: Ranks
) -> None:
    if not replace and (folder / CHECKPOINT).exists():
        raise InputError(
            f"--out {folder} holds a training already: pass --resume to go on with it, "
            "--overwrite to lose it, or another folder"
        )
    if shard is not None and not ranks.launched:
        raise InputError(
            f"--shard {shard} spreads a model over processes, of which there is one: "
            "start them with torchrun --nproc-per-node N -m larskit train ..."
        )


def _run(trainer: Trainer, folder: Path, console: Console) -> int:
    """Train and save until the end, or a signal; return the signal, or 0."""
    ranks = trainer.ranks
    with stopping() as signals, ranks.watching(), _display(trainer, console) as show:
        for _ in trainer.run():
            ended = trainer.batch == 0
            show(ended)
            number = ranks.signalled(signals)
            if ended or number:
                _save(trainer, folder)
            if number:
                return number
    return 0


def prepare(folder: Path) -> None:
    """Make a folder to write to, or raise `InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as why:
        raise InputError(f"--out {folder} cannot be made: {why.strerror}") from why
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder} cannot be written")


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one does what it always does."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.signal(number, catch)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(console: Console) -> Progress:
    """Make a bar with a line of text, which shows nothing unless on a terminal."""
    return Progress(
        "{task.description}",
        BarColumn(None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )


def _stored(folder: Path, given: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Read a checkpoint, and refuse settings that are not its own."""
    path = folder / CHECKPOINT
    try:
        state = _read(path)
        if state.get("ranks", 1) != ranks.size:  # which share the cores differently
            state["settings"]["threads"] = given.get("threads")
        stored = Settings(**state["settings"])
    except FileNotFoundError:
        raise InputError(f"--resume: there is no {path}") from None
    except Exception as why:  # a foreign file can make anything of its reader
        raise _not_ours(path) from why
    asked = Settings(**given)
    for name in given:
        if getattr(asked, name) != getattr(stored, name):
            raise InputError(
                f"--{name.replace('_', '-')} {given[name]} is not what {folder} was "
                f"begun with, {getattr(stored, name)}: omit it, or choose another --out"
            )
    return state


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:
        if file.testzip() is not None:
            raise ValueError("a checksum is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["format"] != FORMAT:
        raise ValueError(f"the format is {state['format']}")
    return state


def _not_ours(path: Path) -> InputError:
    return InputError(
        f"--resume: {path} is truncated or corrupt, or no checkpoint of larskit train: "
        "start again with --overwrite"
    )


def _restore(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    try:
        trainer.load_state_dict(state)
    except Exception as why:  # likewise
        trainer.ranks.end_if_lost(why)
        raise _not_ours(path) from why


def _save(trainer: Trainer, folder: Path) -> None:
    state = trainer.state_dict()
    if trainer.ranks.rank == 0:
        with atomic(folder / CHECKPOINT) as file:
            torch.save({"format": FORMAT, **state}, file)
        with atomic(folder / METRICS, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in trainer.history)
    trainer.ranks.wait()
    trainer.ranks.advice = _after_loss(trainer, folder)


def _after_loss(trainer: Trainer, folder: Path) -> str:
    return f"{folder / CHECKPOINT} is whole, go on with {_resume(trainer, folder)}"


def _resume(trainer: Trainer, folder: Path) -> str:
    shard = f" --shard {trainer.shard}" if trainer.shard else ""
    return f"{trainer.ranks.command} train --resume --out {folder}{shard}"


def _conclude(trainer: Trainer, folder: Path, number: int, console: Console) -> int:
    if trainer.diverged:
        console.print(
            f"The loss is no longer finite after epoch {trainer.epoch}: pass a --lr "
            f"below {trainer.settings.lr:g}."
        )
        return 1
    if not trainer.finished:
        console.print(
            f"Stopped after step {trainer.step} of {trainer.steps} and saved. Go on "
            f"with: {_resume(trainer, folder)}",
            soft_wrap=True,
        )
        return 128 + number
    console.print(
        f"{100 * trainer.history[-1]['test_accuracy']:.2f} % of the test images are "
        f"right; the weights are in {folder / CHECKPOINT}",
        soft_wrap=True,
    )
    return 0


@contextmanager
def _display(trainer: Trainer, console: Console) -> Iterator[Callable[[bool], None]]:
    """Show one line per epoch, and on a terminal a bar below."""
    with progress_bar(console) as bar:
        task = bar.add_task("", total=trainer.steps, completed=trainer.step)
        shown = 0.0

        def show(ended: bool) -> None:
            nonlocal shown
            if ended:
                line = f"epoch {trainer.epoch}/{trainer.settings.epochs} "
                console.print(line + _status(trainer.history[-1]), soft_wrap=True)
                bar.update(task, completed=trainer.step)
            elif console.is_terminal and time.monotonic() - shown > SHOWN_EVERY:
                shown = time.monotonic()
                text = _status(trainer.measured())
                bar.update(task, completed=trainer.step, description=text)

        yield show


def _status(found: dict[str, Any]) -> str:
    """Put an entry of the history, or one in the making, into words."""
    found = {name: math.nan if x is None else x for name, x in found.items()}
    words = (
        f"loss {found['train_loss']:.4f} accuracy {found['train_accuracy']:.1%} "
        f"lr {found['lr']:.3g}"
    )
    if "ratio_min" in found:
        spread = (found[f"ratio_{which}"] for which in ("min", "median", "max"))
        words += " ratios " + "/".join(f"{ratio:.2g}" for ratio in spread)
    if "test_accuracy" in found:
        words += f" test {found['test_accuracy']:.2%}"
    return words
