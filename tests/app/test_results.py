from dataclasses import asdict
from typing import Any

import pytest

from larskit.app import InputError, results
from larskit.app.results import Point
from larskit.app.settings import Settings


def cell(accuracy: float, loss: float | None = 0.1, **given: Any) -> results.Cell:
    return {
        "settings": asdict(Settings(**given)),
        "data": "fingerprint",
        "test_accuracy": accuracy,
        "test_loss": loss,
        "train_accuracy": 1.0,
        "train_loss": 0.0,
        "seconds": 1.5,
    }


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "results.json"
    cells = [cell(0.5, lr=1e-3), cell(0.1, None, optimizer="sgd", lr=1 / 3)]
    results.save(path, cells)
    assert results.load(path) == cells


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("", "corrupt, or no result of larskit study"),
        ('{"format": "larskit.study/1", "cells": [', "corrupt, or no"),
        ('{"cells": []}', "corrupt, or no"),
        ("[1, 2]", "corrupt, or no"),
        ('{"format": "larskit.study/2", "cells": []}', "corrupt, or no"),
        ('{"format": "larskit.study/1", "cells": [{"a": 1}]}', "corrupt, or no"),
        (
            '{"format": "larskit.study/1", "cells": [{"settings": {"lr": -1}}]}',
            "corrupt, or no",
        ),
        (
            '{"format": "larskit.study/1", "cells": [{"settings": {}}]}',
            "corrupt, or no",
        ),
        ("\xff", "corrupt, or no"),
    ],
)
def test_a_truncated_or_foreign_file_is_refused(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        results.load(path)


def test_cells_become_curves():
    cells = [
        cell(0.75, lr=2.0, seed=0),
        cell(0.25, lr=2.0, seed=1),
        cell(0.6, lr=1.0),
        cell(0.5, lr=0.1, optimizer="sgd"),
        cell(0.4, lr=1.0, batch_size=8),
        cell(0.3, lr=1.0, model="convnet-plain"),
    ]
    assert results.curves(cells) == {
        ("convnet", 64): {
            "lars": [
                Point(1.0, 0.6, 0.6, 0.6),
                Point(2.0, 0.5, 0.25, 0.75),
            ],
            "sgd": [Point(0.1, 0.5, 0.5, 0.5)],
        },
        ("convnet", 8): {"lars": [Point(1.0, 0.4, 0.4, 0.4)]},
        ("convnet-plain", 64): {"lars": [Point(1.0, 0.3, 0.3, 0.3)]},
    }


CELLS = [
    cell(0.99, lr=1.0, seed=0),
    cell(0.80, lr=1.0, seed=1),
    cell(0.90, lr=2.0, seed=0),
    cell(0.91, lr=2.0, seed=1),
    cell(0.85, 0.2, optimizer="sgd", lr=0.1, weight_decay=0.0),
    cell(0.85, 0.1, optimizer="sgd", lr=0.2),
    cell(0.85, None, optimizer="sgd", lr=0.4),
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"optimizer": "lars", "lr": 2.0}),
        ({"epochs": 50, "seed": 9}, {"lr": 2.0, "epochs": 50, "seed": 9}),
        ({"optimizer": "sgd"}, {"optimizer": "sgd", "lr": 0.2}),
        ({"lr": 1.0}, {"optimizer": "lars", "lr": 1.0}),
        ({"optimizer": "sgd", "lr": 0.1}, {"weight_decay": 0.0}),
    ],
)
def test_the_best_is_the_best_on_average(tmp_path, given, expected):
    results.save(tmp_path / "results.json", CELLS)
    best = results.best(tmp_path / "results.json", given)
    assert expected.items() <= best.items()
    assert ("seed" in best) == ("seed" in given)
    Settings(**best)


def test_the_best_of_nothing_is_refused(tmp_path):
    results.save(tmp_path / "results.json", CELLS)
    with pytest.raises(InputError, match="has no training with"):
        results.best(tmp_path / "results.json", {"batch_size": 3})
