"""The results file of a study, its learning-rate curves and its best settings."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple, TypedDict

from larskit.app import InputError
from larskit.app.settings import Arguments, Settings
from larskit.state import atomic

FORMAT = "larskit.study/1"
FILE = "results.json"
METRICS = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
AXES = ("model", "batch_size", "optimizer", "lr")


class Result(TypedDict):
    """One finished training run.

    `settings` are the fields of `Settings`, `data` is the fingerprint of the data.
    Accuracies are from 0 to 1. A loss is None where it is not finite.
    """

    settings: Arguments
    data: str
    test_accuracy: float
    test_loss: float | None
    train_accuracy: float
    train_loss: float | None
    seconds: float


class Point(NamedTuple):
    """Mean, minimum and maximum of the test accuracy over seeds, at one rate."""

    lr: float
    mean: float
    low: float
    high: float


Panel = tuple[str, int]
Curves = dict[Panel, dict[str, list[Point]]]


def load(path: Path) -> list[Result]:
    """Read the results of a study.

    Parameters
    ----------
    path : Path
        A file that `save` wrote.

    Returns
    -------
    list of Result
        One per training run.

    Raises
    ------
    InputError
        The file is missing, truncated or corrupt, or not written by `save`.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        for result in content["cells"]:
            Settings(**result["settings"])
            if not {"data", *METRICS} <= result.keys():
                raise KeyError("a metric is missing")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; pass the results.json of a study"
        ) from error
    except (ValueError, TypeError, KeyError, InputError) as error:
        raise InputError(
            f"{path} is truncated or corrupt, or was not written by larskit study: "
            "delete it, or pass another file or folder"
        ) from error
    return content["cells"]


def save(path: Path, results: Iterable[Result]) -> None:
    """Write the results atomically, one per line, and replace an existing file."""
    lines = ",\n".join(json.dumps(result) for result in results)
    with atomic(path, "w") as file:
        file.write(f'{{"format": "{FORMAT}", "cells": [\n{lines}\n]}}\n')


def run_key(settings: Arguments, data: str) -> str:
    """Return a key that two training runs share if their results must be equal."""
    return json.dumps([settings, data], sort_keys=True)


def curves(results: Iterable[Result]) -> Curves:
    """Group results by panel (model and batch size), optimizer and learning rate."""
    panels: dict[Panel, dict[str, dict[float, list[float]]]] = {}
    for result in results:
        model, batch_size, optimizer, lr = (result["settings"][axis] for axis in AXES)
        by_lr = panels.setdefault((model, batch_size), {}).setdefault(optimizer, {})
        by_lr.setdefault(lr, []).append(result["test_accuracy"])
    return {
        panel: {
            optimizer: [
                Point(lr, mean(accuracies), min(accuracies), max(accuracies))
                for lr, accuracies in sorted(by_lr.items())
            ]
            for optimizer, by_lr in optimizers.items()
        }
        for panel, optimizers in panels.items()
    }


def best(path: Path, given: Arguments) -> Arguments:
    """Return the settings of a study with the best mean test accuracy over seeds.

    Parameters
    ----------
    path : Path
        A file that `save` wrote.
    given : dict
        Arguments of `Settings`. Model, batch size, optimizer and learning rate
        restrict the choice. The others replace the values of the study.

    Returns
    -------
    dict
        Arguments of `Settings`, with a seed only if one is given. The test loss breaks
        a tie of the accuracies.

    Raises
    ------
    InputError
        The file cannot be read, or none of its runs matches `given`.
    """
    wanted = {axis: given[axis] for axis in AXES if axis in given}
    groups: dict[str, list[Result]] = {}
    for result in load(path):
        settings = _without_seed(result["settings"])
        if wanted.items() <= settings.items():
            groups.setdefault(run_key(settings, result["data"]), []).append(result)
    if not groups:
        options = " ".join(
            f"--{axis.replace('_', '-')} {value}" for axis, value in wanted.items()
        )
        raise InputError(
            f"{path} has no training run with {options}: omit an option or choose a "
            "value of the study"
            if options
            else f"{path} has no training run: finish the study first"
        )
    best_group = max(groups.values(), key=_accuracy_and_negative_loss)
    return {**_without_seed(best_group[0]["settings"]), **given}


def _without_seed(settings: Arguments) -> Arguments:
    return {name: value for name, value in settings.items() if name != "seed"}


def _accuracy_and_negative_loss(results: list[Result]) -> tuple[float, float]:
    """Return the mean test accuracy, and minus the mean test loss as a tie-breaker."""
    losses = [
        math.inf if result["test_loss"] is None else result["test_loss"]
        for result in results
    ]
    return mean(result["test_accuracy"] for result in results), -mean(losses)
