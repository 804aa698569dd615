"""GradientLARS: gradients scaled layer by layer, before any optimizer.

Chainer calls the hook once for each parameter. `GradientLARS.attach` runs it in each
step of a PyTorch optimizer, `GradientLARS.transform` in a chain of optax.
"""

import sys
from collections.abc import Callable
from operator import is_not
from typing import TYPE_CHECKING, Any

from larskit import engines, norms
from larskit.arrays import Array, Scalar, stop_gradient, unwritable
from larskit.config import Config

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from larskit.torch.attach import Attachment


class GradientLARS:
    """Scale the gradient of each layer to the norm of its weights.

    The gradient g of the weights w becomes ``r*(g + wd*w)`` with
    ``r = |w| / (|g| + wd*|w| + eps)``, and r = 1 where ``|w| <= threshold``. There is
    no trust coefficient: it is part of the learning rate of the optimizer.

    It replaces ``chainer.optimizer_hooks.GradientLARS``, with the same arguments,
    attributes and results.

    Parameters
    ----------
    threshold : float, default=1e-2
        At least 0. A layer whose weight norm is at most this is not scaled; the decay
        is still added to its gradient.
    weight_decay : float, default=0.0
        wd, at least 0. The decay is scaled together with the gradient.
    eps : float, default=1e-9
        At least 0. It keeps the denominator above 0.

    Attributes
    ----------
    threshold, weight_decay, eps : float
        As given. A change takes effect in the next call.
    name, timing, call_for_each_param
        What Chainer's ``add_hook`` reads: ``"GradientLARS"``, ``"pre"``, True.

    Notes
    -----
    An optimizer's own weight decay comes after the hook and is not scaled: SGD and
    Adam add it to the scaled gradient, AdamW subtracts it from the weights. If both are
    given, both are applied; one of them is usually enough.

    As in Chainer, a gradient of zeros is no special case. With a weight decay, such a
    layer decays by ``r*wd*w``, which is about w itself.

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
    # In a slot: the attributes themselves are those of Chainer's hook.
    __slots__ = ("__dict__", "__weakref__", "_cache")

    def __init__(
        self, threshold: Scalar = 1e-2, weight_decay: Scalar = 0.0, eps: Scalar = 1e-9
    ) -> None:
        """Keep the hyper-parameters, after checking them."""
        self.threshold = threshold
        self.weight_decay = weight_decay
        self.eps = eps
        self.config()

    def config(self) -> Config:
        """Return the hyper-parameters as they are now, after checking them."""
        return self._current()[0]

    def _current(self) -> tuple[Config, Callable[[Array, Array], bool]]:
        """Return the configuration, and what scales single NumPy gradients by it."""
        values = self.threshold, self.weight_decay, self.eps
        cache = getattr(self, "_cache", None)  # a copy has none
        if cache is None or any(map(is_not, values, cache[0])):
            config = Config(
                threshold=self.threshold,
                weight_decay=self.weight_decay,
                eps=self.eps,
                trust_coefficient=1.0,
                zero_guard=False,
            )
            cache = values, (config, engines.array_scaler(config))
            self._cache = cache
        return cache[1]

    def __repr__(self) -> str:
        """Show the hyper-parameters."""
        return (
            f"GradientLARS(threshold={self.threshold}, "
            f"weight_decay={self.weight_decay}, eps={self.eps})"
        )

    def __getstate__(self) -> dict[str, Scalar]:
        """Return the attributes without the cache, which cannot be copied."""
        return dict(vars(self))

    def __call__(self, rule: object, param: Any) -> None:
        """Scale the gradient of one parameter in place.

        Parameters
        ----------
        rule : object
            Chainer's update rule, which is not used.
        param : object with ``array`` or ``data``, and ``grad``
            Two arrays of one shape and framework. If one is None, nothing happens. If
            they are sharded (DTensor), every process must call.

        Raises
        ------
        TypeError, ValueError
            The arrays cannot be scaled. Nothing has been written.
        """
        w = param.array if hasattr(param, "array") else param.data
        if w is None or (g := param.grad) is None:
            return
        config, scale_array = self._current()
        if scale_array(w, g):
            return
        w, g = stop_gradient(w), stop_gradient(g)
        norms.check_gradient(w, g, "param.data", "param.grad")
        if reason := unwritable(g):
            raise TypeError(
                f"param.grad {reason}, but the hook writes it in place: pass an array "
                "that can be written, or use GradientLARS.transform"
            )
        if norms.is_sharded(w):
            self._scale_shard(w, g, config)
        else:
            _bound(w, g, config).scale_gradients(config)

    def _scale_shard(self, w: "DTensor", g: "DTensor", config: Config) -> None:
        from larskit.norms import dtensor

        norms.check_layer(w, "param.data")
        if g.placements != w.placements:
            raise TypeError(
                f"param.grad is placed as {g.placements}, expected {w.placements}, as "
                "param.data, to be written in place: redistribute it first"
            )
        group = _bound(w.to_local(), g.to_local(), config)
        sharded = dtensor.ShardedNorms([w])
        own = sharded.zeros()
        own[0], own[1] = group.norms(config)
        w_norms, q = sharded.all_reduce(own)
        group.scale_gradients(config, (w_norms, q))

    def attach(self, optimizer: Any) -> "Attachment":
        """Scale the gradients of a PyTorch optimizer while it steps.

        During ``optimizer.step()`` each ``p.grad`` is the scaled gradient. Afterwards
        it is the original tensor again, bitwise unchanged, also when the step or its
        closure raises. A gradient that the step sets to None stays None.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Any optimizer, with any parameter groups; groups may be added later. If a
            step gets a closure, its gradients are scaled after each call of it.

        Returns
        -------
        Attachment
            Its ``remove()``, or the end of a ``with`` block, removes the hook.

        Raises
        ------
        TypeError
            `optimizer` is no torch optimizer, or has a parameter of FSDP1 or a Partial
            DTensor. From ``step()``: a gradient is sparse, or not on the mesh of its
            parameter. Nothing has changed then.
        ValueError
            The optimizer was made with ``differentiable=True``.

        Notes
        -----
        The optimizer's own step pre-hooks run first, on the original gradients, no
        matter when they were registered. What they change in place (clipping, averaging
        over processes) is kept and is what gets scaled. Post-hooks see the scaled
        gradients. Of several attached hooks, the last one scales first.

        The scaled gradients are written into the same tensors in each step, which take
        as much memory as the gradients. Clone one to keep it beyond the step.

        `torch.amp.GradScaler` works without changes. Fused optimizers receive gradients
        that are still multiplied by the loss scale; the trust ratio does not depend on
        it.

        Parameters may be sharded (DTensor). Every process must then step, also one
        without gradients: one all-reduce for each mesh computes the norms of the whole
        layers. The optimizer sees DTensors with the placements of the parameters.

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
        from larskit.torch.attach import Attachment

        return Attachment(self, optimizer)

    def transform(self) -> Any:
        """Return the hook as a gradient transformation for optax.

        Returns
        -------
        Transformation
            ``init(params)`` and ``update(updates, state, params)``, for
            ``optax.chain(hook.transform(), optax.sgd(lr))``. It has no state. Leaves of
            `updates` that are None stay None.

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
        return rescaling(self.config)


def _bound(w: Array, g: Array, config: Config) -> engines.Group:
    layers = engines.Layers([w], [g], [None], [True], [True])
    return engines.choose(layers, config, scales_gradients=True)
