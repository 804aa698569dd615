"""What a study found: its file, and what can be read from it."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from larskit.app import InputError
from larskit.app.settings import Settings
from larskit.state import atomic

FORMAT = "larskit.study/1"
FILE = "results.json"
MEASURES = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
AXES = ("model", "batch_size", "optimizer", "lr")

Cell = dict[str, Any]


class Point(NamedTuple):
    """Mean, least and greatest test accuracy of trainings that differ in the seed."""

    lr: float
    mean: float
    low: float
    high: float


Panel = tuple[str, int]
Curves = dict[Panel, dict[str, list[Point]]]


def load(path: Path) -> list[Cell]:
    """Read the cells of a study.

    Parameters
    ----------
    path : Path
        A file that `save` wrote.

    Returns
    -------
    list of dict
        Per training: ``settings`` (a dict of `Settings`), ``data`` (a fingerprint),
        ``test_accuracy`` and ``train_accuracy`` (of 1), ``test_loss`` and
        ``train_loss`` (None where not finite), ``seconds``.

    Raises
    ------
    InputError
        The file is missing, truncated, corrupt or of another kind.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(found["format"])
        for cell in found["cells"]:
            Settings(**cell["settings"])
            if not {"data", *MEASURES} <= cell.keys():
                raise KeyError("a measure")
    except OSError as why:
        raise InputError(f"{path} cannot be read: {why.strerror}") from why
    except (ValueError, TypeError, KeyError, InputError) as why:
        raise InputError(
            f"{path} is truncated or corrupt, or no result of larskit study"
        ) from why
    return found["cells"]


def save(path: Path, cells: Iterable[Cell]) -> None:
    """Write the cells, one a line, in place of what the file held."""
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    with atomic(path, "w") as file:
        file.write(f'{{"format": "{FORMAT}", "cells": [\n{lines}\n]}}\n')


def identity(settings: dict[str, Any], data: str) -> str:
    """Return what two trainings share if they need not both be run."""
    return json.dumps([settings, data], sort_keys=True)


def curves(cells: Iterable[Cell]) -> Curves:
    """Sort cells into panels (model and batch size), optimizers and learning rates."""
    found: dict[Panel, dict[str, dict[float, list[float]]]] = {}
    for cell in cells:
        model, batch_size, optimizer, lr = (cell["settings"][axis] for axis in AXES)
        by_lr = found.setdefault((model, batch_size), {}).setdefault(optimizer, {})
        by_lr.setdefault(lr, []).append(cell["test_accuracy"])
    return {
        panel: {
            optimizer: [
                Point(lr, mean(seeds), min(seeds), max(seeds))
                for lr, seeds in sorted(by_lr.items())
            ]
            for optimizer, by_lr in optimizers.items()
        }
        for panel, optimizers in found.items()
    }


def best(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a study that did best on average over the seeds.

    Parameters
    ----------
    path : Path
        A file that `save` wrote.
    given : dict
        Arguments of `Settings`. Those of the study's axes narrow the choice, the
        others replace what the study had.

    Returns
    -------
    dict
        Arguments of `Settings`, without the seed where it is not given. Of equal
        accuracies the one of the least loss on the test images.

    Raises
    ------
    InputError
        The file cannot be read, or nothing in it agrees with what is given.
    """
    narrowed = {axis: given[axis] for axis in AXES if axis in given}
    groups: dict[str, list[Cell]] = {}
    for cell in load(path):
        settings = {k: v for k, v in cell["settings"].items() if k != "seed"}
        if narrowed.items() <= settings.items():
            groups.setdefault(identity(settings, cell["data"]), []).append(cell)
    if not groups:
        raise InputError(f"{path} has no training with {narrowed or 'any settings'}")
    winner = max(groups.values(), key=_merit)[0]["settings"]
    return {**{k: v for k, v in winner.items() if k != "seed"}, **given}


def _merit(seeds: list[Cell]) -> tuple[float, float]:
    losses = [cell["test_loss"] for cell in seeds]
    loss = float("inf") if None in losses else mean(losses)
    return mean(cell["test_accuracy"] for cell in seeds), -loss
