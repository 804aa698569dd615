"""State that goes from framework to framework: the next steps are the same."""

import dataclasses
import re
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import larskit.jax
import larskit.torch
from larskit import functional
from larskit.app.models import build
from larskit.jax import TrainVar
from larskit.jax.variables import read
from larskit.state import (
    from_portable,
    load_optimizer,
    read_state,
    save_optimizer,
    to_portable,
    write_state,
)
from larskit.torch import LARS, param_groups

COMMON = {"momentum": 0.8, "weight_decay": 1e-2, "trust_coefficient": 1e-2, "eps": 1e-5}
EVERY = {"adapt": True, "decay": True}
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "momentum": {
        "denominator": "momentum",
        "lr_placement": "outside",
        "dampening": 0.8,
    },
    "decayed_gradient": {
        "denominator": "decayed_gradient",
        "lr_placement": "outside",
        "nesterov": True,
        "clip": True,
    },
    "gradient": {"denominator": "gradient", "dampening": 0.3, "maximize": True},
}
IN_JAX = ("paper", "momentum")
NET = {
    name: tuple(p.shape) for name, p in build("convnet", 1, 10, 8).named_parameters()
}


def draw(shapes, number):
    rng = np.random.default_rng(number)
    return {
        name: rng.standard_normal(shape).astype("float32")
        for name, shape in shapes.items()
    }


class Torch:
    """An API as the tests see it: weights by name, steps, and its state in a file."""

    def __init__(self, weights, lr=2.0, dtype="float32", **options):
        self.weights = {
            name: torch.nn.Parameter(torch.tensor(w).to(getattr(torch, dtype)))
            for name, w in weights.items()
        }
        options = {**COMMON, **EVERY, **options}
        self.optimizer = LARS(self.weights.items(), lr=lr, **options)

    def step(self, grads):
        for name, p in self.weights.items():
            p.grad = torch.tensor(grads[name]).to(p.dtype)
        self.optimizer.step()

    def read(self):
        return {name: p.detach().float().numpy() for name, p in self.weights.items()}

    def save(self, file, step, **how):
        save_optimizer(self.optimizer, file, step=step, **how)

    def load(self, file, **how):
        return load_optimizer(self.optimizer, file, **how)

    def snapshot(self):
        """Everything that a load could change."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        state = {
            name: {key: (x, x.clone()) for key, x in self.optimizer.state[p].items()}
            for name, p in self.weights.items()
            if p in self.optimizer.state
        }
        return rates, state


class Jax:
    def __init__(
        self, weights, lr: Any = 2.0, dtype="float32", kind: Any = TrainVar, **options
    ):
        self.weights = {
            name: kind(jnp.asarray(w, dtype)) for name, w in weights.items()
        }
        own = {**COMMON, **options}
        placement = own.pop("lr_placement", "inside")
        make: Any = larskit.jax.LARS
        if own.pop("denominator", "paper") == "momentum":
            own.pop("dampening")
            make = make.lamb_paper
        own["tc"] = own.pop("trust_coefficient")
        self.optimizer = make(lr, self.weights, **own)
        self.optimizer.config = dataclasses.replace(
            self.optimizer.config, lr_placement=placement
        )

    def step(self, grads):
        dtype = next(iter(self.read_raw().values())).dtype
        self.optimizer.update({k: jnp.asarray(g, dtype) for k, g in grads.items()})

    def read_raw(self):
        return {name: read(w) for name, w in self.weights.items()}

    def read(self):
        return {name: np.asarray(w, "float32") for name, w in self.read_raw().items()}

    def save(self, file, step, **how):
        save_optimizer(self.optimizer, file, step=step, **how)

    def load(self, file, **how):
        return load_optimizer(self.optimizer, file, **how)

    def snapshot(self):
        held = {**self.optimizer.vars(), **self.optimizer.train_vars()}
        kept = {key: read(x) for key, x in held.items()}
        state = {key: {"array": (x, jnp.array(x))} for key, x in kept.items()}
        return [self.optimizer.__dict__["lr"]], state


class NumPy:
    """`functional.update` on nested dicts, whose dotted paths are torch's names."""

    def __init__(self, weights, lr=2.0, dtype="float32", **options):
        self.names, self.lr, self.dtype = [*weights], lr, dtype
        self.options: Any = {**COMMON, **EVERY, **options}
        self.params = self.nested(weights)
        self.state = functional.init(self.params)

    def nested(self, arrays):
        tree: dict[str, Any] = {}
        for name in self.names:
            outer, _, inner = name.rpartition(".")
            tree.setdefault(outer, {})[inner] = self.array(arrays[name])
        return tree

    def array(self, x):
        return x.astype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    def step(self, grads):
        self.params, self.state = functional.update(
            self.params, self.nested(grads), self.state, self.lr, **self.options
        )

    def read(self):
        pairs = ((name, name.rpartition(".")) for name in self.names)
        return {
            name: np.asarray(self.params[outer][inner], "float32")
            for name, (outer, _, inner) in pairs
        }

    def save(self, file, step, names=None):
        assert self.state.count == step
        found = to_portable(self.params, self.state, self.lr, **self.options)
        write_state(found.renamed(names), file)

    def load(self, file, **how):
        found = read_state(file)
        self.state = from_portable(found, self.params, self.lr, **how, **self.options)
        return found

    def snapshot(self):
        return [self.lr], {"": {"state": (self.state, 0)}}


class Trees(NumPy):
    """`functional.update` on tensors of torch."""

    def array(self, x):
        return torch.tensor(x).to(getattr(torch, self.dtype))

    def read(self):
        pairs = ((name, name.rpartition(".")) for name in self.names)
        return {
            name: self.params[outer][inner].float().numpy()
            for name, (outer, _, inner) in pairs
        }


APIS = {"torch": Torch, "jax": Jax, "numpy": NumPy, "torch tree": Trees}


def advance(api, first, last):
    for number in range(first, last):
        api.step(draw(NET, number))


def assert_close(found, expected, tolerance=1e-6):
    assert set(found) == set(expected)
    for name, x in expected.items():
        error = np.linalg.norm(found[name] - x) / np.linalg.norm(x)
        assert error <= tolerance, (name, error)


def assert_untouched(api, before):
    rates, state = api.snapshot()
    assert rates == before[0]
    assert set(state) == set(before[1])
    for name, held in state.items():
        assert set(held) == set(before[1][name])
        for key, (x, _) in held.items():
            former, copy = before[1][name][key]
            assert x is former
            if key != "state":
                np.testing.assert_array_equal(np.asarray(x), np.asarray(copy))


@pytest.mark.parametrize(
    ("case", "giver", "taker"),
    [
        (case, giver, taker)
        for case in CASES
        for giver in APIS
        for taker in APIS
        if case in IN_JAX or "jax" not in (giver, taker)
    ],
)
def test_ten_steps_agree_after_a_handover(tmp_path, case, giver, taker):
    a = APIS[giver](draw(NET, 0), **CASES[case])
    advance(a, 1, 5)
    a.save(tmp_path / "state", 4)
    b = APIS[taker](a.read(), **CASES[case])
    assert b.load(tmp_path / "state").step == 4
    for number in range(5, 15):
        for api in (a, b):
            api.step(draw(NET, number))
        assert_close(b.read(), a.read())
    if taker == "torch" == giver:
        assert_close(b.read(), a.read(), tolerance=0)


def test_a_real_net_goes_around_through_all_of_them(tmp_path):
    layers = islice(build("resnet18", 3, 10, 32).named_parameters(), 18)
    shapes = {name: tuple(p.shape) for name, p in layers}
    alone, file = Torch(draw(shapes, 0)), tmp_path / "state"
    in_jax = {name: f"layers/{name.replace('.', '/')}" for name in shapes}
    back = {value: key for key, value in in_jax.items()}
    carrier: Any = Torch(draw(shapes, 0))
    for leg in range(3):
        for number in range(10):
            grads = draw(shapes, 1 + 10 * leg + number)
            alone.step(grads)
            if isinstance(carrier, Jax):
                grads = {in_jax[name]: g for name, g in grads.items()}
            carrier.step(grads)
        steps, weights = 10 * (leg + 1), carrier.read()
        if leg == 0:  # torch's names to those of JAX, when saving
            assert_close(weights, alone.read(), tolerance=0)
            carrier.save(file, steps, names=in_jax)
            weights = {in_jax[name]: w for name, w in weights.items()}
            carrier = Jax(weights, kind=nnx.Param)
            carrier.load(file)
        elif leg == 1:  # and back, when loading
            weights = {back[name]: w for name, w in weights.items()}
            assert_close(weights, alone.read())
            carrier.save(file, steps)
            carrier = NumPy(weights)
            carrier.load(file, names=in_jax.get)
        else:
            assert_close(weights, alone.read())
            carrier.save(file, steps)
            carrier = Torch(weights)
            assert carrier.load(file).step == 30
    for number in range(100, 110):
        for api in (alone, carrier):
            api.step(draw(shapes, number))
    assert_close(carrier.read(), alone.read())


@pytest.mark.parametrize(
    ("giver", "taker"),
    [("torch", "jax"), ("jax", "torch"), ("torch", "torch"), ("numpy", "torch tree")],
)
@pytest.mark.parametrize("order", [("inside", "outside"), ("outside", "inside")])
@pytest.mark.parametrize("rate", [2.0, 0.3])
def test_the_placement_converts(tmp_path, giver, taker, order, rate):
    a = APIS[giver](draw(NET, 0), rate, lr_placement=order[0])
    advance(a, 1, 5)
    a.save(tmp_path / "state", 4)
    b = APIS[taker](a.read(), rate, lr_placement=order[1])
    before = b.snapshot()
    with pytest.raises(ValueError, match=r"lr_placement='\w+side' here but .* convert"):
        b.load(tmp_path / "state")
    assert_untouched(b, before)
    b.load(tmp_path / "state", convert=True)
    for number in range(5, 15):
        for api in (a, b):
            api.step(draw(NET, number))
        assert_close(b.read(), a.read())


@pytest.mark.parametrize("taker", ["torch", "jax", "numpy"])
@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_no_momentum_converts_at_a_rate_of_zero(tmp_path, taker, placement):
    file, other = tmp_path / "state", {"inside": "outside", "outside": "inside"}
    a = Torch(draw(NET, 0), 0.0, lr_placement=placement)
    b = APIS[taker](draw(NET, 0), 0.0, lr_placement=other[placement])
    a.save(file, 0)
    b.load(file, convert=True)  # there is nothing to convert yet
    advance(a, 1, 2)
    a.save(file, 1)
    before = b.snapshot()
    with pytest.raises(ValueError, match="cannot be converted at the learning rate 0"):
        b.load(file, convert=True)
    assert_untouched(b, before)


def test_momentum_converts_at_a_finite_rate_only():
    a = NumPy(draw(NET, 0))
    advance(a, 1, 2)
    saved = to_portable(a.params, a.state, **a.options)
    for lr in (float("nan"), float("inf"), -1.0):
        layers = {name: {**x, "lr": lr} for name, x in saved.layers.items()}
        with pytest.raises(ValueError, match="cannot be converted at the learning ra"):
            from_portable(
                dataclasses.replace(saved, layers=layers),
                a.params,
                convert=True,
                **{**a.options, "lr_placement": "outside"},
            )


def test_a_state_without_a_rate_converts_at_the_one_that_is_known():
    a = NumPy(draw(NET, 0))
    advance(a, 1, 3)
    saved = to_portable(a.params, a.state, **a.options)
    assert all(layer["lr"] is None for layer in saved.layers.values())
    outside = {**a.options, "lr_placement": "outside", "convert": True}
    with pytest.raises(ValueError, match="at the learning rate None: load it where"):
        from_portable(saved, a.params, **outside)
    for lr, saved_lr in ((4.0, None), (4.0, 2.0), (None, 4.0)):
        known = to_portable(a.params, a.state, saved_lr, **a.options)
        found = from_portable(known, a.params, lr, **outside).momentum
        for outer, held in a.state.momentum.items():
            for inner, v in held.items():
                np.testing.assert_array_equal(found[outer][inner], v / 4)
    b = Torch(draw(NET, 0), 4.0, lr_placement="outside")
    b.optimizer.load_portable_state(saved, convert=True)
    for name, v in b.optimizer.portable_state().momentum.items():
        np.testing.assert_array_equal(v, saved.momentum[name] / 4)


def test_a_schedule_stays_and_converts_at_its_own_rate(tmp_path):
    a = Torch(draw(NET, 0), lr_placement="outside")
    advance(a, 1, 4)
    a.save(tmp_path / "state", 3)
    saved = a.optimizer.portable_state().momentum
    schedule = lambda step: 0.5 * (step + 1)  # noqa: E731
    b = Jax(draw(NET, 0), schedule)
    b.load(tmp_path / "state", convert=True)
    assert b.optimizer.__dict__["lr"] is schedule
    again = b.optimizer.portable_state()
    for name, v in again.momentum.items():
        np.testing.assert_array_equal(v, 2.0 * saved[name])
        assert again.layers[name]["lr"] == 2.0


class Halving:
    """A scheduler as BrainPy's: it counts by itself."""

    def __init__(self):
        self.rate = 8.0

    def step_call(self):
        self.rate /= 2

    def __call__(self):
        return self.rate


def test_a_scheduler_stays_too(tmp_path):
    a, file = Jax(draw(NET, 0), Halving()), tmp_path / "state"
    advance(a, 1, 3)
    a.save(file, 2)
    assert {layer["lr"] for layer in read_state(file).layers.values()} == {2.0}
    b = Jax(draw(NET, 0), Halving())
    b.load(file)
    assert b.optimizer.lr() == 8.0
    c = Torch(draw(NET, 0), 1.0)
    c.load(file)
    assert c.optimizer.param_groups[0]["lr"] == 2.0


@pytest.mark.parametrize(
    "lr",
    [
        7.0,
        np.float32(7),
        jnp.float32(7),
        TrainVar(np.float32(7)),
        nnx.Variable(jnp.float32(7)),
    ],
    ids=["float", "NumPy", "array", "variable", "nnx"],
)
def test_a_constant_rate_of_jax_becomes_the_saved_one(tmp_path, lr):
    a, b = Torch(draw(NET, 0), 1.5), Jax(draw(NET, 0), lr)
    kind = type(b.optimizer.__dict__["lr"])
    a.save(tmp_path / "state", 0)
    b.load(tmp_path / "state")
    assert float(b.optimizer.lr()) == 1.5
    assert isinstance(b.optimizer.__dict__["lr"], (kind, float))
    assert isinstance(lr, np.floating) or type(b.optimizer.__dict__["lr"]) is kind


def test_the_rates_of_groups_return(tmp_path):
    net, file = build("convnet", 1, 10, 8), tmp_path / "state"

    def make(lr, **kwargs):
        return LARS(param_groups(net, **kwargs), lr=lr, momentum=0.8)

    save_optimizer(make(3.0, excluded_lr=0.1), file)
    optimizer = make(torch.tensor(1.0), excluded_lr=1.0)
    tensor = optimizer.param_groups[0]["lr"]
    load_optimizer(optimizer, file)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert (float(tensor), rates) == (3.0, [tensor, 0.1])
    one = LARS(net.named_parameters(), lr=1.0, momentum=0.8)
    with pytest.raises(ValueError, match=r"of '11.weight' is 3.0 and that of '\S+' 0"):
        load_optimizer(one, file)
    assert one.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("lr", [-1.0, float("nan")])
@pytest.mark.parametrize("taker", ["torch", "jax"])
def test_a_saved_rate_that_is_none_is_refused(taker, lr):
    api = APIS[taker](draw(NET, 0))
    saved = api.optimizer.portable_state()
    bad = {name: {**layer, "lr": lr} for name, layer in saved.layers.items()}
    before = api.snapshot()
    with pytest.raises(ValueError, match="the saved lr must be a finite number of at"):
        api.optimizer.load_portable_state(
            dataclasses.replace(saved, layers=bad, step=1)
        )
    assert_untouched(api, before)


@pytest.mark.parametrize(("giver", "taker"), [("torch", "jax"), ("jax", "torch")])
def test_bfloat16_keeps_its_bits(tmp_path, giver, taker):
    a = APIS[giver](draw(NET, 0), dtype="bfloat16")
    advance(a, 1, 3)
    a.save(tmp_path / "state", 2)
    saved = read_state(tmp_path / "state").momentum
    assert {v.dtype for v in saved.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for name in (taker, "numpy", "torch tree"):
        b = APIS[name](a.read(), dtype="bfloat16")
        b.load(tmp_path / "state")
        b.save(tmp_path / "again", 2)
        for key, v in read_state(tmp_path / "again").momentum.items():
            assert v.dtype == saved[key].dtype
            assert v.tobytes() == saved[key].tobytes()
        c = APIS[name](a.read())
        c.load(tmp_path / "state")  # into float32 weights: the same values
        c.save(tmp_path / "float32", 2)
        for key, v in read_state(tmp_path / "float32").momentum.items():
            np.testing.assert_array_equal(v, saved[key].astype("float32"))


@pytest.mark.parametrize("taker", APIS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_converted_is_rounded_once(tmp_path, taker, dtype):
    a = Torch(draw(NET, 0), 0.3, dtype=dtype, lr_placement="outside")
    a.step(draw(NET, 1))
    a.save(tmp_path / "state", 1)
    b = APIS[taker](a.read(), 0.3)
    b.load(tmp_path / "state", convert=True)
    b.save(tmp_path / "again", 1)
    found = read_state(tmp_path / "again").momentum
    for name, v in read_state(tmp_path / "state").momentum.items():
        exact = v.astype("float64") * 0.3
        np.testing.assert_array_equal(found[name], exact.astype("float32"))


def test_loaded_buffers_lie_as_the_weights_do(tmp_path):
    weights = {"w": draw({"w": (4, 3, 2, 2)}, 0)["w"]}
    a = Torch(weights)
    a.step(weights)
    a.save(tmp_path / "state", 1)
    b = Torch(weights)
    p = b.weights["w"]
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    b.load(tmp_path / "state")
    buffer = b.optimizer.state[p]["momentum_buffer"]
    assert (buffer.stride(), buffer.dtype) == (p.stride(), p.dtype)
    assert torch.equal(buffer, a.optimizer.state[a.weights["w"]]["momentum_buffer"])


def test_what_a_state_holds_is_a_copy():
    for name in APIS:
        api = APIS[name](draw(NET, 0))
        api.step(draw(NET, 1))
        if name in ("torch", "jax"):
            saved = api.optimizer.portable_state()
        else:
            saved = to_portable(api.params, api.state, **api.options)
        before = {key: v.copy() for key, v in saved.momentum.items()}
        api.step(draw(NET, 2))
        for key, v in saved.momentum.items():
            np.testing.assert_array_equal(v, before[key])


MISMATCHES: dict[str, tuple[Any, str]] = {
    "missing": (
        lambda s: s.renamed(lambda name: name + "_"),
        r"misses '0.weight', .* and \d more, expected the layers of .*: pass names=",
    ),
    "extra": (
        lambda s: dataclasses.replace(
            s, layers={**s.layers, "more": s.layers["0.weight"]}
        ),
        "has the extra 'more', expected the layers",
    ),
    "shape": (
        lambda s: changed(s, "0.weight", s.momentum["0.weight"].T),
        r"momentum of '0.weight' has the shape .* expected \(16, 1, 3, 3\): nothing is",
    ),
    "complex": (
        lambda s: changed(s, "0.weight", s.momentum["0.weight"] * 1j),
        "'0.weight' has the dtype complex64, but the weights have .*float32: make",
    ),
    "masters": (
        lambda s: dataclasses.replace(s, master=s.momentum),
        "has master weights of '0.weight', .* which the optimizer cannot take: load",
    ),
    **{
        key: (
            lambda s, key=key, value=value: configured(s, "0.weight", **{key: value}),
            f"'0.weight' has in effect {key}=.* here but {key}={value!r} in the saved "
            "state: give the optimizer the saved value",
        )
        for key, value in {
            "momentum": 0.7,
            "weight_decay": 0.5,
            "trust_coefficient": 1.0,
            "eps": 1.0,
            "denominator": "gradient",
            "nesterov": True,
            "dampening": 0.5,
            "clip": True,
            "threshold": 0.25,
            "adapt": False,
            "maximize": True,
            "lr_placement": "beside",
            "unheard_of": 1,
        }.items()
    },
    "decay": (
        lambda s: configured(s, "0.weight", decay=False),
        "'0.weight' has in effect weight_decay=0.01 here but weight_decay=0.0 in the",
    ),
}


def changed(state, name, v):
    return dataclasses.replace(state, momentum={**state.momentum, name: v})


def configured(state, name, **changes):
    layer = {**state.layers[name], **changes}
    return dataclasses.replace(state, layers={**state.layers, name: layer})


@pytest.mark.parametrize("taker", APIS)
@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_state_that_does_not_fit_changes_nothing(tmp_path, taker, mismatch):
    change, message = MISMATCHES[mismatch]
    api = APIS[taker](draw(NET, 0))
    advance(api, 1, 3)
    api.save(tmp_path / "state", 2)
    write_state(change(read_state(tmp_path / "state")), tmp_path / "state")
    before = api.snapshot()
    with pytest.raises(ValueError, match=message):
        api.load(tmp_path / "state", convert=True)
    assert_untouched(api, before)


@pytest.mark.parametrize("taker", APIS)
def test_a_decay_of_zero_is_no_decay(tmp_path, taker):
    a = Torch(draw(NET, 0), weight_decay=0.0, decay=False)
    a.step(draw(NET, 1))
    a.save(tmp_path / "state", 1)
    b = APIS[taker](a.read(), weight_decay=0.0)
    b.load(tmp_path / "state")
    for api in (a, b):
        api.step(draw(NET, 2))
    assert_close(b.read(), a.read())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), cut=st.booleans())
@pytest.mark.parametrize("taker", ["torch", "jax"])
def test_a_damaged_file_changes_nothing(tmp_path, taker, place, cut):
    api = APIS[taker](draw({"w": (2, 3), "b": (3,)}, 0))
    api.step(draw({"w": (2, 3), "b": (3,)}, 1))
    api.save(tmp_path / "state", None if taker == "jax" else 1)
    data = bytearray((tmp_path / "state").read_bytes())
    byte, bit = divmod(int(place * len(data) * 8), 8)
    data[byte] ^= 1 << bit
    (tmp_path / "state").write_bytes(data[:byte] if cut else data)
    before = api.snapshot()
    with pytest.raises(ValueError, match="state"):
        api.load(tmp_path / "state")
    assert_untouched(api, before)


@pytest.mark.parametrize("taker", ["jax", "numpy"])
def test_who_counts_must_be_told_the_step(tmp_path, taker):
    a = Torch(draw(NET, 0))
    a.step(draw(NET, 1))
    a.save(tmp_path / "state", None)
    b = APIS[taker](a.read())
    before = b.snapshot()
    with pytest.raises(ValueError, match="does not say how many steps were taken, wh"):
        b.load(tmp_path / "state")
    assert_untouched(b, before)


def test_the_step_may_be_told_when_loading(tmp_path):
    a, b = Torch(draw(NET, 0)), Jax(draw(NET, 0))
    a.save(tmp_path / "state", None)
    assert b.load(tmp_path / "state", step=12).step == 12
    assert int(b.optimizer.step_count.value) == 12
    before = b.snapshot()
    with pytest.raises(OverflowError):
        b.load(tmp_path / "state", step=2**40)
    assert_untouched(b, before)


@pytest.mark.parametrize("case", ["paper", "gradient"])
@pytest.mark.parametrize("giver", ["torch", "numpy"])
@pytest.mark.parametrize("taker", APIS)
def test_first_steps_stay_first_steps(tmp_path, case, giver, taker):
    """With dampening a layer without a buffer steps otherwise than one with zeros."""
    if (case, taker) == ("gradient", "jax"):
        return
    a = APIS[giver](draw(NET, 0), **CASES[case])
    a.save(tmp_path / "state", 0)
    b = APIS[taker](a.read(), **CASES[case])
    advance(b, 1, 3)
    b.load(tmp_path / "state")
    if taker == "torch":
        assert not b.optimizer.state
    b = APIS[taker](a.read(), **CASES[case])
    b.load(tmp_path / "state")
    for api in (a, b):
        advance(api, 1, 11)
    assert_close(b.read(), a.read())


def test_a_layer_without_gradients_has_no_buffer(tmp_path):
    grads, case = draw(NET, 1), CASES["gradient"]
    a = Torch(draw(NET, 0), **case)
    a.weights["0.weight"].requires_grad_(False)
    for name, p in a.weights.items():
        p.grad = None if name == "0.weight" else torch.tensor(grads[name])
    a.optimizer.step()
    a.save(tmp_path / "state", 1)
    assert set(NET) - set(read_state(tmp_path / "state").momentum) == {"0.weight"}
    b = Torch(a.read(), **case)
    b.step(grads)
    b.load(tmp_path / "state")
    assert b.weights["0.weight"] not in b.optimizer.state
    with pytest.raises(
        ValueError, match=r"'0\.weight' has no momentum buffer after 1 "
    ):
        NumPy(a.read(), **case).load(tmp_path / "state")
    save_optimizer(b.optimizer, tmp_path / "state", step=0)
    with pytest.raises(
        ValueError, match="has a momentum buffer after 0 steps, but Sta"
    ):
        NumPy(a.read(), **case).load(tmp_path / "state")


@pytest.mark.parametrize("taker", APIS)
def test_without_dampening_no_buffer_is_a_buffer_of_zeros(tmp_path, taker):
    grads = draw(NET, 1)
    a = Torch(draw(NET, 0))
    for name, p in a.weights.items():
        p.grad = None if name == "0.weight" else torch.tensor(grads[name])
    a.optimizer.step()
    a.save(tmp_path / "state", 1)
    b = APIS[taker](a.read())
    b.load(tmp_path / "state")
    for api in (a, b):
        api.step(grads)
    assert_close(b.read(), a.read())


def test_every_layer_says_whether_it_is_adapted_and_decayed(tmp_path):
    a = Torch(draw(NET, 0), adapt="*.weight", decay=None)
    a.step(draw(NET, 1))
    a.save(tmp_path / "state", 1)
    found = read_state(tmp_path / "state").layers
    assert {name: (x["adapt"], x["decay"]) for name, x in found.items()} == {
        name: (name.endswith("weight"), len(shape) > 1) for name, shape in NET.items()
    }
    b = NumPy(a.read(), adapt="*.weight", decay=None)
    b.load(tmp_path / "state")
    for api in (a, b):
        api.step(draw(NET, 2))
    assert_close(b.read(), a.read())
    with pytest.raises(ValueError, match=r"has in effect .* here but .* in the saved"):
        Jax(a.read()).load(tmp_path / "state")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_master_weights_travel_between_torch_optimizers(tmp_path, dtype):
    def make(weights, **options):
        return Torch(weights, dtype=dtype, **options)

    a = make(draw(NET, 0), master_weights=True)
    advance(a, 1, 4)
    a.save(tmp_path / "state", 3)
    found = read_state(tmp_path / "state")
    assert set(found.master) == set(NET)
    arrays = (*found.master.values(), *found.momentum.values())
    assert {x.dtype for x in arrays} == {np.dtype("float32")}
    b = make(a.read(), master_weights=True)
    b.load(tmp_path / "state")
    advance(a, 4, 14)
    advance(b, 4, 14)
    assert_close(b.read(), a.read(), tolerance=0)
    b = make(a.read())
    for api in (b, Jax(a.read(), dtype=dtype)):
        before = api.snapshot()
        with pytest.raises(
            ValueError, match=r"load dataclasses.replace\(state, master"
        ):
            api.load(tmp_path / "state")
        assert_untouched(api, before)
    b.optimizer.load_portable_state(dataclasses.replace(found, master={}))
    buffers = [state["momentum_buffer"].dtype for state in b.optimizer.state.values()]
    assert {*map(str, buffers)} == {f"torch.{dtype}"}


def test_parameters_without_names_bear_their_places(tmp_path):
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = LARS([{"params": [p]} for p in weights], lr=1.0)
    save_optimizer(optimizer, tmp_path / "state", names={"0.0": "a", "1.0": "b"})
    assert [*read_state(tmp_path / "state").layers] == ["a", "b"]


def test_two_layers_of_one_name_are_refused():
    pairs = [{"params": [("w", torch.nn.Parameter(torch.ones(2)))]} for _ in range(2)]
    with pytest.raises(ValueError, match="two layers are called 'w'"):
        LARS(pairs, lr=1.0).portable_state()
    params = {"a.b": np.ones(2), "a": {"b": np.ones(2)}}
    with pytest.raises(
        ValueError, match=r"two layers are called 'a\.b', .* rename one"
    ):
        to_portable(params, functional.init(params))


def test_arrays_of_other_frameworks_go_on_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf = pytest.importorskip("tensorflow")
    params = [tf.ones((2, 3)), (tf.cast(tf.ones(3), tf.bfloat16), None)]
    options: Any = {"adapt": True, "momentum": 0.5}
    params, state = functional.update(
        params, params, functional.init(params), 0.5, **options
    )
    saved = to_portable(params, state, 0.5, **options)
    assert [*saved.momentum] == ["0", "1.0"]
    assert saved.momentum["1.0"].dtype == ml_dtypes.bfloat16
    found = from_portable(saved, params, **options)
    assert int(found.count) == 1
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(state), strict=True):
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)


def test_hyperparameters_of_update_only():
    params = np.ones(3)
    with pytest.raises(TypeError, match="rate"):
        to_portable(params, functional.init(params), rate=3)


def test_the_state_of_a_jax_function_is_traced_again():
    params = {"w": jnp.ones((2, 2))}
    _, state = functional.update(params, params, functional.init(params), 1.0)
    found = from_portable(to_portable(params, state), params)
    step = jax.jit(lambda state: functional.update(params, params, state, 1.0))
    for a, b in zip(*(jax.tree.leaves(step(x)) for x in (found, state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_document_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    document = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, document.name, "exec"), scope)
    assert capsys.readouterr().out == "1\n2 0.9\n"
