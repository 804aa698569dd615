"""The rule, layer by layer, on arrays of any framework: what the others must equal."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import repeat

from larskit import rule
from larskit.arrays import Array, Scalar, namespace, stop_gradient, write
from larskit.config import Config, is_zero
from larskit.engines import contract
from larskit.engines.conditional import (
    beside,
    check_capture,
    config_beside,
    decided,
    unscaled,
)
from larskit.engines.contract import (
    DEFAULT,
    Arrays,
    Layers,
    Switches,
    Unsupported,
)
from larskit.norm import norm
from larskit.rule import LayerStats, Norms

_Row = tuple[Array, Array, Array | None, Config]  # of one layer: w, g, v


def unavailable() -> str | None:
    """Return None: this engine needs nothing."""
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
    """Bind layers of any framework, see `larskit.engines.contract.Engine`."""
    del config, scales_gradients, former
    if switches.carry_norms:
        raise Unsupported("the reference engine carries no norms over")
    if switches.differentiable and layers.out is None:
        _refuse_leaves(layers.weights)
    return Group(layers, switches)


class Group:
    """Layers that are processed one after the other, in place or into new arrays."""

    engine = "reference"
    captured = False

    def __init__(self, layers: Layers, switches: Switches) -> None:
        """Hold the arrays."""
        self._layers, self._switches = layers, switches
        self._records = switches.differentiable and layers.out is None
        self._stats: list[LayerStats] = []
        self.weights: list[Array] = list(layers.weights)
        self.buffers: list[Array | None] = list(layers.buffers)

    def rebind(self, gradients: Arrays) -> bool:
        """Return False: everything is looked at again in each step."""
        del gradients
        return False

    def check(self, lr: Scalar, config: Config) -> None:
        """Refuse what a CUDA graph could not repeat."""
        check_capture(self._layers, self.buffers, lr, config, self._switches)

    def norms(self, config: Config, grad_scale: Array | None = None) -> Norms:
        """Return the norms of each layer, as two vectors."""
        found = [rule.measure(*row) for row in self._rows(config, grad_scale)]
        w_norms, q = zip(*found, strict=True)
        return _stack(w_norms), _stack(q)

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
        """Move the layers one after the other."""
        layers, switches = self._layers, self._switches
        lr = beside(lr, self.weights[0])
        apply_if = decided(apply_if, layers, self.buffers, config, switches)
        self._stats = []
        # strict=False, because `_each` has no end where there are no norms.
        rows = zip(self._rows(config, grad_scale), _each(norms), strict=False)
        with self._recording():
            for i, ((w, g, v, own), known) in enumerate(rows):
                y, new_v, stats = rule.displacement(w, g, v, lr, own, known)
                if full_stats:
                    stats = stats._replace(update_norm=norm(y))
                self._stats.append(stats)
                if apply_if is not False:
                    new_v = None if v is None and is_zero(own.momentum) else new_v
                    self._keep(i, *_applied(apply_if, w, v, rule.moved(w, y), new_v))
        # After all layers: an error in one of them leaves `out` as it was.
        if self._layers.out is not None:
            self.weights = _written(self._layers.out, self.weights)
        self._layers = self._layers._replace(gradients=())  # which are not ours to keep

    @property
    def stats(self) -> LayerStats:
        """The statistics of the last step, as vectors."""
        w_norms, q, ratios, _, _, update_norms = zip(*self._stats, strict=True)
        return LayerStats(
            *map(_stack, (w_norms, q, ratios)),
            adapted=self._layers.adapt,
            decayed=self._layers.decay,
            update_norm=None if None in update_norms else _stack(update_norms),
        )

    def scale_gradients(
        self,
        config: Config,
        norms: Norms | None = None,
        grad_scale: Array | None = None,
    ) -> Arrays:
        """Return ``r*u`` for each layer."""
        # All are computed before any is written, so that an error leaves the gradients.
        scale = 1.0 if grad_scale is None else beside(grad_scale, self.weights[0])
        rows = zip(self._rows(config), _each(norms), strict=False)
        new = [
            rule.scaled_gradient(w, g, own, scale, known)
            for (w, g, _, own), known in rows
        ]
        out = self._layers.gradients if self._layers.out is None else self._layers.out
        self._layers = self._layers._replace(gradients=())
        return _written(out, new)

    def _rows(self, config: Config, grad_scale: Array | None = None) -> Iterator[_Row]:
        """Yield the weights, gradient, buffer and configuration of each layer."""
        layers = self._layers
        config = config_beside(config, self.weights[0])
        flags = list(zip(layers.adapt, layers.decay, strict=True))
        # At most four: each replacement validates every hyper-parameter again.
        own = {flag: replace(config, adapt=flag[0], decay=flag[1]) for flag in flags}
        gradients = unscaled(layers.gradients, grad_scale)
        for i, flag in enumerate(flags):
            w = self.weights[i]
            if self._records:  # which must not see the weights written
                w = w.clone()
            yield w, gradients[i], self.buffers[i], own[flag]

    def _keep(self, i: int, new_w: Array, new_v: Array | None) -> None:
        """Write what a layer became, or hold it where nothing may be written."""
        w, v = self.weights[i], self.buffers[i]
        in_place = self._layers.out is None
        self.weights[i] = write(w, new_w, "a weight") if in_place else new_w
        if v is None or not in_place or self._switches.differentiable:
            self.buffers[i] = new_v
        else:
            write(v, new_v, "a momentum buffer")

    def _recording(self) -> AbstractContextManager[object]:
        """Have autograd record a step that is taken in place, if it must."""
        # The optimizer's `step` runs under ``torch.no_grad()``.
        return sys.modules["torch"].enable_grad() if self._records else nullcontext()


def _refuse_leaves(weights: Arrays) -> None:
    if any(w.is_leaf and w.requires_grad for w in weights):
        raise RuntimeError(
            "differentiable=True makes the new weights part of the graph, which a leaf "
            "that requires gradients cannot be: give the optimizer clones (p.clone()), "
            "and give those their .grad"
        )


def update_norms(
    layers: Layers, lr: Scalar, config: Config, norms: Norms | None
) -> Array:
    """Return |y| of each layer, of a step that is not taken."""
    # Without `out`: a step writes there even if it is not applied.
    group = Group(layers._replace(out=None), DEFAULT)
    group.step_(lr, config, norms, apply_if=False, full_stats=True)
    return group.stats.update_norm


def _each(norms: Norms | None) -> Iterator[Norms | None]:
    return repeat(None) if norms is None else zip(*norms, strict=True)


def _applied(
    apply_if: bool | Array, w: Array, v: Array | None, new_w: Array, new_v: Array | None
) -> tuple[Array, Array | None]:
    """Return the new weights and buffer, or the old where an array of bool says so."""
    if apply_if is True:
        return new_w, new_v
    xp = namespace(w)
    if new_v is not None:
        new_v = xp.where(apply_if, new_v, xp.zeros_like(new_v) if v is None else v)
    return xp.where(apply_if, new_w, w), new_v


def _written(out: contract.Buffers, new: list[Array]) -> list[Array]:
    """Write the results, all of which are there, into the arrays that receive them."""
    return [
        x if receiver is None else write(receiver, x, "out")
        for receiver, x in zip(out, new, strict=True)
    ]


def _stack(scalars: Sequence[Scalar]) -> Array:
    return namespace(scalars[0]).stack(list(map(stop_gradient, scalars)))
