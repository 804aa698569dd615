"""The step of each parameter in the middle of the backward pass."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from larskit.rule import Lengths
from larskit.torch.bucket import is_selected
from larskit.torch.optimizer import LARS
from larskit.torch.plan import PER_LAYER, Plan, name_of, policy_of


class StepInBackward:
    """An optimizer that steps in the backward pass, see `step_in_backward`.

    It is a context manager that takes the hooks off at its end.
    """

    def __init__(self, optimizer: LARS) -> None:
        """Watch every parameter."""
        self._optimizer = optimizer
        self._plans: dict[Tensor, Plan] = {}
        self._stepped: dict[Tensor, Plan] = {}
        self._last: list[Plan] = []
        self._handles: list[Any] = []
        for index in range(len(optimizer.param_groups)):
            self.watch(index)

    def watch(self, index: int) -> None:
        """Step the parameters of a group as their gradients become ready."""
        for row, p in enumerate(self._optimizer.param_groups[index]["params"]):
            self._plans[p] = Plan()
            hook = partial(self._step, index, row)
            self._handles.append(p.register_post_accumulate_grad_hook(hook))

    @torch.no_grad()
    def _step(self, index: int, row: int, p: Tensor) -> None:
        optimizer = self._optimizer
        group = optimizer.param_groups[index]
        name = name_of(index, group, row)
        if p in self._stepped:
            raise RuntimeError(
                f"{name!r} has moved along its gradient, and here is another one: "
                "call optimizer.step() after each backward pass; gradients cannot be "
                "accumulated while they are used at once"
            )
        only = {name: is_selected(group, name, row) for name in PER_LAYER}
        self._plans[p].step_(
            [{**group, **only, "params": [p], "param_names": [name]}], optimizer.state
        )
        self._stepped[p] = self._plans[p]
        p.grad = None

    def end(self, closure: Any) -> None:
        """End the step of all parameters, so that the next backward pass may begin."""
        if closure is not None:
            raise RuntimeError(
                "step() got a closure, but the parameters step while the backward pass "
                "runs: call loss.backward() yourself, then step() without a closure"
            )
        for index, group in enumerate(self._optimizer.param_groups):
            for row, p in enumerate(group["params"]):
                if p.grad is not None:  # which no backward pass has brought
                    self._step(index, row, p)
        self._last, self._stepped = list(self._stepped.values()), {}

    def lengths(self) -> dict[str, Lengths]:
        """Return what the last step measured, see `LARS.lengths`."""
        return {k: v for plan in self._last for k, v in plan.lengths().items()}

    def remove(self) -> None:
        """Have the optimizer step when `step` is called, as before."""
        for handle in self._handles:
            handle.remove()
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None

    def __enter__(self) -> "StepInBackward":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the hooks off."""
        self.remove()


def step_in_backward(optimizer: LARS) -> StepInBackward:
    """Have each parameter step as soon as its gradient is ready, and free the gradient.

    The gradients of a model then never exist all at once, and each is still in cache
    when it is used. The results are those of an ordinary step, to the bit.

    Parameters
    ----------
    optimizer : LARS
        With any groups; more may follow. Learning rates and other hyper-parameters
        count as they are when the backward pass runs.

    Returns
    -------
    StepInBackward
        Its ``remove()``, or the end of a ``with`` block, takes it back.

    Raises
    ------
    TypeError
        If it is another optimizer.
    RuntimeError
        If it steps in backward already, holds gradients, leaves steps out (see
        `on_nonfinite`), or several processes train: a gradient would be used before
        they have averaged it. From the backward pass, for a second gradient before
        `LARS.step` (accumulation); from `LARS.step`, for a closure.

    Notes
    -----
    Call ``optimizer.step()`` after each backward pass as ever, before the scheduler's:
    it ends the step. What looks at all gradients between backward and step has nothing
    to look at: clipping them and `torch.amp.GradScaler` cannot be combined with this.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = LARS(model.parameters(), lr=2.0)
    >>> handle = step_in_backward(optimizer)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> model.weight.grad is None
    True
    >>> optimizer.step()
    """
    if not isinstance(optimizer, LARS):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, expected a larskit.torch.LARS"
        )
    if optimizer._in_backward is not None:
        raise RuntimeError(
            "the optimizer steps in backward already: remove() that first"
        )
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
            f"{processes} processes train, and a gradient would be used before they "
            "have averaged it: use optimizer.step() alone"
        )
    optimizer._in_backward = StepInBackward(optimizer)
    return optimizer._in_backward


def _processes() -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()
