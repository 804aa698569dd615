"""Triton's kernels against the reference, on the GPU or in Triton's interpreter."""

import weakref
from typing import Any

import pytest
import torch
from cases import (
    CONFIGS,
    DEVICE,
    EXACT,
    array,
    configs,
    same,
    step_,
    steps,
    strange_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from larskit import rule
from larskit.config import NAMES, Config
from larskit.engines import (
    Layers,
    Switches,
    Unsupported,
    conditional,
    reference,
    triton,
)
from larskit.engines.triton import kernels
from larskit.engines.triton.kernels import CHOICES, NUMBERS, ROWS

BLOCK = kernels.BLOCK.value
SIZES = st.one_of(
    st.integers(0, 70), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
)
LISTS = st.lists(SIZES, min_size=1, max_size=3)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "channels_last", "unaligned"])
ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="looks at how the host waits")


def full(value, *shape):
    return torch.full(shape, float(value), device=DEVICE)


def bound(w, g, v=None, config=None, **switches: Any) -> Any:
    """Bind layers that are all adapted and decayed."""
    every = [True] * len(w)
    layers = Layers(w, g, v or [None] * len(w), every, every)
    return triton.bind(layers, config or Config(), Switches(**switches))


def row(group, name):
    """Return a row of the table of layers."""
    return group._table[ROWS.index(name)]


def test_the_tables_have_the_fields_of_the_configuration():
    assert {*NUMBERS, *CHOICES} == {"lr", *NAMES}


@settings(max_examples=settings().max_examples // 4)  # each is interpreted
@given(configs(), LISTS, st.sampled_from(EXACT), LAYOUTS)
def test_the_bits_are_those_of_the_reference(config, sizes, dtypes, layout):
    ours = steps(triton, sizes, dtypes, config, layout, 2, device=DEVICE)
    assert same(ours, steps(reference, sizes, dtypes, config, layout, 2))


REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("w_dtype", REAL)
@pytest.mark.parametrize("g_dtype", REAL)
def test_gradients_of_another_dtype(w_dtype, g_dtype):
    config = Config(weight_decay=0.01, nesterov=True)
    dtypes, sizes = (w_dtype, g_dtype), [BLOCK + 7, 12]
    ours = steps(triton, sizes, dtypes, config, count=2, device=DEVICE)
    theirs = steps(reference, sizes, dtypes, config, count=2)
    for a, b in zip(ours, theirs, strict=True):
        eps = torch.finfo(w_dtype).eps
        assert a.dtype == w_dtype
        torch.testing.assert_close(a.cpu(), b, rtol=2 * eps, atol=2 * eps)


def test_runs_repeat_to_the_bit():
    sizes = [5 * BLOCK + 3, 0, 40_000, 1]
    runs = [
        steps(triton, sizes, EXACT[0], Config(), count=1, device=DEVICE)
        for _ in range(3)
    ]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 65504.0, -0.0])
@pytest.mark.parametrize("dtypes", EXACT[::3])
def test_strange_numbers(value, dtypes):
    ours = strange_step(triton, value, dtypes, DEVICE)
    theirs = strange_step(reference, value, dtypes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_offsets_of_more_than_32_bits():
    """A layer of which only the end is there: the blocks before it are left out."""
    tail, hidden = BLOCK + 100, 2**34
    w, g, v = (array(None, torch.float32, tail).to(DEVICE) for _ in range(3))
    expected = w.clone(), v.clone()
    config = Config(weight_decay=0.01, trust_coefficient=1.0)
    group = bound([w], [g], [v], config)
    for name in ("weights", "gradients", "buffers", "out"):
        row(group, name).sub_(4 * hidden)
    row(group, "size").add_(hidden)
    row(group, "first").sub_(hidden // BLOCK)
    norms = full(3, 1).double(), full(2, 1).double()
    group.step_(0.5, config, norms)
    w_2, v_2 = expected
    step_(reference, [w_2], [g], [v_2], 0.5, config, norms)
    assert torch.equal(w, w_2)
    assert torch.equal(v, v_2)


def make(*sizes: int, dtype=torch.float32, buffers=True, config=None, **switches: Any):
    """Return a group of layers of one number, and its tensors."""
    w = [full(i + 1, n).to(dtype) for i, n in enumerate(sizes)]
    g = [full(1, n).to(dtype) for n in sizes]
    v: list[Any] = [full(0, n).to(dtype) if buffers else None for n in sizes]
    group = bound(w, g, v, config, **switches)
    return group, w, g, group._out


@ON_CPU
def test_tables_are_written_again_only_when_a_storage_moves(monkeypatch):
    writes = []
    write = conditional.integers
    monkeypatch.setattr(
        conditional, "integers", lambda *a: (writes.append(1), write(*a))[1]
    )
    config = Config(momentum=0.0)
    group, _w, g, _ = make(5, BLOCK, config=config)
    for _ in range(3):
        assert group.rebind(g)
        group.step_(1.0, config)
    assert len(writes) == 1
    g[1] = g[1].clone()
    assert group.rebind(g)
    group.step_(1.0, config)
    assert len(writes) == 2


CHANGES = {
    "nothing": (lambda p, v: None, lambda g: g, True),
    "another gradient": (lambda p, v: None, torch.clone, True),
    "weights elsewhere": (lambda p, v: put(p, p.data.clone()), lambda g: g, False),
    "a buffer elsewhere": (lambda p, v: put(v, v.data.clone()), lambda g: g, False),
    "weights transposed": (lambda p, v: put(p, p.data.t()), lambda g: g, False),
    "gradient transposed": (lambda p, v: None, torch.t, False),
    "gradient float16": (lambda p, v: None, torch.Tensor.half, False),
    "gradient sparse": (lambda p, v: None, torch.Tensor.to_sparse, False),
    "gradient subclass": (lambda p, v: None, nn.Parameter, False),
    "gradient negated": (lambda p, v: None, lambda g: negated(g), False),
}


def put(p, data):
    p.data = data


def negated(g):
    """Return a tensor of the same look whose bits are to be read negated."""
    x = torch.complex(g, g).conj().imag
    return x if x.stride() == g.stride() else torch._neg_view(g)


@pytest.mark.parametrize("what", CHANGES)
def test_a_group_sees_what_has_changed(what):
    change, make_gradient, fits = CHANGES[what]
    p, g, v = nn.Parameter(full(1, 4, 4)), full(1, 4, 4), full(0, 4, 4)
    group = bound([p], [g], [v])
    change(p, v)
    assert group.rebind([make_gradient(g)]) is fits


def test_a_group_steps_once_along_its_gradients():
    group, *_ = make(4)
    group.step_(1.0, Config(momentum=0.0))
    with pytest.raises(AssertionError, match="rebind the group before the next step"):
        group.step_(1.0, Config(momentum=0.0))


def scaling(w, g, config, out: Any = None):
    """Bind one layer whose gradient is scaled."""
    layers = Layers([w], [g], [None], [True], [True], out)
    return triton.bind(layers, config, scales_gradients=True)


def test_gradients_are_scaled_once():
    """Their memory may be used for something else afterwards."""
    group = scaling(full(1, 4), full(1, 4), Config(), out=[None])
    group.scale_gradients(Config())
    for call in (group.scale_gradients, group.norms):
        with pytest.raises(AssertionError, match="rebind the group before the next"):
            call(Config())


@pytest.mark.parametrize("what", ["step", "scaled in place", "scaled"])
def test_no_gradient_is_held_longer_than_a_call(what):
    w, g = full(1, 4), full(1, 4)
    if what == "step":
        group = bound([w], [g])
        group.step_(0.5, Config())
    else:
        group = scaling(w, g, Config(), out=[None] if what == "scaled" else None)
        group.scale_gradients(Config())
    held = weakref.ref(g)
    del g
    assert held() is None


@pytest.mark.parametrize("nesterov", [False, True])
def test_gradients_are_scaled_as_in_a_first_step(nesterov):
    config = Config(
        denominator="momentum",
        lr_placement="outside",
        dampening=0.5,
        nesterov=nesterov,
        weight_decay=0.1,
    )
    w, g = (array(None, torch.float32, BLOCK + 5).to(DEVICE) for _ in range(2))
    expected = rule.scaled_gradient(w, g, config)
    (found,) = scaling(w, g, config).scale_gradients(config)
    assert found is g
    assert torch.equal(found, expected)


def test_weights_that_cannot_be_written_may_scale_gradients():
    with torch.inference_mode():
        w = full(1, 4)
    g = full(2, 4)
    scaling(w, g, Config()).scale_gradients(Config())
    assert g.tolist() == pytest.approx([1e-3] * 4)


@pytest.mark.parametrize("on_device", [True, False], ids=["dev", "bool"])
@pytest.mark.parametrize("buffers", [True, False], ids=["v", "no v"])
def test_a_skipped_update_is_measured(on_device, buffers):
    found = []
    for flag in (True, False):
        group, w, *_ = make(3, BLOCK + 3, buffers=buffers)
        before = [x.clone() for x in w]
        apply_if = torch.tensor(flag, device=DEVICE) if on_device else flag
        group.step_(0.5, Config(), apply_if=apply_if, full_stats=True)
        assert same(w, before) is not flag
        assert on_device or flag or (group.buffers[0] is None) is not buffers
        found.append(group.stats.update_norm.tolist())
    assert found[0] == found[1]


def test_hyper_parameters_on_the_device_are_read_there():
    group, w, g, _ = make(4)
    lr, wd = full(0.5), full(0.25)
    config = Config(threshold=9.0, momentum=0.0, weight_decay=wd)
    group.step_(lr, config)
    assert w[0].tolist() == [0.375] * 4
    lr.fill_(1.0)
    wd.fill_(1.0)
    assert group.rebind(g)
    group.step_(lr, config)
    assert w[0].tolist() == [-1.0] * 4


def test_hyper_parameters_may_change():
    rows = [(1.0, CONFIGS[0]), (0.5, CONFIGS[0]), (0.5, CONFIGS[1]), (1.0, CONFIGS[40])]
    results = []
    for engine in (triton, reference):
        w, g, v = ([full(i, 5)] for i in (1, 2, 3))
        group = bound(w, g, v)
        for lr, config in rows:
            if engine is reference:
                step_(engine, w, g, v, lr, config)
            else:
                assert group.rebind(g)
                group.step_(lr, config)
        results.append(w + v)
    assert same(*results)


@ON_CPU
def test_the_host_looks_at_nothing(monkeypatch):
    group, w, g, _ = make(4, 9)
    lr, flag, scale = full(0.5), torch.tensor(True), full(2.0)

    def wait(*_: Any) -> None:
        raise AssertionError("the host looked at a tensor")

    for name in ("item", "__bool__", "__float__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    options: Any
    for options in ({}, {"apply_if": flag}, {"grad_scale": scale}):
        for config in CONFIGS[:2]:
            assert group.rebind(list(g))
            group.norms(config)
            group.step_(lr, config, **options)
    monkeypatch.undo()
    assert w[0][0] != 1


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
def test_a_flag_decides_whether_anything_moves(applied, buffers):
    group, w, g, v = make(3, BLOCK + 3, buffers=buffers)
    before = [x.clone() for x in w]
    config = Config(trust_coefficient=1.0, weight_decay=0.5)
    flag = torch.tensor(applied, device=DEVICE)
    group.step_(0.25, config, apply_if=flag)
    if applied:
        expected: list[Any] = [None, None]
        step_(reference, before, g, expected, 0.25, config)
        assert same(w + v, before + expected)
    else:
        assert same(w + v, before + [torch.zeros_like(x) for x in v])


@pytest.mark.parametrize("config", CONFIGS[::9])
def test_the_scale_of_the_loss_is_taken_out(config):
    group, w, g, v = make(3, BLOCK + 3)
    twins: Any = [x.clone() for x in w], [x.clone() for x in v]
    if config.momentum == 0:
        v, twins = [], (twins[0], [None, None])
    step_(reference, twins[0], g, twins[1], 0.25, config)
    scaled = [x * 1024 for x in g]
    kept = [x.clone() for x in scaled]
    assert group.rebind(scaled)
    group.step_(0.25, config, grad_scale=full(1024))
    assert same(w + v, twins[0] + [x for x in twins[1] if x is not None])
    assert same(scaled, kept)


@pytest.mark.parametrize("config", CONFIGS[::9])
def test_carried_squares_change_no_bit(config):
    results = []
    for carry in (False, True):
        generator = torch.Generator().manual_seed(0)
        sizes = [BLOCK + 70, 5]
        w = [array(generator, torch.bfloat16, n).to(DEVICE) for n in sizes]
        v = [torch.zeros_like(x) for x in w]
        group = bound(w, w, v, config, carry_norms=carry)
        for i in range(3):
            g = [array(generator, torch.bfloat16, n).to(DEVICE) for n in sizes]
            assert group.rebind(g)
            group.step_(0.5 / (1 + i), config)
        results.append([*w, *v, *group.stats[:3]])
    assert same(*results)


def test_carried_squares_are_used_until_somebody_writes():
    config = Config(momentum=0.0, trust_coefficient=0.5)
    group, w, g, _ = make(4, 4, config=config, carry_norms=True)
    group.step_(0.0, config)
    w[0].data.fill_(9.0)  # which nothing can see
    assert group.rebind(g)
    group.step_(0.0, config)
    assert group.stats.weight_norm.tolist() == [2.0, 4.0]
    w[1].fill_(9.0)
    assert group.rebind(g)
    group.step_(0.0, config)
    assert group.stats.weight_norm.tolist() == [18.0, 18.0]


@pytest.mark.parametrize("flag", [True, False], ids=["apply", "skip"])
def test_squares_are_carried_from_what_was_measured(flag):
    """A skipped step leaves none, and none are there where norms were given."""
    config = Config(momentum=0.0)
    group, w, g, _ = make(4, config=config, carry_norms=True)
    group._sums.fill_(torch.nan)
    norms = full(1, 1).double(), full(1, 1).double()
    group.step_(1.0, config, norms, apply_if=torch.tensor(flag, device=DEVICE))
    assert group.rebind(g)
    group.step_(0.0, config)
    assert group.stats.weight_norm[0] == w[0].double().norm()


@pytest.mark.parametrize("config", CONFIGS[::17])
def test_given_norms_are_those_that_were_measured(config):
    group, w, g, v = make(4, BLOCK + 1)
    twins = [x.clone() for x in w], [x.clone() for x in v]
    norms = group.norms(config)
    group.step_(0.5, config, norms)
    other = bound(twins[0], g, twins[1], config)
    other.step_(0.5, config)
    assert same(w + v, twins[0] + twins[1])


@ON_CPU
def test_what_a_graph_captures_stands_in_it_by_value(monkeypatch):
    """The tables are written by kernels with the numbers in their arguments."""
    plain, w, g, v = make(4, 0, BLOCK + 1)
    twins = [[x.clone() for x in column] for column in (w, g, v)]
    plain.step_(0.5, CONFIGS[0])
    monkeypatch.setattr(conditional, "is_capturing", lambda device: True)
    copies = []
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: copies.append(a))
    group = bound(*twins)
    monkeypatch.undo()
    group.step_(0.5, CONFIGS[0])
    assert not copies
    assert group.captured
    assert same(w + v, twins[0] + twins[2])


@ON_CPU
def test_what_was_captured_is_not_used_again(monkeypatch):
    group, _, g, _ = make(4)
    monkeypatch.setattr(conditional, "is_capturing", lambda device: True)
    assert not group.rebind([g[0].clone()])  # whose address would have to be written
    assert not group.captured
    assert group.rebind(g)
    assert group.captured
    assert not group.rebind(g)  # which another graph might ask
    monkeypatch.undo()
    assert not group.rebind(g)


REFUSED = [
    (torch.int32, torch.int32, "weight 0 is int32 and its gradient int32"),
    (torch.complex64, torch.float32, "weight 0 is complex64 and its gradient float32"),
]


@pytest.mark.parametrize(("w_dtype", "g_dtype", "message"), REFUSED)
def test_dtypes_that_are_refused(w_dtype, g_dtype, message):
    w, g = full(1, 3).to(w_dtype), full(1, 3).to(g_dtype)
    with pytest.raises(Unsupported, match=message):
        bound([w], [g])


def test_layouts_that_are_refused():
    w = full(1, 4, 6)
    with pytest.raises(Unsupported, match="gradient 0 is not contiguous"):
        bound([w[:, :3].contiguous()], [w[:, ::2]])
    with pytest.raises(Unsupported, match=r"gradient 0 has the shape \(6, 4\)"):
        bound([w], [w.t()])
    with pytest.raises(Unsupported, match="weight 0 is on the device meta"):
        bound([w.to("meta")], [w.to("meta")])
    with torch.inference_mode():
        inference = full(1, 4, 6)
    with pytest.raises(Unsupported, match="weight 0 is an inference tensor"):
        bound([inference], [w])


def test_a_device_that_runs_no_kernels_is_refused(monkeypatch):
    class NoCompiler:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(kernels, "probe", NoCompiler())
    triton.refusal_of.cache_clear()
    try:
        message = (
            r"Triton runs no kernels on \w+(:0)?: RuntimeError: Failed to find C co"
        )
        with pytest.raises(Unsupported, match=message):
            make(4)
    finally:
        monkeypatch.undo()
        triton.refusal_of.cache_clear()
    make(4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy
def test_carried_squares_are_of_the_layer_alone():
    """Behind its end nothing times infinity would not be nothing."""
    config = Config(momentum=0.0, trust_coefficient=1e30)
    group, _, g, _ = make(5, config=config, carry_norms=True)
    group.step_(1e30, config)
    assert group.rebind(g)
    group.step_(0.0, config)
    assert group.stats.weight_norm.tolist() == [torch.inf]


def test_the_sums_of_many_blocks_are_added_up():
    """Of a layer of 10 million elements, which no interpreter could measure."""
    group, *_ = make(5)
    sums = torch.rand(3, 5000, dtype=torch.float64).to(DEVICE)
    group._sums, group._blocks = sums, 5000
    row(group, "size").fill_(5000 * BLOCK - 3)
    config = Config()
    finish: Any = kernels.finish
    finish[(1,)](*group._arguments(0.5, config), group._variant(config), False)
    finish_update: Any = kernels.finish_update
    finish_update[(1,)](*group._arguments(0.5, config), group._variant(config))
    found = group._stats[[0, 1, 3], 0]
    torch.testing.assert_close(found, sums.sum(1).sqrt(), rtol=1e-14, atol=0)


def test_hyper_parameters_are_written_when_they_change(monkeypatch):
    group, _, g, _ = make(5)
    written = []
    fill_ = torch.Tensor.fill_
    monkeypatch.setattr(
        torch.Tensor, "fill_", lambda x, value: (written.append(value), fill_(x, value))
    )
    for lr in (0.5, 0.5, 0.25):
        assert group.rebind(g)
        group.step_(lr, Config(momentum=0.75))
    assert written.count(0.5) == written.count(0.25) == written.count(0.75) == 1
