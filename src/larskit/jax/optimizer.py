"""LARS as an object that changes variables in place: `brainpy.optim.LARS`."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from larskit import rule
from larskit.arrays import (
    Array,
    Scalar,
    check_array,
    check_floating,
    from_numpy,
    is_array,
    norm_dtype,
    to_numpy,
)
from larskit.config import Config, check_lr, is_number
from larskit.jax.graph import Node
from larskit.jax.variables import (
    AnyVariable,
    Variable,
    checked_like,
    native,
    read,
    variable_type,
    write,
)
from larskit.names import check_same
from larskit.rule import LayerStats
from larskit.state import Names, PortableState
from larskit.state.portable import hyperparameters

Rate = Any  # a number, an array, a variable, a scheduler, or a callable of the step
Variables = dict[str, AnyVariable]


class LARS(Node):
    r"""Layer-wise adaptive rate scaling of variables: each is one layer.

    Every layer is adapted and decayed:

    .. math::
        r &= \eta |w| / (|g| + \lambda |w| + \epsilon) \\
        v' &= \mu v + \mathrm{lr} \, r \, (g + \lambda w) \\
        w' &= w - v'

    with r = 1 where \|w\| or \|g\| is 0.

    Parameters
    ----------
    lr : float, 0-d array, variable, scheduler, or callable
        The learning rate, at least 0. A scheduler is an object that returns it when
        called without arguments, and whose ``step_call()`` is called after each update,
        as those of BrainPy. Another callable is called with the number of updates made,
        from 0, as the schedules of optax.
    train_vars : dict of str to variable, optional
        The weights: `TrainVar`, ``flax.nnx.Param`` or ``brainpy.math.TrainVar``, all of
        one type; see `register_train_vars`. The optimizer's own state is made of
        variables of that type, so that its transformations see them.
    momentum : float, default=0.9
        mu, at least 0 and below 1.
    weight_decay : float, default=0.0001
        lambda, at least 0.
    tc : float, default=0.001
        eta, the trust coefficient, above 0.
    eps : float, default=1e-05
        At least 0.
    name : str, optional
        A Python identifier that no other object bears; by default ``LARS0``, ``LARS1``
        and so on.

    Attributes
    ----------
    vars_to_train : dict of str to variable
        The weights.
    implicit_vars : dict of str to variable
        The momentum of the weight ``k``, of its shape and dtype, under ``k + "_m"``.
    step_count : variable of shape () and int32
        The number of updates made.
    config : Config
        The hyper-parameters.

    Notes
    -----
    This is what ``brainpy.optim.LARS`` 2.8.2 computes; older ones differ where \|g\| is
    0. The formula in its documentation differs: `lamb_paper`.

    The object is a pytree: `jax.jit` takes it as an argument and returns it, weights
    and all, as below. Under ``flax.nnx.jit`` and ``brainpy.math.jit`` the variables of
    those types change in place.

    The weights belong to the model: they are in `train_vars`, but not in `vars`,
    `state_dict` and the files. `to` moves them all the same.

    Examples
    --------
    >>> import jax
    >>> from larskit.jax import LARS, TrainVar
    >>> @jax.jit
    ... def step(optimizer, x, y):
    ...     def loss(weights):
    ...         return ((x @ weights["w"] - y) ** 2).mean()
    ...
    ...     weights = {key: w.value for key, w in optimizer.vars_to_train.items()}
    ...     optimizer.update(jax.grad(loss)(weights))
    ...     return optimizer
    >>> optimizer = LARS(10.0, {"w": TrainVar([3.0, 4.0])})
    >>> optimizer = step(optimizer, jax.numpy.eye(2), jax.numpy.zeros(2))
    >>> optimizer.vars_to_train["w"]
    TrainVar(Array([2.97, 3.96], dtype=float32))
    """

    config: Config
    vars_to_train: Variables
    _stats: Variables  # of the last update: |w|, q and the trust ratio of each weight
    step_count: AnyVariable

    def __init__(
        self,
        lr: Rate,
        train_vars: Mapping[str, AnyVariable] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0001,
        tc: float = 0.001,
        eps: float = 1e-05,
        name: str | None = None,
    ) -> None:
        """Start from momenta of zero."""
        super().__init__()
        self.config = Config.pick(locals(), trust_coefficient=tc)
        self.lr = lr
        self.step_count = Variable(0, "int32")
        self.vars_to_train = {}
        self._stats = {}
        self.register_train_vars(train_vars)
        self.name = name

    @classmethod
    def lamb_paper(
        cls,
        lr: Rate,
        train_vars: Mapping[str, AnyVariable] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0001,
        tc: float = 0.001,
        eps: float = 1e-05,
        name: str | None = None,
    ) -> Self:
        r"""Return the LARS of the LAMB paper (arXiv 1904.00962).

        The documentation of ``brainpy.optim.LARS`` prints its formula. The momentum is
        an average, and its norm is the denominator:

        .. math::
            v' &= \mu v + (1 - \mu) (g + \lambda w) \\
            w' &= w - \mathrm{lr} \, \frac{\eta |w|}{|v'| + \epsilon} \, v'

        with a ratio of 1 where \|w\| or \|v'\| is 0. With ``tc=1`` and ``eps=0`` it is
        the formula of its documentation exactly.

        Parameters
        ----------
        lr, train_vars, momentum, weight_decay, tc, eps, name
            As those of the class.

        Returns
        -------
        LARS
        """
        made = cls(lr, train_vars, momentum, weight_decay, tc, eps, name)
        made.config = replace(
            made.config,
            denominator="momentum",
            lr_placement="outside",
            dampening=momentum,
        )
        return made

    @property
    def lr(self) -> Rate:
        """The learning rate, as a callable: ``lr()`` is that of the next update.

        A scheduler is returned as it is; of the others, ``lr(i)`` is the rate after `i`
        updates. It may be set to all that the class takes; a float is a constant of a
        compiled function, so that another makes JAX compile again.
        """
        lr = self.__dict__["lr"]
        return lr if hasattr(lr, "step_call") else self._rate

    @lr.setter
    def lr(self, lr: Rate) -> None:
        if _is_constant(lr):
            _check_constant(native(lr))
        self.__dict__["lr"] = jnp.asarray(lr) if isinstance(lr, np.ndarray) else lr

    def _rate(self, step: Scalar = None) -> Scalar:
        lr = self.__dict__["lr"]
        if _is_constant(lr):
            return native(lr)
        return lr(read(self.step_count) if step is None else step)

    def __repr__(self) -> str:
        """Show the hyper-parameters."""
        config = self.config
        how = ".lamb_paper" if config.denominator == "momentum" else ""
        return (
            f"{type(self).__name__}{how}(lr={self.__dict__['lr']!r}, "
            f"momentum={config.momentum}, weight_decay={config.weight_decay}, "
            f"tc={config.trust_coefficient}, eps={config.eps})"
        )

    def register_train_vars(
        self, train_vars: Mapping[str, AnyVariable] | None = None
    ) -> None:
        """Train more variables, from a momentum of zero.

        Parameters
        ----------
        train_vars : dict of str to variable, optional
            Variables of ours, of flax.nnx or of BrainPy, all of the same type, of any
            shape and a floating or complex dtype. What is trained already under the
            same name is left as it is.

        Raises
        ------
        TypeError, ValueError
            It is no dict of such variables, or a name or a variable is taken. None is
            registered then.
        """
        new = self._checked({} if train_vars is None else train_vars)
        if not new:
            return
        kind = variable_type(next(iter(new.values())))
        self.register_implicit_vars(
            {f"{key}_m": kind(jnp.zeros_like(read(w))) for key, w in new.items()}
        )
        self.vars_to_train.update(new)
        norms = {key: norm_dtype(read(w)) for key, w in new.items()}
        self._stats.update({key: kind(jnp.zeros(3, norms[key])) for key in new})
        if variable_type(self.step_count) is not kind:
            self.step_count = kind(read(self.step_count))

    def _checked(self, train_vars: Mapping[str, AnyVariable]) -> Variables:
        """Return those that are new, after checking them together with the others."""
        if not isinstance(train_vars, Mapping):
            raise TypeError(
                f"train_vars is a {type(train_vars).__name__}, expected a dict of "
                "variables by name"
            )
        known = self.vars_to_train
        new = {key: w for key, w in train_vars.items() if known.get(key) is not w}
        for key, w in new.items():
            _check_trainable(key, w)
            if key in known:
                raise ValueError(
                    f"train_vars[{key!r}] is another variable than the one trained "
                    "under that name: choose another name"
                )
        named = {**known, **new}
        if len({id(w) for w in named.values()}) < len(named):
            raise ValueError(
                f"train_vars holds one variable under two names, among {[*named]}: "
                "register it once"
            )
        if len({variable_type(w) for w in named.values()}) > 1:
            raise TypeError(
                "train_vars mixes variables of larskit.jax, flax.nnx or brainpy: use "
                "one optimizer for each"
            )
        return new

    def register_vars(
        self, train_vars: Mapping[str, AnyVariable] | None = None
    ) -> None:
        """Do `register_train_vars`, under its old name."""
        warnings.warn("use register_train_vars() instead", stacklevel=2)
        self.register_train_vars(train_vars)

    def train_vars(
        self, method: str = "absolute", level: int = -1, include_self: bool = True
    ) -> Variables:
        """Collect the weights, and the trainable variables of the nodes below.

        Parameters
        ----------
        method, level, include_self
            See `vars`.

        Returns
        -------
        dict of str to variable
        """
        found = super().train_vars(method, level, include_self)
        if include_self:
            prefix = f"{self.name}." if method == "absolute" else ""
            found.update({prefix + key: w for key, w in self.vars_to_train.items()})
        return found

    def check_grads(self, grads: Mapping[str, Array]) -> None:
        """Refuse gradients that do not fit the weights.

        Parameters
        ----------
        grads : mapping of str to array
            See `update`.

        Raises
        ------
        ValueError
            One is missing, has no weight, or has another shape than its weight.
        TypeError
            One is no array, or has another dtype than its weight.
        """
        self._fitted(grads)

    def _fitted(self, grads: Mapping[str, Array]) -> dict[str, Array]:
        if not isinstance(grads, Mapping):
            raise TypeError(
                f"grads is a {type(grads).__name__}, expected a dict of gradients by "
                "the names of the weights"
            )
        known = self.vars_to_train
        check_same("grads", grads, known, "expected one for each trained variable")
        return {key: _gradient(grads, key, w) for key, w in known.items()}

    def update(self, grads: Mapping[str, Array]) -> None:
        """Move the weights one step along their gradients.

        Parameters
        ----------
        grads : mapping of str to array
            One for each weight, under its name, of its shape and dtype: arrays of JAX,
            NumPy or BrainPy, or variables.

        Raises
        ------
        ValueError, TypeError
            As `check_grads` does. Nothing has moved then.
        """
        fitted = self._fitted(grads)
        lr = native(self.lr())
        moved = []
        for key, w in self.vars_to_train.items():
            m = self.implicit_vars[f"{key}_m"]
            new_w, new_m, stats = rule.step(
                read(w), fitted[key], read(m), lr, self.config
            )
            moved += [(w, new_w), (m, new_m), (self._stats[key], jnp.stack(stats[:3]))]
        for variable, value in (*moved, (self.step_count, read(self.step_count) + 1)):
            write(variable, value)
        if scheduler := getattr(self.__dict__["lr"], "step_call", None):
            scheduler()

    def layer_stats(self) -> dict[str, LayerStats]:
        """Return the statistics of the last update.

        Returns
        -------
        dict of str to LayerStats
            By the names of the weights: the floats ``weight_norm`` (before the update),
            ``gradient_norm`` and ``trust_ratio``; ``adapted`` and ``decayed`` are True.
            Empty before the first update. This waits for the device.
        """
        if int(read(self.step_count)) == 0:
            return {}
        return {
            key: LayerStats(*np.asarray(read(stats)).tolist())
            for key, stats in self._stats.items()
        }

    def portable_state(self) -> PortableState:
        """Return the state in the form that every framework reads.

        Returns
        -------
        PortableState
            A copy, for `larskit.state.write_state`; ``save_optimizer`` calls this.
        """
        rate = native(self.lr())
        momentum = {
            key: to_numpy(read(self.implicit_vars[f"{key}_m"]))
            for key in self.vars_to_train
        }
        layers = {key: hyperparameters(rate, self.config) for key in momentum}
        return PortableState(int(read(self.step_count)), layers, momentum)

    def load_portable_state(
        self, state: PortableState, *, names: Names = None, convert: bool = False
    ) -> None:
        """Take a state from any framework; ``load_optimizer`` calls this.

        Parameters
        ----------
        state, names, convert
            See `larskit.state.load_optimizer`. Where the learning rate is one
            number it becomes the saved one.

        Raises
        ------
        ValueError, TypeError
            It does not fit, or does not say how many steps were taken. Nothing is set
            then.
        """
        weights = {key: read(w) for key, w in self.vars_to_train.items()}
        layers = {key: hyperparameters(None, self.config) for key in weights}
        found = state.fitted(layers, weights, names=names, convert=convert)
        step = found.counted_by(type(self).__name__)
        rate = self._resumed_rate(found)
        found = found.converted({key: {**x, "lr": rate} for key, x in layers.items()})
        moved = [(self.step_count, _filled(step, read(self.step_count)))]
        for key in weights:
            m = self.implicit_vars[f"{key}_m"]
            moved.append((m, _filled(found.momentum.get(key, 0.0), read(m))))
        for variable, value in moved:
            write(variable, value)
        self._set_constant(rate)

    def _resumed_rate(self, state: PortableState) -> float:
        """Return the rate of the next update: the saved one, or that of a schedule."""
        if not _is_constant(self.__dict__["lr"]):
            steps = () if hasattr(self.lr, "step_call") else (state.step,)
            return float(native(self.lr(*steps)))
        return float(state.resumed_lr(self.vars_to_train, native(self.lr())))

    def _set_constant(self, rate: float) -> None:
        lr = self.__dict__["lr"]
        if variable_type(lr):
            write(lr, _filled(rate, read(lr)))
        elif _is_constant(lr):
            self.lr = _filled(rate, lr) if isinstance(lr, jax.Array) else rate

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Return what JAX may trace, and the rest, see `tree_unflatten`.

        Returns
        -------
        dynamic_values : tuple
            The weights, the state, and a learning rate that is an array, a variable or
            a pytree.
        aux : tuple
            Everything else; hashable.

        Raises
        ------
        TypeError
            The learning rate is a scheduler that is not a pytree, whose count JAX would
            not see.
        """
        lr = self.__dict__["lr"]
        if hasattr(lr, "step_call") and jax.tree_util.all_leaves([lr]):
            raise TypeError(
                f"the scheduler {lr!r} is not a pytree, so JAX cannot pass its state "
                "on: register its class in jax.tree_util, or pass a callable of the "
                "step count as lr"
            )
        return super().tree_flatten()


def _filled(x: Scalar | np.ndarray, array: Array) -> Array:
    """Return `x`, a number or an array, with the shape, dtype and place of `array`."""
    exact = np.asarray(x, array.dtype)  # refuses an int that is too large
    return from_numpy(np.broadcast_to(exact, array.shape), array)


def _is_constant(lr: Rate) -> bool:
    return variable_type(lr) is not None or not callable(lr)


def _check_constant(lr: Scalar) -> None:
    check_lr(lr)
    if not (is_number(lr) or is_array(lr)):
        raise TypeError(
            f"lr is a {type(lr).__name__}, expected a number, a variable, a scheduler "
            "or a callable of the step count"
        )
    if np.shape(lr):
        raise ValueError(f"lr has the shape {np.shape(lr)}, expected one number")


def _check_trainable(key: object, w: object) -> None:
    if not isinstance(key, str):
        raise TypeError(f"train_vars has the key {key!r}, expected a string")
    if variable_type(w) is None:
        raise TypeError(
            f"train_vars[{key!r}] is a {type(w).__name__}, expected a variable of "
            "larskit.jax, flax.nnx or brainpy: wrap it in larskit.jax.TrainVar"
        )
    check_floating(read(w), f"train_vars[{key!r}]")


def _gradient(grads: Mapping[str, Array], key: str, w: AnyVariable) -> Array:
    g, what = native(grads[key]), f"grads[{key!r}]"
    check_array(g, what)
    return checked_like(g, read(w), what)
