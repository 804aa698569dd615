"""LARS as a `torch.optim.Optimizer`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from larskit.arrays import check_floating
from larskit.config import (
    PER_LAYER,
    SHARED,
    Config,
    Denominator,
    LrPlacement,
    OnNonfinite,
    documented,
)
from larskit.norms import check_layer
from larskit.rule import LayerStats
from larskit.select import Selection, check_matched, select
from larskit.state import Names, PortableState
from larskit.torch import describe, foreign, portable
from larskit.torch.bucket import LOW_PRECISION
from larskit.torch.foreign import StateDict
from larskit.torch.options import (
    SWITCHES,
    Groups,
    ParamGroup,
    check_group,
    is_selected,
    policy_of,
)
from larskit.torch.stepper import Stepper

_SWITCHES = (*SWITCHES, "on_nonfinite", "master_weights")


@documented
class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    A layer is one parameter tensor. A step updates it by a fixed fraction of its weight
    norm, ``lr * trust_coefficient``, independent of the gradient's magnitude; see
    `larskit.rule` for the formula.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) pairs, or of dict
        Parameters or groups of them; `param_groups` makes groups of a model.
    lr : float or 0-d Tensor, optional
        Learning rate, at least 0; not needed where each group has its own. With the
        default trust coefficient good rates are about a hundred times those of SGD, 1
        to 30.
    {momentum:threshold}
    adapt, decay : None, bool, pattern, sequence of patterns, or callable
        Which layers get a trust ratio and which are decayed. None (default): those of
        two or more dimensions. True: all. False: none. A name pattern (`fnmatch`, or a
        compiled expression), or a callable ``(name, tensor) -> bool``, both for
        parameters that come with names. A layer that is not adapted steps at the raw
        learning rate.
    {maximize}
    foreach : bool, optional
        True: multi-tensor operations. False: tensor by tensor, on the reference engine.
        None (default): multi-tensor operations where `fused` does not apply.
    fused : bool, optional
        True: the whole step in C++ on the CPU, or in Triton kernels on a GPU; dense
        tensors only, else an error says why. `torch.amp.GradScaler` then leaves
        division by the scale and the check for infinities to the kernels, as with
        torch's fused optimizers. None (default): wherever that is possible and
        `foreach` is None.
    carry_norms : bool
        Compute the norms of the new weights while they are written, so that the next
        step reads the weights once less. It requires a fused engine. Norms of weights
        that another caller has written are computed again. One case is undetected: a
        write through ``.data``. Call ``torch.autograd.graph.increment_version(p)``
        after it.
    on_nonfinite : {"propagate", "skip", "raise"}
        What to do with a NaN or infinite norm: compute on with it (default), skip the
        whole step, or skip it and raise `FloatingPointError`. All groups must have the
        same; all processes of `torch.distributed` agree in an all-reduce of one number.
    capturable : bool
        Read nothing on the host, so that a CUDA graph can capture the step. `lr` may be
        a tensor on the device: each replay reads it.
    differentiable : bool
        Record the step in autograd's graph, on the reference engine.
    master_weights : bool
        Keep float32 weights and buffers beside parameters of bfloat16 and float16. If
        another caller writes a parameter, its master weights follow.

    Raises
    ------
    ValueError, TypeError
        For a hyper-parameter out of range, or a name pattern that matches nothing.
    RuntimeError
        For conflicting options.

    Notes
    -----
    ``p.grad`` is never changed. `step` performs a host-device synchronization only for
    ``on_nonfinite="raise"``, and for "skip" before there are momentum buffers. All
    options except `on_nonfinite` can differ between parameter groups. `lr` and
    `weight_decay` may be tensors of one element.

    The state of a parameter is its ``momentum_buffer``, and its ``master_weight`` where
    one is kept. For sharded parameters (DTensor) both are DTensors, and each step
    performs one all-reduce, which computes the norms of the whole layers.

    Under `torch.compile` the step is part of the graph where the foreach engine takes
    it: with ``foreach=True``, and by default on all devices except the CPU. Otherwise
    it runs between two graphs. Pass `lr` as a tensor: each new float recompiles.

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

    @foreign.explains_names
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
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
            name: given[name] for name in ("lr", *SHARED, *PER_LAYER, *_SWITCHES)
        }
        check_group({**defaults, "lr": 0.0 if lr is None else lr})
        self._stepper = Stepper()
        super().__init__(params, defaults)
        for name in PER_LAYER:
            selected = [
                is_selected(group, name, row)
                for group in self.param_groups
                for row in range(len(group["params"]))
            ]
            check_matched(defaults[name], selected, name)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group after checking it.

        Patterns and callables in `adapt` and `decay` become tuples of bools.
        """
        full = {**self.defaults, **param_group}
        if full["lr"] is None:
            raise TypeError(
                f"parameter group {len(self.param_groups)} has no learning rate: pass "
                "lr, or give each group its own"
            )
        check_group(full)
        super().add_param_group(dict(param_group))  # torch fills in what it is given
        group = self.param_groups[-1]
        try:
            _check_parameters(group["params"])
            names = group.get("param_names")
            for name in PER_LAYER:
                selected = select(full[name], names, group["params"], name)
                if name in param_group:
                    check_matched(full[name], selected, name)
                plain = full[name] is None or isinstance(full[name], bool)
                group[name] = full[name] if plain else selected
            policy_of(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._stepper.group_added(len(self.param_groups) - 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set a pickled or loaded state; options that it lacks get their defaults."""
        super().__setstate__(state)
        self.__dict__.setdefault("_stepper", Stepper())
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, None if name in PER_LAYER else value)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of LARS, or of another optimizer with momentum.

        Parameters
        ----------
        state_dict : dict
            Of this class, older versions included, in any dtype and from any device; of
            `torch.optim.SGD`, or of the LARS of timm, MAE, Barlow Twins and similar.
            Options that it does not contain stay as they are here.

        Raises
        ------
        ValueError
            It does not fit the parameters, or its momentum buffers do not contain the
            learning rate and those of this optimizer do: see `convert_state_dict`.
            Nothing has changed then.
        """
        float32: list[tuple[Tensor, str, Tensor]] = []

        def adapt(optimizer: object, state_dict: StateDict) -> StateDict:
            adapted = foreign.adapted(state_dict, self.param_groups)
            for group in adapted["param_groups"]:
                check_group(group)
            policy_of(adapted["param_groups"])
            float32.extend(_float32_state(adapted, self.param_groups))
            return adapted

        handle = self.register_load_state_dict_pre_hook(adapt)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for p, key, x in float32:  # which torch has rounded to the parameter's dtype
            self.state[p][key] = x.to(p.device)

    def portable_state(self) -> PortableState:
        """Return the state for any framework, see `larskit.state.save_optimizer`.

        Of sharded parameters it is that of the whole layers, which every process must
        ask for. It does not say how many steps were taken.
        """
        return portable.portable_state(self)

    def load_portable_state(
        self, state: PortableState, *, names: Names = None, convert: bool = False
    ) -> None:
        """Take a state of any framework, see `larskit.state.load_optimizer`.

        The learning rates of the groups become the saved ones.
        """
        portable.load_portable_state(self, state, names=names, convert=convert)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes them again and returns the loss; runs first.

        Returns
        -------
        float or Tensor, optional
            What the closure returned.

        Raises
        ------
        RuntimeError
            For a sparse gradient, or parameters that the options do not allow.
        FloatingPointError
            With ``on_nonfinite="raise"``. Nothing has changed in either case.
        """
        self._stepper.check_closure(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        self._stepper.step_(self.param_groups, self.state, grad_scale, found_inf)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the step itself divides by the scale of `torch.amp.GradScaler`.

        The scaler then sets `grad_scale` and `found_inf` and does not synchronize.
        """
        return self._stepper.divides_grad_scale(self.param_groups)

    def describe(self) -> str:
        """Return a table of the layers.

        Returns
        -------
        str
            One line for each layer: its name and shape, whether it is adapted and
            decayed, and the engine that took its last step. A layer that is not adapted
            is marked where the learning rate is above 1.

        Examples
        --------
        >>> optimizer = LARS(torch.nn.Linear(4, 2).named_parameters(), lr=2.0)
        >>> print(optimizer.describe())
        layer   shape  adapted  decayed  engine
        weight  2x4    yes      yes      none yet
        bias    2      no       no       none yet  raw rate 2: lower it
        """
        return describe.table(self.param_groups, self._stepper.plans)

    def __repr__(self) -> str:
        """Show the hyper-parameters, and which layers are excluded."""
        return describe.summary(type(self).__name__, self.param_groups)

    def layer_stats(self) -> dict[str, LayerStats]:
        """Return the statistics of the last step.

        Returns
        -------
        dict of str to LayerStats
            By parameter name, or ``"group.index"`` where parameters came without names:
            the floats ``weight_norm`` (before the step), ``gradient_norm`` and
            ``trust_ratio``, and the bools ``adapted`` and ``decayed``. The norm is
            that of the gradient which the chosen `denominator` measures: |g|,
            |g + wd*w| or |y|, not multiplied by a loss scale. Empty before the first
            step.

        Notes
        -----
        This waits for the device.
        """
        return self._stepper.layer_stats()


def _float32_state(
    state_dict: StateDict, groups: Groups
) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Yield the float32 state of low-precision parameters, to be set after loading."""
    for group, own in zip(state_dict["param_groups"], groups, strict=False):
        for key, p in zip(group["params"], own["params"], strict=False):
            if group["master_weights"] and p.dtype in LOW_PRECISION:
                for name, x in state_dict["state"].get(key, {}).items():
                    if isinstance(x, Tensor) and x.dtype == torch.float32:
                        yield p, name, x


def _check_parameters(params: list[Tensor]) -> None:
    for i, p in enumerate(params):
        check_floating(p, f"parameter {i}")
        check_layer(p, f"parameter {i}")
