"""The rule's guarantees, and each option against a restatement in plain floats."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from larskit import norm, rule
from larskit.config import Config

DENOMINATORS = ("paper", "decayed_gradient", "gradient", "momentum")
PLACEMENTS = ("inside", "outside")


def restated(w, g, v, lr, c):
    """One step in float64, written from the published equations, not from rule.py."""
    sign = -1.0 if c.maximize else 1.0
    wd = c.weight_decay if c.decay else 0.0
    u = sign * g + wd * w
    norm_of = lambda x: math.sqrt(float(np.sum(np.abs(x) ** 2)))  # noqa: E731
    y = new_v = u
    if c.denominator == "momentum":
        old = np.zeros_like(w) if v is None else v
        new_v = c.momentum * old + (1 - c.dampening) * u
        y = u + c.momentum * new_v if c.nesterov else new_v
        q = norm_of(y)
    else:
        q = norm_of(u) if c.denominator == "decayed_gradient" else norm_of(g)
    d = q + c.eps + (wd * norm_of(w) if c.denominator == "paper" else 0.0)
    if not c.adapt or norm_of(w) <= c.threshold or (q == 0 and c.zero_guard):
        r = 1.0
    else:
        r = c.trust_coefficient * norm_of(w) / d
        if c.clip:
            r = 1.0 if lr == 0 else min(r / lr, 1.0)
    if c.denominator == "momentum":
        return w - lr * r * y, new_v, r
    x = (lr if c.lr_placement == "inside" else 1.0) * r * u
    new_v = x if v is None else c.momentum * v + (1 - c.dampening) * x
    y = x + c.momentum * new_v if c.nesterov else new_v
    return w - (y if c.lr_placement == "inside" else lr * y), new_v, r


def every_axis():
    axes = {
        "denominator": DENOMINATORS,
        "lr_placement": PLACEMENTS,
        "momentum": (0.9, 0.0),
        "nesterov": (False, True),
        "dampening": (0.0, 0.3),
        "clip": (False, True),
        "maximize": (False, True),
    }
    for values in itertools.product(*axes.values()):
        options = dict(zip(axes, values, strict=True))
        try:
            yield Config(weight_decay=0.01, eps=1e-3, trust_coefficient=0.02, **options)
        except ValueError:
            continue


@pytest.mark.parametrize("config", list(every_axis()))
def test_every_axis_follows_its_equation(config):
    rng = np.random.default_rng(0)
    w, v, lr = rng.normal(size=(5, 3)), None, 0.5
    ours, our_v = w, None
    for step in range(4):
        g = rng.normal(size=w.shape)
        lr = lr * (0.7 if step else 1.0)
        w, v, r = restated(w, g, v, lr, config)
        ours, our_v, found = rule.step(ours, g, our_v, lr, config)
        np.testing.assert_allclose(ours, w, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(our_v, v, rtol=1e-13, atol=1e-15)
        assert found.trust_ratio == pytest.approx(r, rel=1e-13)


@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({"adapt": False}, 1.0),
        ({"threshold": 5.0}, 1.0),
        ({"threshold": 4.9}, 5.0 / (2.0 + 0.5 * 5.0)),
        ({"decay": False}, 5.0 / 2.0),
        ({"eps": 0.5}, 5.0 / (2.0 + 0.5 * 5.0 + 0.5)),
        ({"clip": True}, 1.0),
    ],
)
def test_ratio_of_one_layer(options, ratio):
    config = Config(trust_coefficient=1.0, weight_decay=0.5, **options)
    w, g = np.array([3.0, 4.0]), np.array([0.0, 2.0])
    assert rule.step(w, g, None, 0.1, config)[2].trust_ratio == pytest.approx(ratio)


def test_clipping_at_a_rate_of_zero_gives_one():
    config = Config(clip=True, trust_coefficient=0.5)
    found = rule.step(np.ones(4), np.ones(4), None, 0.0, config)[2]
    assert found.trust_ratio == 1.0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_order_of_operations_in_float32(placement):
    f = np.float32
    config = Config(weight_decay=0.013, lr_placement=placement, dampening=0.3)
    w, g, v = np.random.default_rng(0).normal(size=(3, 5000)).astype(f)
    norms = [np.sqrt(norm.sum_of_squares(x)) for x in (w, g)]
    ratio = 1e-3 * norms[0] / (norms[1] + 0.013 * norms[0] + 0.0)
    r, lr = f(ratio), f(0.37)
    u = g + f(0.013) * w
    x = (lr * r) * u if placement == "inside" else r * u
    new_v = f(0.9) * v + f(1 - 0.3) * x
    new_w = w - (new_v if placement == "inside" else lr * new_v)
    for convert in (np.asarray, torch.from_numpy):
        a, b, c = map(convert, (w, g, v))
        ours, our_v, _ = rule.step(a, b, c, 0.37, config)
        assert np.array_equal(np.asarray(ours), new_w)
        assert np.array_equal(np.asarray(our_v), new_v)


finite = st.floats(-1e3, 1e3, width=32)
arrays = hnp.arrays(
    np.float64, hnp.array_shapes(max_dims=3, max_side=6), elements=finite
)


def pairs():
    shapes = hnp.array_shapes(max_dims=3, max_side=6)
    one = lambda s: hnp.arrays(np.float64, s, elements=st.floats(0.1, 10))  # noqa: E731
    return shapes.flatmap(lambda s: st.tuples(one(s), one(s)))


@given(pairs(), st.sampled_from(DENOMINATORS), st.floats(1e-6, 1e6))
def test_gradient_scale_does_not_matter(pair, denominator, scale):
    w, g = pair
    config = Config(denominator=denominator, lr_placement="outside")
    first, _, _ = rule.step(w, g, None, 0.1, config)
    second, _, _ = rule.step(w, g * scale, None, 0.1, config)
    np.testing.assert_allclose(first, second, rtol=1e-12)


@given(pairs(), st.sampled_from(DENOMINATORS), st.floats(0.01, 10), st.floats(1e-4, 1))
def test_first_step_is_as_long_as_lr_eta_w(pair, denominator, lr, eta):
    w, g = pair
    config = Config(
        denominator=denominator, lr_placement="outside", trust_coefficient=eta
    )
    new, _, _ = rule.step(w, g, None, lr, config)
    assert np.linalg.norm(new - w) == pytest.approx(
        lr * eta * np.linalg.norm(w), rel=1e-9
    )


@given(pairs(), st.sampled_from(DENOMINATORS[:3]), st.booleans(), st.floats(0, 0.99))
def test_placements_are_equivalent_under_a_constant_rate(pair, denominator, nag, mu):
    w, g = pair
    ends = []
    for placement in PLACEMENTS:
        config = Config(
            denominator=denominator,
            lr_placement=placement,
            momentum=mu,
            nesterov=nag and mu > 0,
            weight_decay=0.01,
        )
        x, v = w, None
        for step in range(4):
            x, v, _ = rule.step(x, g * (1 + step), v, 0.3, config)
        ends.append(x)
    np.testing.assert_allclose(*ends, rtol=1e-10)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("zero", ["weights", "gradient", "both"])
def test_zero_norms_step_at_the_raw_rate_and_still_decay(denominator, zero):
    w = np.zeros(3) if zero != "gradient" else np.array([1.0, 2.0, 2.0])
    g = np.zeros(3) if zero != "weights" else np.array([1.0, 2.0, 2.0])
    config = Config(denominator=denominator, lr_placement="outside", weight_decay=0.1)
    new, _, found = rule.step(w, g, None, 0.5, config)
    measured_decay = denominator in ("decayed_gradient", "momentum")
    if zero == "gradient" and measured_decay:
        assert found.trust_ratio == pytest.approx(1e-3 * 3 / (0.1 * 3))
    else:
        assert found.trust_ratio == 1.0
    np.testing.assert_allclose(new, w - 0.5 * found.trust_ratio * (g + 0.1 * w))


def test_without_the_guard_a_zero_gradient_is_decayed_by_its_ratio():
    config = Config(weight_decay=0.5, trust_coefficient=1.0, zero_guard=False)
    w = np.array([3.0, 4.0])
    scaled = rule.scaled_gradient(w, np.zeros(2), config)
    np.testing.assert_allclose(scaled, w)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_nan_fills_the_whole_layer(denominator, where):
    w, g = np.ones(4), np.ones(4)
    (w if where == "weights" else g)[1] = math.nan
    config = Config(denominator=denominator, lr_placement="outside", clip=True)
    new, _, found = rule.step(w, g, None, 0.1, config)
    assert np.isnan(new).all()
    assert np.isnan(found.trust_ratio)


def test_an_infinite_gradient_is_not_hidden():
    new, _, _ = rule.step(
        torch.ones(3), torch.tensor([1.0, math.inf, 1.0]), None, 0.1, Config()
    )
    assert not torch.isfinite(new).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_narrow_layers_do_not_overflow(dtype):
    w = torch.full((1000,), 300.0, dtype=dtype)
    config = Config(trust_coefficient=0.5)
    new, new_v, found = rule.step(w, w, None, 1.0, config)
    assert found.weight_norm.item() == pytest.approx(300 * math.sqrt(1000), rel=1e-2)
    assert new.dtype == new_v.dtype == dtype
    torch.testing.assert_close(new, w * 0.5)


@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"],
)
def test_results_return_in_their_own_dtype(dtype):
    dtype = getattr(torch, dtype)
    w, g = torch.ones(3).to(dtype), torch.full((3,), 2.0).to(dtype)
    new, new_v, found = rule.step(w, g, None, 0.1, Config(trust_coefficient=1.0))
    assert new.dtype == new_v.dtype == dtype
    assert found.trust_ratio.dtype == torch.float64
    expected = torch.full((3,), 0.9).to(dtype)
    torch.testing.assert_close(new, expected)


def test_complex_lengths_are_those_of_the_absolute_values():
    z = np.array([3 + 4j, 0 + 12j])
    assert norm.norm(z) == pytest.approx(13.0)


@given(arrays)
def test_sum_of_squares_is_that_of_exact_arithmetic(x):
    exact = math.fsum(float(e) * float(e) for e in x.ravel())
    assert float(norm.sum_of_squares(x)) == pytest.approx(exact, rel=1e-14, abs=0)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1023, 1024, 1025, 5000, 40_000])
def test_sum_of_squares_has_one_order_in_every_framework(size):
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    block = norm.ROWS * norm.LANES
    blocks = []
    for start in range(0, max(size, 1), block):
        rows = np.zeros(block)
        part = x[start : start + block].astype(np.float64) ** 2
        rows[: len(part)] = part
        lanes = [0.0] * norm.LANES
        for row in rows.reshape(norm.ROWS, norm.LANES):
            lanes = [a + b for a, b in zip(lanes, row, strict=True)]
        blocks.append(fold(lanes))
    expected = fold(blocks)
    assert float(norm.sum_of_squares(x)) == expected
    assert norm.sum_of_squares(torch.from_numpy(x)).item() == expected


def fold(values):
    values = list(values)
    while len(values) > 1:
        half = (len(values) + 1) // 2
        for i in range(len(values) - half):
            values[i] += values[half + i]
        values = values[:half]
    return values[0]


def test_gradients_through_a_zero_layer_are_finite():
    w = torch.zeros(3, requires_grad=True)
    g = torch.zeros(3, requires_grad=True)
    for denominator in DENOMINATORS:
        config = Config(denominator=denominator, lr_placement="outside")
        new, _, _ = rule.step(w, g, None, 0.1, config)
        for gradient in torch.autograd.grad(new.sum(), (w, g)):
            assert torch.isfinite(gradient).all()


def test_a_rate_of_zero_keeps_every_bit_of_the_weights():
    w, g = torch.randn(50), torch.randn(50)
    for config in every_axis():
        assert torch.equal(rule.step(w, g, None, 0.0, config)[0], w)


def test_eps_of_zero_stays_zero():
    tiny = np.full(4, 1e-30)
    ratio = rule.step(np.ones(4), tiny, None, 0.1, Config(trust_coefficient=1.0))[2]
    assert ratio.trust_ratio == pytest.approx(1e30)


def test_norms_that_are_given_are_not_measured_again():
    given_norms = np.float64(8.0), np.float64(2.0)
    config = Config(trust_coefficient=1.0)
    found = rule.step(np.ones(4), np.ones(4), None, 0.1, config, given_norms)[2]
    assert found[:3] == (8.0, 2.0, 4.0)


@pytest.mark.parametrize("scale", [2.0**16, torch.tensor(2.0**16)])
def test_scaled_gradient_of_a_scaled_loss(scale):
    w, g = torch.randn(20), torch.randn(20)
    config = Config(trust_coefficient=1.0, weight_decay=0.1, eps=1e-3)
    plain = rule.scaled_gradient(w, g, config)
    torch.testing.assert_close(
        rule.scaled_gradient(w, g * scale, config, scale), plain * scale
    )


def test_inputs_are_left_alone():
    w, g, v = (np.ones(3) * k for k in (1.0, 2.0, 3.0))
    for x in (w, g, v):
        x.flags.writeable = False
    for config in every_axis():
        rule.step(w, g, v, 0.1, config)
    assert [x[0] for x in (w, g, v)] == [1.0, 2.0, 3.0]
