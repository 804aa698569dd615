"""Every engine against the reference, on one table of options, dtypes and layers."""

from typing import Any

import pytest
import torch
from cases import CONFIGS, DEVICE, DTYPES, SHAPES, covering, step_

from larskit.config import Config
from larskit.engines import Layers, foreach, native, reference, triton

ENGINES = {"foreach": foreach, "native": native, "triton": triton}
if DEVICE != "cpu":
    del ENGINES["native"]
ALL = [reference, *ENGINES.values()]
# Of norms and ratios: foreach may fuse multiplications and additions, others may not.
ROUNDING = {"foreach": 1e-6, "native": 1e-14, "triton": 1e-14}
RATES = (0.5, 1.5, torch.tensor(0.3), 0.0)


def layers(dtype, generator):
    return [torch.randn(s, generator=generator).to(dtype).to(DEVICE) for s in SHAPES]


def dtypes(name):
    """Return those that an engine takes."""
    return DTYPES[:4] if name == "native" else DTYPES


def ulps(dtype, *operands):
    """Two ulp of the largest operand, element by element; four in float64."""
    real = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    largest = torch.stack([x.abs().double() for x in operands]).amax(0)
    ulp = torch.finfo(real).eps * largest + torch.finfo(real).smallest_normal
    return (4 if dtype == torch.float64 else 2) * ulp


def one_step(engine, state, g, lr, config) -> Any:
    w, v = ([None if x is None else x.clone() for x in column] for column in state)
    return (w, v), step_(engine, w, [x.clone() for x in g], v, lr, config)


def each_step_agrees(name, config, dtype):
    generator = torch.Generator().manual_seed(0)
    w = layers(dtype, generator)
    state: Any = w, [None] * len(w)
    for lr in RATES:
        lr = lr.to(DEVICE) if isinstance(lr, torch.Tensor) else lr
        g = layers(dtype, generator)
        new, stats = one_step(reference, state, g, lr, config)
        theirs, their_stats = one_step(ENGINES[name], state, g, lr, config)
        for ours, other in zip(stats[:3], their_stats[:3], strict=True):
            torch.testing.assert_close(other, ours, rtol=ROUNDING[name], atol=0)
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


def some(name):
    """Return options and dtypes; few for Triton's interpreter, which is slow."""
    rows = covering(dtypes(name))
    return rows[::3] if name == "triton" and DEVICE == "cpu" else rows


@pytest.mark.parametrize(
    ("name", "config", "dtype"),
    [(name, *row) for name in ENGINES for row in some(name)],
)
def test_each_step_agrees_with_the_reference(name, config, dtype):
    each_step_agrees(name, config, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("index", "config"), [*enumerate(CONFIGS)])
@pytest.mark.parametrize("name", ENGINES)
def test_each_step_of_every_combination_agrees_with_the_reference(name, index, config):
    every = dtypes(name)
    interpreted = name == "triton" and DEVICE == "cpu"  # each program takes its time
    for dtype in [every[index % len(every)]] if interpreted else every:
        each_step_agrees(name, config, dtype)


def ones(*shape):
    return torch.ones(shape, device=DEVICE)


@pytest.mark.parametrize("engine", ALL)
def test_norms_that_are_given_are_used(engine):
    w, g, v = [ones(4)], [ones(4)], [None]
    norms = 8 * ones(1).double(), 2 * ones(1).double()
    config = Config(trust_coefficient=1.0)
    assert step_(engine, w, g, v, 0.25, config, norms).trust_ratio.tolist() == [4.0]
    torch.testing.assert_close(w[0], 0 * ones(4))


@pytest.mark.parametrize("engine", ALL)
def test_norms(engine):
    w = [torch.tensor([3.0, 4.0], device=DEVICE), ones(2, 0), ones(4)]
    g = [x.clone() for x in w]
    layers = Layers(w, g, [None] * 3, [True] * 3, [True] * 3)
    for found in engine.bind(layers, Config()).norms(Config()):
        assert found.dtype == torch.float64
        assert found.tolist() == [5.0, 0.0, 2.0]


@pytest.mark.parametrize("engine", ALL)
def test_gradients_keep_their_bits(engine):
    for config in CONFIGS[::7]:
        w, g, v = ([torch.randn(3, 4).to(DEVICE)] for _ in range(3))
        before = g[0].clone()
        step_(engine, w, g, v, 0.1, config)
        assert torch.equal(g[0], before)
        assert g[0].data_ptr() != v[0].data_ptr()


@pytest.mark.parametrize("engine", ALL)
def test_a_new_buffer_shares_no_memory(engine):
    w, g = [ones(3)], [ones(3)]
    v: list[Any] = [None]
    step_(engine, w, g, v, 1.0, Config(adapt=False))
    assert len({x.data_ptr() for x in (w[0], g[0], v[0])}) == 3


@pytest.mark.parametrize("engine", ALL)
def test_layers_with_and_without_a_buffer_in_one_call(engine):
    config = Config(adapt=False, dampening=0.5)
    w, g = ([ones(2), ones(2)] for _ in range(2))
    v: list[Any] = [ones(2), None]
    step_(engine, w, g, v, 1.0, config)
    torch.testing.assert_close(v, [1.4 * ones(2), ones(2)])
    torch.testing.assert_close(w, [-0.4 * ones(2), 0 * ones(2)])


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_narrow_number_survives(engine, dtype):
    w = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    w = w[w.isfinite()].to(DEVICE)
    before = w.clone()
    config = Config(adapt=False, momentum=0.0)
    step_(engine, [w], [torch.zeros_like(w)], [None], 1.0, config)
    assert torch.equal(w, before)
