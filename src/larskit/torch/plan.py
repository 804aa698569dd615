"""How the parameters of an optimizer are stepped, and by which engine."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from larskit import config as _config
from larskit import rule
from larskit.config import Config, check_lr
from larskit.engines import foreach as _foreach
from larskit.engines import native as _native
from larskit.engines import reference as _reference
from larskit.rule import Lengths

PER_LAYER = ("adapt", "decay")
ENGINES = ("foreach", "fused", "carry_norms")
PER_GROUP = tuple(
    name for name in _config.NAMES if name not in (*PER_LAYER, "zero_guard")
)
_NOTHING: dict[str, Any] = {}


class Plan:
    """How some parameters step, kept from step to step while nothing of it changes."""

    def __init__(self) -> None:
        self._buckets: list[_Bucket] = []
        self._idle: list[Tensor] = []  # without a gradient
        self._params: list[Tensor] = []
        self._sharded: list[Any] = []
        self._states: list[Any] = []
        self._switches: list[Any] = []
        self._values: list[Any] = []
        self._configs: list[Config] = []
        self._outside_graphs: Any = torch.compiler.disable(self._step_)

    def step_(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Move the parameters of `groups` that have gradients."""
        step_ = self._outside_graphs if torch.compiler.is_compiling() else self._step_
        step_(groups, state)

    def _step_(self, groups: list[dict[str, Any]], state: Any) -> None:
        self._check(groups)
        fits = self._fits(groups, state)
        if not fits:
            self._sort(groups, state)
        for bucket in self._buckets:
            bucket.take(self._configs[bucket.index])
        self._measure_sharded()
        for bucket in self._buckets:
            bucket.step_(groups[bucket.index], state)
        if not fits:
            self._states = [*state.values()]

    def _measure_sharded(self) -> None:
        """Give the buckets of sharded layers the lengths of the whole layers.

        All of them take part, also those without a gradient in this process.
        """
        if not self._sharded:
            return
        from larskit.norms import dtensor

        layers = self._sharded
        measured = {p: x for b in self._buckets for p, x in b.measured()}
        shards = [p.to_local() for p in layers], [measured.get(p) for p in layers]
        found = dtensor.lengths([*shards[0], *shards[1]], layers * 2, _lengths)
        rows = {p: row for row, p in enumerate(layers)}
        for bucket in self._buckets:
            if bucket.sharded:
                own = torch.tensor([rows[p] for p in bucket.params])
                bucket.norms = found[own], found[own + len(layers)]

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
        buckets: dict[Any, _Bucket] = {}
        idle = []
        for index, group in enumerate(groups):
            rows = zip(group["params"], group["adapt"], group["decay"], strict=True)
            for row, (p, adapt, decay) in enumerate(rows):
                if p.grad is None:
                    idle.append(p)
                    continue
                name = name_of(index, group, row)
                _check_dense(p.grad, name)
                sharded = is_sharded(p)
                key = index, p.device, p.dtype, p.grad.dtype, adapt, decay, sharded
                if key not in buckets:
                    buckets[key] = _Bucket(index, adapt, decay, sharded)
                buckets[key].add(name, p, _buffer(state, p))
        for bucket in buckets.values():
            bucket.choose_engine(groups[bucket.index], self._buckets)
        self._buckets, self._idle = list(buckets.values()), idle
        self._params = [p for group in groups for p in group["params"]]
        self._sharded = [p for p in self._params if is_sharded(p)]
        self._switches = [_switches(group) for group in groups]


def _same(these: Collection[Any], those: Collection[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _switches(group: dict[str, Any]) -> Any:
    """Return what in a group decides about buckets and engines."""
    return [group[name] for name in (*PER_LAYER, *ENGINES)], group["momentum"] == 0


def name_of(index: int, group: dict[str, Any], row: int) -> str:
    """Name a parameter as its group does, or by where it stands."""
    names = group.get("param_names")
    return names[row] if names else f"{index}.{row}"


class _Bucket:
    """Layers of one device, dtype and kind, and what a step measured of them."""

    def __init__(self, index: int, adapt: bool, decay: bool, sharded: bool) -> None:
        self.index = index  # of the parameter group
        self.flags = {"adapt": adapt, "decay": decay}
        self.sharded = sharded
        self.names: list[str] = []
        self.params: list[Any] = []
        self.weights: list[Tensor] = []  # what this process holds of the parameters
        self.grads: list[Any] = []
        self.buffers: list[Tensor | None] = []
        self.former: list[Tensor | None] = []  # the buffers before the step
        self.engine: Any = None
        self.native: _native.Group | None = None
        self.states: list[dict[str, Any]] = []  # once they hold the buffers
        self.given: Any = None
        self.config: Any = None
        self.norms: Any = None
        self.found: Any = None

    def add(self, name: str, p: Any, buffer: Any) -> None:
        self.names.append(name)
        self.params.append(p)
        grad = p.grad
        if self.sharded:
            if grad.placements != p.placements:  # sums that are not complete, say
                grad = grad.redistribute(placements=p.placements)
            grad = grad.to_local().contiguous()  # an uneven shard may have gaps
            buffer = buffer if buffer is None else buffer.to_local()
        self.weights.append(p.to_local() if self.sharded else p)
        self.grads.append(grad)
        self.buffers.append(buffer)
        self.former.append(buffer)

    def take(self, config: Config) -> None:
        """Take the configuration of the parameter group."""
        if config is not self.given:
            self.given, self.config = config, replace(config, **self.flags)

    def measured(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each sharded parameter, and what is measured of it beside itself."""
        rows = zip(self.params, self.weights, self.grads, self.former, strict=True)
        for p, w, g, v in rows if self.sharded else ():
            yield p, rule.measured(w, g, v, self.config)

    def choose_engine(self, group: dict[str, Any], former: "list[_Bucket]") -> None:
        """Choose as the group's switches say; `former` buckets may know lengths."""
        foreach, fused, carry = (group[name] for name in ENGINES)
        if carry and self.sharded:
            raise RuntimeError(
                "carry_norms=True is not for sharded parameters, whose lengths the "
                "processes find together: leave it away"
            )
        if fused or (fused is None and foreach is None):
            try:
                self._go_native(group["momentum"] != 0, former if carry else [])
                return
            except _native.Unfit as why:
                if fused or carry:
                    demand = "fused=True" if fused else "carry_norms=True"
                    raise RuntimeError(
                        f"{demand}, but {why}: leave it away to take another engine"
                    ) from None
        plain = {torch.Tensor, torch.nn.Parameter}
        if foreach is None:
            foreach = all(type(w) in plain for w in self.weights)
        self.engine = _foreach if foreach else _reference

    def _go_native(self, keep: bool, former: "list[_Bucket]") -> None:
        kept = _native.kept_buffers(self.weights, self.buffers, keep)
        columns = self.weights, self.grads, self.buffers
        self.native = _native.Group(*columns, new_buffers=kept)
        if not self.sharded:
            self.native.remember()
        self.buffers = kept
        for bucket in former:
            if bucket.native is not None:
                self.native.take_over(bucket.native)

    def aim(self) -> bool:
        """Whether the native engine can go on, with the gradients that are here now."""
        if self.native is None or self.sharded:
            return False
        self.grads = [p.grad for p in self.params]
        if not self.native.aim(self.grads):
            return False
        now = [state.get("momentum_buffer") for state in self.states]
        return all(map(is_, now, self.buffers))

    @property
    def lengths(self) -> Lengths:
        """What the last step measured."""
        return self.found if self.native is None else self.native.lengths

    def step_(self, group: dict[str, Any], state: Any) -> None:
        """Move the layers and keep their buffers in `state`."""
        lr, carry = group["lr"], group["carry_norms"]
        if self.native is not None:
            self.native.step_(lr, self.config, self.norms, carry=carry)
        else:
            weights = [w.detach() for w in self.weights]
            columns = weights, self.grads, self.buffers
            self.found = self.engine.step_(*columns, lr, self.config, self.norms)
        self.grads = []
        if self.states:
            return
        for p, buffer in zip(self.params, self.buffers, strict=True):
            if buffer is not None:
                state[p]["momentum_buffer"] = self._like(p, buffer)
        if self.native is not None:
            self.states = [state.get(p, _NOTHING) for p in self.params]

    def _like(self, p: Any, buffer: Tensor) -> Tensor:
        """Return a buffer as a tensor of the parameter's own kind."""
        if not self.sharded:
            return buffer
        whole = {"shape": p.shape, "stride": p.stride()}
        return type(p.data).from_local(
            buffer, p.device_mesh, p.placements, run_check=False, **whole
        )


def is_sharded(p: Any) -> bool:
    """Whether a parameter is a DTensor."""
    return type(p).__name__ == "DTensor"


def _lengths(tensors: list[Tensor]) -> Tensor:
    """Return the lengths of tensors of several dtypes, as the engines find them."""
    found = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)
    for dtype in {x.dtype for x in tensors}:
        rows = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        own = [tensors[i] for i in rows]
        try:
            found[rows] = _native.lengths(own)
        except _native.Unfit:
            found[rows] = _foreach.lengths(own)
    return found


def config_of(group: dict[str, Any]) -> Config:
    """Check the hyper-parameters of a group, and return them."""
    check_lr(group["lr"])
    return Config(**{name: group[name] for name in PER_GROUP})


def _buffer(state: Any, p: Tensor) -> Tensor | None:
    return state[p].get("momentum_buffer") if p in state else None


def _check_dense(grad: Tensor, name: str) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {name!r} is sparse ({grad.layout}); LARS needs the "
            "length of the whole layer: use dense gradients (sparse=False)"
        )
