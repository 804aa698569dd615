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


def same(one: Trainer, other: Trainer) -> bool:
    pairs = zip(weights(one).values(), weights(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def three(few):
    return read(few)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_epochs_learn_the_digits(digits, optimizer):
    trainer = trained(digits, optimizer=optimizer, epochs=2, batch_size=48)
    first, last = trainer.history
    assert last["test_accuracy"] > 0.8
    assert last["train_loss"] < first["train_loss"] < np.log(10)
    assert (last["epoch"], last["step"]) == (2, 2 * (1437 // 48))
    assert ("ratio_min" in last) == (optimizer in ("lars", "larc"))


def test_the_ratios_are_those_of_the_adapted_layers(three):
    trainer = trained(three, epochs=1, batch_size=40)
    assert isinstance(trainer.optimizer, LARS)
    stats = trainer.optimizer.layer_stats()
    adapted = [p for p in trainer.model.parameters() if p.ndim > 1]
    ratios = sorted(x.trust_ratio for x in stats.values() if x.trust_ratio != 1)
    assert len(ratios) == len(adapted) == 4
    entry = trainer.history[-1]
    assert entry["ratio_min"] == ratios[0]
    assert entry["ratio_median"] == (ratios[1] + ratios[2]) / 2
    assert entry["ratio_max"] == ratios[-1]


def test_larc_is_lars_clipped(three):
    trainer = trained(three, optimizer="larc", lr=1e-6, epochs=1, batch_size=40)
    assert trainer.history[-1]["ratio_min"] == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [3, 4])
def test_a_training_that_was_stored_ends_with_the_same_bits(three, optimizer, steps):
    given = {"optimizer": optimizer, "epochs": 3, "batch_size": 20}
    file = io.BytesIO()
    torch.save(trained(three, steps, **given).state_dict(), file)
    file.seek(0)
    resumed = Trainer(Settings(**given), three)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == steps
    for _ in resumed.run():
        pass
    through = trained(three, **given)
    assert same(resumed, through)
    assert resumed.history == through.history


def test_the_seed_decides_everything(three):
    given = {"epochs": 2, "batch_size": 20}
    one, again = trained(three, **given), trained(three, **given)
    assert same(one, again)
    assert not same(one, trained(three, seed=1, **given))


def test_the_number_of_threads_is_kept(three):
    trainer = trained(three, 1, threads=2)
    assert torch.get_num_threads() == 2
    assert trainer.state_dict()["settings"]["threads"] == 2
    torch.set_num_threads(1)
    assert trained(three, 1).state_dict()["settings"]["threads"] == 1


def test_every_epoch_takes_every_image_once_in_another_order(three):
    trainer = Trainer(Settings(epochs=2, batch_size=20), three)
    orders = []
    for _ in range(2):
        orders.append(trainer._order().tolist())
        trainer.epoch += 1
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(three.train)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulating_changes_nothing_but_roundings(three, optimizer):
    given = {"optimizer": optimizer, "model": "convnet-plain", "epochs": 2}
    whole = trained(three, batch_size=40, **given)
    parts = trained(three, batch_size=40, accumulate=3, **given)
    for name, w in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], w, rtol=1e-4, atol=1e-5)
    assert parts.history[-1]["train_loss"] == pytest.approx(
        whole.history[-1]["train_loss"], rel=1e-4
    )


def test_only_the_product_of_rate_and_trust_coefficient_counts(three):
    given = {"model": "convnet-plain", "epochs": 2, "batch_size": 40}
    one = trained(three, lr=4.0, trust_coefficient=0.01, **given)
    other = trained(three, lr=40.0, trust_coefficient=0.001, **given)
    for name, w in weights(one).items():
        torch.testing.assert_close(weights(other)[name], w, rtol=1e-3, atol=1e-4)


def test_only_the_last_part_of_a_batch_is_communicated(three, monkeypatch):
    trainer, apart = Trainer(Settings(batch_size=40, accumulate=3), three), []
    monkeypatch.setattr(trainer, "_apart", lambda: nullcontext(apart.append(1)))
    trainer._step(trainer._order()[:40])
    assert len(apart) == 2


def test_batch_norm_knows_the_weights_as_they_are(three):
    trainer = trained(three, epochs=1, batch_size=len(three.train))
    first, norm = trainer.model.get_submodule("0"), trainer.model.get_submodule("1")
    x, _ = trainer._batch(torch.from_numpy(three.train))
    with torch.no_grad():
        seen = first(x)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("poly", [1 / 3, 2 / 3, 1.0, 0.5625, 0.25, 0.0625]),
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.8535534, 0.5, 0.1464466]),
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_rate_rises_and_falls(three, schedule, expected):
    given = {"schedule": schedule, "lr": 1.0, "warmup": 0.3}
    given |= {"epochs": 3, "batch_size": 40}
    trainer = Trainer(Settings(**given), three)
    rates = [trainer.measured()["lr"] for _ in trainer.run() if trainer.batch]
    ends = [entry["lr"] for entry in trainer.history]
    assert sorted(rates + ends) == pytest.approx(sorted(expected))
    assert ends == pytest.approx(expected[1::2])


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 1.0), (1.0, 1 / 6)])
def test_warmup_may_be_nothing_or_everything(three, warmup, first):
    given = {"lr": 1.0, "epochs": 3, "warmup": warmup, "batch_size": 40}
    assert trained(three, 1, **given).measured()["lr"] == pytest.approx(first)


def test_a_loss_that_is_not_finite_ends_the_training(three):
    given = {"optimizer": "sgd", "lr": 1e20, "model": "convnet-plain"}
    trainer = trained(three, epochs=9, batch_size=20, **given)
    assert trainer.diverged
    assert trainer.finished
    assert trainer.epoch < 9
    assert trainer.history[-1]["train_loss"] is None


def test_bfloat16_is_mixed_precision(three):
    given = {"epochs": 2, "batch_size": 40}
    wide, narrow = (
        trained(three, precision=p, **given) for p in ("float32", "bfloat16")
    )
    assert all(w.dtype == torch.float32 for w in narrow.model.parameters())
    assert not same(wide, narrow)
    assert narrow.history[-1]["test_loss"] == pytest.approx(
        wide.history[-1]["test_loss"], rel=0.2
    )


def test_testing_last_changes_nothing_else(three):
    settings = Settings(epochs=3, batch_size=40)
    every = trained(three, epochs=3, batch_size=40)
    last = Trainer(settings, three, test_last=True)
    for _ in last.run():
        pass
    assert same(every, last)
    assert "test_accuracy" not in last.history[0]
    assert last.history[-1] == every.history[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 5000}, "--batch-size 5000 is larger than the 80 images"),
        ({"batch_size": 8, "accumulate": 8}, "leaves 1 image at a time"),
        ({"precision": "float16", "device": "cpu"}, "float16 needs a GPU"),
        ({"device": "nonsense"}, "--device nonsense cannot be used"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
    ],
)
def test_what_data_or_machine_cannot_do_is_refused(three, given, message):
    with pytest.raises(InputError, match=message) as caught:
        Trainer(Settings(**given), three)
    assert "\n" not in str(caught.value)
