"""Which parameters are processed together, kept while nothing changes."""

from collections.abc import Callable, Collection, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from larskit import engines
from larskit.engines import Switches
from larskit.norm import norm
from larskit.norms import is_sharded
from larskit.torch.bucket import Bucket, BucketKey, key_of
from larskit.torch.options import Groups, LayerState, ParamGroup, Settings, State

if TYPE_CHECKING:
    from larskit.norms.dtensor import ShardedNorms

# Of a group: the flags of its layers, and `Settings.structure`.
_Structure = tuple[object, object, tuple[Switches, bool, bool]]


class Plan:
    """Parameters in buckets, for one engine call each.

    Most of what a steady step does in Python is to find that nothing has changed. The
    plan compares identities: of settings, parameters, state dicts and what these hold.
    The engines look at the tensors.

    Parameters
    ----------
    check : callable
        Gets each parameter that has a gradient, and its name, before anything is
        bound; raises where the gradient does not fit.
    scales_gradients : bool, default=False
        Whether gradients are scaled, instead of parameters stepped.
    """

    def __init__(
        self, check: Callable[[Tensor, str], None], *, scales_gradients: bool = False
    ) -> None:
        """Hold no parameter yet."""
        self._check = check
        self.buckets: list[Bucket] = []
        self._scales_gradients = scales_gradients
        self._settings: Sequence[Settings] = ()
        self._structure: list[_Structure] = []
        self._params: list[Tensor] = []
        self._states: list[LayerState] = []
        self._idle: list[Tensor] = []  # parameters without a gradient
        self._sharded: ShardedNorms | None = None  # the norms of all sharded layers
        self._idle_shards: list[tuple[int, Any]] = []
        # Versions of parameters that have masters. Not in the buckets, which parameters
        # without a gradient leave: their masters must still see the writes of others.
        self._written: dict[Tensor, int] = {}
        self._captured: list[engines.Group] = []  # for replays of CUDA graphs

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, on which decisions are taken."""
        return self._params[0].device

    def update(
        self, groups: Groups, settings: Sequence[Settings], state: State
    ) -> None:
        """Bind all gradients that are here, as before or to other engines.

        Raises
        ------
        Unsupported, RuntimeError
            A parameter does not fit the settings of its group. Nothing has changed.
        """
        if not self._fits(groups, settings, state):
            self._bind(groups, settings, state)

    def after_step(self, state: State) -> None:
        """Note what a step has written, so that the writes of others are seen."""
        for bucket in self.buckets:
            if bucket.key.master:
                self._written.update(zip(bucket.params, bucket.versions(), strict=True))
        # The first step adds state dicts: unnoted, the second step would bind again.
        if len(self._states) != len(state):
            self._states = [*state.values()]

    def all_reduce_norms(self, grad_scale: Tensor | None = None) -> None:
        """Give the buckets of sharded layers the norms of the whole layers.

        Every process takes part with all its sharded parameters. Those without a
        gradient contribute their weights: another process may have a gradient.
        """
        if self._sharded is None:
            return
        own = self._sharded.zeros()
        buckets = [bucket for bucket in self.buckets if bucket.key.sharded]
        for bucket in buckets:
            config = self._settings[bucket.key.group].config
            own[0, bucket.rows], own[1, bucket.rows] = bucket.measure(
                config, grad_scale
            )
        # A zero here would be a wrong |w| for the processes that do have a gradient.
        for row, p in self._idle_shards:
            own[0, row] = norm(p.to_local())
        found = self._sharded.all_reduce(own)
        for bucket in buckets:
            bucket.norms = found[0, bucket.rows], found[1, bucket.rows]

    def _fits(self, groups: Groups, settings: Sequence[Settings], state: State) -> bool:
        # Only a change of structure needs other buckets: the engines get the numbers of
        # `Config` at each call.
        if settings is not self._settings:
            if _structure(groups, settings) != self._structure:
                return False
            self._settings = settings
        return (
            same([p for group in groups for p in group["params"]], self._params)
            and same(state.values(), self._states)
            and all([p.grad is None for p in self._idle])
            and all([bucket.rebind() for bucket in self.buckets])
        )

    def _bind(self, groups: Groups, settings: Sequence[Settings], state: State) -> None:
        buckets: dict[BucketKey, Bucket] = {}
        idle = []
        for index, group in enumerate(groups):
            for row, p in enumerate(group["params"]):
                if p.grad is None:
                    idle.append(p)
                    continue
                name = name_of(index, group, row)
                self._check(p, name)
                key = key_of(index, settings[index], p)
                bucket = buckets.setdefault(key, Bucket(key))
                bucket.add(group, row, name, state, self._written)
        # All of them bind before anything is assigned: if one raises, the plan is as it
        # was. A bucket's group is thrown away, never repaired.
        for key, bucket in buckets.items():
            bucket.bind(settings[key.group], self.buckets, self._scales_gradients)
        # A replay reads the tables of these groups, so that they must outlive their
        # buckets.
        self._captured += [b.group for b in self.buckets if b.group.captured]
        self.buckets, self._idle = list(buckets.values()), idle
        self._params = [p for group in groups for p in group["params"]]
        self._states = [*state.values()]
        self._settings, self._structure = settings, _structure(groups, settings)
        self._gather_sharded()

    def _gather_sharded(self) -> None:
        params = [p for p in self._params if is_sharded(p)]
        self._sharded = None
        if not params:
            return
        from larskit.norms import dtensor

        self._sharded = dtensor.ShardedNorms(params)
        rows: dict[Tensor, int] = {p: row for row, p in enumerate(params)}
        self._idle_shards = [(rows[p], p) for p in self._idle if p in rows]
        for bucket in self.buckets:
            if bucket.key.sharded:
                own = [rows[p] for p in bucket.params]
                bucket.rows = engines.integers(own, self._sharded.device)


def name_of(index: int, group: ParamGroup, row: int) -> str:
    """Name a parameter as its group does, or by its place."""
    names = group.get("param_names")
    return names[row] if names else f"{index}.{row}"


def _structure(groups: Groups, settings: Sequence[Settings]) -> list[_Structure]:
    """Return what decides about buckets and engines, beside the parameters."""
    pairs = zip(groups, settings, strict=True)
    return [(group["adapt"], group["decay"], own.structure) for group, own in pairs]


def same(these: Collection[object], those: Collection[object]) -> bool:
    """Whether two collections hold the very same objects, in the same order."""
    # `==` of two tensors would be a tensor, and reading it would wait for the device.
    return len(these) == len(those) and all(map(is_, these, those))
