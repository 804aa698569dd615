import io
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from larskit.app import InputError
from larskit.app.data import read
from larskit.app.settings import RECIPES, Settings
from larskit.app.trainer import Trainer
from larskit.torch import LARS

OPTIMIZERS = tuple(RECIPES)


def trained(data, steps: int | None = None, **given: Any) -> Trainer:
    trainer = Trainer(Settings(**given), data)
    for _ in trainer.run():
        if trainer.step == steps:
            break
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


def same_weights(first: Trainer, second: Trainer) -> bool:
    pairs = zip(weights(first).values(), weights(second).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def data(few):
    return read(few)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_epochs_learn_the_digits(digits, optimizer):
    trainer = trained(digits, optimizer=optimizer, epochs=2, batch_size=48)
    first, last = trainer.history
    assert last["test_accuracy"] > 0.8
    assert last["train_loss"] < first["train_loss"] < np.log(10)
    assert (last["epoch"], last["step"]) == (2, 2 * (1437 // 48))
    assert ("ratio_min" in last) == (optimizer in ("lars", "larc"))


def test_the_metrics_have_the_ratios_of_adapted_layers(data):
    trainer = trained(data, epochs=1, batch_size=40)
    assert isinstance(trainer.optimizer, LARS)
    stats = trainer.optimizer.layer_stats()
    adapted = [p for p in trainer.model.parameters() if p.ndim > 1]
    ratios = sorted(x.trust_ratio for x in stats.values() if x.trust_ratio != 1)
    assert len(ratios) == len(adapted) == 4
    entry = trainer.history[-1]
    assert entry["ratio_min"] == ratios[0]
    assert entry["ratio_median"] == (ratios[1] + ratios[2]) / 2
    assert entry["ratio_max"] == ratios[-1]


def test_larc_clips_the_ratios(data):
    trainer = trained(data, optimizer="larc", lr=1e-6, epochs=1, batch_size=40)
    assert trainer.history[-1]["ratio_min"] == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [3, 4])
def test_a_resumed_run_is_bitwise_identical(data, optimizer, steps):
    given = {"optimizer": optimizer, "epochs": 3, "batch_size": 20}
    file = io.BytesIO()
    torch.save(trained(data, steps, **given).state_dict(), file)
    file.seek(0)
    resumed = Trainer(Settings(**given), data)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == steps
    for _ in resumed.run():
        pass
    full = trained(data, **given)
    assert same_weights(resumed, full)
    assert resumed.history == full.history


def test_equal_seeds_give_identical_weights(data):
    given = {"epochs": 2, "batch_size": 20}
    one, again = trained(data, **given), trained(data, **given)
    assert same_weights(one, again)
    assert not same_weights(one, trained(data, seed=1, **given))


def test_the_number_of_threads_is_saved(data):
    trainer = trained(data, 1, threads=2)
    assert torch.get_num_threads() == 2
    assert trainer.state_dict()["settings"]["threads"] == 2
    torch.set_num_threads(1)
    assert trained(data, 1).state_dict()["settings"]["threads"] == 1


def test_every_epoch_visits_every_image_once_in_a_new_order(data):
    trainer = Trainer(Settings(epochs=2, batch_size=20), data)
    orders = []
    for _ in range(2):
        orders.append(trainer._epoch_order().tolist())
        trainer.epoch += 1
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(data.train)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_only_changes_rounding(data, optimizer):
    given = {"optimizer": optimizer, "model": "convnet-plain", "epochs": 2}
    whole = trained(data, batch_size=40, **given)
    parts = trained(data, batch_size=40, accumulate=3, **given)
    for name, w in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], w, rtol=1e-4, atol=1e-5)
    assert parts.history[-1]["train_loss"] == pytest.approx(
        whole.history[-1]["train_loss"], rel=1e-4
    )


def test_only_the_product_of_rate_and_trust_coefficient_matters(data):
    given = {"model": "convnet-plain", "epochs": 2, "batch_size": 40}
    one = trained(data, lr=4.0, trust_coefficient=0.01, **given)
    other = trained(data, lr=40.0, trust_coefficient=0.001, **given)
    for name, w in weights(one).items():
        torch.testing.assert_close(weights(other)[name], w, rtol=1e-3, atol=1e-4)


def test_only_the_last_part_of_a_batch_is_communicated(data, monkeypatch):
    trainer, unsynchronized = Trainer(Settings(batch_size=40, accumulate=3), data), []
    monkeypatch.setattr(
        trainer, "_no_sync", lambda: nullcontext(unsynchronized.append(1))
    )
    trainer._step(trainer._epoch_order()[:40])
    assert len(unsynchronized) == 2


def test_batch_norm_statistics_are_those_of_the_current_weights(data):
    trainer = trained(data, epochs=1, batch_size=len(data.train))
    first, norm = trainer.model.get_submodule("0"), trainer.model.get_submodule("1")
    x, _ = trainer._load(torch.from_numpy(data.train))
    with torch.no_grad():
        outputs = first(x)
    torch.testing.assert_close(norm.running_mean, outputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, outputs.var((0, 2, 3)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("poly", [1 / 3, 2 / 3, 1.0, 0.5625, 0.25, 0.0625]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.8535534, 0.5, 0.1464466]),
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_rate_follows_the_schedule(data, schedule, expected):
    given = {"schedule": schedule, "lr": 1.0, "warmup": 0.3}
    given |= {"epochs": 3, "batch_size": 40}
    trainer = Trainer(Settings(**given), data)
    rates = [trainer.metrics()["lr"] for _ in trainer.run() if trainer.batch]
    ends = [entry["lr"] for entry in trainer.history]
    assert sorted(rates + ends) == pytest.approx(sorted(expected))
    assert ends == pytest.approx(expected[1::2])


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 1.0), (1.0, 1 / 6)])
def test_the_warmup_can_be_no_step_or_every_step(data, warmup, first):
    given = {"lr": 1.0, "epochs": 3, "warmup": warmup, "batch_size": 40}
    assert trained(data, 1, **given).metrics()["lr"] == pytest.approx(first)


def test_a_non_finite_loss_ends_the_run(data):
    given = {"optimizer": "sgd", "lr": 1e20, "model": "convnet-plain"}
    trainer = trained(data, epochs=9, batch_size=20, **given)
    assert trainer.diverged
    assert trainer.finished
    assert trainer.epoch < 9
    assert trainer.history[-1]["train_loss"] is None


def test_bfloat16_is_mixed_precision(data):
    given = {"epochs": 2, "batch_size": 40}
    single, mixed = (
        trained(data, precision=p, **given) for p in ("float32", "bfloat16")
    )
    assert all(w.dtype == torch.float32 for w in mixed.model.parameters())
    assert not same_weights(single, mixed)
    assert mixed.history[-1]["test_loss"] == pytest.approx(
        single.history[-1]["test_loss"], rel=0.2
    )


def test_evaluating_only_at_the_end_changes_nothing_else(data):
    settings = Settings(epochs=3, batch_size=40)
    every = trained(data, epochs=3, batch_size=40)
    last = Trainer(settings, data, test_last=True)
    for _ in last.run():
        pass
    assert same_weights(every, last)
    assert "test_accuracy" not in last.history[0]
    assert last.history[-1] == every.history[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 5000}, r"--batch-size must be at most .* 80, got 5000"),
        (
            {"batch_size": 8, "accumulate": 8},
            "computes 1 images at a time, but convnet needs 2",
        ),
        ({"precision": "float16", "device": "cpu"}, "float16 needs a GPU"),
        ({"device": "nonsense"}, "--device nonsense cannot be used"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
    ],
)
def test_settings_that_do_not_fit_data_or_machine_are_errors(data, given, message):
    with pytest.raises(InputError, match=message) as caught:
        Trainer(Settings(**given), data)
    assert "\n" not in str(caught.value)
