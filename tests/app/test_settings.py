from dataclasses import asdict
from pathlib import Path

import pytest

from larskit.app import InputError
from larskit.app.settings import RECIPES, Settings


@pytest.mark.parametrize("optimizer", RECIPES)
def test_defaults_are_those_of_the_optimizer(optimizer):
    recipe, settings = RECIPES[optimizer], Settings(optimizer=optimizer)
    assert settings.lr == recipe.lr
    assert settings.weight_decay == recipe.weight_decay
    assert settings.trust_coefficient == recipe.trust_coefficient
    assert recipe.lr in recipe.lrs
    assert Settings(**asdict(settings)) == settings


def test_given_values_are_kept():
    settings = Settings(optimizer="lars", lr=40, weight_decay=0, trust_coefficient=1e-3)
    assert settings.lr == 40
    assert settings.weight_decay == 0
    assert settings.trust_coefficient == 1e-3


def test_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(Settings(data="a.npz").data) == tmp_path.resolve() / "a.npz"
    assert Settings(data="digits").data == "digits"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.0}, "--lr must be a finite number above 0, got 0.0"),
        ({"lr": -1.0}, "--lr must be"),
        ({"lr": float("inf")}, "--lr must be"),
        ({"lr": float("nan")}, "--lr must be"),
        ({"lr": "4"}, "--lr must be"),
        ({"epochs": 0}, "--epochs must be an integer of at least 1, got 0"),
        ({"epochs": -3}, "--epochs must be"),
        ({"epochs": 1.5}, "--epochs must be"),
        ({"batch_size": 0}, "--batch-size must be"),
        ({"accumulate": 0}, "--accumulate must be"),
        (
            {"accumulate": 9, "batch_size": 8},
            "--accumulate must be at most the batch size of 8, got 9",
        ),
        ({"image_size": 0}, "--image-size must be"),
        ({"threads": 0}, "--threads must be"),
        ({"seed": -1}, "--seed must be"),
        ({"warmup": 1.5}, "--warmup must be from 0 to 1"),
        ({"momentum": 1.0}, "--momentum must be at least 0 and below 1"),
        ({"weight_decay": -1e-4}, "--weight-decay must be"),
        ({"trust_coefficient": 0.0}, "--trust-coefficient must be"),
        (
            {"optimizer": "sgd", "trust_coefficient": 0.1},
            "--trust-coefficient does not apply to sgd, got 0.1: omit",
        ),
        ({"optimizer": "adam"}, "--optimizer must be one of 'lars', 'larc'"),
        ({"model": "vgg"}, "--model must be one of"),
        ({"precision": "float64"}, "--precision must be one of"),
        ({"schedule": "step"}, "--schedule must be one of"),
    ],
)
def test_an_invalid_value_is_an_error(given, message):
    with pytest.raises(InputError, match=message):
        Settings(**given)
