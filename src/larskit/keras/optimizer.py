"""LARS as a `keras.optimizers.Optimizer`."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

import keras
from keras import ops

from larskit import rule
from larskit.arrays import (
    Array,
    Scalar,
    cast,
    check_floating,
    dtype_name,
    to_numpy,
    widen,
)
from larskit.config import (
    NAMES,
    PER_LAYER,
    SHARED,
    Config,
    Denominator,
    LrPlacement,
    check_lr,
    documented,
    is_number,
)
from larskit.keras import portable
from larskit.keras.variables import Variable, dense, path_of, tensor
from larskit.names import listed
from larskit.rule import LayerStats
from larskit.select import Selection, check_matched, select
from larskit.state import Names, PortableState
from larskit.state.portable import hyperparameters

Rate = Any  # a number, a schedule of Keras, or a callable without arguments
Chosen = Sequence[Any]  # of a layer: its path, whether it is adapted, whether decayed
VarList = Iterable[Variable] | None
VarNames = Iterable[str] | None


@documented
@keras.saving.register_keras_serializable(package="larskit")
class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive rate scaling.

    A layer is one variable. It moves by ``learning_rate * trust_coefficient * |w|``,
    independent of the gradient's magnitude; see `larskit.rule` for the formula.

    Parameters
    ----------
    learning_rate : float, LearningRateSchedule, or callable
        Learning rate, at least 0; a callable takes no arguments. With the default trust
        coefficient good rates are about a hundred times those of SGD, 1 to 30.
    {momentum:threshold}
    adapt, decay : None, bool, pattern, sequence of patterns, or callable
        Which layers get a trust ratio and which are decayed. None (default): those of
        two or more dimensions. True: all. False: none. A pattern of ``variable.path``
        (`fnmatch`, or a compiled expression), or a callable ``(path, variable) ->
        bool``, which must be registered with Keras if the optimizer is to be saved. A
        layer that is not adapted steps at the raw learning rate.
    {maximize}
    layer_stats : bool, default=False
        Keep the statistics of the last step in three more numbers for each variable,
        for the method `layer_stats`.
    name : str
        The optimizer's name.
    **base_kwargs
        Those of `keras.optimizers.Optimizer`: ``clipnorm``, ``clipvalue``,
        ``global_clipnorm``, ``use_ema``, ``gradient_accumulation_steps`` and others.

    Raises
    ------
    ValueError, TypeError
        For a hyper-parameter out of range; when the optimizer is built, for a pattern
        or an exclusion that matches nothing.

    Notes
    -----
    Weight decay is applied once, by the rule, and not again by Keras's base class.

    Hyper-parameters are attributes and may be set between steps, `adapt` and `decay`
    until the optimizer is built; what Keras has compiled does not see it.

    Sparse gradients are made dense, since the norm of a layer needs all of it. The
    first step, which dampening leaves out, is the optimizer's, not the variable's.

    To load a model that was saved with this optimizer, import `larskit.keras` first.

    References
    ----------
    Y. You, I. Gitman, B. Ginsburg, "Large Batch Training of Convolutional Networks",
    arXiv 1708.03888, 2017.

    Examples
    --------
    >>> import keras
    >>> import larskit.keras
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    >>> model.compile(larskit.keras.LARS(2.0, weight_decay=1e-4), loss="mse")
    """

    _configs: list[Config] | None = None  # of the variables; None: to be made again

    def __init__(
        self,
        learning_rate: Rate,
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
        layer_stats: bool = False,
        name: str = "lars",
        **base_kwargs: Any,
    ) -> None:
        """Check the arguments."""
        given = {name: x for name, x in locals().items() if name in NAMES}
        Config.pick(given)
        for key in PER_LAYER:
            select(given[key], [], [], key)
        check_lr(learning_rate, "learning_rate")
        if is_number(learning_rate):
            learning_rate = float(learning_rate)
        super().__init__(
            learning_rate, weight_decay=weight_decay, name=name, **base_kwargs
        )
        for key, value in given.items():
            setattr(self, key, value)
        self._keeps_stats = bool(layer_stats)
        self._stats: list[Variable] = []
        self._excluded_adapt: Sequence[str] = ()
        self._excluded_decay: Sequence[str] = ()
        self._chosen: Sequence[Chosen] = ()
        self._chosen_by: Sequence[Any] = ()

    def exclude_from_weight_decay(
        self, var_list: VarList = None, var_names: VarNames = None
    ) -> None:
        """Leave some of the variables that `decay` selects undecayed.

        Parameters
        ----------
        var_list : iterable of variable, optional
            Variables, known by their paths from then on: all that share a path are
            excluded together.
        var_names : iterable of str, optional
            Regular expressions; a variable in whose path one is found is excluded.

        Raises
        ------
        ValueError, TypeError
            The optimizer is built already, or the arguments are of another kind.

        Notes
        -----
        A second call replaces the first one. Unlike the base class's, exclusions are
        part of the configuration, and saved.
        """
        self._excluded_decay = self._exclusion(var_list, var_names)

    def exclude_from_adaptation(
        self, var_list: VarList = None, var_names: VarNames = None
    ) -> None:
        """Leave some of the variables that `adapt` selects at the raw learning rate.

        Parameters
        ----------
        var_list, var_names
            See `exclude_from_weight_decay`, as for the rest.
        """
        self._excluded_adapt = self._exclusion(var_list, var_names)

    def _exclusion(self, var_list: VarList, var_names: VarNames) -> Sequence[str]:
        """Return the regular expressions of the excluded paths."""
        if self.built:
            raise ValueError(
                f"{self.name!r} is built already: exclude variables before its first "
                "step"
            )
        if isinstance(var_names, str):
            raise TypeError(
                f"var_names is the string {var_names!r}, expected a list of strings: "
                f"pass [{var_names!r}]"
            )
        exact = [rf"^{re.escape(path_of(variable))}$" for variable in var_list or ()]
        return [re.compile(found).pattern for found in (*exact, *(var_names or ()))]

    def build(self, variables: Sequence[Variable]) -> None:
        """Make the momentum buffers, and decide which layers are adapted and decayed.

        Parameters
        ----------
        variables : sequence of variable
            What is trained, of a floating dtype.

        Raises
        ------
        ValueError, TypeError
            Naming the variable, pattern or exclusion that does not fit. Nothing is made
            then.
        """
        if self.built:
            return
        for variable in variables:
            check_floating(tensor(variable), path_of(variable))
        chosen = self._choose(variables)
        super().build(variables)
        self._chosen, self._chosen_by = chosen, self._choice()
        self.momentums = self.add_optimizer_variables(variables, "momentum")
        if self._keeps_stats:
            self._stats = [
                self.add_variable((3,), dtype="float32", name=f"layer_stats_{i}")
                for i in range(len(variables))
            ]

    def _choice(self) -> list[Any]:
        """Return all that decides which layers are adapted and which are decayed."""
        return [self.adapt, self.decay, self._excluded_adapt, self._excluded_decay]

    def _choose(self, variables: Sequence[Variable]) -> Sequence[Chosen]:
        """Return the path of each variable, and whether it is adapted and decayed.

        For the variables of a loaded model that has been found out before it was saved:
        it could not be now, since loading takes the model's name off some paths.
        """
        paths = [path_of(variable) for variable in variables]
        former = [path for path, *_ in self._chosen]
        if self._chosen_by == self._choice() and _end_alike(paths, former):
            return self._chosen
        adapt, decay = (self._selected(key, variables) for key in PER_LAYER)
        return [list(row) for row in zip(paths, adapt, decay, strict=True)]

    def _selected(self, what: str, variables: Sequence[Variable]) -> Sequence[bool]:
        selection, paths = getattr(self, what), [path_of(x) for x in variables]
        chosen = select(selection, paths, variables, what)
        check_matched(selection, chosen, what)
        excluded = getattr(self, f"_excluded_{what}")
        out = [any(re.search(x, path) for x in excluded) for path in paths]
        if excluded and not any(out):
            raise ValueError(
                f"the exclusions from {what} ({', '.join(excluded)}) match none of the "
                f"variables {', '.join(paths)}: check the names"
            )
        return [a and not b for a, b in zip(chosen, out, strict=True)]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a new hyper-parameter counts from the next step."""
        super().__setattr__(name, value)
        if name in (*SHARED, "_chosen"):
            self.__dict__["_configs"] = None

    def _config(self, index: int) -> Config:
        """Return the hyper-parameters of one variable."""
        configs = self._configs
        if configs is None:
            shared = Config.pick(vars(self))
            configs = [replace(shared, adapt=a, decay=d) for _, a, d in self._chosen]
            self.__dict__["_configs"] = configs  # which Keras need not track
        return configs[index]

    def apply(
        self,
        grads: Sequence[Array],
        trainable_variables: Sequence[Variable] | None = None,
    ) -> None:
        """Move the variables one step along their gradients.

        Parameters
        ----------
        grads : sequence of array or None
            One for each variable; where there is none, the variable stays.
        trainable_variables : sequence of variable, optional
            By default those that the optimizer was built for.
        """
        full = [None if g is None else dense(g) for g in grads]
        super().apply(full, trainable_variables)

    def update_step(
        self, gradient: Array, variable: Variable, learning_rate: Scalar
    ) -> None:
        """Move one variable; `apply` calls this."""
        index = self._get_variable_index(variable)
        buffer = self.momentums[index]
        w, v, lr = map(tensor, (variable, buffer, learning_rate))
        g = cast(tensor(gradient), dtype_name(widen(w)))
        config = self._config(index).at_step(tensor(self.iterations))
        new_w, new_v, stats = rule.step(w, g, v, lr, config)
        self.assign(variable, new_w)
        self.assign(buffer, new_v)
        if self._keeps_stats:
            numbers = [ops.cast(x, "float32") for x in stats[:3]]
            self.assign(self._stats[index], ops.stack(numbers))

    def layer_stats(self) -> dict[str, LayerStats]:
        """Return the statistics of the last step.

        Returns
        -------
        dict of str to LayerStats
            By ``variable.path``: the floats ``weight_norm`` (before the step),
            ``gradient_norm`` and ``trust_ratio``, in float32, and the bools ``adapted``
            and ``decayed``. Empty before the first step. This waits for the device.

        Raises
        ------
        ValueError
            The optimizer was not made with ``layer_stats=True``.
        """
        if not self._keeps_stats:
            raise ValueError(
                f"{self.name!r} keeps no statistics: make it with layer_stats=True"
            )
        if not self.built or int(self.iterations) == 0:
            return {}
        found = {}
        for (path, adapt, decay), stats in zip(self._chosen, self._stats, strict=True):
            w_norm, q, ratio = to_numpy(tensor(stats)).tolist()
            found[path] = LayerStats(w_norm, q, ratio, adapt, decay)
        return found

    def __repr__(self) -> str:
        """Show the hyper-parameters, and which variables are excluded."""
        rate = self._learning_rate
        if isinstance(rate, keras.Variable):
            rate = float(to_numpy(tensor(rate)))
        shared, plain = vars(Config.pick(vars(self))), vars(Config())
        options = {name: shared[name] for name in SHARED if shared[name] != plain[name]}
        shown = {"learning_rate": rate, **options}
        text = ", ".join(f"{name}={x!r}" for name, x in shown.items())
        lines = [f"{type(self).__name__}({text}"]
        for what, place in (("not adapted", 1), ("not decayed", 2)):
            if paths := [row[0] for row in self._chosen if not row[place]]:
                lines.append(f"  {what} ({len(paths)}): {listed(paths)}")
        return "\n".join(lines) + (")" if len(lines) == 1 else "\n)")

    def _apply_weight_decay(self, variables: Sequence[Variable]) -> None:
        """Do nothing, for the rule decays."""

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` makes an equal optimizer of, without its state.

        Returns
        -------
        dict
            Plain values only.

        Raises
        ------
        ValueError
            `adapt` or `decay` is a function that is not registered with Keras.
        """
        plain = hyperparameters(None, Config.pick(vars(self)))
        choice = {
            "adapt": _saved(self.adapt, "adapt"),
            "decay": _saved(self.decay, "decay"),
            "excluded_adapt": list(self._excluded_adapt),
            "excluded_decay": list(self._excluded_decay),
        }
        return {
            **super().get_config(),
            **{key: plain[key] for key in SHARED},
            "layer_stats": self._keeps_stats,
            **choice,
            "chosen": [list(row) for row in self._chosen],
            "chosen_by": choice if self._chosen_by == self._choice() else None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Return the optimizer that `get_config` describes.

        Parameters
        ----------
        config : dict
            What `get_config` returned.
        custom_objects : dict, optional
            Functions and classes by name, besides those that are registered.

        Returns
        -------
        LARS
        """
        config = dict(config)
        by, chosen = config.pop("chosen_by", None), config.pop("chosen", ())
        same = by is not None and all(config.get(key) == by[key] for key in by)
        excluded = {key: config.pop(f"excluded_{key}", ()) for key in PER_LAYER}
        for key in PER_LAYER:
            config[key] = _restored(config.get(key), custom_objects)
        optimizer = super().from_config(config, custom_objects)
        optimizer._excluded_adapt = excluded["adapt"]
        optimizer._excluded_decay = excluded["decay"]
        if same:
            optimizer._chosen, optimizer._chosen_by = chosen, optimizer._choice()
        return optimizer

    def portable_state(self) -> PortableState:
        """Return the state for any framework, see `larskit.state.save_optimizer`.

        The layers are named by ``variable.path``. The averages of ``use_ema`` are not
        in it.

        Returns
        -------
        PortableState
            A copy.

        Raises
        ------
        ValueError
            The optimizer is not built, gradients are being accumulated, or two
            variables have one path.
        """
        return portable.portable_state(self)

    def load_portable_state(
        self, state: PortableState, *, names: Names = None, convert: bool = False
    ) -> None:
        """Take a state of any framework, see `larskit.state.load_optimizer`.

        Parameters
        ----------
        state, names, convert
            See `larskit.state.load_optimizer`. A learning rate that is no schedule
            becomes the saved one. The averages of ``use_ema`` start again from the
            present weights.

        Raises
        ------
        ValueError, TypeError
            It does not fit, does not say how many steps were taken, or the optimizer is
            not built. Nothing is set then.
        """
        portable.load_portable_state(self, state, names=names, convert=convert)


def _end_alike(paths: list[str], others: list[str]) -> bool:
    """Whether the paths are the others, except for prefixes."""
    pairs = zip((f"/{x}" for x in paths), (f"/{x}" for x in others), strict=False)
    alike = (a.endswith(b) or b.endswith(a) for a, b in pairs)
    return len(paths) == len(others) and all(alike)


def _saved(selection: Selection, what: str) -> Any:
    """Return a selection in plain values."""
    if isinstance(selection, re.Pattern):
        return {"regex": selection.pattern, "flags": selection.flags}
    if isinstance(selection, (list, tuple)):
        return [_saved(item, what) for item in selection]
    if not callable(selection):
        return selection
    name = keras.saving.get_registered_name(selection)
    if keras.saving.get_registered_object(name) is not selection:
        raise ValueError(
            f"{what}={selection!r} cannot be saved: decorate the function with "
            "keras.saving.register_keras_serializable(), or pass name patterns"
        )
    return keras.saving.serialize_keras_object(selection)


def _restored(saved: Any, custom_objects: Any) -> Any:
    if isinstance(saved, list):
        return [_restored(item, custom_objects) for item in saved]
    if isinstance(saved, dict) and "regex" in saved:
        return re.compile(saved["regex"], saved["flags"])
    if isinstance(saved, dict):
        return keras.saving.deserialize_keras_object(saved, custom_objects)
    return saved
