"""A training run, step by step, with a state that can be saved after any step."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from larskit.app import InputError, models, optimizers
from larskit.app.data import Data
from larskit.app.ranks import Ranks, Shard, shard_like
from larskit.app.settings import Settings
from larskit.torch import LARS

# Images per forward pass of an evaluation, and images that batch norm is updated with.
EVAL_BATCH_SIZE, BATCH_NORM_IMAGES = 256, 8192

# The metrics of an epoch by name. None is a value that is not finite.
Metrics = Mapping[str, float | None]


class Stateful(Protocol):
    """A part of a trainer that is saved."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Restore the state."""
        ...


class Trainer:
    """A training run: a model, its optimizer and its progress.

    Equal settings and data give bitwise identical weights on the same kind of machine
    with the same number of processes.

    Every epoch shuffles the training images and drops the last, incomplete batch. The
    statistics of batch norm are recomputed before each evaluation.

    Each of several processes computes its share of every batch, with batch norm over
    that share. N processes give the result of one process with N times the
    `accumulate`, up to rounding. All processes must call the same methods in the same
    order; `metrics` alone may be called by any of them.

    Parameters
    ----------
    settings : Settings
        The settings of the run.
    data : Data
        The images.
    test_last : bool, default=False
        Evaluate on the test images after the last epoch only.
    ranks : Ranks, optional
        The processes that train together. By default, this process alone.
    shard : {"fsdp2"}, optional
        Shard the model over the processes. By default, each process has a full copy.

    Attributes
    ----------
    model : torch.nn.Module
        The network.
    epoch, batch : int
        The number of finished epochs, and of finished batches in the current epoch.
    batches : int
        The number of batches per epoch.
    history : list of dict
        The metrics of every finished epoch. None is a value that is not finite.
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
        """Check the settings against the data and the machine, then build the model."""
        self.settings, self.data, self.test_last = settings, data, test_last
        self.ranks, self.shard = ranks or Ranks(), shard
        self.device = select_device(settings, data, self.ranks)
        self.batches = len(data.train) // settings.batch_size
        if self.device.type == "cuda":
            _use_deterministic_algorithms()
        if threads := settings.threads or self.ranks.threads:
            torch.set_num_threads(threads)
        torch.manual_seed(settings.seed)
        _, channels, *sides = data.x.shape
        classes = len(data.classes)
        model = models.build(settings.model, channels, classes, min(sides))
        self.model = model.to(self.device)
        self._network, self._no_sync = self.ranks.distribute(self.model, shard)
        self.optimizer = optimizers.build(settings, model)
        self.schedule = optimizers.schedule(settings, self.optimizer, self.steps)
        float16 = settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=float16)
        self.epoch = self.batch = 0
        self.history: list[dict[str, Any]] = []
        self._totals, self._lr = self._zero_totals(), 0.0
        self._x = torch.from_numpy(data.x)
        self._y = torch.from_numpy(data.y)
        self._moments = [
            torch.from_numpy(m)[:, None, None].to(self.device) for m in data.moments
        ]

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return self.settings.epochs * self.batches

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self.epoch * self.batches + self.batch

    @property
    def diverged(self) -> bool:
        """Whether the loss of the last epoch was not finite."""
        return bool(self.history) and self.history[-1]["train_loss"] is None

    @property
    def finished(self) -> bool:
        """Whether the run has diverged or completed all epochs."""
        return self.diverged or self.epoch == self.settings.epochs

    def run(self) -> Iterator[None]:
        """Train, and yield after every step."""
        while not self.finished:
            order = self._epoch_order()
            while self.batch < self.batches:
                size = self.settings.batch_size
                self._step(order[self.batch * size :][:size])
                self.batch += 1
                if self.batch < self.batches:
                    yield
            self._end_epoch()
            yield

    def metrics(self) -> dict[str, float]:
        """Return the training metrics of the current epoch so far.

        They are the learning rate of the last step, the mean training loss and accuracy
        and, for LARS, minimum, median and maximum of the trust ratios. During an epoch,
        loss and accuracy are those of this rank's images. This waits for the device.
        """
        loss, correct, seen = self._totals.tolist()
        metrics = {
            "lr": self._lr,
            "train_loss": loss / seen,
            "train_accuracy": correct / seen,
        }
        if ratios := self._trust_ratios():
            metrics["ratio_min"] = min(ratios)
            metrics["ratio_median"] = median(ratios)
            metrics["ratio_max"] = max(ratios)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the remaining steps depend on; complete on rank 0 only.

        Tensors are unsharded, so any number of ranks can resume, sharded or not. There
        is no generator state: the image order is a function of the seed and the epoch,
        and no other random number is drawn after initialization.
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
            "totals": self.ranks.all_gather(self._totals),
            "history": self.history,
            **{
                name: self.ranks.full_state(part.state_dict())
                for name, part in self._stateful().items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned for equal settings and data."""
        if self._network is not self.model:
            self._rebuild_ddp_buckets()
        for name, part in self._stateful().items():
            part.load_state_dict(self._sharded(name, state[name]))
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._totals = self.ranks.local_sums(state["totals"]).to(self.device)
        self.history = state["history"]
        if not 0 <= self.step <= self.steps:
            raise ValueError(f"step must be from 0 to {self.steps}, got {self.step}")

    def _stateful(self) -> dict[str, Stateful]:
        names = ("model", "optimizer", "schedule", "scaler")
        return {name: getattr(self, name) for name in names}

    def _rebuild_ddp_buckets(self) -> None:
        """Run one backward pass, after which DDP rebuilds its gradient buckets.

        An uninterrupted run has the rebuilt buckets. Their layout determines the
        rounding of sums over three or more ranks, so a resumed run needs them from its
        first step.
        """
        images = torch.from_numpy(self.data.train[: self.settings.batch_size])
        loss, _ = self._loss(*self.ranks.local_parts(images))
        loss.backward()
        self.optimizer.zero_grad()

    def _sharded(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        """Shard the tensors of a full state as those of this trainer are sharded."""
        if name == "model":
            current = self.model.state_dict()
            return {key: shard_like(x, current.get(key)) for key, x in state.items()}
        if name == "optimizer":
            groups = self.optimizer.param_groups
            params = [p for group in groups for p in group["params"]]
            buffers = {
                index: {key: shard_like(x, params[index]) for key, x in entry.items()}
                for index, entry in state["state"].items()
            }
            return {**state, "state": buffers}
        return state

    def _zero_totals(self) -> Tensor:
        """Return zeros for the summed loss, the correct images and all images."""
        return torch.zeros(3, device=self.device)

    def _epoch_order(self) -> Tensor:
        """Return the indices of the training images, shuffled for this epoch."""
        seed = self.settings.seed * 2**31 + self.epoch
        generator = torch.Generator().manual_seed(seed)
        train = torch.from_numpy(self.data.train)
        return train[torch.randperm(len(train), generator=generator)]

    def _load(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized images and their labels, on the device."""
        mean, std = self._moments
        x = self._x[indices].to(self.device, torch.float32)
        return (x - mean) / std, self._y[indices].to(self.device)

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.settings.precision)
        enabled = dtype != torch.float32
        return torch.autocast(self.device.type, dtype if enabled else None, enabled)

    def _loss(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed loss of some images, and their `_zero_totals` row."""
        x, y = self._load(indices)
        with self._autocast():
            logits = self._network(x)
        loss = cross_entropy(logits.float(), y, reduction="sum")
        correct = (logits.argmax(1) == y).sum()
        seen = torch.full_like(correct, len(y))
        return loss, torch.stack([loss.detach(), correct, seen])

    def _step(self, indices: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        # Ranks average their gradients, so each divides by the mean share of a rank.
        # That gives the gradient of the mean over the batch, also for unequal shares.
        divisor = len(indices) / self.ranks.size
        parts = self.ranks.local_parts(indices, self.settings.accumulate)
        for part in parts:
            with nullcontext() if part is parts[-1] else self._no_sync():
                loss, totals = self._loss(part)
                self.scaler.scale(loss / divisor).backward()
            self._totals += totals
        self._lr = self.optimizer.param_groups[0]["lr"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        self._update_batch_norm()
        self.model.eval()
        totals = self._zero_totals()
        test = torch.from_numpy(self.data.test)
        for part in test.split(EVAL_BATCH_SIZE * self.ranks.size):
            totals += self._loss(*self.ranks.local_parts(part))[1]
        loss, correct, seen = self.ranks.all_reduce(totals).tolist()
        return loss / seen, correct / seen

    def _update_batch_norm(self) -> None:
        """Recompute the statistics of batch norm with the current weights.

        Moving averages lag behind by about 20 steps, which can be a whole run at a
        large batch size: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021. All
        ranks compute the same number of parts; the result is the mean over ranks.
        """
        images, ranks = (
            torch.from_numpy(self.data.train[:BATCH_NORM_IMAGES]),
            self.ranks,
        )
        count = math.ceil(len(images) / EVAL_BATCH_SIZE / ranks.size)
        parts = ranks.local_parts(images, count)
        with self._autocast():
            update_bn((self._load(part)[0] for part in parts), self.model)
        for statistic in self.model.buffers():
            if ranks.size > 1 and statistic.is_floating_point():
                ranks.all_reduce(statistic).div_(ranks.size)

    def _trust_ratios(self) -> list[float]:
        """Return the trust ratios of the last step, of adapted layers only."""
        if not isinstance(self.optimizer, LARS):
            return []
        stats = self.optimizer.layer_stats().values()
        return [layer.trust_ratio for layer in stats if layer.adapted]

    def _end_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.ranks.all_reduce(self._totals)
        entry = {"epoch": self.epoch, "step": self.step, **self.metrics()}
        is_last = self.epoch == self.settings.epochs
        if not self.test_last or is_last or not math.isfinite(entry["train_loss"]):
            entry["test_loss"], entry["test_accuracy"] = self._evaluate()
        # JSON has neither NaN nor infinity.
        self.history.append(
            {name: x if math.isfinite(x) else None for name, x in entry.items()}
        )
        self._totals = self._zero_totals()


def select_device(settings: Settings, data: Data, ranks: Ranks) -> torch.device:
    """Return the device of a run.

    Raises `InputError` if the data is too small or the device cannot be used.
    """
    images = len(data.train)
    if settings.batch_size > images:
        raise InputError(
            f"--batch-size must be at most the number of training images, {images}, "
            f"got {settings.batch_size}"
        )
    smallest = settings.batch_size // (settings.accumulate * ranks.size)
    needed = 1 if settings.model == "convnet-plain" else 2
    if smallest < needed:
        processes = f" in {ranks.size} processes" if ranks.size > 1 else ""
        raise InputError(
            f"--batch-size {settings.batch_size} with --accumulate "
            f"{settings.accumulate}{processes} computes {smallest} images at a time, "
            f"but {settings.model} needs {needed}: raise --batch-size or lower "
            "--accumulate"
        )
    return _device(settings, ranks)


def _device(settings: Settings, ranks: Ranks) -> torch.device:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1:
        name = _device_of_rank(name, ranks)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {name} cannot be used: {reason}; pass --device cpu or auto"
        ) from error
    if settings.precision == "float16" and device.type == "cpu":
        raise InputError(
            "--precision float16 needs a GPU, got the device cpu: pass --precision "
            "bfloat16"
        )
    return device


def _device_of_rank(name: str, ranks: Ranks) -> str:
    """Return the device of one of several ranks: a GPU of its own, or the CPU."""
    if name == "cpu":
        return name
    if name != "cuda":
        raise InputError(
            f"--device {name} cannot be used by {ranks.size} processes: pass cuda, "
            "which gives each process its own GPU, or cpu"
        )
    gpus = torch.cuda.device_count()
    if ranks.local_size > gpus:
        raise InputError(
            f"--device cuda has {gpus} GPUs for {ranks.local_size} processes: start at "
            "most one process per GPU, or pass --device cpu"
        )
    torch.cuda.set_device(ranks.local_rank)
    return f"cuda:{ranks.local_rank}"


def _use_deterministic_algorithms() -> None:
    """Make CUDA sum in a fixed order; CPU operations always do."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
