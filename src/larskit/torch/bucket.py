"""Parameters that one engine processes together, and where their state is kept."""

from collections.abc import Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from larskit import engines
from larskit.arrays import check_memory
from larskit.config import PER_LAYER, Config
from larskit.engines import Layers
from larskit.norms import is_sharded
from larskit.rule import Norms
from larskit.torch.options import (
    LayerState,
    ParamGroup,
    Settings,
    State,
    is_selected,
)

if TYPE_CHECKING:
    from larskit.arrays import Scalar

MOMENTUM, MASTER = _TENSORS = "momentum_buffer", "master_weight"
LOW_PRECISION = (torch.float16, torch.bfloat16)
_NOTHING: LayerState = {}


class BucketKey(NamedTuple):
    """What the parameters of a bucket have in common."""

    group: int
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    sharded: bool
    master: bool  # whether float32 weights are kept beside those of low precision


def key_of(index: int, settings: Settings, p: Any) -> BucketKey:
    """Return the key of a parameter that has a gradient."""
    master = settings.master_weights and p.dtype in LOW_PRECISION
    dtypes = p.dtype, p.grad.dtype
    return BucketKey(index, p.device, *dtypes, is_sharded(p), master)


class Bucket:
    """Parameters of one key, bound to the engine that processes them."""

    group: engines.Group

    def __init__(self, key: BucketKey) -> None:
        """Hold no parameter yet."""
        self.key = key
        self.names: list[str] = []
        self.params: list[Any] = []
        self.rows: Tensor | None = None  # of these among all sharded parameters
        self.norms: Norms | None = None  # of this step, where they are known before it
        self._flags: list[list[bool]] = [[], []]  # whether each is adapted, and decayed
        self._locals: list[Tensor] = []  # the shards of the parameters held here
        self._weights: list[Tensor] = []  # what moves: those, or their float32 masters
        self._buffers: list[Tensor | None] = []
        self._stored: list[list[Any]] = [[], [], []]  # state dicts, their keys, values
        self._is_stored = False
        self._versions: list[int] = []
        # Scaled gradients and the DTensors around them, by the id of the former.
        self._scaled: dict[int, tuple[Tensor, Tensor]] = {}

    def add(
        self,
        group: ParamGroup,
        row: int,
        name: str,
        state: State,
        written: Mapping[Tensor, int],
    ) -> None:
        """Take a parameter of a group in, with its state.

        `written` has the versions of parameters when their masters were written last.
        """
        p = group["params"][row]
        # `state` is a defaultdict: an index would add an entry, and bind may raise.
        kept = state.get(p, _NOTHING)
        local, buffer = self._local(p), self._local(kept.get(MOMENTUM))
        self._check_memory(p, name, kept)
        w = local
        if self.key.master:
            w = _master(self._local(kept.get(MASTER)), local, written.get(p))
            # Of low precision if it is older than `master_weights=True`.
            buffer = None if buffer is None else buffer.float()
        self.names.append(name)
        self.params.append(p)
        self._locals.append(local)
        self._weights.append(w)
        self._buffers.append(buffer)
        for flags, what in zip(self._flags, PER_LAYER, strict=True):
            flags.append(is_selected(group, what, row))

    def bind(
        self, settings: Settings, former: "list[Bucket]", scales_gradients: bool
    ) -> None:
        """Bind the parameters to the engine that steps them, or scales gradients."""
        for name in ("carry_norms", "differentiable"):
            if self.key.sharded and getattr(settings.switches, name):
                raise RuntimeError(
                    f"{name}=True is not supported for sharded parameters, whose norms "
                    "are reduced over all processes: omit it"
                )
        gradients = [self._gradient(p) for p in self.params]
        # Scaled gradients are new tensors: those of the parameters are not ours.
        out = [None] * len(gradients) if scales_gradients else None
        self.group = engines.choose(
            Layers(self._weights, gradients, self._buffers, *self._flags, out=out),
            settings.config,
            settings.switches,
            scales_gradients=scales_gradients,
            former=[bucket.group for bucket in former],
        )

    def rebind(self) -> bool:
        """Bind the gradients that are here now; False if anything else has changed."""
        # Those of the last step: `measure` would return them for this one.
        self.norms = None
        gradients = [p.grad for p in self.params]
        if self.key.sharded:
            if not self._holds_same_shards(gradients):
                return False
            gradients = [g.to_local() for g in gradients]
        if self.key.master and self.versions() != self._versions:
            return False
        # A caller may have replaced what `_store` put there, and the engine writes.
        states, keys, values = self._stored
        same_state = all(map(is_, map(dict.get, states, keys), values))
        return same_state and self.group.rebind(gradients)

    def _holds_same_shards(self, gradients: list[Any]) -> bool:
        pairs = zip(self.params, gradients, strict=True)
        if not all(is_sharded(g) and g.placements == p.placements for p, g in pairs):
            return False
        # `to_local` makes a new view at each call: identity cannot be compared, and
        # the engine has seen the first ones only.
        rows = zip(map(self._local, self.params), self._locals, strict=True)
        return all(x.data_ptr() == w.data_ptr() and x.shape == w.shape for x, w in rows)

    def measure(self, config: Config, grad_scale: Tensor | None = None) -> Norms:
        """Return the norms of what is held here, before the step."""
        if self.norms is None:
            self.norms = self.group.norms(config, grad_scale)
        return self.norms

    def step_(
        self,
        lr: "Scalar",
        config: Config,
        state: State,
        grad_scale: Tensor | None,
        apply_if: bool | Tensor,
    ) -> None:
        """Move the parameters and keep their state; see `engines.Group.step_`."""
        self.group.step_(
            lr, config, self.norms, grad_scale=grad_scale, apply_if=apply_if
        )
        if apply_if is False:
            return
        if self.key.master:
            torch._foreach_copy_(self._locals, self._weights)
            self._versions = self.versions()
        if not self._is_stored:
            self._store(state)

    def _store(self, state: State) -> None:
        """Put the buffers and masters into the optimizer's state, once."""
        self._is_stored = True
        rows = zip(self.params, self._weights, self.group.buffers, strict=True)
        for p, w, v in rows:
            # No step would update it, and a checkpoint would keep it.
            if MASTER in state.get(p, ()) and not self.key.master:
                del state[p][MASTER]
            for key, x in ((MOMENTUM, v), (MASTER, w if self.key.master else None)):
                if x is not None:
                    state[p][key] = self._placed_as(p, x)
                    row = state[p], key, state[p][key]
                    for column, value in zip(self._stored, row, strict=True):
                        column.append(value)

    def scaled_gradients(
        self, config: Config, grad_scale: Tensor | None
    ) -> list[Tensor]:
        """Return the scaled gradients, as tensors of the kind of their parameters."""
        found = self.group.scale_gradients(config, self.norms, grad_scale)
        if not self.key.sharded:
            return list(found)
        for p, g in zip(self.params, found, strict=True):
            # The entry holds `g` as well, so that no other tensor can get its id.
            if id(g) not in self._scaled:
                self._scaled[id(g)] = g, self._placed_as(p, g)
        return [self._scaled[id(g)][1] for g in found]

    def versions(self) -> list[int]:
        """Return what changes whenever another caller writes a parameter."""
        return [w._version for w in self._locals]

    def _check_memory(self, p: Any, name: str, kept: Any) -> None:
        arrays = {"parameter": p, "gradient": p.grad}
        for what, x in {**arrays, **{key: kept.get(key) for key in _TENSORS}}.items():
            if x is not None:
                check_memory(self._local(x), f"the {what} of {name!r}")

    def _local(self, x: Any) -> Any:
        return x.to_local() if self.key.sharded and x is not None else x

    def _gradient(self, p: Any) -> Tensor:
        if not self.key.sharded:
            return p.grad
        from larskit.norms import dtensor

        return dtensor.shard(p.grad, p)

    def _placed_as(self, p: Any, x: Tensor) -> Any:
        """Return `x`, which belongs to a parameter, as a tensor of the same kind."""
        if not self.key.sharded:
            return x
        from larskit.norms import dtensor

        return dtensor.assemble(x, p)


def _master(master: Tensor | None, w: Tensor, written: int | None) -> Tensor:
    """Return the float32 weights of `w`: the master, except where `w` was changed."""
    if master is None:
        return w.float()
    # None: the master comes from a loaded state, which is more precise than `w`.
    if written in (None, w._version):
        return master
    # By elements: those that nobody wrote keep the digits that `w` cannot hold.
    return master.where(master.to(w.dtype) == w, w.float())
