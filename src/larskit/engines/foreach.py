"""The rule on whole lists of torch tensors, through torch's multi-tensor functions.

It may fuse a multiplication with an addition where the reference does not, so the two
agree to 2 ulp of the larger operand in each step.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from larskit import rule
from larskit.arrays import Array, Scalar, norm_dtype, scalar
from larskit.config import Config, is_number, is_zero
from larskit.engines import contract, reference
from larskit.engines.conditional import (
    beside,
    check_capture,
    config_beside,
    decided,
    unscaled,
)
from larskit.engines.contract import DEFAULT, Arrays, Layers, Switches, Unsupported
from larskit.rule import LayerStats, Norms

Tensors = list[Tensor]
Buffers = list[Tensor | None]
_Rows = list[list[int]]  # of each part, the indices of its layers
# The types for which foreach is the default of torch's own optimizers, see
# `torch.optim.optimizer._default_to_fused_or_foreach`.
_PLAIN = (Tensor, torch.nn.Parameter)


def unavailable() -> str | None:
    """Return None: this engine needs torch alone, which this module has imported."""
    return None


def facts() -> dict[str, str]:
    """Return nothing: this engine uses nothing of its own."""
    return {}


def bind(
    layers: Layers,
    config: Config,
    switches: Switches = DEFAULT,
    *,
    scales_gradients: bool = False,
    former: Iterable[contract.Group] = (),
) -> "Group":
    """Bind layers of torch tensors, see `larskit.engines.contract.Engine`."""
    del config, former
    if switches.carry_norms:
        raise Unsupported("the foreach engine carries no norms over")
    if switches.differentiable:
        raise Unsupported("autograd cannot record the steps of the foreach engine")
    if layers.out is not None and not scales_gradients:
        raise Unsupported("the foreach engine moves weights in place only")
    if not switches.foreach:
        for i, w in enumerate(layers.weights):
            if type(w) not in _PLAIN:
                raise Unsupported(
                    f"weight {i} is a {type(w).__name__}, no plain tensor"
                )
    return Group(layers, switches)


class Group:
    """Layers that are processed together, those of equal flags at a time."""

    engine = "foreach"
    captured = False

    def __init__(self, layers: Layers, switches: Switches) -> None:
        """Hold the tensors, and divide the layers by whether they adapt and decay."""
        self._layers, self._switches = layers, switches
        self._found: Any = None  # of the last step: its parts, and what they computed
        self.weights: Tensors = list(layers.weights)
        self.buffers: Buffers = list(layers.buffers)
        self._parts: dict[tuple[bool, bool], list[int]] = {}
        for i, flags in enumerate(zip(layers.adapt, layers.decay, strict=True)):
            self._parts.setdefault(flags, []).append(i)

    def rebind(self, gradients: Arrays) -> bool:
        """Return False: everything is looked at again in each step."""
        del gradients
        return False

    def check(self, lr: Scalar, config: Config) -> None:
        """Refuse what a CUDA graph could not repeat."""
        check_capture(self._layers, self.buffers, lr, config, self._switches)

    def norms(self, config: Config, grad_scale: Array | None = None) -> Norms:
        """Return the norms of each layer, as two vectors."""
        parts = list(self._divided(config, grad_scale))
        found = [_measure(part.w, _measured_gradients(part)) for part in parts]
        w_norms, q = _assembled([part.rows for part in parts], found)
        return w_norms, q

    def step_(
        self,
        lr: Scalar,
        config: Config,
        norms: Norms | None = None,
        *,
        grad_scale: Array | None = None,
        apply_if: bool | Array = True,
        full_stats: bool = False,
    ) -> None:
        """Move the layers."""
        layers, switches = self._layers, self._switches
        lr = beside(lr, self.weights[0])
        apply_if = decided(apply_if, layers, self.buffers, config, switches)
        before, flag = [], torch.empty(0)
        if isinstance(apply_if, Tensor):
            flag = apply_if
            self._make_buffers(config)
            kept = [x for x in (*self.weights, *self.buffers) if x is not None]
            before = [(x, x.clone()) for x in kept]
        step = _step_ if apply_if is not False else _look
        parts = list(self._divided(config, grad_scale, norms))
        found = [step(part, scalar(lr, part.w[0]), full_stats) for part in parts]
        for x, old in before:
            # The host may not read the flag. `where` drops a NaN that a product would
            # keep.
            x.copy_(torch.where(flag, x, old))
        # A part has a list of its own, into which it puts the buffers it makes.
        for part in parts:
            for i, v in zip(part.rows, part.buffers, strict=True):
                self.buffers[i] = v
        self._found = [part.rows for part in parts], found
        self._layers = self._layers._replace(gradients=())  # which are not ours to keep

    @property
    def stats(self) -> LayerStats:
        """The statistics of the last step, as vectors."""
        w_norms, q, ratios, *update_norms = _assembled(*self._found)
        return LayerStats(
            w_norms,
            q,
            ratios,
            self._layers.adapt,
            self._layers.decay,
            update_norms[0] if update_norms else None,
        )

    def scale_gradients(
        self,
        config: Config,
        norms: Norms | None = None,
        grad_scale: Array | None = None,
    ) -> Arrays:
        """Return ``r*u`` for each layer, without waiting for the device."""
        config = config_beside(config, self.weights[0])
        scale = 1.0 if grad_scale is None else beside(grad_scale, self.weights[0])
        # The results stay multiplied by the loss scale, which the inner optimizer
        # divides by. So the decay is multiplied too, and only q is divided, for the
        # ratio.
        scaled = replace(config, weight_decay=config.weight_decay * scale)
        out = self._layers.gradients if self._layers.out is None else self._layers.out
        results = [
            torch.empty_like(g) if x is None else x
            for g, x in zip(self._layers.gradients, out, strict=True)
        ]
        for part in self._divided(scaled, None, norms):
            part.buffers[:] = [None] * len(part.rows)  # scaling knows no momentum
            w_norms, q = part.norms or _measure(part.w, _measured_gradients(part))
            unscaled_config = replace(part.config, weight_decay=config.weight_decay)
            ratios = rule.trust_ratio(w_norms, q / scale, 0.0, unscaled_config)
            u = _decayed(part.w, part.g, part.config)
            factors = rule.rounded(ratios, part.w[0]).unbind()
            _copy(torch._foreach_mul(u, factors), [results[i] for i in part.rows])
        self._layers = self._layers._replace(gradients=())
        return results

    def _divided(
        self, config: Config, grad_scale: Array | None, norms: Norms | None = None
    ) -> Iterator["_Part"]:
        """Yield the layers whose flags are equal."""
        config = config_beside(config, self.weights[0])
        gradients = list(unscaled(self._layers.gradients, grad_scale))
        buffers: Any = self.buffers
        for (adapt, decay), rows in self._parts.items():
            own = replace(config, adapt=adapt, decay=decay)
            known = (
                None if norms is None else (_at(norms[0], rows), _at(norms[1], rows))
            )
            w, g, v = ([x[i] for i in rows] for x in (self.weights, gradients, buffers))
            yield _Part(rows, w, g, v, own, known)

    def _make_buffers(self, config: Config) -> None:
        """Make the missing buffers, so that all of them can be put back."""
        if not is_zero(config.momentum):
            pairs = zip(self.weights, self.buffers, strict=True)
            self.buffers = [torch.zeros_like(w) if v is None else v for w, v in pairs]


class _Part:
    """Layers of equal flags, and real float32 or float64 tensors of them."""

    def __init__(
        self,
        rows: list[int],
        weights: Tensors,
        gradients: Tensors,
        buffers: Buffers,
        config: Config,
        norms: Norms | None,
    ) -> None:
        self.rows, self.weights, self.buffers = rows, weights, buffers
        self.config, self.norms = config, norms
        self.gradients = gradients
        self.w, self.g = _widen(_real(weights)), _widen(_real(gradients))
        self.v = [None if v is None else _real([v])[0] for v in buffers]


def _step_(part: _Part, lr: Scalar, full_stats: bool) -> tuple[Tensor, ...]:
    """Move layers, and return their statistics."""
    move = _along_buffer if part.config.denominator == "momentum" else _along_gradient
    y, new_v, found = move(part, lr)
    if full_stats:
        found = (*found, _norms(y))
    _store(part.buffers, new_v, part.weights, not is_zero(part.config.momentum))
    # `part.w` are the weights themselves, or views, unless their precision is low.
    torch._foreach_sub_(part.w, y)
    _copy(part.w, part.weights)
    return found


def _look(part: _Part, lr: Scalar, full_stats: bool) -> tuple[Tensor, ...]:
    """Return the statistics of a step that is not taken."""
    w_norms, q = part.norms or _measure(part.w, _measured_gradients(part))
    found = w_norms, q, rule.trust_ratio(w_norms, q, lr, part.config)
    if not full_stats:
        return found
    rows = part.weights, part.gradients, part.buffers
    flags = ([x] * len(part.w) for x in (part.config.adapt, part.config.decay))
    layers = Layers(*rows, *flags)
    return (*found, reference.update_norms(layers, lr, part.config, (w_norms, q)))


def _along_gradient(
    part: _Part, lr: Scalar
) -> tuple[Tensors, Tensors, tuple[Tensor, ...]]:
    """Return what to subtract from the weights, the new buffers and the statistics."""
    w, g, config = part.w, part.g, part.config
    u = _decayed(w, g, config)
    w_norms, q = part.norms or _measure(
        w, u if config.denominator == "decayed_gradient" else g
    )
    ratio = rule.trust_ratio(w_norms, q, lr, config)
    inside = config.lr_placement == "inside"
    scale = rule.rounded(ratio, w[0])
    # 0-d tensors: numbers would have to be read from the device.
    factors = ((lr * scale) if inside else scale).unbind()
    if u is g:  # which is not ours to change
        x = list(torch._foreach_mul(u, factors))
    else:
        torch._foreach_mul_(u, factors)
        x = u
    y, new_v = _accumulate(part.v, x, config)
    if not inside:
        y = torch._foreach_mul(y, lr)
    return list(y), new_v, (w_norms, q, ratio)


def _along_buffer(
    part: _Part, lr: Scalar
) -> tuple[Tensors, Tensors, tuple[Tensor, ...]]:
    """Do what `_along_gradient` does where q is the norm of the updated buffer."""
    u = _decayed(part.w, part.g, part.config)
    # Zeros, where other first buffers are x itself: this one is dampened too.
    zeros = zip(u, part.v, strict=True)
    v = [torch.zeros_like(x) if v is None else v for x, v in zeros]
    y, new_v = _accumulate(v, u, part.config)
    w_norms, q = part.norms or _measure(part.w, y)
    ratio = rule.trust_ratio(w_norms, q, lr, part.config)
    factors = (lr * rule.rounded(ratio, part.w[0])).unbind()
    return list(torch._foreach_mul(y, factors)), new_v, (w_norms, q, ratio)


def _measured_gradients(part: _Part) -> Tensors:
    if part.config.denominator in ("paper", "gradient"):
        return part.g
    rows = zip(part.weights, part.gradients, part.buffers, strict=True)
    return [rule.measured_gradient(*row, part.config) for row in rows]


def _measure(w: Tensors, measured: Tensors) -> Norms:
    return _norms(w), _norms(measured)


def _norms(tensors: Tensors) -> Tensor:
    dtype = getattr(torch, norm_dtype(tensors[0]))
    return torch.stack(torch._foreach_norm(_real(tensors), 2, dtype))


def _assembled(rows: _Rows, found: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return vectors in the order of the layers, from those of the parts."""
    if len(rows) == 1:
        return tuple(found[0])
    order = [i for own in rows for i in own]
    # Not by an index, which would have to go to the device.
    columns = []
    for vectors in zip(*found, strict=True):
        numbers = [x for vector in vectors for x in vector.unbind()]
        pairs = sorted(zip(order, numbers, strict=True), key=lambda pair: pair[0])
        columns.append(torch.stack([x for _, x in pairs]))
    return tuple(columns)


def _at(vector: Tensor, rows: list[int]) -> Tensor:
    """Return some elements: each is a view, so that no index goes to the device."""
    return (
        vector if len(rows) == len(vector) else torch.stack([vector[i] for i in rows])
    )


def _copy(tensors: Sequence[Tensor], receivers: Tensors) -> None:
    """Copy what is not in its receivers already."""
    receivers = _real(receivers)
    pairs = zip(tensors, receivers, strict=True)
    if any(x is not receiver for x, receiver in pairs):
        torch._foreach_copy_(receivers, list(tensors))


def _decayed(w: Tensors, g: Tensors, config: Config) -> Tensors:
    if config.maximize:
        g = list(torch._foreach_neg(g))
    wd = rule.weight_decay(config)
    if is_zero(wd):
        return g
    if is_number(wd):
        return list(torch._foreach_add(g, w, alpha=wd))
    return list(torch._foreach_add(g, torch._foreach_mul(w, wd)))


def _accumulate(v: list[Any], x: Tensors, config: Config) -> tuple[Tensors, Tensors]:
    """Return the direction to step along and the buffers that took x."""
    if is_zero(config.momentum):
        return x, x
    new_v = list(x)
    old = [i for i, buffer in enumerate(v) if buffer is not None]
    if old:
        # Buffers of float32 themselves, so that `_store` finds nothing to copy.
        kept = _widen([v[i] for i in old])
        added = [x[i] for i in old]
        if not is_zero(config.dampening):
            added = torch._foreach_mul(added, 1 - config.dampening)
        torch._foreach_mul_(kept, config.momentum)
        torch._foreach_add_(kept, added)
        for i, buffer in zip(old, kept, strict=True):
            new_v[i] = buffer
    if not config.nesterov:
        return new_v, new_v
    ahead = torch._foreach_mul(new_v, config.momentum)
    return list(torch._foreach_add(x, ahead)), new_v


def _store(
    buffers: Buffers, new_v: Tensors, weights: Tensors, makes_missing: bool
) -> None:
    """Write the buffers that were not moved in place, and make the missing."""
    for i, (buffer, new) in enumerate(zip(buffers, new_v, strict=True)):
        if new is buffer or (buffer is None and not makes_missing):
            continue
        if weights[i].is_complex():
            new = torch.view_as_complex(new)
        if buffer is None:
            buffers[i] = new.to(weights[i].dtype)
        else:
            buffer.copy_(new)


def _real(tensors: Tensors) -> Tensors:
    if not any(x.is_complex() for x in tensors):
        return tensors
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


def _widen(tensors: Tensors) -> Tensors:
    # All tensors of a list have one dtype, see `contract.Layers`.
    if tensors[0].element_size() >= 4:
        return tensors
    return [x.float() for x in tensors]
