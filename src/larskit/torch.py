"""LARS as a `torch.optim.Optimizer`."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

try:
    import torch
except ModuleNotFoundError as why:
    raise ImportError(
        "larskit.torch needs PyTorch: pip install 'larskit[torch]'"
    ) from why

from torch import Tensor

from larskit import config as _config
from larskit import rule
from larskit.arrays import check_floating
from larskit.config import Config, Denominator, LrPlacement, OnNonfinite, check_lr
from larskit.engines import foreach as _foreach
from larskit.engines import native as _native
from larskit.engines import reference as _reference
from larskit.rule import Lengths
from larskit.select import Selection, check_matched, select

__all__ = ["LARS", "StepInBackward", "param_groups", "step_in_backward"]

_LATER = {
    "on_nonfinite": "propagate",
    "capturable": False,
    "differentiable": False,
    "master_weights": False,
}
_PER_LAYER = ("adapt", "decay")
_ENGINES = ("foreach", "fused", "carry_norms")
_NOTHING: dict[str, Any] = {}
_PER_GROUP = tuple(
    name for name in _config.NAMES if name not in (*_PER_LAYER, "zero_guard")
)


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
            for name in ("lr", *_PER_GROUP, *_PER_LAYER, *_ENGINES, *_LATER)
        }
        self._plan = _Plan()
        self._in_backward: StepInBackward | None = None
        super().__init__(params, defaults)
        for name in _PER_LAYER:
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
            for name in _PER_LAYER:
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
        self._plan = _Plan()
        self.__dict__.setdefault("_in_backward", None)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name in _PER_LAYER:
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


class StepInBackward:
    """An optimizer that steps in the backward pass, see `step_in_backward`.

    It is a context manager that takes the hooks off at its end.
    """

    def __init__(self, optimizer: LARS) -> None:
        """Watch every parameter."""
        self._optimizer = optimizer
        self._plans: dict[Tensor, _Plan] = {}
        self._stepped: dict[Tensor, _Plan] = {}
        self._last: list[_Plan] = []
        self._handles: list[Any] = []
        for index in range(len(optimizer.param_groups)):
            self.watch(index)

    def watch(self, index: int) -> None:
        """Step the parameters of a group as their gradients become ready."""
        for row, p in enumerate(self._optimizer.param_groups[index]["params"]):
            self._plans[p] = _Plan()
            hook = partial(self._step, index, row)
            self._handles.append(p.register_post_accumulate_grad_hook(hook))

    @torch.no_grad()
    def _step(self, index: int, row: int, p: Tensor) -> None:
        optimizer = self._optimizer
        group = optimizer.param_groups[index]
        name = _name(index, group, row)
        if p in self._stepped:
            raise RuntimeError(
                f"{name!r} has moved along its gradient, and here is another one: "
                "call optimizer.step() after each backward pass; gradients cannot be "
                "accumulated while they are used at once"
            )
        only = {key: group[key][row : row + 1] for key in ("params", *_PER_LAYER)}
        self._plans[p].step_(
            [{**group, **only, "param_names": [name]}], optimizer.state
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
        If it steps in backward already, holds gradients, or several processes train: a
        gradient would be used before they have averaged it. From the backward pass, for
        a second gradient before `LARS.step` (accumulation); from `LARS.step`, for a
        closure.

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


class _Plan:
    """How some parameters step, kept from step to step while nothing of it changes."""

    def __init__(self) -> None:
        self._buckets: list[_Bucket] = []
        self._idle: list[Tensor] = []  # without a gradient
        self._params: list[Tensor] = []
        self._sharded: list[Any] = []
        self._states: list[Any] = []
        self._switches: list[Any] = []
        self._values: list[Any] = []
        self._configs: list[Config] = []
        self._outside_graphs: Any = torch.compiler.disable(self._step_)

    def step_(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Move the parameters of `groups` that have gradients."""
        step_ = self._outside_graphs if torch.compiler.is_compiling() else self._step_
        step_(groups, state)

    def _step_(self, groups: list[dict[str, Any]], state: Any) -> None:
        self._check(groups)
        fits = self._fits(groups, state)
        if not fits:
            self._sort(groups, state)
        for bucket in self._buckets:
            bucket.take(self._configs[bucket.index])
        self._measure_sharded()
        for bucket in self._buckets:
            bucket.step_(groups[bucket.index], state)
        if not fits:
            self._states = [*state.values()]

    def _measure_sharded(self) -> None:
        """Give the buckets of sharded layers the lengths of the whole layers.

        All of them take part, also those without a gradient in this process.
        """
        if not self._sharded:
            return
        from larskit.norms import dtensor

        layers = self._sharded
        measured = {p: x for b in self._buckets for p, x in b.measured()}
        shards = [p.to_local() for p in layers], [measured.get(p) for p in layers]
        found = dtensor.lengths([*shards[0], *shards[1]], layers * 2, _lengths)
        rows = {p: row for row, p in enumerate(layers)}
        for bucket in self._buckets:
            if bucket.sharded:
                own = torch.tensor([rows[p] for p in bucket.params])
                bucket.norms = found[own], found[own + len(layers)]

    def lengths(self) -> dict[str, Lengths]:
        found = {}
        for bucket in self._buckets:
            rows = zip(*(column.tolist() for column in bucket.lengths), strict=True)
            found.update(zip(bucket.names, map(Lengths._make, rows), strict=True))
        return found

    def _check(self, groups: list[dict[str, Any]]) -> None:
        """Set the configuration of each group, checked anew if it is a new one."""
        values = [group[name] for group in groups for name in ("lr", *_PER_GROUP)]
        if not _same(values, self._values):
            self._configs = [_config_of(group) for group in groups]
            self._values = values

    def _fits(self, groups: list[dict[str, Any]], state: Any) -> bool:
        """Whether the buckets of the last step serve again, with new gradients."""
        return (
            self._switches == [_switches(group) for group in groups]
            and _same([p for group in groups for p in group["params"]], self._params)
            and _same(state.values(), self._states)
            and all(p.grad is None for p in self._idle)
            and all(bucket.aim() for bucket in self._buckets)
        )

    def _sort(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Sort the parameters into lists that one engine call can step."""
        buckets: dict[Any, _Bucket] = {}
        idle = []
        for index, group in enumerate(groups):
            rows = zip(group["params"], group["adapt"], group["decay"], strict=True)
            for row, (p, adapt, decay) in enumerate(rows):
                if p.grad is None:
                    idle.append(p)
                    continue
                name = _name(index, group, row)
                _check_dense(p.grad, name)
                sharded = _is_sharded(p)
                key = index, p.device, p.dtype, p.grad.dtype, adapt, decay, sharded
                if key not in buckets:
                    buckets[key] = _Bucket(index, adapt, decay, sharded)
                buckets[key].add(name, p, _buffer(state, p))
        for bucket in buckets.values():
            bucket.choose_engine(groups[bucket.index], self._buckets)
        self._buckets, self._idle = list(buckets.values()), idle
        self._params = [p for group in groups for p in group["params"]]
        self._sharded = [p for p in self._params if _is_sharded(p)]
        self._switches = [_switches(group) for group in groups]


def _same(these: Collection[Any], those: Collection[Any]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _switches(group: dict[str, Any]) -> Any:
    """Return what in a group decides about buckets and engines."""
    return [group[name] for name in (*_PER_LAYER, *_ENGINES)], group["momentum"] == 0


def _name(index: int, group: dict[str, Any], row: int) -> str:
    names = group.get("param_names")
    return names[row] if names else f"{index}.{row}"


class _Bucket:
    """Layers of one device, dtype and kind, and what a step measured of them."""

    def __init__(self, index: int, adapt: bool, decay: bool, sharded: bool) -> None:
        self.index = index  # of the parameter group
        self.flags = {"adapt": adapt, "decay": decay}
        self.sharded = sharded
        self.names: list[str] = []
        self.params: list[Any] = []
        self.weights: list[Tensor] = []  # what this process holds of the parameters
        self.grads: list[Any] = []
        self.buffers: list[Tensor | None] = []
        self.former: list[Tensor | None] = []  # the buffers before the step
        self.engine: Any = None
        self.native: _native.Group | None = None
        self.states: list[dict[str, Any]] = []  # once they hold the buffers
        self.given: Any = None
        self.config: Any = None
        self.norms: Any = None
        self.found: Any = None

    def add(self, name: str, p: Any, buffer: Any) -> None:
        self.names.append(name)
        self.params.append(p)
        grad = p.grad
        if self.sharded:
            if grad.placements != p.placements:  # sums that are not complete, say
                grad = grad.redistribute(placements=p.placements)
            grad = grad.to_local().contiguous()  # an uneven shard may have gaps
            buffer = buffer if buffer is None else buffer.to_local()
        self.weights.append(p.to_local() if self.sharded else p)
        self.grads.append(grad)
        self.buffers.append(buffer)
        self.former.append(buffer)

    def take(self, config: Config) -> None:
        """Take the configuration of the parameter group."""
        if config is not self.given:
            self.given, self.config = config, replace(config, **self.flags)

    def measured(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each sharded parameter, and what is measured of it beside itself."""
        rows = zip(self.params, self.weights, self.grads, self.former, strict=True)
        for p, w, g, v in rows if self.sharded else ():
            yield p, rule.measured(w, g, v, self.config)

    def choose_engine(self, group: dict[str, Any], former: "list[_Bucket]") -> None:
        """Choose as the group's switches say; `former` buckets may know lengths."""
        foreach, fused, carry = (group[name] for name in _ENGINES)
        if carry and self.sharded:
            raise RuntimeError(
                "carry_norms=True is not for sharded parameters, whose lengths the "
                "processes find together: leave it away"
            )
        if fused or (fused is None and foreach is None):
            try:
                self._go_native(group["momentum"] != 0, former if carry else [])
                return
            except _native.Unfit as why:
                if fused or carry:
                    demand = "fused=True" if fused else "carry_norms=True"
                    raise RuntimeError(
                        f"{demand}, but {why}: leave it away to take another engine"
                    ) from None
        plain = {torch.Tensor, torch.nn.Parameter}
        if foreach is None:
            foreach = all(type(w) in plain for w in self.weights)
        self.engine = _foreach if foreach else _reference

    def _go_native(self, keep: bool, former: "list[_Bucket]") -> None:
        kept = _native.kept_buffers(self.weights, self.buffers, keep)
        columns = self.weights, self.grads, self.buffers
        self.native = _native.Group(*columns, new_buffers=kept)
        if not self.sharded:
            self.native.remember()
        self.buffers = kept
        for bucket in former:
            if bucket.native is not None:
                self.native.take_over(bucket.native)

    def aim(self) -> bool:
        """Whether the native engine can go on, with the gradients that are here now."""
        if self.native is None or self.sharded:
            return False
        self.grads = [p.grad for p in self.params]
        if not self.native.aim(self.grads):
            return False
        now = [state.get("momentum_buffer") for state in self.states]
        return all(map(is_, now, self.buffers))

    @property
    def lengths(self) -> Lengths:
        """What the last step measured."""
        return self.found if self.native is None else self.native.lengths

    def step_(self, group: dict[str, Any], state: Any) -> None:
        """Move the layers and keep their buffers in `state`."""
        lr, carry = group["lr"], group["carry_norms"]
        if self.native is not None:
            self.native.step_(lr, self.config, self.norms, carry=carry)
        else:
            weights = [w.detach() for w in self.weights]
            columns = weights, self.grads, self.buffers
            self.found = self.engine.step_(*columns, lr, self.config, self.norms)
        self.grads = []
        if self.states:
            return
        for p, buffer in zip(self.params, self.buffers, strict=True):
            if buffer is not None:
                state[p]["momentum_buffer"] = self._like(p, buffer)
        if self.native is not None:
            self.states = [state.get(p, _NOTHING) for p in self.params]

    def _like(self, p: Any, buffer: Tensor) -> Tensor:
        """Return a buffer as a tensor of the parameter's own kind."""
        if not self.sharded:
            return buffer
        whole = {"shape": p.shape, "stride": p.stride()}
        return type(p.data).from_local(
            buffer, p.device_mesh, p.placements, run_check=False, **whole
        )


def _is_sharded(p: Any) -> bool:
    return type(p).__name__ == "DTensor"


def _lengths(tensors: list[Tensor]) -> Tensor:
    """Return the lengths of tensors of several dtypes, as the engines find them."""
    found = torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)
    for dtype in {x.dtype for x in tensors}:
        rows = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        own = [tensors[i] for i in rows]
        try:
            found[rows] = _native.lengths(own)
        except _native.Unfit:
            found[rows] = _foreach.lengths(own)
    return found


def _config_of(group: dict[str, Any]) -> Config:
    check_lr(group["lr"])
    return Config(**{name: group[name] for name in _PER_GROUP})


def _buffer(state: Any, p: Tensor) -> Tensor | None:
    return state[p].get("momentum_buffer") if p in state else None


def _check_dense(grad: Tensor, name: str) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of {name!r} is sparse ({grad.layout}); LARS needs the "
            "length of the whole layer: use dense gradients (sparse=False)"
        )


def param_groups(
    model: torch.nn.Module,
    *,
    weight_decay: float | None = None,
    adapt: Selection = None,
    decay: Selection = None,
    excluded_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into groups by whether they are adapted and decayed.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters that require gradients are taken, each once.
    weight_decay : float, optional
        For the layers that are decayed; None leaves it to the optimizer.
    adapt, decay : None, bool, pattern, sequence of patterns, or callable
        As in `LARS`.
    excluded_lr : float, optional
        The learning rate of the layers that are not adapted. The rates of LARS, 1 to
        30, are large for a bias.

    Returns
    -------
    list of dict
        For `LARS`, with named parameters; at most four, none empty.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    >>> groups = param_groups(model, adapt="0.weight", excluded_lr=0.1)
    >>> [(group["adapt"], len(group["params"])) for group in groups]
    [(True, 1), (False, 3)]
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient"
        )
    names, tensors = zip(*named, strict=True)
    flags = []
    for what, selection in (("adapt", adapt), ("decay", decay)):
        selected = select(selection, names, tensors, what)
        check_matched(selection, selected, what)
        flags.append(selected)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for pair, adapted, decayed in zip(named, *flags, strict=True):
        own: dict[str, Any] = {"params": [], "adapt": adapted, "decay": decayed}
        if weight_decay is not None:
            own["weight_decay"] = weight_decay
        if excluded_lr is not None and not adapted:
            own["lr"] = excluded_lr
        groups.setdefault((adapted, decayed), own)["params"].append(pair)
    return list(groups.values())


def _check_group(group: dict[str, Any]) -> None:
    _config_of(group)
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
        if _is_sharded(p) and any(x.is_partial() for x in p.placements):
            raise TypeError(
                f"parameter {i} is a DTensor placed as {p.placements}: a sum that is "
                "not complete has no length; shard or replicate it"
            )
