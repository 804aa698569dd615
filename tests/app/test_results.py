from dataclasses import asdict
from typing import Any

import pytest

from larskit.app import InputError, results
from larskit.app.results import Point
from larskit.app.settings import Settings


def result(accuracy: float, loss: float | None = 0.1, **given: Any) -> results.Result:
    return {
        "settings": asdict(Settings(**given)),
        "data": "fingerprint",
        "test_accuracy": accuracy,
        "test_loss": loss,
        "train_accuracy": 1.0,
        "train_loss": 0.0,
        "seconds": 1.5,
    }


def test_saved_results_load_unchanged(tmp_path):
    path = tmp_path / "results.json"
    found = [result(0.5, lr=1e-3), result(0.1, None, optimizer="sgd", lr=1 / 3)]
    results.save(path, found)
    assert results.load(path) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("", "truncated or corrupt, or was not written by"),
        ('{"format": "larskit.study/1", "cells": [', "truncated or corrupt"),
        ('{"cells": []}', "truncated or corrupt"),
        ("[1, 2]", "truncated or corrupt"),
        ('{"format": "larskit.study/2", "cells": []}', "truncated or corrupt"),
        ('{"format": "larskit.study/1", "cells": [{"a": 1}]}', "truncated or corrupt"),
        (
            '{"format": "larskit.study/1", "cells": [{"settings": {"lr": -1}}]}',
            "truncated or corrupt",
        ),
        (
            '{"format": "larskit.study/1", "cells": [{"settings": {}}]}',
            "truncated or corrupt",
        ),
        ("\xff", "truncated or corrupt"),
    ],
)
def test_a_corrupt_or_foreign_file_is_an_error(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        results.load(path)


def test_results_are_grouped_into_curves():
    found = [
        result(0.75, lr=2.0, seed=0),
        result(0.25, lr=2.0, seed=1),
        result(0.6, lr=1.0),
        result(0.5, lr=0.1, optimizer="sgd"),
        result(0.4, lr=1.0, batch_size=8),
        result(0.3, lr=1.0, model="convnet-plain"),
    ]
    assert results.curves(found) == {
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


RESULTS = [
    result(0.99, lr=1.0, seed=0),
    result(0.80, lr=1.0, seed=1),
    result(0.90, lr=2.0, seed=0),
    result(0.91, lr=2.0, seed=1),
    result(0.85, 0.2, optimizer="sgd", lr=0.1, weight_decay=0.0),
    result(0.85, 0.1, optimizer="sgd", lr=0.2),
    result(0.85, None, optimizer="sgd", lr=0.4),
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
def test_the_best_settings_have_the_best_mean_accuracy(tmp_path, given, expected):
    results.save(tmp_path / "results.json", RESULTS)
    best = results.best(tmp_path / "results.json", given)
    assert expected.items() <= best.items()
    assert ("seed" in best) == ("seed" in given)
    Settings(**best)


def test_best_without_a_matching_run_is_an_error(tmp_path):
    results.save(tmp_path / "results.json", RESULTS)
    with pytest.raises(InputError, match="has no training run with --batch-size 3"):
        results.best(tmp_path / "results.json", {"batch_size": 3})
