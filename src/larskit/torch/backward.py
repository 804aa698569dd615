"""The step of each parameter in the middle of the backward pass."""

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from larskit.config import PER_LAYER
from larskit.rule import LayerStats
from larskit.torch.options import Groups, State, is_selected, policy_of
from larskit.torch.plan import Plan, name_of
from larskit.torch.stepper import Stepper

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class StepInBackward(Stepper):
    """Steps each parameter in the backward pass, see `step_in_backward`.

    It takes the place of the optimizer's own stepper. As a context manager it removes
    itself at its end.
    """

    def __init__(self, optimizer: Any) -> None:
        """Watch every parameter."""
        super().__init__()
        # The optimizer holds this object: neither keeps the other alive.
        self._optimizer_ref = ref(optimizer)
        self._former = optimizer._stepper
        self._steppers: dict[Tensor, Stepper] = {}
        self._stepped: dict[Tensor, Stepper] = {}
        # `layer_stats` is called after `step_`, which has emptied `_stepped` by then.
        self._last: list[Stepper] = []
        self._handles: list[RemovableHandle] = []
        for index in range(len(optimizer.param_groups)):
            self.group_added(index)

    def group_added(self, index: int) -> None:
        """Step the parameters of a group as their gradients become ready."""
        for row, p in enumerate(self._optimizer.param_groups[index]["params"]):
            self._steppers[p] = Stepper()
            hook = partial(_step_ready, ref(self), index, row)
            self._handles.append(p.register_post_accumulate_grad_hook(hook))

    @property
    def _optimizer(self) -> Any:
        return self._optimizer_ref()

    @torch.no_grad()
    def _step_one(self, index: int, row: int, p: Tensor) -> None:
        group = self._optimizer.param_groups[index]
        name = name_of(index, group, row)
        # Before anything moves: this gradient was computed at weights that the first
        # one has changed already, so that the sum of both would be wrong.
        if p in self._stepped:
            raise RuntimeError(
                f"{name!r} got a second gradient before optimizer.step(): call step() "
                "after each backward pass, as step_in_backward accumulates nothing"
            )
        # A group's flags have an entry for each of its rows, and `alone` has one row.
        # The dict is new at each call, but its values are not: the plan compares those.
        only = {name: is_selected(group, name, row) for name in PER_LAYER}
        alone = {**group, **only, "params": [p], "param_names": [name]}
        self._steppers[p].step_([alone], self._optimizer.state)
        self._stepped[p] = self._steppers[p]
        # Here, not in `zero_grad`: at most one gradient exists at a time.
        p.grad = None

    def check_closure(self, closure: object) -> None:
        """Refuse a closure: its backward pass would step."""
        if closure is not None:
            raise RuntimeError(
                "step() got a closure, but the parameters step while the backward pass "
                "runs: call loss.backward() yourself, then step() without a closure"
            )

    def step_(
        self,
        groups: Groups,
        state: State,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """End the step of all parameters, so that the next backward pass may begin."""
        del state, grad_scale, found_inf
        for index, group in enumerate(groups):
            for row, p in enumerate(group["params"]):
                if p.grad is not None:  # which no backward pass has brought
                    self._step_one(index, row, p)
        self._last, self._stepped = list(self._stepped.values()), {}

    def divides_grad_scale(self, groups: Groups) -> bool:
        """Return False: gradients are used before a scaler can look at them."""
        del groups
        return False

    @property
    def plans(self) -> list[Plan]:
        """The plans of the last step, one for each parameter."""
        return [each.plan for each in self._last]

    def layer_stats(self) -> dict[str, LayerStats]:
        """Return the statistics of the last step, see `LARS.layer_stats`."""
        return {k: v for each in self._last for k, v in each.layer_stats().items()}

    def remove(self) -> None:
        """Have the optimizer step when `step` is called, as before."""
        for handle in self._handles:
            handle.remove()
        # A second `remove` must not undo what came after the first.
        if getattr(self._optimizer, "_stepper", None) is self:
            self._optimizer._stepper = self._former

    def __enter__(self) -> "StepInBackward":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the hooks off."""
        self.remove()


def _step_ready(
    stepper: "ref[StepInBackward]", index: int, row: int, p: Tensor
) -> None:
    """Step a parameter, as long as its optimizer is there."""
    # Autograd holds this hook where the cyclic collector does not look: a strong
    # reference would keep the optimizer and the model for ever.
    if (alive := stepper()) is not None and alive._optimizer is not None:
        alive._step_one(index, row, p)


def step_in_backward(optimizer: torch.optim.Optimizer) -> StepInBackward:
    """Have each parameter step as soon as its gradient is ready, and free the gradient.

    This frees each gradient as soon as it is used, while it is still in the cache. The
    results are bitwise those of an ordinary step.

    Parameters
    ----------
    optimizer : LARS
        With any groups; groups may be added later. The hyper-parameters are read while
        the backward pass runs.

    Returns
    -------
    StepInBackward
        Its ``remove()``, or the end of a ``with`` block, ends this.

    Raises
    ------
    TypeError
        It is another optimizer.
    RuntimeError
        It steps in backward already, there are unused gradients, `on_nonfinite` may
        skip steps, or several processes train: a gradient would be used before they
        have averaged it. From the backward pass: a second gradient before `LARS.step`
        (accumulation). From `LARS.step`: a closure.

    Notes
    -----
    Call ``optimizer.step()`` after each backward pass, before that of the scheduler: it
    ends the step. Gradient clipping and `torch.amp.GradScaler` cannot be combined with
    this, because they read all gradients between the backward pass and the step.

    Examples
    --------
    >>> from larskit.torch import LARS
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = LARS(model.parameters(), lr=2.0)
    >>> handle = step_in_backward(optimizer)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> model.weight.grad is None
    True
    >>> optimizer.step()
    """
    stepper: Any = getattr(optimizer, "_stepper", None)
    if not isinstance(stepper, Stepper):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, expected a larskit.torch.LARS"
        )
    if isinstance(stepper, StepInBackward):
        raise RuntimeError(
            "the optimizer steps in backward already: remove() that first"
        )
    # The first backward pass would accumulate into them, and step along the sum.
    if any(p.grad is not None for g in optimizer.param_groups for p in g["params"]):
        raise RuntimeError(
            "there are gradients that no step has used: call optimizer.step() or "
            "optimizer.zero_grad() first"
        )
    if (policy := policy_of(optimizer.param_groups)) != "propagate":
        raise RuntimeError(
            f"on_nonfinite={policy!r} decides over a whole step, but each parameter "
            "moves before the next gradient is known: use on_nonfinite='propagate'"
        )
    if (processes := _processes()) > 1:
        raise RuntimeError(
            f"step_in_backward supports one process, got {processes}: it would use "
            "gradients before they are averaged; use optimizer.step() alone"
        )
    stepper = StepInBackward(optimizer)
    optimizer._stepper = stepper  # pyright: ignore[reportAttributeAccessIssue]
    return stepper


def _processes() -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()
