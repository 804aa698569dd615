"""One step of an optimizer: validation, what decides whether to move, and the move."""

from functools import cache
from itertools import starmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from larskit import engines
from larskit.config import PER_LAYER, SHARED
from larskit.norms import is_sharded
from larskit.rule import LayerStats, Norms
from larskit.torch.options import (
    SWITCHES,
    Groups,
    ParamGroup,
    Settings,
    State,
    check_rate,
    policy_of,
    settings_of,
    switches_of,
)
from larskit.torch.plan import Plan, same
from larskit.torch.turn import Turn

if TYPE_CHECKING:
    from larskit.arrays import Scalar
    from larskit.torch.bucket import Bucket

# All that a step reads of a parameter group, beside its parameters and its rate.
_OPTIONS = (*SHARED, *PER_LAYER, *SWITCHES, "on_nonfinite", "master_weights")


class Stepper:
    """Steps parameter groups, and keeps its plan from step to step."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.plan = Plan(_check_gradient)
        self._options: list[object] = []
        self._rates: list[Scalar] = []
        self._settings: list[Settings] = []
        self._policy = ""
        self._turn = Turn()
        self._step_outside_graphs: Any = _outside_graphs()

    def step_(
        self,
        groups: Groups,
        state: State,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Move the parameters that have gradients.

        These were multiplied by `grad_scale`, and nothing moves where `found_inf` is
        not 0: what `torch.amp.GradScaler` says.
        """
        if not torch.compiler.is_compiling():
            self._step_(groups, state, grad_scale, found_inf)
        elif all(map(_is_traceable, groups)):
            self._step_in_graph(groups, state)
        else:
            self._step_outside_graphs(self, groups, state, grad_scale, found_inf)

    def _step_(
        self,
        groups: Groups,
        state: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        with self._turn:
            self._validate(groups)
            try:
                self.plan.update(groups, self._settings, state)
            except engines.Unsupported as why:
                raise _refusal(groups, why) from None
            buckets = self.plan.buckets
            # All checks come before the first move: a refused step changes nothing.
            for bucket in buckets:
                index = bucket.key.group
                bucket.group.check(self._rates[index], self._settings[index].config)
            # Before `_judge`, which must see the norms of whole layers.
            self.plan.all_reduce_norms(grad_scale)
            apply_if = True if found_inf is None else found_inf == 0
            if self._policy != "propagate":
                apply_if = self._judge(grad_scale, apply_if)
            for bucket in buckets:
                index = bucket.key.group
                config = self._settings[index].config
                bucket.step_(self._rates[index], config, state, grad_scale, apply_if)
            self.plan.after_step(state)

    def _step_in_graph(self, groups: Groups, state: State) -> None:
        """Step on the foreach engine, with operations that `torch.compile` traces."""
        settings = [settings_of(group) for group in groups]
        plan = Plan(_check_gradient)  # of this call: what is traced keeps nothing
        plan.update(groups, settings, state)
        for bucket in plan.buckets:
            index = bucket.key.group
            config = settings[index].config
            bucket.step_(groups[index]["lr"], config, state, None, True)
        self.plan = plan

    def _validate(self, groups: Groups) -> None:
        """Check what has changed in the groups, before anything else changes."""
        # By identity. A tensor is not compared by value, which would wait for its
        # device: the engines read its contents in each step.
        options = [group[name] for group in groups for name in _OPTIONS]
        if not same(options, self._options):
            policy = policy_of(groups)
            self._settings = [settings_of(group) for group in groups]
            # Only now: where a setting was refused, the next step must check again.
            self._options, self._policy = options, policy
        rates = [group["lr"] for group in groups]
        if not same(rates, self._rates):
            for rate in rates:
                check_rate(rate)
            self._rates = rates

    def _judge(
        self, grad_scale: Tensor | None, apply_if: bool | Tensor
    ) -> bool | Tensor:
        """Return whether to move: as `apply_if` says, and if all norms are finite.

        The answer is a bool, or a tensor on the device. The host waits for the device
        only where an error may follow, or where first buffers are made or not.
        """
        found = [self._measure(bucket, grad_scale) for bucket in self.plan.buckets]
        # Before any raise, on every process: one that raised alone would leave the
        # others waiting in the all-reduce.
        finite = _on_all_ranks(self._finite(found))
        if isinstance(apply_if, Tensor):
            apply_if = apply_if.to(finite.device, non_blocking=True)
        if self._policy == "raise" and apply_if and not finite:
            raise FloatingPointError(
                f"the step was not taken, because {self._nonfinite()} is not finite"
            )
        # A step skipped on the device would leave first buffers of zeros behind, where
        # a step skipped on the host leaves none.
        starts = any(self._starts(bucket) for bucket in self.plan.buckets)
        apply_if = finite & apply_if
        return bool(apply_if) if self._policy == "raise" or starts else apply_if

    def _measure(self, bucket: "Bucket", grad_scale: Tensor | None) -> Norms:
        return bucket.measure(self._settings[bucket.key.group].config, grad_scale)

    def _starts(self, bucket: "Bucket") -> bool:
        """Whether this step makes the momentum buffer of a parameter."""
        keeps = self._settings[bucket.key.group].keeps_momentum
        return keeps and any(v is None for v in bucket.group.buffers)

    def _finite(self, found: list[Norms]) -> Tensor:
        flags = [x.isfinite().all() for norms in found for x in norms]
        device = self.plan.device
        flags = [flag.to(device, non_blocking=True) for flag in flags]
        # The one is for a process without gradients, which must take part in the
        # all-reduce.
        return torch.stack([torch.ones((), dtype=torch.bool, device=device), *flags])

    def _nonfinite(self) -> str:
        for bucket in self.plan.buckets:
            norms: Any = bucket.norms
            rows = zip(bucket.names, *(x.tolist() for x in norms), strict=True)
            for name, *of_layer in rows:
                for what, x in zip(("weights", "gradient"), of_layer, strict=True):
                    if x - x != 0:
                        return f"the norm of the {what} of {name!r} ({x})"
        # `_on_all_ranks` reduces one flag, not which layer it is about.
        return "a norm in another process"

    def check_closure(self, closure: object) -> None:
        """Accept a closure, which runs before the step."""

    def group_added(self, index: int) -> None:
        """Accept another parameter group: the next step looks at all of them."""

    def divides_grad_scale(self, groups: Groups) -> bool:
        """Whether a step divides gradients by the scale of `torch.amp.GradScaler`."""
        return all(
            engines.divides_grad_scale(p, switches_of(group))
            for group in groups
            for p in group["params"]
        )

    @property
    def plans(self) -> list[Plan]:
        """The plans of the last step."""
        return [self.plan]

    def layer_stats(self) -> dict[str, LayerStats]:
        """Return the statistics of the last step, by name."""
        found: dict[str, LayerStats] = {}
        for bucket in self.plan.buckets:
            w_norms, q, ratios, *flags, _ = bucket.group.stats
            vectors = (x.tolist() for x in (w_norms, q, ratios))
            rows = zip(*vectors, *flags, strict=True)
            found.update(zip(bucket.names, starmap(LayerStats, rows), strict=True))
        return found


@cache
def _outside_graphs() -> Any:
    """Return the step as a function that `torch.compile` calls between its graphs."""
    # Not of a bound method: an optimizer that holds itself is freed by the cyclic
    # collector only, and with it all weights, gradients and buffers.
    return torch.compiler.disable(Stepper._step_)


def _check_gradient(p: Any, name: str) -> None:
    if p.grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {name!r} is sparse ({p.grad.layout}); LARS needs the "
            "norm of the whole layer: use dense gradients (sparse=False)"
        )
    if is_sharded(p) != is_sharded(p.grad):
        here, there = (type(x).__name__ for x in (p, p.grad))
        raise RuntimeError(
            f"the parameter {name!r} is a {here} and its gradient a {there}: "
            "distribute both, or neither (distribute_tensor, full_tensor)"
        )


def _refusal(groups: Groups, why: engines.Unsupported) -> RuntimeError:
    """Return the error of a switch that demands what no engine can do."""
    asked = [name for name in SWITCHES if any(group[name] for group in groups)]
    switch = next(iter(asked))
    return RuntimeError(f"{switch}=True, but {why}: omit it to use another engine")


def _is_traceable(group: ParamGroup) -> bool:
    """Whether `torch.compile` can make the step of a group part of its graph."""
    switches = switches_of(group)
    return (
        not group["master_weights"]
        and group["on_nonfinite"] == "propagate"
        and all(engines.is_traceable(p, switches) for p in group["params"])
        and not any(map(is_sharded, group["params"]))
    )


def _on_all_ranks(flags: Tensor) -> Tensor:
    """Return whether all flags are true, here and in every other process."""
    # A step taken by some processes only would leave them with different weights.
    flag = flags.all()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        number = flag.to(torch.int32)
        dist.all_reduce(number, dist.ReduceOp.MIN)
        flag = number > 0
    return flag
