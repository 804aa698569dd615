"""GradientLARS: gradients rescaled layer by layer, in front of any optimizer.

Chainer calls the hook once per parameter; `GradientLARS.attach` puts it before the
step of a PyTorch optimizer, `GradientLARS.transform` into a chain of optax.
"""

import sys
from functools import wraps
from itertools import repeat
from operator import is_not
from types import MethodType
from typing import Any

from larskit.arrays import (
    check_floating,
    is_array,
    namespace,
    stop_gradient,
    unwritable,
    write,
)
from larskit.config import Config
from larskit.engines import native
from larskit.layout import Unfit, empty_like
from larskit.rule import norm, scaled_gradient


class GradientLARS:
    """Rescale each layer's gradient to the length of its weights.

    The gradient g of the weights w becomes ``r*(g + wd*w)`` with
    ``r = |w| / (|g| + wd*|w| + eps)``, and r = 1 where ``|w| <= threshold``. There is
    no trust coefficient: it is part of the learning rate of the optimizer behind.

    It takes the place of ``chainer.optimizer_hooks.GradientLARS``, whose arguments,
    attributes and numbers it has.

    Parameters
    ----------
    threshold : float, default=1e-2
        At least 0; a layer no longer than this keeps its gradient, decay added.
    weight_decay : float, default=0.0
        wd, at least 0. It is rescaled together with the gradient.
    eps : float, default=1e-9
        At least 0; keeps the denominator from 0.

    Attributes
    ----------
    threshold, weight_decay, eps : float
        As given. They may be changed, and count from the next call.
    name, timing, call_for_each_param
        What Chainer's ``add_hook`` asks for: ``"GradientLARS"``, ``"pre"``, True.

    Notes
    -----
    An optimizer's own weight decay comes after the hook, so it is not rescaled: SGD and
    Adam add it to the rescaled gradient, AdamW takes it from the weights. Where both
    are given, both are applied; one of them is usually enough.

    A gradient of zeros is no special case, as in Chainer: with a decay, such a layer
    decays by ``r*wd*w``, which is about w itself.

    References
    ----------
    Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks",
    arXiv 1708.03888; I. Gitman, D. Dilipkumar, B. Parr, "Convergence Analysis of
    Gradient Descent Algorithms with Proportional Updates", arXiv 1801.03137.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> import numpy as np
    >>> layer = SimpleNamespace(data=np.array([3.0, 4.0]), grad=np.array([0.0, 0.1]))
    >>> GradientLARS(eps=0.0)(None, layer)
    >>> layer.grad
    array([0., 5.])
    """

    name = "GradientLARS"
    timing = "pre"
    call_for_each_param = True
    _made: Any = None  # the native engine's rescaler, and what it was made of

    def __init__(
        self, threshold: Any = 1e-2, weight_decay: Any = 0.0, eps: Any = 1e-9
    ) -> None:
        """Keep the hyper-parameters, after checking them."""
        self.threshold = threshold
        self.weight_decay = weight_decay
        self.eps = eps
        self._config()

    def _config(self) -> Config:
        return Config(
            threshold=self.threshold,
            weight_decay=self.weight_decay,
            eps=self.eps,
            trust_coefficient=1.0,
            zero_guard=False,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes but for the rescaler, which cannot be copied."""
        return {name: x for name, x in vars(self).items() if name != "_made"}

    def _rescaler(self) -> native.Rescaler:
        """Return the native engine's, made anew where an attribute has changed."""
        values = self.threshold, self.weight_decay, self.eps
        if self._made is None or any(map(is_not, values, self._made[0])):
            self._made = values, native.Rescaler(self._config())
        return self._made[1]

    def __call__(self, rule: Any, param: Any) -> None:
        """Rescale the gradient of one parameter in place.

        Parameters
        ----------
        rule : object
            Chainer's update rule; not looked at.
        param : object with ``array`` or ``data``, and ``grad``
            Two arrays of one shape and framework. Where one is None, nothing happens.
            If they are sharded (DTensor), every process must call.

        Raises
        ------
        TypeError, ValueError
            Before anything is written, where the arrays cannot be rescaled.
        """
        w = param.array if hasattr(param, "array") else param.data
        if w is None or (g := param.grad) is None or self._rescaler()(w, g):
            return
        w, g = stop_gradient(w), stop_gradient(g)
        _check(w, g, "param.data", "param.grad")
        if reason := unwritable(g):
            raise TypeError(
                f"param.grad {reason}, but the hook writes it in place: pass an array "
                "that can be written, or use GradientLARS.transform"
            )
        norms = None
        if _is_sharded(w):
            _check_own_length(w, "param.data")
            if g.placements != w.placements:
                raise TypeError(
                    f"param.grad is placed as {g.placements}, expected {w.placements}, "
                    "as param.data, to be written in place: redistribute it first"
                )
            layer, w, g = w, w.to_local(), g.to_local()
            norms = _lengths_together([layer], {layer: g})
        config = self._config()
        if not _rescale_natively([w], [g], [g], config, norms):
            of_layer = None if norms is None else (norms[0][0], norms[1][0])
            write(g, scaled_gradient(w, g, config, norms=of_layer), "param.grad")

    def attach(self, optimizer: Any) -> "Attachment":
        """Rescale the gradients of a PyTorch optimizer while it steps.

        During ``optimizer.step()`` each ``p.grad`` is the rescaled gradient, in a
        tensor of its own; afterwards it is the same tensor as before, untouched, also
        when the step or its closure raises. A gradient that the step sets to None
        stays None.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Any, with any parameter groups; more groups may follow. A closure's
            gradients are rescaled after it ran, and put back before it runs again.

        Returns
        -------
        Attachment
            Its ``remove()``, or the end of a ``with`` block, takes the hook off.

        Raises
        ------
        TypeError
            If `optimizer` is of another kind, or holds a parameter of FSDP1 or a
            DTensor that is a sum not complete; from ``step()``, if a gradient is
            sparse, or not on the mesh of its parameter. Nothing has changed then.
        ValueError
            If the optimizer is differentiable.

        Notes
        -----
        The step pre-hooks of the optimizer run first, whenever they were registered, on
        the gradients as they are: what they change in place (clipping, averaging over
        processes) stays, and is what gets rescaled. Post-hooks see the rescaled ones.
        Of several attached hooks the last one acts first.

        `torch.amp.GradScaler` needs nothing. Fused optimizers get gradients that are
        still multiplied by the loss scale, and so does the result: the ratio does not
        depend on it.

        Parameters may be sharded (DTensor): every process must step then, also one
        without gradients, and they find the lengths of the whole layers in one
        all-reduce. The inner optimizer sees DTensors, placed as the parameters are.

        Copies, pickles and the ``state_dict`` of the optimizer come without the hook.
        """
        torch: Any = sys.modules.get("torch")  # who holds its optimizer has loaded it
        if torch is None or not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}, expected a "
                "torch.optim.Optimizer: pass the one that holds the parameters"
            )
        if optimizer.defaults.get("differentiable"):
            raise ValueError(
                "optimizer was made with differentiable=True, which GradientLARS does "
                "not support: make it with differentiable=False"
            )
        for i, p in enumerate(_parameters(optimizer)):
            _check_own_length(p, f"parameter {i}")
        return Attachment(self, optimizer)

    def transform(self) -> Any:
        """Return the hook as a gradient transformation for optax.

        Returns
        -------
        Transformation
            ``init(params)`` and ``update(updates, state, params)``, for
            ``optax.chain(hook.transform(), optax.sgd(lr))``. It has no state. The
            leaves of `updates` that are None stay None.

        Raises
        ------
        ImportError
            Without JAX.
        """
        try:
            from larskit.jax.transform import rescaling
        except ImportError as why:
            raise ImportError(
                "GradientLARS.transform needs JAX: pip install 'larskit[jax]'"
            ) from why
        return rescaling(self._config)


class Attachment:
    """One hook on one optimizer; a context manager that takes it off at the end."""

    def __init__(self, hook: GradientLARS, optimizer: Any) -> None:
        """Put a step that rescales around the optimizer's own."""
        self._optimizer = optimizer
        self._active = True
        self._outer = vars(optimizer).get("step")
        inner = optimizer.step

        @wraps(getattr(inner, "__func__", inner))  # what torch's schedulers look at
        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return inner(*args, **kwargs)
            gradients = _Gradients(hook, optimizer)
            handle = optimizer.register_step_pre_hook(gradients.before_step)
            try:
                return inner(*args, **kwargs)
            finally:
                handle.remove()
                gradients.put_back()

        self._step = optimizer.step = MethodType(step, optimizer)

    def remove(self) -> None:
        """Take the hook off; a second call does nothing."""
        self._active = False
        if vars(self._optimizer).get("step") is not self._step:
            return  # somebody wrapped it since, and passes through it
        if self._outer is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._outer

    def __enter__(self) -> "Attachment":
        """Return the attachment itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the hook off."""
        self.remove()


class _Gradients:
    """The gradients of an optimizer during one step."""

    def __init__(self, hook: GradientLARS, optimizer: Any) -> None:
        self._hook = hook
        self._optimizer = optimizer
        self._before_step_ran = False
        self._own: list[tuple[Any, Any]] = []

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Rescale now or, where there is a closure, each time after it ran."""
        if self._before_step_ran:  # a step that calls its parent's
            return None
        self._before_step_ran = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.rescale()
            return None

        def rescaling_closure() -> Any:
            self.put_back()
            loss = closure()
            self.rescale()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": rescaling_closure}
        return (args[0], rescaling_closure, *args[2:]), kwargs

    def rescale(self) -> None:
        """Compute every rescaled gradient, then put them in place."""
        config = self._hook._config()
        own = []
        for i, p in enumerate(_parameters(self._optimizer)):
            if p.grad is None:
                continue
            _check_own_length(p, f"parameter {i}")
            w, g = stop_gradient(p), stop_gradient(p.grad)
            _check(w, g, f"parameter {i}", f"the gradient of parameter {i}")
            own.append((p, p.grad))
        new = self._rescaled(own, config)
        self._own = own
        for p, g in new.items():
            p.grad = g

    def _rescaled(self, own: list[tuple[Any, Any]], config: Config) -> dict[Any, Any]:
        """Return the rescaled gradients by parameter, one kind after the other."""
        here = {p: _held_here(g, p) for p, g in own}
        layers = [p for p in _parameters(self._optimizer) if _is_sharded(p)]
        lengths = _lengths_together(layers, here) if layers else ()
        rows = {p: row for row, p in enumerate(layers)}
        kinds: dict[Any, list[Any]] = {}
        for p, g in here.items():
            kinds.setdefault((p in rows, p.device, p.dtype, g.dtype), []).append(p)
        new = {}
        for (sharded, *_), kind in kinds.items():
            w, g = [_held_here(p, p) for p in kind], [here[p] for p in kind]
            norms = None
            if sharded:
                norms = [column[[rows[p] for p in kind]] for column in lengths]
            scale = _loss_scale(self._optimizer, kind[0])
            new |= zip(kind, _rescaled(w, g, config, scale, norms), strict=True)
        return {p: _placed_as(p, g) for p, g in new.items()}

    def put_back(self) -> None:
        """Restore the optimizer's own gradients; those that were dropped stay so."""
        for p, g in self._own:
            if p.grad is not None:
                p.grad = g
        self._own = []


def _rescaled(
    weights: list[Any], gradients: list[Any], config: Config, scale: Any, norms: Any
) -> list[Any]:
    """Return new gradients of one kind, by the native engine where it takes them."""
    if isinstance(scale, float) and scale == 1.0 and native.fits(weights[0]):
        results = [empty_like(g) for g in gradients]
        if _rescale_natively(weights, gradients, results, config, norms):
            return results
    of_layers = repeat(None) if norms is None else zip(*norms, strict=True)
    rows = zip(weights, gradients, of_layers, strict=False)
    return [scaled_gradient(w, g, config, scale, lengths) for w, g, lengths in rows]


def _rescale_natively(
    weights: list[Any],
    gradients: list[Any],
    results: list[Any],
    config: Config,
    norms: Any = None,
) -> bool:
    """Write the rescaled gradients in C++; False where that cannot be."""
    nothing = [None] * len(weights)
    try:
        group = native.Group(weights, gradients, nothing, results, rescales=True)
    except Unfit:
        return False
    group.rescale_(config, norms)
    return True


def _is_sharded(x: Any) -> bool:
    return type(x).__name__ == "DTensor"


def _held_here(x: Any, layer: Any) -> Any:
    """Return what this process holds of `x`, placed as `layer` is."""
    x = stop_gradient(x)
    if not _is_sharded(layer):
        return x
    from larskit.norms import dtensor

    return dtensor.shard(x, layer)


def _placed_as(layer: Any, shard: Any) -> Any:
    """Return a tensor of the kind of `layer`, of which this process holds `shard`."""
    if not _is_sharded(layer):
        return shard
    from larskit.norms import dtensor

    return dtensor.assemble(shard, layer)


def _lengths_together(layers: list[Any], gradients: dict[Any, Any]) -> Any:
    """Return the lengths of sharded layers and of their gradients, as two columns.

    A layer without a gradient in this process takes part, with zeros.
    """
    from larskit.norms import dtensor

    shards = [_held_here(p, p) for p in layers] + [gradients.get(p) for p in layers]
    found = dtensor.lengths(shards, layers * 2, _lengths)
    return found.reshape(2, len(layers))


def _lengths(shards: list[Any]) -> Any:
    try:
        return native.lengths(shards)
    except Unfit:
        found = [norm(x) for x in shards]
        return namespace(found[0]).stack(found)


def _parameters(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _loss_scale(optimizer: Any, p: Any) -> Any:
    """Return what GradScaler left the gradient of `p` multiplied by."""
    scale = None
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale.to(p.device, non_blocking=True)


def _check(w: Any, g: Any, w_name: str, g_name: str) -> None:
    """Refuse what cannot be rescaled, before anything changes."""
    for x, name in ((w, w_name), (g, g_name)):
        if not is_array(x):
            raise TypeError(f"{name} is a {type(x).__name__}, expected an array")
        check_floating(x, name)
    if tuple(g.shape) != tuple(w.shape):
        raise ValueError(
            f"{g_name} has the shape {tuple(g.shape)}, expected that of {w_name}, "
            f"{tuple(w.shape)}"
        )
    if _mesh(w) != _mesh(g):
        raise TypeError(
            f"{g_name} is a {type(g).__name__} on the mesh {_mesh(g)}, but {w_name} a "
            f"{type(w).__name__} on {_mesh(w)}: distribute both over one mesh"
        )


def _mesh(x: Any) -> Any:
    return x.device_mesh if _is_sharded(x) else None


def _check_own_length(p: Any, name: str) -> None:
    """Refuse a torch parameter whose length the processes cannot find."""
    if _is_sharded(p) and any(placement.is_partial() for placement in p.placements):
        raise TypeError(
            f"{name} is a DTensor placed as {p.placements}: a sum that is not complete "
            "has no length; shard or replicate it"
        )
    if getattr(p, "_fsdp_flattened", False):  # also with use_orig_params=True
        raise TypeError(
            f"{name} is part of FSDP1's flat parameter, in which layers lie end to end "
            "and are cut anywhere, so that none has its own length here: use "
            "fully_shard (FSDP2)"
        )
