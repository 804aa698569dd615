"""The state of a LARS of Keras in the form that every framework reads."""

from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
from keras import ops

from larskit.arrays import Scalar, from_numpy, to_numpy
from larskit.config import Config
from larskit.keras.variables import Variable, path_of, tensor
from larskit.state import Names, PortableState
from larskit.state.portable import LayerTable, described

if TYPE_CHECKING:
    from larskit.keras.optimizer import LARS


def portable_state(optimizer: "LARS") -> PortableState:
    """Return a copy of the state, see `LARS.portable_state`."""
    every = _calls_per_step(optimizer)
    step, rest = divmod(int(optimizer._iterations), every)
    if rest:
        raise ValueError(
            f"{rest} of {every} gradients are accumulated, and they are not part of a "
            "portable state: save after the step"
        )
    layers = _layers(optimizer)
    kept = layers if step else ()  # a first step has no buffers
    momentum = {layer.path: to_numpy(tensor(layer.buffer)) for layer in kept}
    return PortableState(step, _table(layers, _rate(optimizer, step)), momentum)


def load_portable_state(
    optimizer: "LARS",
    state: PortableState,
    *,
    names: Names = None,
    convert: bool = False,
) -> None:
    """Set the state, see `LARS.load_portable_state`."""
    layers = _layers(optimizer)
    weights = {layer.path: layer.variable for layer in layers}
    table = _table(layers, None)
    found = state.fitted(table, weights, names=names, convert=convert)
    step = found.counted_by("the optimizer", one_for_all=True)
    rate = own = _rate(optimizer, step)
    if _has_constant_rate(optimizer):
        rate = found.resumed_lr(weights, own)
    momentum = found.converted(_table(layers, rate)).momentum
    for layer in layers:
        zeros = np.zeros(layer.buffer.shape)
        new = from_numpy(momentum.get(layer.path, zeros), tensor(layer.buffer))
        layer.buffer.assign(new)
    optimizer._iterations.assign(step * _calls_per_step(optimizer))
    if _has_constant_rate(optimizer):
        optimizer.learning_rate = rate
    if optimizer.gradient_accumulation_steps:
        optimizer._backend_reset_gradient_accumulators()
    if optimizer.use_ema:
        _restart_averages(optimizer)


class _Layer(NamedTuple):
    path: str
    variable: Variable
    buffer: Variable
    config: Config


def _layers(optimizer: "LARS") -> list[_Layer]:
    if not optimizer.built:
        raise ValueError(
            f"{optimizer.name!r} has no state yet: call "
            "build(model.trainable_variables)"
        )
    pairs = zip(optimizer._trainable_variables, optimizer.momentums, strict=True)
    return [
        _Layer(path_of(variable), variable, buffer, optimizer._config(index))
        for index, (variable, buffer) in enumerate(pairs)
        if buffer is not None  # Keras writes the gradient into it: scales of float8
    ]


def _table(layers: list[_Layer], rate: float | None) -> LayerTable:
    rows = ((layer.path, rate, layer.config) for layer in layers)
    return described(rows, "give the layers of the model names of their own")


def _calls_per_step(optimizer: "LARS") -> int:
    """Return how many calls of `apply` make one step."""
    return optimizer.gradient_accumulation_steps or 1


def _has_constant_rate(optimizer: "LARS") -> bool:
    return isinstance(optimizer._learning_rate, keras.Variable)


def _rate(optimizer: "LARS", step: int) -> float:
    """Return the learning rate of the next step, after `step` of them."""
    rate: Scalar = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate((step + 1) * _calls_per_step(optimizer) - 1)
    else:
        rate = optimizer.learning_rate
    return float(to_numpy(tensor(rate)))


def _restart_averages(optimizer: "LARS") -> None:
    """Set the moving averages of the weights to the present weights."""
    pairs = zip(
        optimizer._trainable_variables,
        optimizer._model_variables_moving_average,
        strict=True,
    )
    for variable, average in pairs:
        if average is not None:
            optimizer.assign(average, ops.copy(variable))  # JAX donates none twice
