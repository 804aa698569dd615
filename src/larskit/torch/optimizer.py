"""LARS as a `torch.optim.Optimizer`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from larskit import config as _config
from larskit.arrays import check_floating
from larskit.config import Config, Denominator, LrPlacement, OnNonfinite
from larskit.rule import Lengths
from larskit.select import Selection, check_matched, select
from larskit.torch.plan import (
    ENGINES,
    PER_GROUP,
    PER_LAYER,
    Plan,
    config_of,
    is_sharded,
)

if TYPE_CHECKING:
    from larskit.torch.backward import StepInBackward

_LATER = {
    "on_nonfinite": "propagate",
    "capturable": False,
    "differentiable": False,
    "master_weights": False,
}


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    A layer is one parameter tensor. It moves by ``lr * trust_coefficient * |w|``,
    whatever the size of its gradient; see `larskit.rule` for the formula.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) pairs, or of dict
        Parameters or groups of them; `param_groups` makes groups of a model.
    lr : float or 0-d Tensor
        Learning rate, at least 0. With the default trust coefficient good rates are
        about a hundred times those of SGD, 1 to 30.
    momentum, weight_decay, trust_coefficient, eps
        See `larskit.config.Config`, as for the keywords down to `threshold`.
    denominator : {"paper", "decayed_gradient", "gradient", "momentum"}
        What the length of a layer is divided by.
    lr_placement : {"inside", "outside"}
        Whether the rate multiplies what enters the momentum buffer or what leaves it.
        Most PyTorch implementations have it outside.
    nesterov, dampening, clip, threshold
        Nesterov's momentum, dampening of the buffer, LARC's clipping of the ratio, and
        the length up to which a layer is not adapted.
    adapt, decay : None, bool, pattern, sequence of patterns, or callable
        Which layers get a trust ratio and which are decayed. None (default): those of
        two or more dimensions. True: all. False: none. A name pattern (`fnmatch`, or a
        compiled expression), or a callable ``(name, tensor) -> bool``, both for
        parameters that come with names. A layer that is not adapted steps at the raw
        learning rate.
    maximize : bool
        Climb instead of descend.
    foreach : bool, optional
        True: work on lists of tensors; False: tensor by tensor, by the reference
        engine. None (default): lists of plain tensors, where `fused` does not apply.
    fused : bool, optional
        True: take the whole step in C++, for whole contiguous tensors on the CPU, or
        say why that cannot be. None (default): where it can be, and `foreach` is None.
    carry_norms : bool
        Measure the new weights while they are written, so that the next step need not:
        a pass over memory less. It demands the native engine. Weights that something
        else writes are measured anew, but for what edits them through ``.data``, which
        nothing can see: call ``torch.autograd.graph.increment_version(p)`` after such.
    on_nonfinite, capturable, differentiable, master_weights
        Reserved. Anything but the default is refused.

    Raises
    ------
    ValueError, TypeError
        For a hyper-parameter out of range, or a name pattern that matches nothing.
    NotImplementedError
        For what this version does not have.

    Notes
    -----
    ``p.grad`` is never changed, and `step` never waits for the device. Everything but
    the reserved arguments can differ between parameter groups. The state of a
    parameter is its ``momentum_buffer``, a tensor of the parameter's own kind: of
    parameters that are sharded (DTensor) it is a DTensor, and the processes find the
    lengths of the whole layers together, in one all-reduce a step. A training step
    under `torch.compile` calls `step` between two graphs, on the same engine as ever.

    References
    ----------
    Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks",
    arXiv 1708.03888, 2017.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = LARS(model.parameters(), lr=2.0, weight_decay=1e-4)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = Config.momentum,
        weight_decay: float = Config.weight_decay,
        trust_coefficient: float = Config.trust_coefficient,
        eps: float = Config.eps,
        *,
        denominator: Denominator = Config.denominator,
        lr_placement: LrPlacement = Config.lr_placement,
        nesterov: bool = Config.nesterov,
        dampening: float = Config.dampening,
        clip: bool = Config.clip,
        threshold: float = Config.threshold,
        adapt: Selection = None,
        decay: Selection = None,
        maximize: bool = Config.maximize,
        on_nonfinite: OnNonfinite = "propagate",
        foreach: bool | None = None,
        fused: bool | None = None,
        carry_norms: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        master_weights: bool = False,
    ) -> None:
        """Check the arguments and resolve which layers are adapted and decayed."""
        given = locals()
        defaults = {
            name: given[name]
            for name in ("lr", *PER_GROUP, *PER_LAYER, *ENGINES, *_LATER)
        }
        self._plan = Plan()
        self._in_backward: StepInBackward | None = None
        super().__init__(params, defaults)
        for name in PER_LAYER:
            selected = [any(group[name]) for group in self.param_groups]
            check_matched(defaults[name], selected, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it; `adapt` and `decay` become tuples of bools."""
        full = {**self.defaults, **param_group}
        _check_group(full)
        super().add_param_group(dict(param_group))  # torch fills in what it is given
        group = self.param_groups[-1]
        try:
            _check_parameters(group["params"])
            names = group.get("param_names")
            for name in PER_LAYER:
                selected = select(full[name], names, group["params"], name)
                if name in param_group:
                    check_matched(full[name], selected, name)
                group[name] = selected
        except (TypeError, ValueError, NotImplementedError):
            self.param_groups.pop()
            raise
        if self._in_backward is not None:
            self._in_backward.watch(len(self.param_groups) - 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled or loaded state; what an older one lacks gets its default."""
        super().__setstate__(state)
        self._plan = Plan()
        self.__dict__.setdefault("_in_backward", None)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name in PER_LAYER:
                    value = select(None, None, group["params"], name)
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes them anew and returns the loss; runs first.

        Returns
        -------
        float or Tensor, optional
            What the closure returned.

        Raises
        ------
        RuntimeError
            For a sparse gradient; nothing has moved then.
        """
        if self._in_backward is not None:
            return self._in_backward.end(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._plan.step_(self.param_groups, self.state)
        return loss

    def lengths(self) -> dict[str, Lengths]:
        """Return what the last step measured of each layer.

        Returns
        -------
        dict of str to Lengths
            By parameter name, or ``"group.index"`` where parameters came without names:
            floats ``weight`` (the length before the step), ``denominator``, ``ratio``.
            Empty before the first step. This waits for the device.
        """
        if self._in_backward is not None:
            return self._in_backward.lengths()
        return self._plan.lengths()


def _check_group(group: dict[str, Any]) -> None:
    config_of(group)
    _config.choice("on_nonfinite", group["on_nonfinite"], OnNonfinite)
    if group["foreach"] and group["fused"]:
        raise RuntimeError(
            "foreach=True and fused=True demand two engines: leave one of them None"
        )
    if group["carry_norms"] and (
        group["foreach"] is not None or group["fused"] is False
    ):
        raise RuntimeError(
            f"carry_norms=True demands the native engine, but foreach is "
            f"{group['foreach']} and fused {group['fused']}: leave both None"
        )
    for name, allowed in _LATER.items():
        if group[name] not in (allowed, False):
            raise NotImplementedError(
                f"{name}={group[name]!r} is not in this version of larskit: pass "
                f"{name}={allowed!r}"
            )


def _check_parameters(params: list[Any]) -> None:
    for i, p in enumerate(params):
        check_floating(p, f"parameter {i}")
        if type(p).__name__ == "FlatParameter":
            raise TypeError(
                f"parameter {i} is a FlatParameter of FSDP1, in which layers lie end "
                "to end, so that none has its own length: use fully_shard (FSDP2)"
            )
        if is_sharded(p) and any(x.is_partial() for x in p.placements):
            raise TypeError(
                f"parameter {i} is a DTensor placed as {p.placements}: a sum that is "
                "not complete has no length; shard or replicate it"
            )
