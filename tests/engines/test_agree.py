"""Every engine against the reference, on one table of options, dtypes and layers."""

import itertools
from typing import Any

import pytest
import torch

from larskit.config import Config
from larskit.engines import foreach, native, reference

ENGINES = {"foreach": foreach, "native": native}
SHAPES = [(64, 3, 3, 3), (17,), (1,), (), (0,), (41, 127), (3, 5_000)]
AXES = {
    "denominator": ("paper", "decayed_gradient", "gradient", "momentum"),
    "lr_placement": ("inside", "outside"),
    "momentum": (0.9, 0.0),
    "nesterov": (False, True),
    "dampening": (0.0, 0.3),
    "clip": (False, True),
}
EXTRAS = [
    {"maximize": True},
    {"adapt": False},
    {"decay": False},
    {"threshold": 6.0},
    {"eps": 1e-3, "weight_decay": 0.0},
    {"maximize": True, "decay": False, "nesterov": True, "clip": True},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def configs():
    for values in itertools.product(*AXES.values()):
        options = dict(zip(AXES, values, strict=True))
        try:
            yield Config(weight_decay=0.01, trust_coefficient=0.02, **options)
        except ValueError:
            continue
    for options in EXTRAS:
        yield Config(**{"weight_decay": 0.01, "trust_coefficient": 0.02} | options)


def layers(dtype, generator):
    return [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]


def ulps(dtype, *operands):
    """Two ulp of the largest operand, element by element; four in float64."""
    real = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    largest = torch.stack([x.abs().double() for x in operands]).amax(0)
    ulp = torch.finfo(real).eps * largest + torch.finfo(real).smallest_normal
    return (4 if dtype == torch.float64 else 2) * ulp


def one_step(engine, state, g, lr, config) -> Any:
    w, v = ([None if x is None else x.clone() for x in column] for column in state)
    return (w, v), engine.step_(w, [x.clone() for x in g], v, lr, config)


@pytest.mark.parametrize("config", list(configs()), ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_each_step_agrees_with_the_reference(name, config):
    for dtype in DTYPES:
        if name == "native" and dtype.is_complex:
            continue
        generator = torch.Generator().manual_seed(0)
        w = layers(dtype, generator)
        state: Any = w, [None] * len(w)
        for lr in (0.5, 1.5, torch.tensor(0.3), 0.0):
            g = layers(dtype, generator)
            new, lengths = one_step(reference, state, g, lr, config)
            theirs, their_lengths = one_step(ENGINES[name], state, g, lr, config)
            for ours, other in zip(lengths, their_lengths, strict=True):
                torch.testing.assert_close(other, ours, rtol=1e-6, atol=0)
            for i, w_i in enumerate(state[0]):
                v_i = new[1][i] if new[1][i] is not None else w_i
                bound = ulps(dtype, w_i, new[0][i], v_i, g[i])
                assert ((theirs[0][i] - new[0][i]).abs() <= bound).all(), (dtype, i)
                assert theirs[0][i].dtype == dtype
                if config.momentum == 0:
                    assert theirs[1][i] is None
                else:
                    assert ((theirs[1][i] - v_i).abs() <= bound).all(), (dtype, i)
                    assert theirs[1][i].dtype == dtype
            state = new


@pytest.mark.parametrize("engine", [reference, *ENGINES.values()])
def test_norms_that_are_given_are_used(engine):
    w, g, v = [torch.ones(4)], [torch.ones(4)], [None]
    norms = torch.tensor([8.0], dtype=torch.float64), torch.tensor([2.0]).double()
    config = Config(trust_coefficient=1.0)
    assert engine.step_(w, g, v, 0.25, config, norms).ratio.tolist() == [4.0]
    torch.testing.assert_close(w[0], torch.zeros(4))


@pytest.mark.parametrize("engine", [reference, *ENGINES.values()])
def test_lengths(engine):
    found = engine.lengths([torch.tensor([3.0, 4.0]), torch.zeros(2, 0), torch.ones(4)])
    assert found.dtype == torch.float64
    assert found.tolist() == [5.0, 0.0, 2.0]


@pytest.mark.parametrize("engine", [reference, *ENGINES.values()])
def test_gradients_keep_their_bits(engine):
    for config in configs():
        w, g, v = ([torch.randn(3, 4)] for _ in range(3))
        before = g[0].clone()
        engine.step_(w, g, v, 0.1, config)
        assert torch.equal(g[0], before)
        assert g[0].data_ptr() != v[0].data_ptr()


@pytest.mark.parametrize("engine", [reference, *ENGINES.values()])
def test_a_new_buffer_shares_no_memory(engine):
    w, g = [torch.ones(3)], [torch.ones(3)]
    v: list[Any] = [None]
    engine.step_(w, g, v, 1.0, Config(adapt=False))
    assert len({x.data_ptr() for x in (w[0], g[0], v[0])}) == 3


@pytest.mark.parametrize("engine", [reference, *ENGINES.values()])
def test_layers_with_and_without_a_buffer_in_one_call(engine):
    config = Config(adapt=False, dampening=0.5)
    w, g = ([torch.ones(2), torch.ones(2)] for _ in range(2))
    v: list[Any] = [torch.ones(2), None]
    engine.step_(w, g, v, 1.0, config)
    torch.testing.assert_close(v, [torch.full((2,), 1.4), torch.ones(2)])
    torch.testing.assert_close(w, [torch.full((2,), -0.4), torch.zeros(2)])
