"""GradientLARS on an optimizer of PyTorch: gradients are scaled while it steps."""

from collections.abc import Sequence
from functools import wraps
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor

from larskit import norms
from larskit.config import Config
from larskit.torch.options import Settings
from larskit.torch.plan import Plan
from larskit.torch.turn import Turn

_Args = Sequence[Any]
_Kwargs = dict[str, Any]


class Hook(Protocol):
    """The hyper-parameters of a `larskit.GradientLARS`, which may change."""

    def config(self) -> Config:
        """Return them as they are now."""
        ...


class Attachment:
    """One hook on one optimizer; a context manager that removes it at its end.

    It wraps ``optimizer.step`` on the instance. The gradients are scaled in a step
    pre-hook, which torch calls after all others, because these may still change them;
    and they are restored when the step returns or raises, which no hook of torch sees.

    Parameters
    ----------
    hook : GradientLARS
        Its ``config()`` is the same object while no hyper-parameter has changed.
    optimizer : torch.optim.Optimizer
        Any, see `larskit.GradientLARS.attach`.
    """

    def __init__(self, hook: Hook, optimizer: torch.optim.Optimizer) -> None:
        """Check the parameters, and wrap the step."""
        self._hook, self._optimizer = hook, optimizer
        for i, p in enumerate(self._params()):
            norms.check_layer(p, f"parameter {i}")
        self._settings: list[Settings] = []
        self._plan = Plan(_check, scales_gradients=True)
        self._originals: list[tuple[Tensor, Tensor | None]] = []
        self._turn = Turn()
        self._began = False  # whether the pre-hook of this step has run
        self._active = True
        self._outer = vars(optimizer).get("step")
        self._inner = inner = optimizer.step

        @wraps(getattr(inner, "__func__", inner))  # what torch's schedulers look at
        def step(optimizer: object, *args: Any, **kwargs: Any) -> object:
            return self._step(args, kwargs)

        # A bound method, because torch's schedulers wrap ``optimizer.step.__func__``.
        self._wrapper = optimizer.step = MethodType(step, optimizer)

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        self._active = False
        if vars(self._optimizer).get("step") is not self._wrapper:
            return  # another caller has wrapped it since, and passes through it
        if self._outer is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._outer

    def __enter__(self) -> "Attachment":
        """Return the attachment itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hook."""
        self.remove()

    def __repr__(self) -> str:
        """Show the hyper-parameters and the optimizer."""
        state = "attached to" if self._active else "removed from"
        return f"<{self._hook!r} {state} {type(self._optimizer).__name__}>"

    def _step(self, args: _Args, kwargs: _Kwargs) -> object:
        if not self._active:
            return self._inner(*args, **kwargs)
        with self._turn:
            # For this step only: so it is the last in the order of registration, and no
            # copy or pickle of the optimizer contains it.
            handle = self._optimizer.register_step_pre_hook(self._before_step)
            try:
                return self._inner(*args, **kwargs)
            finally:
                handle.remove()
                self._restore()
                self._began = False

    def _before_step(self, optimizer: object, args: _Args, kwargs: _Kwargs) -> Any:
        """Scale now or, where there is a closure, each time after it ran."""
        if self._began:  # by a step that calls its parent's
            return None
        self._began = True
        # torch passes the optimizer itself as args[0].
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._scale()
            return None

        def scaling_closure() -> object:
            # LBFGS calls this often: each time on the gradients as they were.
            self._restore()
            loss = closure()
            self._scale()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": scaling_closure}
        return (args[0], scaling_closure, *args[2:]), kwargs

    @torch.no_grad()
    def _scale(self) -> None:
        """Compute every scaled gradient, then put them in place of the originals."""
        plan, config = self._plan, self._hook.config()
        # A new list in each step would look like a change to the plan.
        if not self._settings or self._settings[0].config is not config:
            self._settings = [Settings(config)]
        params = self._params()
        plan.update([{"params": params, **_EVERY}], self._settings, {})
        plan.all_reduce_norms()
        scale = self._grad_scale()
        scaled = [
            (p, g)
            for bucket in plan.buckets
            for p, g in zip(
                bucket.params, bucket.scaled_gradients(config, scale), strict=True
            )
        ]
        # An error above leaves every ``.grad`` as it was.
        self._originals = [(p, p.grad) for p, _ in scaled]
        for p, g in scaled:
            p.grad = g

    def _restore(self) -> None:
        """Put the original gradients back; those that were dropped stay dropped."""
        for p, g in self._originals:
            if p.grad is not None:
                p.grad = g
        self._originals = []

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _grad_scale(self) -> Tensor | None:
        """Return what GradScaler left the gradients multiplied by, if anything."""
        if not getattr(self._optimizer, "_step_supports_amp_scaling", False):
            return None
        return getattr(self._optimizer, "grad_scale", None)


_EVERY = {"adapt": True, "decay": True}  # layer, as in Chainer


def _check(p: Any, name: str) -> None:
    name = f"parameter {name.partition('.')[2]}"  # which is "0.5" to the plan
    norms.check_layer(p, name)
    norms.check_gradient(p, p.grad, name, f"the gradient of {name}")
