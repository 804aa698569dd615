"""Layers that one engine steps together, and the choice of that engine."""

from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from larskit import layout, rule
from larskit.config import Config, is_zero
from larskit.engines import foreach as _foreach
from larskit.engines import native as _native
from larskit.engines import reference as _reference
from larskit.layout import Unfit, kept_buffers
from larskit.rule import Lengths

SWITCHES = ("foreach", "fused", "carry_norms", "capturable", "differentiable")
PER_LAYER = ("adapt", "decay")
MOMENTUM, MASTER = "momentum_buffer", "master_weight"
NARROW = (torch.float16, torch.bfloat16)
GPU = "cuda"  # the type of devices that Triton's kernels run on


class Kind(NamedTuple):
    """What the layers of a bucket have in common."""

    group: int
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    adapt: bool | None  # None: some are, some are not
    decay: bool | None
    sharded: bool
    master: bool  # whether float32 weights are kept beside the narrow ones


def kind_of(index: int, group: dict[str, Any], row: int, p: Any) -> Kind:
    """Return the kind of a parameter that has a gradient."""
    mixed = p.device.type == GPU and _fuses(group, p.device)
    adapt, decay = (
        None if mixed else is_selected(group, name, row) for name in PER_LAYER
    )
    master = group["master_weights"] and p.dtype in NARROW
    dtypes = p.dtype, p.grad.dtype
    return Kind(index, p.device, *dtypes, adapt, decay, is_sharded(p), master)


def _fuses(group: dict[str, Any], device: torch.device) -> bool:
    """Whether a fused engine is to be tried."""
    if torch.compiler.is_compiling():
        return False
    if group["fused"] is not None:
        return group["fused"]
    on_host = group["capturable"] and device.type != GPU
    return group["foreach"] is None and not (on_host or group["differentiable"])


def is_selected(group: dict[str, Any], name: str, row: int) -> bool:
    """Whether a layer of a group is adapted, or decayed."""
    given = group[name]
    if given is None:
        return group["params"][row].ndim >= 2
    return given if isinstance(given, bool) else given[row]


def is_sharded(p: Any) -> bool:
    """Whether a parameter is a DTensor."""
    return type(p).__name__ == "DTensor"


def has_momentum(group: dict[str, Any]) -> bool:
    """Whether the layers of a parameter group keep momentum buffers."""
    return not is_zero(group["momentum"])


_COLUMNS = (
    "names", "params", "_grads", "_locals", "_weights", "_buffers", "_former", "_flags",
)  # fmt: skip


class Bucket:
    """Layers of one kind, and what a step measured of them."""

    def __init__(self, kind: Kind) -> None:
        """Hold no layer yet."""
        self.kind = kind
        self.names: list[str] = []
        self.params: list[Any] = []
        self.norms: Any = None  # where they are known before the step
        self.rows: Any = None  # where sharded layers stand among all such
        self._grads: list[Any] = []
        self._locals: list[Tensor] = []  # what this process holds of the parameters
        self._weights: list[Tensor] = []  # what moves: those, or their masters
        self._buffers: list[Tensor | None] = []
        self._former: list[Tensor | None] = []  # the buffers before the step
        self._flags: list[Any] = []  # whether each layer is adapted, and decayed
        self._stored: list[list[Any]] = [[], [], []]  # states, their keys and values
        self._versions: list[int] = []
        self._engine: Any = None
        self._fused: Any = None  # a group of the native engine, or of Triton's
        self._scale: Tensor | None = None  # of the loss, for Triton to divide by
        self._given: Any = None
        self._config: Any = None
        self._found: Lengths | None = None

    def add(
        self, group: dict[str, Any], row: int, name: str, state: Any, written: Any
    ) -> None:
        """Take a parameter of a group in, with its state.

        `written` is the version of the parameter when its master was written last.
        """
        p = group["params"][row]
        local, buffer = self._local(p), self._local(state.get(MOMENTUM))
        w = local
        if self.kind.master:
            w = _master(self._local(state.get(MASTER)), local, written)
            buffer = None if buffer is None else buffer.float()
        self.names.append(name)
        self.params.append(p)
        self._grads.append(self._gradient(p))
        self._locals.append(local)
        self._weights.append(w)
        self._buffers.append(buffer)
        self._former.append(buffer)
        self._flags.append([is_selected(group, name, row) for name in PER_LAYER])

    def _local(self, x: Any) -> Any:
        return x.to_local() if self.kind.sharded and x is not None else x

    def _gradient(self, p: Any) -> Tensor:
        if not self.kind.sharded:
            return p.grad
        from larskit.norms import dtensor

        return dtensor.shard(p.grad, p)

    def choose_engine(
        self, group: dict[str, Any], former: "list[Bucket]"
    ) -> "list[Bucket]":
        """Choose as the group's switches say, and return what is to step then.

        That is this bucket, or parts of it. `former` buckets may know lengths.
        """
        self._check_switches(group)
        if _fuses(group, self.kind.device):
            try:
                self._fuse(has_momentum(group), former if group["carry_norms"] else [])
                return [self]
            except Unfit as why:
                for switch in ("fused", "carry_norms"):
                    if group[switch]:
                        raise RuntimeError(
                            f"{switch}=True, but {why}: leave it away to take another "
                            "engine"
                        ) from None
        parts: list[Bucket] = self._parts() if self.kind.adapt is None else [self]
        for part in parts:
            part._choose_plain(group["foreach"])
        return parts

    def _choose_plain(self, foreach: bool | None) -> None:
        plain = {torch.Tensor, torch.nn.Parameter}
        if foreach is None:
            foreach = all(type(w) in plain for w in self._weights)
        self._engine = _foreach if foreach else _reference

    def _parts(self) -> "list[Bucket]":
        """Part layers that are adapted, or decayed, from those that are not."""
        parts = {}
        for i, (adapt, decay) in enumerate(self._flags):
            kind = self.kind._replace(adapt=adapt, decay=decay)
            part = parts.setdefault(kind, Bucket(kind))
            for name in _COLUMNS:
                getattr(part, name).append(getattr(self, name)[i])
        return list(parts.values())

    @property
    def _on_gpu(self) -> bool:
        return self.kind.device.type == GPU

    def _check_switches(self, group: dict[str, Any]) -> None:
        """Refuse what cannot be done with these parameters."""
        for name in ("carry_norms", "differentiable"):
            if group[name] and self.kind.sharded:
                raise RuntimeError(
                    f"{name}=True is not for sharded parameters, whose lengths the "
                    "processes find together: leave it away"
                )
        if group["differentiable"] and any(
            p.is_leaf and p.requires_grad for p in self.params
        ):
            raise RuntimeError(
                "differentiable=True makes the new weights part of the graph, which a "
                "leaf that requires gradients cannot be: give the optimizer clones "
                "(p.clone()), and give those their .grad"
            )
        if group["capturable"] and group["fused"] and not self._on_gpu:
            raise RuntimeError(
                "capturable=True and fused=True exclude each other on the "
                f"device {self.kind.device}: the native engine reads lr on the host; "
                "leave one away"
            )

    def check_capture(self, group: dict[str, Any]) -> None:
        """Refuse what a CUDA graph could not repeat."""
        device, lr = self.kind.device, group["lr"]
        elsewhere = isinstance(lr, Tensor) and lr.device != device
        if group["capturable"] and elsewhere:
            raise RuntimeError(
                f"capturable=True, but lr is on the device {lr.device}, where a "
                f"captured step would read it only once: move it to {device}"
            )
        if not layout.is_capturing(device):
            return
        if not group["capturable"]:
            raise RuntimeError(
                "the step is being captured in a CUDA graph, but capturable=False: "
                "make the optimizer with capturable=True"
            )
        if has_momentum(group) and any(v is None for v in self._former):
            raise RuntimeError(
                "the step is being captured in a CUDA graph before there are momentum "
                "buffers, which the first step makes: take it before the capture"
            )

    def _fuse(self, keep: bool, former: "list[Bucket]") -> None:
        kept = kept_buffers(self._weights, self._buffers, keep)
        columns = self._weights, self._grads, self._buffers
        if self._on_gpu:
            adapt, decay = zip(*self._flags, strict=True)
            self._fused = _triton().Group(
                *columns, new_buffers=kept, adapt=adapt, decay=decay
            )
        else:
            self._fused = _native.Group(*columns, new_buffers=kept)
            self._fused.remember()
            for bucket in former:
                if isinstance(bucket._fused, _native.Group):
                    self._fused.take_over(bucket._fused)
        self._buffers = kept

    def aim(self) -> bool:
        """Whether a fused engine can go on, with the gradients that are here now."""
        if self._fused is None:
            return False
        self._grads = [p.grad for p in self.params]
        if self.kind.sharded and not self._aim_at_shards():
            return False
        if self.kind.master and self.versions() != self._versions:
            return False
        states, keys, values = self._stored
        as_before = all(map(is_, map(dict.get, states, keys), values))
        return as_before and self._fused.aim(self._grads)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph works on the tables of this bucket."""
        return self._on_gpu and self._fused is not None and self._fused.captured

    def _aim_at_shards(self) -> bool:
        pairs = zip(self.params, self._grads, strict=True)
        if not all(is_sharded(g) and g.placements == p.placements for p, g in pairs):
            return False
        self._grads = [g.to_local() for g in self._grads]
        now = map(self._local, self.params)  # views of what we hold, if it is as it was
        return all(
            x.data_ptr() == w.data_ptr() and x.shape == w.shape
            for x, w in zip(now, self._locals, strict=True)
        )

    def versions(self) -> list[int]:
        """Return what changes whenever somebody writes a parameter."""
        return [w._version for w in self._locals]

    def take(self, config: Config) -> None:
        """Take the configuration of the parameter group, its tensors on our device."""
        self.norms = None
        if config is self._given:
            return
        device = self.kind.device
        moved = {
            name: x.to(device, non_blocking=True)
            for name, x in vars(config).items()
            if isinstance(x, Tensor) and x.device != device
        }
        self._given = None if moved else config  # what lies elsewhere can change there
        flags = {name: getattr(self.kind, name) is not False for name in PER_LAYER}
        self._config = replace(config, **flags, **moved)

    def unscale(self, scale: Tensor | None) -> None:
        """Have the gradients divided by the scale of the loss, but left as they are."""
        if scale is not None and scale.device != self.kind.device:
            scale = scale.to(self.kind.device, non_blocking=True)
        self._scale = scale
        if scale is not None and not (self._on_gpu and self._fused):
            inverse = scale.double().reciprocal().float()
            self._grads = list(torch._foreach_mul(self._grads, inverse))

    def measure(self) -> None:
        """Find the lengths before the step is taken, unless they are known."""
        if self.norms is not None:
            return
        if self._fused is not None:
            self.norms = self._fused.norms(self._config, **self._unscaling)
            return
        rows = zip(self._weights, self._grads, self._former, strict=True)
        measured = [rule.measured(w, g, v, self._config) for w, g, v in rows]
        self.norms = tuple(map(self._engine.lengths, (self._weights, measured)))

    @property
    def _unscaling(self) -> dict[str, Any]:
        return {"scale": self._scale} if self._on_gpu else {}

    def step_(self, group: dict[str, Any], state: Any, permitted: Any = True) -> None:
        """Move the layers and keep their state in `state`.

        Nothing changes where `permitted`, a bool or a flag on a device, is false.
        """
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device != self.kind.device:
            lr = lr.to(self.kind.device, non_blocking=True)
        if self._fused is not None and not self._on_gpu:
            permitted = bool(permitted)
        if permitted is False:
            self.measure()
            self._found = self._rated(lr)
        elif group["differentiable"]:
            self._move_in_graph(lr, has_momentum(group))
        elif permitted is True:
            self._move(lr, group["carry_norms"])
        else:
            permitted = permitted.to(self.kind.device, non_blocking=True)
            self._move_where(permitted, lr, group["carry_norms"])
        self._grads = []
        if permitted is not False:
            self._store(state)

    def _rated(self, lr: Any) -> Lengths:
        """Return the lengths and ratios of a step that is not taken."""
        if self._fused is not None and self._on_gpu:
            return self._fused.rated(lr, self._config, self.norms)
        w_norms, q = self.norms
        return Lengths(w_norms, q, rule.trust_ratio(w_norms, q, lr, self._config))

    def _move(self, lr: Any, carry: bool = False, **options: Any) -> None:
        if self._fused is not None:
            options |= self._unscaling
            self._fused.step_(lr, self._config, self.norms, carry=carry, **options)
            self._found = None
        else:
            weights = [w.detach() for w in self._weights]
            self._found = self._engine.step_(
                weights, self._grads, self._buffers, lr, self._config, self.norms
            )
        if self.kind.master:
            torch._foreach_copy_(self._locals, self._weights)

    def _move_where(self, permitted: Tensor, lr: Any, carry: bool) -> None:
        if self._on_gpu and self._fused is not None:
            self._move(lr, carry, permitted=permitted)
            return
        if not is_zero(self._config.momentum):  # so that all of it can be put back
            pairs = zip(self._weights, self._buffers, strict=True)
            self._buffers = [torch.zeros_like(w) if v is None else v for w, v in pairs]
        written = [*self._locals, *self._weights, *self._buffers]
        before = [x.clone() for x in written if x is not None]
        self._move(lr)
        for x, old in zip((x for x in written if x is not None), before, strict=True):
            x.copy_(x.where(permitted, old))

    @torch.enable_grad()
    def _move_in_graph(self, lr: Any, keep: bool) -> None:
        """Move so that autograd sees it: nothing is overwritten but the parameters."""
        found = []
        for i, p in enumerate(self._weights):
            g, v = self._grads[i], self._buffers[i]
            new_w, new_v, lengths = rule.update(p.clone(), g, v, lr, self._config)
            p.copy_(new_w)
            self._buffers[i] = new_v if keep else self._buffers[i]
            found.append([x.detach() for x in lengths])
        self._found = Lengths(*map(torch.stack, zip(*found, strict=True)))

    def _store(self, state: Any) -> None:
        """Keep the buffers in the optimizer's state, unless they are there."""
        self._versions = self.versions() if self.kind.master else []
        self._former = self._buffers
        if self._stored[0]:
            return
        for p, w, v in zip(self.params, self._weights, self._buffers, strict=True):
            if MASTER in state.get(p, ()) and not self.kind.master:
                del state[p][MASTER]
            kept = {MOMENTUM: v, MASTER: w if self.kind.master else None}
            for key, x in kept.items():
                if x is not None:
                    state[p][key] = self._like(p, x)
                    row = state[p], key, state[p][key]
                    for column, value in zip(self._stored, row, strict=True):
                        column.append(value)

    def _like(self, p: Any, x: Tensor) -> Tensor:
        """Return what belongs to a parameter as a tensor of its own kind."""
        if not self.kind.sharded:
            return x
        from larskit.norms import dtensor

        return dtensor.assemble(x, p)

    @property
    def lengths(self) -> Lengths:
        """What the last step measured."""
        if self._found is not None:
            return self._found
        return self._fused.lengths

    @property
    def starts(self) -> bool:
        """Whether layers get their momentum buffers in the next step."""
        keeps = not is_zero(self._config.momentum)
        return keeps and any(v is None for v in self._former)

    @property
    def dampens_first(self) -> bool:
        """Whether a first buffer is not what one of zeros would become."""
        return self.starts and not is_zero(self._config.dampening)


def _triton() -> Any:
    try:
        from larskit.engines import triton
    except ModuleNotFoundError as why:
        raise Unfit(
            f"{why.name} is not installed, which comes with PyTorch for GPUs"
        ) from None
    return triton


def _master(master: Tensor | None, w: Tensor, written: int | None) -> Tensor:
    """Return the float32 weights of `w`: the master, but where `w` was changed."""
    if master is None:
        return w.float()
    if written in (None, w._version):
        return master
    return master.where(master.to(w.dtype) == w, w.float())
