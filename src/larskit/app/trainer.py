"""One training, step by step, with a state that can be stored between any two."""

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from larskit.app import InputError, models, optimizers
from larskit.app.data import Data
from larskit.app.ranks import Ranks, Shard, place
from larskit.app.settings import Settings
from larskit.torch import LARS

EVALUATED_AT_ONCE, SETTLED_ON = 256, 8192


class Trainer:
    """A model in training: equal settings and data give equal weights.

    Every epoch takes the images in a new order, in batches of `Settings.batch_size`;
    what is left over waits for the next epoch. Before it is tested, the statistics of
    batch norm are measured again.

    Of several processes each computes a share of every batch, and normalises it by
    itself: N of them do what one does that accumulates N times as many parts. All of
    them must call the same methods in the same order, `measured` excepted.

    Parameters
    ----------
    settings : Settings
        What to train, and how.
    data : Data
        The images.
    test_last : bool, default=False
        Measure on the test images after the last epoch only.
    ranks : Ranks, optional
        The processes that train together; this one alone by default.
    shard : {"fsdp2"}, optional
        Spread the model over them; by default each holds all of it.

    Attributes
    ----------
    model : torch.nn.Module
        The network.
    epoch, batch : int
        How many epochs, and batches of this epoch, are done.
    batches : int
        How many batches an epoch has.
    history : list of dict
        What was measured, one entry per finished epoch.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        *,
        test_last: bool = False,
        ranks: Ranks | None = None,
        shard: Shard | None = None,
    ) -> None:
        """Check what depends on data and machine, then make the model."""
        self.settings, self.data, self.test_last = settings, data, test_last
        self.ranks, self.shard = ranks or Ranks(), shard
        self.device = check(settings, data, self.ranks)
        self.batches = len(data.train) // settings.batch_size
        if self.device.type == "cuda":
            _be_deterministic()
        if threads := settings.threads or self.ranks.threads:
            torch.set_num_threads(threads)
        torch.manual_seed(settings.seed)
        _, channels, *sides = data.x.shape
        classes = len(data.classes)
        model = models.build(settings.model, channels, classes, min(sides))
        self.model = model.to(self.device)
        self._network, self._apart = self.ranks.spread(self.model, shard)
        self.optimizer = optimizers.build(settings, model)
        self.schedule = optimizers.schedule(settings, self.optimizer, self.steps)
        float16 = settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=float16)
        self.epoch = self.batch = 0
        self.history: list[dict[str, Any]] = []
        self._totals, self._lr = self._zero(), 0.0
        self._x = torch.from_numpy(data.x)
        self._y = torch.from_numpy(data.y)
        self._moments = [
            torch.from_numpy(m)[:, None, None].to(self.device) for m in data.moments
        ]

    @property
    def steps(self) -> int:
        """How many steps the whole training has."""
        return self.settings.epochs * self.batches

    @property
    def step(self) -> int:
        """How many of them are done."""
        return self.epoch * self.batches + self.batch

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last epoch was not finite."""
        return bool(self.history) and self.history[-1]["train_loss"] is None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.diverged or self.epoch == self.settings.epochs

    def run(self) -> Iterator[None]:
        """Train, and pause after every step."""
        while not self.finished:
            order = self._order()
            while self.batch < self.batches:
                size = self.settings.batch_size
                self._step(order[self.batch * size :][:size])
                self.batch += 1
                if self.batch < self.batches:
                    yield
            self._end_epoch()
            yield

    def measured(self) -> dict[str, float]:
        """Return the measures of this epoch so far, by name; waits for the device.

        They are the rate of the last step, mean loss and accuracy of the images while
        they were trained on (by this rank, until the epoch ends) and, for LARS, the
        spread of the trust ratios.
        """
        loss, correct, seen = self._totals.tolist()
        found = {
            "lr": self._lr,
            "train_loss": loss / seen,
            "train_accuracy": correct / seen,
        }
        if ratios := self._ratios():
            found["ratio_min"] = min(ratios)
            found["ratio_median"] = median(ratios)
            found["ratio_max"] = max(ratios)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the training depends on; complete on rank 0.

        No generator is among it: the order of an epoch follows from the seed and the
        epoch, and nothing else is drawn. Tensors are whole, so that any number of ranks
        can go on, with a model that is sharded or not.
        """
        settings = replace(self.settings, threads=torch.get_num_threads())
        return {
            "settings": asdict(settings),
            "ranks": self.ranks.size,
            "data": self.data.fingerprint,
            "classes": self.data.classes,
            "moments": [m.flatten().tolist() for m in self._moments],
            "epoch": self.epoch,
            "batch": self.batch,
            "totals": self.ranks.gather(self._totals),
            "history": self.history,
            **{
                name: self.ranks.whole(part.state_dict())
                for name, part in self._parts().items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned for equal settings and data."""
        if self._network is not self.model:
            self._rehearse()
        for name, part in self._parts().items():
            part.load_state_dict(self._placed(name, state[name]))
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._totals = self.ranks.own(state["totals"]).to(self.device)
        self.history = state["history"]
        if not 0 <= self.step <= self.steps:
            raise ValueError(f"step {self.step} is not one of {self.steps}")

    def _parts(self) -> dict[str, Any]:
        names = ("model", "optimizer", "schedule", "scaler")
        return {name: getattr(self, name) for name in names}

    def _rehearse(self) -> None:
        """Have DDP change to the buckets that it lays out after a first backward pass.

        Their layout decides how the sums over three or more ranks are rounded.
        """
        some = torch.from_numpy(self.data.train[: self.settings.batch_size])
        loss, _ = self._loss(*self.ranks.share(some))
        loss.backward()
        self.optimizer.zero_grad()

    def _placed(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a part with its tensors sharded as the part's are."""
        if name == "model":
            own = self.model.state_dict()
            return {key: place(x, own.get(key)) for key, x in state.items()}
        if name == "optimizer":
            groups = self.optimizer.param_groups
            params = [p for group in groups for p in group["params"]]
            kept = {
                index: {key: place(x, params[index]) for key, x in kept.items()}
                for index, kept in state["state"].items()
            }
            return {**state, "state": kept}
        return state

    def _zero(self) -> Tensor:
        """Sum of losses, number right, and number seen."""
        return torch.zeros(3, device=self.device)

    def _order(self) -> Tensor:
        seed = self.settings.seed * 2**31 + self.epoch
        generator = torch.Generator().manual_seed(seed)
        train = torch.from_numpy(self.data.train)
        return train[torch.randperm(len(train), generator=generator)]

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = self._moments
        x = self._x[indices].to(self.device, torch.float32)
        return (x - mean) / deviation, self._y[indices].to(self.device)

    def _mixed(self) -> torch.autocast:
        dtype = getattr(torch, self.settings.precision)
        enabled = dtype != torch.float32
        return torch.autocast(self.device.type, dtype if enabled else None, enabled)

    def _loss(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss of some images, and `_zero`'s numbers for them."""
        x, y = self._batch(indices)
        with self._mixed():
            logits = self._network(x)
        loss = cross_entropy(logits.float(), y, reduction="sum")
        right = (logits.argmax(1) == y).sum()
        seen = torch.full_like(right, len(y))
        return loss, torch.stack([loss.detach(), right, seen])

    def _step(self, indices: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        images = len(indices) / self.ranks.size  # as gradients are averaged over them
        parts = self.ranks.share(indices, self.settings.accumulate)
        for part in parts:
            with nullcontext() if part is parts[-1] else self._apart():
                loss, totals = self._loss(part)
                self.scaler.scale(loss / images).backward()
            self._totals += totals
        self._lr = self.optimizer.param_groups[0]["lr"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        self._settle_batch_norm()
        self.model.eval()
        totals = self._zero()
        test, at_once = torch.from_numpy(self.data.test), self.ranks.size
        for part in test.split(EVALUATED_AT_ONCE * at_once):
            totals += self._loss(*self.ranks.share(part))[1]
        loss, correct, seen = self.ranks.sum(totals).tolist()
        return loss / seen, correct / seen

    def _settle_batch_norm(self) -> None:
        """Measure the statistics of batch norm with the weights as they are.

        Moving averages lag behind by some 20 steps, which may be all of a training in
        large batches: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021. Each
        rank measures as many parts of the images; the statistics are their mean.
        """
        some, ranks = torch.from_numpy(self.data.train[:SETTLED_ON]), self.ranks
        parts = ranks.share(some, math.ceil(len(some) / EVALUATED_AT_ONCE / ranks.size))
        with self._mixed():
            update_bn((self._batch(part)[0] for part in parts), self.model)
        for statistic in self.model.buffers():
            if ranks.size > 1 and statistic.is_floating_point():
                ranks.sum(statistic).div_(ranks.size)

    def _ratios(self) -> list[float]:
        """Return the trust ratios of the last step, of the layers that have one."""
        if not isinstance(self.optimizer, LARS):
            return []
        stats = self.optimizer.layer_stats()
        return [
            stats[name].trust_ratio
            for group in self.optimizer.param_groups
            if group["adapt"]
            for name in group["param_names"]
        ]

    def _end_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.ranks.sum(self._totals)
        entry = {"epoch": self.epoch, "step": self.step, **self.measured()}
        goes_on = self.epoch < self.settings.epochs
        if not (self.test_last and goes_on and math.isfinite(entry["train_loss"])):
            entry["test_loss"], entry["test_accuracy"] = self._evaluate()
        # JSON has no NaN
        self.history.append(
            {name: x if math.isfinite(x) else None for name, x in entry.items()}
        )
        self._totals = self._zero()


def check(settings: Settings, data: Data, ranks: Ranks) -> torch.device:
    """Return the device, or raise `InputError` where machine or data do not fit."""
    images = len(data.train)
    if settings.batch_size > images:
        raise InputError(
            f"--batch-size {settings.batch_size} is larger than the {images} images "
            "there are to train on"
        )
    smallest = settings.batch_size // (settings.accumulate * ranks.size)
    plain = settings.model == "convnet-plain"
    if smallest < (1 if plain else 2):
        among = f" in {ranks.size} processes" if ranks.size > 1 else ""
        raise InputError(
            f"--batch-size {settings.batch_size} with --accumulate "
            f"{settings.accumulate}{among} leaves {smallest} image at a time, but "
            + ("1 is needed" if plain else "batch norm needs 2")
        )
    return _device(settings, ranks)


def _device(settings: Settings, ranks: Ranks) -> torch.device:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1:
        name = _own(name, ranks)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as why:
        reason = str(why).splitlines()[0]
        raise InputError(f"--device {name} cannot be used: {reason}") from why
    if settings.precision == "float16" and device.type == "cpu":
        raise InputError("--precision float16 needs a GPU: take bfloat16 on a CPU")
    return device


def _own(name: str, ranks: Ranks) -> str:
    """Return the device of this rank among several, each with a GPU or none."""
    if name == "cpu":
        return name
    if name != "cuda":
        raise InputError(
            f"--device {name} is not for {ranks.size} processes: pass cuda, of which "
            "each takes a GPU of its own, or cpu"
        )
    gpus = torch.cuda.device_count()
    if ranks.local_size > gpus:
        raise InputError(
            f"--device cuda has {gpus} GPUs for {ranks.local_size} processes: start as "
            "many as there are GPUs, or pass --device cpu"
        )
    torch.cuda.set_device(ranks.local_rank)
    return f"cuda:{ranks.local_rank}"


def _be_deterministic() -> None:
    """Have CUDA add in a fixed order, as the CPU does anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
