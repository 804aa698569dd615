"""How the parameters of an optimizer are stepped, and what is kept between steps."""

from collections.abc import Collection
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from larskit import config as _config
from larskit import layout
from larskit.config import Config, check_lr
from larskit.rule import Lengths
from larskit.torch.bucket import (
    PER_LAYER,
    SWITCHES,
    Bucket,
    Kind,
    has_momentum,
    is_sharded,
    kind_of,
)

PER_GROUP = tuple(
    name for name in _config.NAMES if name not in (*PER_LAYER, "zero_guard")
)
_NOTHING: dict[str, Any] = {}


class Plan:
    """How some parameters step, kept from step to step while nothing of it changes."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._buckets: list[Bucket] = []
        self._idle: list[Tensor] = []  # without a gradient
        self._params: list[Tensor] = []
        self._sharded: list[Any] = []
        self._together: Any = None  # the processes, on the lengths of those
        self._states: list[Any] = []
        self._switches: list[Any] = []
        self._values: list[Any] = []
        self._configs: list[Config] = []
        self._captured: list[Bucket] = []  # whose tables CUDA graphs work on
        self._written: dict[Any, int] = {}  # versions of parameters with masters
        self._outside_graphs: Any = torch.compiler.disable(self._step_)

    def step_(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        scale: Tensor | None = None,
        overflow: Tensor | None = None,
    ) -> None:
        """Move the parameters of `groups` that have gradients.

        These were multiplied by `scale`, and nothing moves if `overflow` is not 0: what
        `torch.amp.GradScaler` says.
        """
        if not torch.compiler.is_compiling():
            self._step_(groups, state, scale, overflow)
        elif all(map(_is_traceable, groups)):
            self._step_in_graph(groups, state)
        else:
            self._outside_graphs(groups, state, scale, overflow)

    def _step_(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        scale: Tensor | None,
        overflow: Tensor | None,
    ) -> None:
        policy = policy_of(groups)
        self._check(groups)
        fits = self._fits(groups, state)
        if not fits:
            self._captured += [bucket for bucket in self._buckets if bucket.captured]
            self._sort(groups, state)
        for bucket in self._buckets:
            bucket.check_capture(groups[bucket.kind.group])
        for bucket in self._buckets:
            bucket.take(self._configs[bucket.kind.group])
            bucket.unscale(scale)
        permitted = overflow is None or overflow == 0
        if permitted is not True and any(b.dampens_first for b in self._buckets):
            permitted = bool(permitted)
        self._measure_sharded()
        if policy != "propagate":
            permitted = self._judge(policy, groups, permitted)
        for bucket in self._buckets:
            bucket.step_(groups[bucket.kind.group], state, permitted)
            if bucket.kind.master:
                self._written.update(zip(bucket.params, bucket.versions(), strict=True))
        if not fits:
            self._states = [*state.values()]

    def _step_in_graph(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Do what `_step_` does on the foreach engine, for `torch.compile` to see."""
        self._sort(groups, state)
        for bucket in self._buckets:
            group = groups[bucket.kind.group]
            bucket.take(config_of(group))
            bucket.step_(group, state)

    def _measure_sharded(self) -> None:
        """Give the buckets of sharded layers the lengths of the whole layers.

        All of them take part, also those without a gradient in this process.
        """
        if self._together is None:
            return
        count = len(self._sharded)
        own = self._together.zeros()
        buckets = [bucket for bucket in self._buckets if bucket.kind.sharded]
        for bucket in buckets:
            bucket.measure()
            own[bucket.rows], own[bucket.rows + count] = bucket.norms
        found = self._together.completed(own)
        for bucket in buckets:
            bucket.norms = found[bucket.rows], found[bucket.rows + count]

    def _judge(self, policy: str, groups: list[dict[str, Any]], permitted: Any) -> Any:
        """Return whether to move: as `permitted` says, and if all lengths are finite.

        The answer is a bool or a flag on the device. The device is waited for only
        where an error may follow, or the first buffers are to be made or not.
        """
        for bucket in self._buckets:
            bucket.measure()
        finite = _on_all_ranks(self._finite())
        if isinstance(permitted, Tensor):
            permitted = permitted.to(finite.device, non_blocking=True)
        captured = any(group["capturable"] for group in groups)
        free = finite.device.type == "cpu" and not captured
        starts = any(bucket.starts for bucket in self._buckets)
        if not (policy == "raise" or free or starts):
            return finite & permitted
        if policy == "raise" and permitted and not finite:
            raise FloatingPointError(
                f"the step was not taken, because {self._nonfinite()} is not finite"
            )
        return bool(finite & permitted)

    def _finite(self) -> Tensor:
        flags = [x.isfinite().all() for bucket in self._buckets for x in bucket.norms]
        device = self._params[0].device
        flags = [flag.to(device, non_blocking=True) for flag in flags]
        return torch.stack([torch.ones((), dtype=torch.bool, device=device), *flags])

    def _nonfinite(self) -> str:
        for bucket in self._buckets:
            rows = zip(bucket.names, *(x.tolist() for x in bucket.norms), strict=True)
            for name, *lengths in rows:
                for what, x in zip(("weights", "gradient"), lengths, strict=True):
                    if x - x != 0:
                        return f"the length of the {what} of {name!r} ({x})"
        return "a length in another process"

    def lengths(self) -> dict[str, Lengths]:
        """Return what the last step measured, by name."""
        found = {}
        for bucket in self._buckets:
            rows = zip(*(column.tolist() for column in bucket.lengths), strict=True)
            found.update(zip(bucket.names, map(Lengths._make, rows), strict=True))
        return found

    def _check(self, groups: list[dict[str, Any]]) -> None:
        """Set the configuration of each group, checked anew if it is a new one."""
        values = [group[name] for group in groups for name in ("lr", *PER_GROUP)]
        if not _same(values, self._values):
            self._configs = [config_of(group) for group in groups]
            self._values = values

    def _fits(self, groups: list[dict[str, Any]], state: Any) -> bool:
        """Whether the buckets of the last step serve again, with new gradients."""
        return (
            self._switches == [_switches(group) for group in groups]
            and _same([p for group in groups for p in group["params"]], self._params)
            and _same(state.values(), self._states)
            and all(p.grad is None for p in self._idle)
            and all(bucket.aim() for bucket in self._buckets)
        )

    def _sort(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Sort the parameters into lists that one engine call can step."""
        buckets: dict[Kind, Bucket] = {}
        idle = []
        for index, group in enumerate(groups):
            for row, p in enumerate(group["params"]):
                if p.grad is None:
                    idle.append(p)
                    continue
                name = name_of(index, group, row)
                _check_gradient(p, name)
                kind = kind_of(index, group, row, p)
                if kind not in buckets:
                    buckets[kind] = Bucket(kind)
                kept = state.get(p, _NOTHING)
                buckets[kind].add(group, row, name, kept, self._written.get(p))
        sorted_buckets = [
            part
            for bucket in buckets.values()
            for part in bucket.choose_engine(groups[bucket.kind.group], self._buckets)
        ]
        self._buckets, self._idle = sorted_buckets, idle
        self._params = [p for group in groups for p in group["params"]]
        self._gather_sharded()
        self._switches = [_switches(group) for group in groups]

    def _gather_sharded(self) -> None:
        self._sharded = [p for p in self._params if is_sharded(p)]
        self._together = None
        if not self._sharded:
            return
        from larskit.norms import dtensor

        # Once as weights, and once as what is measured beside them.
        self._together = together = dtensor.Together(self._sharded * 2)
        places = {p: i for i, p in enumerate(self._sharded)}
        for bucket in self._buckets:
            if bucket.kind.sharded:
                rows = [places[p] for p in bucket.params]
                bucket.rows = layout.integers(rows, together.device)


def _same(these: Collection[Any], those: Collection[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _switches(group: dict[str, Any]) -> Any:
    """Return what in a group decides about buckets and engines."""
    names = (*PER_LAYER, *SWITCHES, "master_weights")
    return [group[name] for name in names], has_momentum(group)


def _is_traceable(group: dict[str, Any]) -> bool:
    """Whether the foreach engine steps a group, of tensors that it can be traced on."""
    on_cpu = any(p.device.type == "cpu" for p in group["params"])
    return (
        not (group["fused"] or group["carry_norms"] or group["master_weights"])
        and (group["foreach"] or (group["foreach"] is None and not on_cpu))
        and group["on_nonfinite"] == "propagate"
        and not any(map(is_sharded, group["params"]))
    )


def name_of(index: int, group: dict[str, Any], row: int) -> str:
    """Name a parameter as its group does, or by where it stands."""
    names = group.get("param_names")
    return names[row] if names else f"{index}.{row}"


def policy_of(groups: list[dict[str, Any]]) -> str:
    """Return what to do with a length that is not finite: one thing for all groups."""
    policies = list(dict.fromkeys(group["on_nonfinite"] for group in groups))
    if len(policies) > 1:
        raise ValueError(
            f"on_nonfinite concerns the whole step, but the parameter groups have "
            f"{' and '.join(map(repr, policies))}: give all of them the same"
        )
    return policies[0]


def _on_all_ranks(flags: Tensor) -> Tensor:
    """Return whether all flags are true, here and in every other process."""
    flag = flags.all()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        number = flag.to(torch.int32)
        dist.all_reduce(number, dist.ReduceOp.MIN)
        flag = number > 0
    return flag


def config_of(group: dict[str, Any]) -> Config:
    """Check the hyper-parameters of a group, and return them."""
    check_lr(group["lr"])
    for name in ("lr", *PER_GROUP):
        x = group[name]
        if isinstance(x, Tensor) and x.numel() != 1:
            shape = tuple(x.shape)
            raise ValueError(f"{name} has the shape {shape}, expected one number")
    return Config(**{name: group[name] for name in PER_GROUP})


def _check_gradient(p: Any, name: str) -> None:
    if p.grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {name!r} is sparse ({p.grad.layout}); LARS needs the "
            "length of the whole layer: use dense gradients (sparse=False)"
        )
    if is_sharded(p) != is_sharded(p.grad):
        here, there = (type(x).__name__ for x in (p, p.grad))
        raise RuntimeError(
            f"the parameter {name!r} is a {here} and its gradient a {there}: "
            "distribute both, or neither (distribute_tensor, full_tensor)"
        )
