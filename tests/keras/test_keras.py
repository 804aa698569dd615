"""`larskit.keras.LARS` on every backend, each in a process of its own."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import larskit.jax
import larskit.torch
from larskit.config import Config
from larskit.jax import TrainVar
from larskit.state import load_optimizer, read_state, save_optimizer

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras

import larskit.keras

LARS: Any = larskit.keras.LARS
# Keras's variables are older than NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")

ALL = {
    *("cases", "narrow", "averages", "loss_scale", "missing", "stateless", "portable"),
    *("fit", "distributed", "schedule", "jit", "mixed", "saved", "sparse", "slices"),
}
# Only TensorFlow has slices, and Keras has the others not everywhere; torch.compile
# takes so long that a slow test calls it.
CHECKS = {
    "jax": ALL - {"slices"},
    "torch": ALL - {"slices", "distributed", "jit"},
    "tensorflow": ALL - {"stateless"},
}
PROGRAM = Path(__file__).parent / "live" / "program.py"
SHAPES = {"kernel": (5, 4), "bias": (4,), "cube": (2, 3, 2)}
STEPS = 6
HOW: dict[str, Any] = {"weight_decay": 1e-2, "trust_coefficient": 1e-2, "eps": 1e-5}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"weight_decay": 0.0},
    "paper": HOW,
    "no momentum": {**HOW, "momentum": 0.0},
    "nesterov": {**HOW, "nesterov": True},
    "dampening": {**HOW, "dampening": 0.4, "maximize": True},
    "momentum": {
        **HOW,
        "denominator": "momentum",
        "lr_placement": "outside",
        "dampening": 0.9,
    },
    "decayed_gradient": {
        **HOW,
        "denominator": "decayed_gradient",
        "lr_placement": "outside",
    },
    "gradient": {**HOW, "denominator": "gradient", "clip": True, "eps": 1e-3},
    "threshold": {**HOW, "threshold": 3.0},
    "all": {**HOW, "adapt": True, "decay": True},
    "patterns": {**HOW, "adapt": ["k*", "b*"], "decay": "cube"},
}
EVERY = {**HOW, "adapt": True, "decay": True}
# Keras's own, and what each makes of the gradients of one step.
OWN: dict[str, Any] = {
    "clipnorm": (0.5, lambda gs: [g * min(1, 0.5 / np.linalg.norm(g)) for g in gs]),
    "clipvalue": (0.1, lambda gs: [np.clip(g, -0.1, 0.1) for g in gs]),
    "global_clipnorm": (0.5, lambda gs: [g * min(1, 0.5 / total(gs)) for g in gs]),
}
ACCUMULATED = {**HOW, "dampening": 0.3, "gradient_accumulation_steps": 3}


def total(arrays):
    return np.sqrt(sum(np.sum(x**2) for x in arrays))


def draw(seed):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    data = {name: normal(*shape) for name, shape in SHAPES.items()}
    for number in range(10):
        data |= {f"{name}.{number}": normal(*SHAPES[name]) for name in SHAPES}
    for i, shape in enumerate([(8, 6), (6,), (6, 3), (3,)]):
        data[f"w{i}"] = normal(*shape)
    data |= {"x": normal(48, 8), "y": normal(48, 3)}
    data |= {"table": normal(9, 5), "out": normal(20, 1)}
    return {**data, "rows": rng.integers(0, 9, (16, 4)).astype("float32")}


DATA = draw(0)


def tensors(suffix="", scale=1.0, dtype=torch.float32):
    return {
        name: torch.nn.Parameter(torch.tensor(DATA[name + suffix] * scale).to(dtype))
        for name in SHAPES
    }


def step(optimizer, params, gradients, without=()):
    for (name, p), g in zip(params.items(), gradients, strict=True):
        p.grad = None if name in without else torch.tensor(g).to(p.dtype)
    optimizer.step()


def gradients(number):
    return [DATA[f"{name}.{number}"] for name in SHAPES]


def reference(steps=range(STEPS), change=gradients, scale=1.0, dtype=None, **how):
    """Return what larskit.torch makes of the same weights and gradients, per step."""
    params = tensors(scale=scale, dtype=dtype or torch.float32)
    without = how.pop("without", ())
    optimizer = larskit.torch.LARS(params.items(), lr=2.0, **how)
    found = []
    for number in steps:
        step(optimizer, params, change(number), without)
        found.append([p.detach().double().numpy().copy() for p in params.values()])
    return found


def trained(epochs=3, rate: Any = lambda step: 2.0):
    """Return the trajectory of the net of the program, by larskit.torch."""
    w = [torch.nn.Parameter(torch.tensor(DATA[f"w{i}"])) for i in range(4)]
    optimizer = larskit.torch.LARS(w, lr=2.0, **HOW)
    x, y = torch.tensor(DATA["x"]), torch.tensor(DATA["y"])
    found = []
    for number in range(3 * epochs):
        rows = slice(number % 3 * 16, number % 3 * 16 + 16)
        out = torch.tanh(x[rows] @ w[0] + w[1]) @ w[2] + w[3]
        optimizer.zero_grad()
        (out - y[rows]).square().mean().backward()
        optimizer.param_groups[0]["lr"] = rate(number)
        optimizer.step()
        if number % 3 == 2:
            found.append([p.detach().double().numpy().copy() for p in w])
    return found


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(np.asarray(a) - b) <= tolerance * np.linalg.norm(b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make what the program starts from, the state of larskit.torch among it."""
    folder = tmp_path_factory.mktemp("keras")
    cases = {**CASES, "accumulated": ACCUMULATED}
    cases |= {name: {**HOW, name: value} for name, (value, _) in OWN.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    params = tensors()
    named = {f"net.{name}": p for name, p in params.items()}
    optimizer = larskit.torch.LARS(named.items(), lr=2.0, **EVERY)
    for number in range(2):
        step(optimizer, params, gradients(number))
    save_optimizer(optimizer, folder / "torch.safetensors", step=2)
    after = {f"{name}.after": p.detach().numpy() for name, p in params.items()}
    arrays: dict[str, Any] = {**DATA, **after}
    np.savez(folder / "data.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Run the program on all backends at once, and return what they found."""
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda pair: run(folder, *pair), CHECKS.items()))
    return dict(zip(CHECKS, found, strict=True))


def run(folder, backend, checks):
    two_devices = "--xla_force_host_platform_device_count=2"
    file = folder / f"{backend}.json"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), str(file), *checks],
        env={**os.environ, "KERAS_BACKEND": backend, "XLA_FLAGS": two_devices},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


def each_backend(test):
    """Mark a test of what the processes of the backends have found."""
    return pytest.mark.integration(pytest.mark.parametrize("backend", CHECKS)(test))


@each_backend
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_pytorch(results, backend, case):
    assert_close(results[backend]["cases"][case], reference(**CASES[case])[-1], 2e-6)


@each_backend
@pytest.mark.parametrize("name", OWN)
def test_gradients_are_clipped_first(results, backend, name):
    clip = OWN[name][1]
    expected = reference(change=lambda number: clip(gradients(number)), **HOW)
    assert_close(results[backend]["cases"][name], expected[-1])


@each_backend
def test_accumulated_gradients_make_one_step(results, backend):
    def mean(number):
        several = [gradients(i) for i in range(3 * number, 3 * number + 3)]
        return [np.mean(gs, axis=0) for gs in zip(*several, strict=True)]

    expected = reference(range(2), mean, **HOW, dampening=0.3)
    assert_close(results[backend]["cases"]["accumulated"], expected[-1])


@each_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_variables_are_stepped_wide(results, backend, dtype):
    kind = getattr(torch, dtype)
    expected = reference(scale=100.0, dtype=kind, **HOW)[-1]
    tolerance = float(torch.finfo(kind).eps)
    assert_close(results[backend]["narrow"][dtype], expected, tolerance)


@each_backend
def test_averages_of_the_weights(results, backend):
    found, average = results[backend]["averages"], None
    for weights, expected in zip(found["trajectory"], reference(**HOW), strict=True):
        assert_close(weights, expected)
        former = average or expected
        average = [(a + w) / 2 for a, w in zip(former, expected, strict=True)]
    assert average is not None
    assert_close(found["final"], average)


@each_backend
def test_a_scaled_loss_that_overflows_is_no_step(results, backend):
    found = results[backend]["loss_scale"]
    assert_close(found["untouched"], [DATA[name] for name in SHAPES], 0)
    assert found["steps"] == 3
    assert_close(found["weights"], reference(range(3), **HOW, dampening=0.5)[-1])


@each_backend
def test_a_variable_without_gradient_stays(results, backend):
    expected = reference(**HOW, without=["bias"])[-1]
    assert_close(results[backend]["missing"], expected)


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_stateless_step(results, backend):
    assert_close(results[backend]["stateless"], reference(**HOW, dampening=0.3)[-1])


@each_backend
def test_fit_is_a_training_of_pytorch(results, backend):
    for found, expected in zip(results[backend]["fit"], trained(), strict=True):
        assert_close(found, expected)
    for found, other in zip(
        results[backend]["fit"], results["jax"]["fit"], strict=True
    ):
        assert_close(found, [np.asarray(x) for x in other])


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_fit_on_two_devices(results, backend):
    assert_close(results[backend]["distributed"], trained()[-1])


@each_backend
def test_fit_with_a_schedule(results, backend):
    expected = trained(rate=lambda step: 4.0 * 0.5 ** (step // 3))[-1]
    assert_close(results[backend]["schedule"], expected)


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_fit_without_a_compiler(results, backend):
    assert_close(results[backend]["jit"], trained()[-1])


@pytest.mark.slow
def test_fit_with_the_compiler_of_pytorch(folder):
    assert_close(run(folder, "torch", ["jit"])["jit"], trained()[-1])


@each_backend
def test_fit_in_mixed_precision(results, backend):
    found = results[backend]["mixed"]
    assert (found["optimizer"], found["steps"]) == ("LossScaleOptimizer", 6)
    assert_close(found["weights"], trained()[-1], 1e-2)


@each_backend
def test_a_loaded_model_goes_on_identically(results, backend):
    found = results[backend]["saved"]
    assert found["one"] == found["other"]
    first = results["jax"]["saved"]["one"]
    assert_close(found["one"], [np.asarray(x) for x in first])


@each_backend
def test_sparse_gradients_are_those_of_whole_layers(results, backend):
    first = [np.asarray(x) for x in results["jax"]["sparse"]]
    assert_close(results[backend]["sparse"], first)
    assert np.linalg.norm(first[0] - DATA["table"]) > 1e-2


@pytest.mark.integration
def test_slices_of_tensorflow(results):
    sparse, raw, dense, raw_dense = results["tensorflow"]["slices"]
    assert sparse == dense == raw == raw_dense


@each_backend
def test_a_state_goes_from_pytorch_through_keras_to_jax(results, folder, backend):
    expected, found = reference(range(10), **EVERY), results[backend]["portable"]
    assert found["step"] == 2
    assert_close(found["weights"], expected[5], 1e-6)
    pairs = zip(SHAPES, found["weights"], strict=True)
    weights = {name: TrainVar(np.asarray(w, "float32")) for name, w in pairs}
    optimizer = larskit.jax.LARS(1.0, weights, tc=1e-2, weight_decay=1e-2, eps=1e-5)
    file = folder / f"through {backend}.safetensors"
    assert load_optimizer(optimizer, file).step == 6
    for number in range(6, 10):
        optimizer.update(dict(zip(SHAPES, gradients(number), strict=True)))
    assert_close([w.value for w in weights.values()], expected[9], 1e-6)


def variables(**dtypes):
    return [
        keras.Variable(DATA[name], name=name, dtype=dtypes.get(name, "float32"))
        for name in SHAPES
    ]


def train(optimizer, weights, numbers):
    for number in numbers:
        optimizer.apply(gradients(number), weights)
    return [np.asarray(w.value) for w in weights]


def renewed(optimizer):
    return keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))


@keras.saving.register_keras_serializable(package="tests")
def is_kernel(path, variable):
    return path == "kernel" and len(variable.shape) == 2


def is_cube(path, variable):
    return path == "cube"


@pytest.mark.parametrize(
    "how",
    [
        *CASES.values(),
        {"maximize": True, "clip": True, "nesterov": True, "threshold": np.float32(1)},
        {"adapt": re.compile("CUBE|bias", re.IGNORECASE), "decay": is_kernel},
        {"adapt": ["kernel", re.compile("^c")], "decay": False},
        {"clipvalue": 0.2, "use_ema": True, "ema_momentum": 0.5, "name": "other"},
        {"global_clipnorm": 0.2, "gradient_accumulation_steps": 2},
    ],
)
def test_a_configuration_makes_the_same_optimizer(how):
    one = LARS(2, **how)
    other = renewed(one)
    assert json.loads(json.dumps(one.get_config())) == other.get_config()
    for name, value in {"learning_rate": 2.0, **how}.items():
        assert getattr(other, name) == value
    found = train(one, variables(), range(4))
    assert_close(train(other, variables(), range(4)), found, 0)
    assert renewed(one).get_config() == one.get_config()


def test_a_schedule_is_part_of_the_configuration():
    rate = keras.optimizers.schedules.ExponentialDecay(4.0, 3, 0.5)
    optimizer = renewed(LARS(rate))
    assert [float(optimizer._learning_rate(i)) for i in (0, 3)] == [4.0, 2.0]


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("by", ["var_list", "var_names"])
@pytest.mark.parametrize(
    ("exclude", "what"),
    [("exclude_from_adaptation", "adapt"), ("exclude_from_weight_decay", "decay")],
)
def test_exclusions_are_kept(exclude, what, by, built):
    weights = variables()
    optimizer = LARS(2.0, **EVERY)
    getattr(optimizer, exclude)(weights)  # which the next call replaces
    getattr(optimizer, exclude)(**{by: ["cub"] if by == "var_names" else weights[2:]})
    if built:
        optimizer.build(weights)
        optimizer = renewed(optimizer)
    expected = reference(**{**EVERY, what: ["kernel", "bias"]})[-1]
    for one in (renewed(optimizer), optimizer):
        assert_close(train(one, variables(), range(STEPS)), expected)


def test_what_was_chosen_goes_with_the_choice():
    optimizer = LARS(2.0, **EVERY)
    optimizer.build(variables())
    for change in ({"adapt": False}, {"excluded_adapt": ["."]}):
        other = LARS.from_config({**optimizer.get_config(), **change})
        found = train(other, variables(), range(STEPS))
        assert_close(found, reference(**{**EVERY, "adapt": False})[-1])
    other = renewed(optimizer)
    other.decay = False
    found = train(other, variables(), range(STEPS))
    assert_close(found, reference(**{**EVERY, "decay": False})[-1])


def test_configurations_are_made_again_only_after_a_change(monkeypatch):
    variables = [keras.Variable(np.ones((2, 2))), keras.Variable(np.ones(2))]
    optimizer = LARS(1.0)
    optimizer.apply([np.ones((2, 2)), np.ones(2)], variables)
    made = []
    monkeypatch.setattr(Config, "__post_init__", lambda self: made.append(self))
    optimizer.apply([np.ones((2, 2)), np.ones(2)])
    assert made == []
    optimizer.eps = 0.5
    optimizer.apply([np.ones((2, 2)), np.ones(2)])
    assert {config.eps for config in made} == {0.5}


def test_hyperparameters_may_be_set_between_steps():
    optimizer, weights = LARS(2.0, **HOW), variables()
    assert optimizer.weight_decay == HOW["weight_decay"]
    assert LARS(2.0).weight_decay == 0.0
    train(optimizer, weights, range(1))
    optimizer.weight_decay, optimizer.momentum, optimizer.learning_rate = 0.1, 0.5, 1.0
    params = tensors()
    expected = larskit.torch.LARS(params.items(), lr=2.0, **HOW)
    step(expected, params, gradients(0))
    expected.param_groups[0].update(weight_decay=0.1, momentum=0.5, lr=1.0)
    step(expected, params, gradients(1))
    found = train(optimizer, weights, range(1, 2))
    assert_close(found, [p.detach().numpy() for p in params.values()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_state_goes_to_pytorch_and_back(tmp_path, dtype):
    how = {**HOW, "dampening": 0.3, "nesterov": True}
    narrow, kind = dict.fromkeys(SHAPES, dtype), getattr(torch, dtype)
    optimizer, weights = LARS(2.0, **how), variables(**narrow)
    train(optimizer, weights, range(3))
    save_optimizer(optimizer, tmp_path / "state")
    state = read_state(tmp_path / "state")
    assert {x.dtype.name for x in state.momentum.values()} == {dtype}
    params = {
        w.name: torch.nn.Parameter(torch.tensor(np.asarray(w, "float32")).to(kind))
        for w in weights
    }
    other = larskit.torch.LARS(params.items(), lr=1.0, **how)
    load_optimizer(other, tmp_path / "state")
    again, copies = LARS(1.0, **how), variables(**narrow)
    again.build(copies)
    for w, copy in zip(weights, copies, strict=True):
        copy.assign(w)
    load_optimizer(again, tmp_path / "state")
    for number in range(3, 8):
        step(other, params, gradients(number))
    found = train(optimizer, weights, range(3, 8))
    assert_close(train(again, copies, range(3, 8)), found, 0)
    tolerance = 2e-6 if dtype == "float32" else float(torch.finfo(kind).eps)
    expected = [p.detach().float().numpy() for p in params.values()]
    assert_close([np.asarray(w, "float32") for w in found], expected, tolerance)


def test_a_state_in_the_middle_of_everything():
    """A schedule stays, averages restart, accumulated gradients are dropped."""
    how = {**HOW, "gradient_accumulation_steps": 2, "use_ema": True}
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([4], [4.0, 1.0])
    weights, optimizer = variables(), LARS(rate, **how)
    train(optimizer, weights, range(4))
    state = optimizer.portable_state()
    assert (state.step, state.layers["cube"]["lr"]) == (2, 1.0)
    train(optimizer, weights, range(4, 5))
    with pytest.raises(ValueError, match="1 of 2 gradients are accumulated"):
        optimizer.portable_state()
    before = [np.asarray(w) for w in weights]
    optimizer.load_portable_state(state)
    assert int(optimizer.iterations) == 2
    assert int(optimizer._iterations) == 4
    optimizer.finalize_variable_values(weights)
    assert_close([np.asarray(w) for w in weights], before, 0)
    other, copies = LARS(rate, **how), variables()
    other.build(copies)
    for w, copy in zip(weights, copies, strict=True):
        copy.assign(w)
    other.load_portable_state(state)
    found = train(optimizer, weights, range(5, 7))
    assert_close(train(other, copies, range(5, 7)), found, 0)
    assert not np.array_equal(found[0], before[0])


def test_momentum_is_converted_at_the_saved_rate():
    inside, weights = LARS(4.0, **HOW), variables()
    train(inside, weights, range(2))
    outside, copies = LARS(1.0, lr_placement="outside", **HOW), variables()
    outside.build(copies)
    for w, copy in zip(weights, copies, strict=True):
        copy.assign(w)
    outside.load_portable_state(inside.portable_state(), convert=True)
    found = train(outside, copies, range(2, 6))
    assert_close(found, train(inside, weights, range(2, 6)), 1e-6)


def built(names=tuple(SHAPES), **how):
    optimizer = LARS(2.0, **how)
    optimizer.build([keras.Variable(np.ones((2, 2)), name=name) for name in names])
    return optimizer


def load(dampening=0.0, taker=0.0, **changes):
    state = built(dampening=dampening).portable_state()
    optimizer = built(dampening=taker)
    optimizer.load_portable_state(dataclasses.replace(state, **changes))
    return optimizer


def test_a_state_without_buffers_is_one_of_zeros():
    assert built(dampening=0.5).portable_state().momentum == {}
    assert int(load(dampening=0.5, taker=0.5).iterations) == 0
    optimizer = load(step=3)
    assert int(optimizer.iterations) == 3
    assert not any(np.any(v.value) for v in optimizer.momentums)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: LARS(-1.0), ValueError, "learning_rate must be a finite number of"),
        (lambda: LARS("1"), TypeError, "learning_rate must be .*, got '1': pass a num"),
        (lambda: LARS(1.0, momentum=1.0), ValueError, "momentum must be at least 0 "),
        (lambda: LARS(1.0, weight_decay=None), TypeError, "got None: pass a number"),
        (lambda: LARS(1.0, nesterov=1.5), TypeError, "nesterov must be True or Fal"),
        (lambda: LARS(1.0, denominator="momentum"), ValueError, "lr_placement='outs"),
        (lambda: LARS(1.0, adapt=3), TypeError, "adapt must be None, True, False, a"),
        (lambda: LARS(1.0, lr=3), ValueError, r"not recognized: \{'lr': 3\}"),
        (lambda: built(adapt="*w"), ValueError, "adapt='\\*w' matches no parameter"),
        (
            lambda: LARS(1.0, adapt=is_cube).get_config(),
            ValueError,
            "adapt=<function is_cube .* cannot be saved: decorate the function with",
        ),
        (
            lambda: LARS(1.0).exclude_from_weight_decay(var_names="bias"),
            TypeError,
            r"var_names is the string 'bias', .*: pass \['bias'\]",
        ),
        (
            lambda: LARS(1.0).exclude_from_adaptation(["bias"]),
            TypeError,
            "'bias' is a str, expected a variable: pass names in var_names",
        ),
        (
            lambda: built().exclude_from_adaptation(var_names=["bias"]),
            ValueError,
            "'lars' is built already: exclude variables before its first step",
        ),
        (
            lambda: LARS.from_config(
                {"learning_rate": 1.0, "excluded_decay": ["^w$"]}
            ).build(variables()),
            ValueError,
            r"decay \(\^w\$\) match none of the variables kernel, bias, cube: check",
        ),
        (
            lambda: LARS(1.0).build([keras.Variable([1], name="n", dtype="int32")]),
            TypeError,
            "n has the dtype int32, expected one of float16,",
        ),
        (lambda: LARS(1.0).portable_state(), ValueError, r"call build\(model.trainab"),
        (
            lambda: built(names=["w", "w"]).portable_state(),
            ValueError,
            "two layers are called 'w', .*: give the layers of the model names of",
        ),
        (lambda: load(step=None), ValueError, "does not say how many steps were tak"),
        (lambda: load(taker=0.5), ValueError, "'kernel' has in effect dampening=0.5"),
        (
            lambda: load(dampening=0.5, taker=0.5, step=1),
            ValueError,
            "'kernel' has no momentum buffer after 1 steps",
        ),
    ],
)
def test_errors_say_what_to_do(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_the_statistics_of_the_last_step():
    w = keras.Variable([[3.0, 4.0]], name="kernel")
    b = keras.Variable([1.0], name="bias")
    optimizer = larskit.keras.LARS(
        0.1,
        weight_decay=0.5,
        trust_coefficient=1.0,
        eps=0.25,
        layer_stats=True,
    )
    assert optimizer.layer_stats() == {}
    optimizer.build([w, b])
    assert optimizer.layer_stats() == {}
    grads = [keras.ops.convert_to_tensor(x) for x in ([[0.6, 0.8]], [2.0])]
    optimizer.apply(grads)
    found = optimizer.layer_stats()
    assert set(found) == {"kernel", "bias"}
    assert found["kernel"][:3] == pytest.approx((5, 1, 5 / 3.75), rel=1e-6)
    assert found["bias"][:3] == pytest.approx((1, 2, 1))
    assert [found[name][3:] for name in found] == [
        (True, True, None),
        (False, False, None),
    ]
    twin = larskit.keras.LARS.from_config(optimizer.get_config())
    twin.build([w, b])
    assert len(twin.variables) == len(optimizer.variables)
    with pytest.raises(ValueError, match="make it with layer_stats=True"):
        larskit.keras.LARS(0.1).layer_stats()


def test_the_repr_names_what_is_excluded():
    optimizer = larskit.keras.LARS(8.0, weight_decay=1e-4, clip=True, decay=True)
    first = "LARS(learning_rate=8.0, weight_decay=0.0001, clip=True"
    assert repr(optimizer) == f"{first})"
    kernel = keras.Variable([[1.0]], name="kernel")
    bias = keras.Variable([1.0], name="bias")
    optimizer.build([kernel, bias])
    assert repr(optimizer) == f"{first}\n  not adapted (1): 'bias'\n)"
