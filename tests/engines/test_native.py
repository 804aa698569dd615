"""The C++ engine is bitwise the reference, for all threads, sizes and dtypes."""

import os
import sys
import threading
from contextlib import contextmanager
from operator import is_
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import (
    EXACT,
    LAYOUTS,
    array,
    carrying,
    configs,
    same,
    step_,
    steps,
    strange_step,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from larskit import (
    _native,  # pyright: ignore[reportMissingModuleSource]
    rule,
)
from larskit.config import NAMES, Config
from larskit.engines import Layers, Switches, Unsupported, native, reference

LIVE = Path(__file__).parent / "live"
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([1023, 1024, 1025, 5003, 70_001]))


def bound(w, g, v=None, config=None, out=None, **switches: Any) -> native.Group:
    """Bind layers, adapted and decayed as the configuration says."""
    config = config or Config()
    flags = [config.adapt] * len(w), [config.decay] * len(w)
    layers = Layers(w, g, v or [None] * len(w), *flags, out)
    return native.bind(layers, config, Switches(**switches))


@contextmanager
def limited(threads):
    """Have torch, and hence the kernel, use as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_it_is_there():
    assert native.unavailable() is None


def test_the_kernel_has_the_fields_of_the_configuration():
    """All of them: whether layers are adapted and decayed is theirs to say."""
    assert {*_native.FIELDS, "adapt", "decay"} == {*NAMES}


LISTS = st.lists(SIZES, min_size=1, max_size=5)


@given(configs(), LISTS, st.sampled_from(EXACT), LAYOUTS, st.sampled_from([1, 2, 3, 8]))
def test_it_equals_the_reference_bitwise(config, sizes, dtypes, layout, threads):
    with limited(threads):
        ours = steps(native, sizes, dtypes, config, layout)
    assert same(ours, steps(reference, sizes, dtypes, config, layout))


LARGE = [900_000, 3, 40_000, 0, 300_007, 1024]


@pytest.fixture(params=["torch's threads", "threads of its own"])
def pool(request, monkeypatch):
    """Have the kernel use torch's OpenMP team, or not although torch is loaded."""
    if request.param != "torch's threads":
        make: Any = _native.Group
        monkeypatch.setattr(_native, "Group", lambda *given: make(*given[:-1], False))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads, pool):
    config = Config(weight_decay=0.01)
    with limited(threads):
        ours = steps(native, LARGE, EXACT[0], config)
    assert same(ours, steps(reference, LARGE, EXACT[0], config))


MIXED = [True, False] * 3, [True, True, False] * 2


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("nesterov", [True, False])
def test_layers_of_all_flags_in_one_group(threads, nesterov, pool):
    config = Config(weight_decay=0.01, nesterov=nesterov)
    generator = torch.Generator().manual_seed(0)
    w, *gradients = (
        [array(generator, torch.float32, n) for n in LARGE] for _ in range(3)
    )
    results = []
    for engine in (reference, native):
        own: list[Any] = [x.clone() for x in w]
        v: Any = [None] * len(own)
        group: Any = None
        for g in gradients:  # a first step, and another one
            group = engine.bind(Layers(own, g, v, *MIXED), config)
            with limited(threads):
                group.step_(0.5, config, full_stats=True)
            v = group.buffers
        results.append([*own, *v, *group.stats[:3], group.stats.update_norm])
    assert same(*results)


def carried_steps(sizes, dtypes, config, threads, layout, disturb=None):
    generator = torch.Generator().manual_seed(0)
    w = [array(generator, dtypes[0], n, layout) for n in sizes]
    group: Any = None
    for i in range(3):
        g = [array(generator, dtypes[1], n, layout) for n in sizes]
        if group is None:
            group = bound(w, g, config=config, carry_norms=True)
        assert group.rebind(g)
        with limited(threads):
            group.step_(0.37 / (1 + i), config)
        if disturb:
            disturb(w)
    return w + [x for x in group.buffers if x is not None]


@given(configs(), LISTS, st.sampled_from(EXACT), LAYOUTS, st.sampled_from([1, 2, 3, 8]))
def test_carried_norms_change_no_bit(config, sizes, dtypes, layout, threads):
    with carrying(0):
        ours = carried_steps(sizes, dtypes, config, threads, layout)
    assert same(ours, steps(reference, sizes, dtypes, config, layout))


def test_carried_norms_of_large_layers(pool):
    config = Config(weight_decay=0.01)
    for threads in (1, 2, 3, 8):
        ours = carried_steps(LARGE, EXACT[0], config, threads, "contiguous")
        assert same(ours, steps(reference, LARGE, EXACT[0], config))


def test_small_layers_carry_nothing():
    sizes = native.CARRIES_ABOVE, native.CARRIES_ABOVE + 1
    w = [torch.ones(n) for n in sizes]
    config = Config(momentum=0.0)
    group = bound(w, [torch.zeros_like(x) for x in w], config=config, carry_norms=True)
    group.step_(1.0, config)
    for x in w:
        x.data.zero_()  # which nothing can see
    assert group.rebind([torch.zeros_like(x) for x in w])
    group.step_(1.0, config)
    small, large = group.stats.weight_norm.tolist()
    assert (small, large) == (0.0, pytest.approx(sizes[1] ** 0.5))


@pytest.mark.usefixtures("every_layer_carries")
def test_carried_norms_are_used_until_another_caller_writes():
    w = [torch.ones(4), torch.ones(4)]
    g = [torch.ones(4), torch.ones(4)]
    config = Config(momentum=0.0, trust_coefficient=0.5)
    group = bound(w, g, config=config, carry_norms=True)
    group.step_(1.0, config)
    w[0].data.fill_(9.0)  # which nothing can see
    w[1].fill_(9.0)
    assert group.rebind(g)
    group.step_(1.0, config)
    assert group.stats.weight_norm.tolist() == [1.0, 18.0]
    w[0].fill_(3.0)
    assert group.rebind(g)
    group.step_(1.0, config)
    assert group.stats.weight_norm.tolist()[0] == 6.0


@pytest.mark.usefixtures("every_layer_carries")
def test_a_group_adopts_the_norms_that_another_carries():
    w = [torch.ones(4), torch.full((9,), 2.0), torch.ones(1), torch.ones(4)]
    g = [torch.zeros_like(x) for x in w]
    config = Config(momentum=0.0)
    old = bound(w, g, config=config, carry_norms=True)
    old.step_(1.0, config)
    w[0].data.zero_()  # which nothing can see
    w[1].zero_()
    w[3].data = torch.zeros(4)
    extra = torch.full((1,), 7.0)
    every = [True] * 5
    columns = [*w[::-1], extra], [*g[::-1], extra.clone()], [None] * 5
    switches = Switches(carry_norms=True)
    new = native.bind(Layers(*columns, every, every), config, switches, former=[old])
    new.step_(1.0, config)
    assert new.stats.weight_norm.tolist() == [0.0, 1.0, 0.0, 2.0, 7.0]


@pytest.mark.usefixtures("every_layer_carries")
def test_a_group_adopts_the_norms_of_several_others():
    config, switches = Config(momentum=0.0), Switches(carry_norms=True)
    w = [torch.full((4,), 2.0), torch.full((9,), 3.0)]
    g = [torch.zeros_like(x) for x in w]
    others = [bound([w[i]], [g[i]], config=config, carry_norms=True) for i in (0, 1)]
    for i, other in enumerate(others):
        other.step_(1.0, config)
        w[i].data.zero_()  # which nothing can see
    both = [True, True]
    layers = Layers(w, g, [None, None], both, both)
    new = native.bind(layers, config, switches, former=others)
    assert new.norms(config)[0].tolist() == [4.0, 9.0]


def test_a_group_steps_once_along_its_gradients():
    w, g = [torch.ones(4)], [torch.ones(4)]
    group = bound(w, g, config=Config(momentum=0.0))
    group.step_(1.0, Config(momentum=0.0))
    with pytest.raises(AssertionError, match="rebind the group before the next step"):
        group.step_(1.0, Config(momentum=0.0))


def put(p, data):
    p.data = data


CHANGES = {
    "nothing": (lambda p: None, lambda g: g, True),
    "another gradient": (lambda p: None, torch.clone, True),
    "weights elsewhere": (lambda p: put(p, p.data.clone()), lambda g: g, False),
    "fewer rows": (lambda p: put(p, p.data[:2]), lambda g: g, False),
    "transposed": (lambda p: put(p, p.data.t()), lambda g: g, False),
    "gradient transposed": (lambda p: None, torch.t, False),
    "gradient float16": (lambda p: None, torch.Tensor.half, False),
    "gradient sparse": (lambda p: None, torch.Tensor.to_sparse, False),
    "gradient subclass": (lambda p: None, torch.nn.Parameter, False),
    "gradient short": (lambda p: None, lambda g: g[:3], False),
    "gradient on meta": (lambda p: None, lambda g: g.to("meta"), False),
    "gradient fake": (lambda p: None, lambda g: FakeTensorMode().from_tensor(g), False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_group_sees_what_has_changed(what):
    change, make, fits = CHANGES[what]
    p, g, v = nn.Parameter(torch.ones(4, 4)), torch.ones(4, 4), torch.zeros(4, 4)
    group = bound([p], [g], [v])
    change(p)
    assert group.rebind([make(g)]) is fits


def test_a_group_sees_a_negated_gradient():
    p, g = nn.Parameter(torch.ones(1)), torch.ones(1, dtype=torch.complex64).imag
    group = bound([p], [g.clone()], [None])
    assert group.rebind([g.clone()])
    assert not group.rebind([torch.ones(1, dtype=torch.complex64).conj().imag])
    p, g = nn.Parameter(torch.ones(2)), torch.ones(2)
    group = bound([p], [g], [None])
    assert group.rebind([g])
    assert not group.rebind([torch.ones(2, dtype=torch.complex64).conj().imag])


def test_a_group_sees_that_its_buffer_moved_or_its_gradient_is_its_weight():
    p, g, v = nn.Parameter(torch.ones(4, 4)), torch.ones(4, 4), torch.zeros(4, 4)
    group = bound([p], [g], [v])
    before = v.data
    v.data = torch.zeros(4, 4)
    assert not group.rebind([g])
    v.data = before
    assert group.rebind([g])
    assert not group.rebind([p.detach()])


def test_a_group_that_did_not_fit_is_checked_again():
    p, g = nn.Parameter(torch.ones(4)), torch.ones(4)
    group = bound([p, torch.ones(4)], [g, g.clone()])
    for _ in range(2):
        assert not group.rebind([p.detach(), g.half()])
        assert not group.rebind([p.detach(), g])
        assert not group.rebind([g])
    assert group.rebind((g.clone(), g))


HOOK = Config(trust_coefficient=1.0, zero_guard=False, weight_decay=0.5)


def scaling(w, g, out=None) -> native.Group:
    every = [True] * len(w)
    layers = Layers(w, g, [None] * len(w), every, every, out)
    return native.bind(layers, HOOK, scales_gradients=True)


@pytest.mark.parametrize("sizes", [[17, 0, 5003], LARGE])
@pytest.mark.parametrize("dtypes", EXACT)
@pytest.mark.parametrize("where", ["in place", "new", "given"])
def test_other_gradients_are_scaled_by_the_same_group(sizes, dtypes, where):
    generator = torch.Generator().manual_seed(0)
    w = [array(generator, dtypes[0], n) for n in sizes]
    g, *others = ([array(generator, dtypes[1], n) for n in sizes] for _ in range(3))
    given = [torch.empty_like(x) for x in g]
    out = {"in place": None, "new": [None] * len(w), "given": given}[where]
    group, found = scaling(w, g, out), []
    for gradients in others:
        rows = zip(w, gradients, strict=True)
        expected = [rule.scaled_gradient(*row, HOOK) for row in rows]
        before = [x.clone() for x in gradients]
        assert group.rebind(gradients)
        found = list(group.scale_gradients(HOOK))
        assert same(found, expected)
        assert where == "in place" or same(gradients, before)
    if where == "new":  # in the memory of the first call
        assert group.rebind(others[0])
        assert all(map(is_, group.scale_gradients(HOOK), found))
        found[0].data = found[0].clone()
        assert not group.rebind(others[0])


@pytest.mark.parametrize("dtypes", EXACT[:2])
@pytest.mark.parametrize("layout", ["contiguous", "unaligned"])
def test_large_gradients_are_scaled_past_the_caches(dtypes, layout):
    generator = torch.Generator().manual_seed(0)
    sizes = [8 * 2**20 + 5, 1029]
    w, g, out = (
        [array(generator, dtype, n, layout) for n in sizes]
        for dtype in (*dtypes, dtypes[1])
    )
    found = scaling(w, g, out).scale_gradients(HOOK)
    rows = zip(w, g, strict=True)
    assert same(found, [rule.scaled_gradient(*row, HOOK) for row in rows])


def test_gradients_scaled_in_place_stay_apart():
    w, g = [torch.ones(4), torch.ones(4)], [torch.ones(4), torch.ones(4)]
    group = scaling(w, g)
    assert not group.rebind([g[0], g[0]])
    assert not group.rebind([w[1], g[1]])
    assert group.rebind(g[::-1])


def test_a_step_that_is_not_taken_makes_no_buffer():
    w, g = [torch.ones(4)], [torch.full((4,), 0.5)]
    config = Config(trust_coefficient=1.0)
    group: Any = bound(w, g, config=config)
    group.step_(0.5, config, apply_if=torch.tensor(False), full_stats=True)
    assert w[0].tolist() == [1.0] * 4
    assert group.buffers == [None]
    assert [x.item() for x in group.stats[:3]] == [2.0, 1.0, 2.0]
    assert group.stats.update_norm.tolist() == [1.0]  # of the update not applied
    assert group.rebind(g)
    group.step_(0.5, config)
    assert w[0].tolist() == [0.5] * 4
    assert group.buffers[0].tolist() == [0.5] * 4


def test_norms_leave_the_statistics_of_the_last_step():
    w, g, config = [torch.ones(4)], [torch.ones(4)], Config(momentum=0.0)
    group = bound(w, g, config=config)
    group.step_(1.0, config)
    before = group.stats
    assert group.rebind([torch.full((4,), 2.0)])
    assert group.norms(config)[1].tolist() == [4.0]
    assert group.stats[:3] == before[:3]


def test_a_steady_step_makes_few_python_calls():
    """At most 12 calls into larskit, at most 3 deep below the first: the aim."""
    w, g, config = [torch.ones(4)], [torch.ones(4)], Config()
    group = bound(w, g, config=config)
    deepest, calls, depth = 0, 0, 0

    def count(frame, event, argument):
        nonlocal deepest, calls, depth
        if "larskit" in frame.f_code.co_filename:
            calls += event == "call"
            depth += {"call": 1, "return": -1}.get(event, 0)
            deepest = max(deepest, depth)

    for _ in range(2):
        deepest, calls, depth = 0, 0, 0
        sys.setprofile(count)
        group.rebind(g)
        group.step_(0.5, config)
        sys.setprofile(None)
    assert calls <= 12
    assert deepest <= 3


def test_float64_is_within_four_ulp():
    dtypes = torch.float64, torch.float64
    config = Config(weight_decay=0.01, nesterov=True)
    ours = steps(native, [5000, 31, 147], dtypes, config)
    theirs = steps(reference, [5000, 31, 147], dtypes, config)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * 2.3e-16, atol=4 * 2.3e-16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65504.0, 6e-8, -0.0, 1e-40])
@pytest.mark.parametrize("dtypes", EXACT)
def test_strange_numbers(value, dtypes):
    ours, theirs = (
        strange_step(engine, value, dtypes) for engine in (native, reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "options", [{}, {"dampening": 0.5}, {"lr_placement": "outside"}]
)
def test_a_decay_below_the_range_of_float32_is_a_decay(options):
    config, found = Config(weight_decay=1e-60, **options), []
    for engine in (native, reference):
        w, v = torch.tensor([np.inf, 1.0]), torch.ones(2)
        step_(engine, [w], [torch.ones(2)], [v], 0.1, config)
        found.append(w)
    assert found[0].isnan().tolist() == found[1].isnan().tolist() == [True, True]


def test_numpy_arrays_step_in_place():
    w, g = np.ones((3, 4), "float32"), np.full((3, 4), 2.0, "float32")
    v: list[Any] = [None]
    found = step_(native, [w], [g], v, 0.5, Config(trust_coefficient=1.0))
    assert type(found.trust_ratio) is np.ndarray
    assert found.trust_ratio.tolist() == [0.5]
    np.testing.assert_array_equal(w, np.full((3, 4), 0.5, "float32"))
    np.testing.assert_array_equal(v[0], np.full((3, 4), 0.5, "float32"))


def test_numpy_arrays_have_no_version_that_carried_norms_need():
    w, g = [np.ones(4, "f4")], [np.ones(4, "f4")]
    assert not bound(w, g).rebind(g)
    with pytest.raises(Unsupported, match="carry_norms needs the version counters"):
        bound(w, g, carry_norms=True)


@pytest.mark.parametrize("switch", ["capturable", "differentiable"])
def test_switches_that_it_cannot_honour(switch):
    why = {"capturable": "reads lr on the host", "differentiable": "autograd cannot"}
    with pytest.raises(Unsupported, match=why[switch]):
        bound([torch.ones(2)], [torch.ones(2)], **{switch: True})


def test_autograd_sees_the_write():
    w, v = torch.ones(3), torch.zeros(3)
    before = w._version, v._version
    step_(native, [w], [torch.ones(3)], [v], 0.1, Config())
    assert w._version > before[0]
    assert v._version > before[1]


SHARED = torch.ones(8)
FIXED = np.ones(4, "f4")
FIXED.flags.writeable = False
REFUSED = [
    (torch.ones(8)[::2], torch.ones(4), "weight 0 is not contiguous"),
    (torch.ones(4), torch.ones(8)[::2], "gradient 0 is not contiguous"),
    (torch.ones(1).expand(4), torch.ones(4), "weight 0 is not contiguous"),
    (torch.ones(3, 4).T, torch.ones(4, 3), "gradient 0 has other strides"),
    (torch.ones(4), torch.ones(5), r"gradient 0 has the shape \(5,\), its weight \(4,"),
    (torch.ones(4), torch.ones(4).double(), "weight 0 is float32 and its gradient flo"),
    (torch.ones(2, dtype=torch.complex64),) * 2 + ("weight 0 is complex64",),
    (torch.ones(2, device="meta"),) * 2 + ("weight 0 is on the device meta",),
    (torch.ones(2), torch.ones(2).to_sparse(), r"gradient 0 is sparse \(torch.sparse"),
    (torch.ones(2), torch._neg_view(torch.ones(2)), "gradient 0 is a lazy view"),
    (torch.ones(4), np.ones(4, "f4"), "gradient 0 is a ndarray, its weight a Tensor"),
    (SHARED, SHARED, "two of the arrays share memory"),
    (SHARED[:4], SHARED[2:6], "two of the arrays share memory"),
    (np.ones(2, ">f4"), np.ones(2, "f4"), "weight 0 is not aligned"),
    (FIXED, np.ones(4, "f4"), "weight 0 is read-only"),
    (jnp.ones(4), jnp.ones(4), "weight 0 is a ArrayImpl, neither a NumPy array nor"),
]


@pytest.mark.parametrize(("w", "g", "why"), REFUSED)
def test_what_it_refuses(w, g, why):
    with pytest.raises(RuntimeError, match=why):
        step_(native, [w], [g], [None], 0.1, Config())


def test_several_python_threads_at_once():
    expected = steps(native, [200_000, 17], EXACT[0], Config())
    found: list[Any] = [None] * 4

    def work(i):
        found[i] = steps(native, [200_000, 17], EXACT[0], Config())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in found:
        assert all(map(torch.equal, result, expected))


@pytest.mark.distributed
def test_a_forked_child_has_a_pool_of_its_own(python):
    assert python(LIVE / "forking.py", LARSKIT_NUM_THREADS="2") == "0 0.5\n"


@pytest.mark.distributed
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_fork_may_interrupt_a_step(framework, python):
    assert python(LIVE / "interrupted.py", framework, "10") == "10 of 10 went on\n"


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_thousand_forks_may_interrupt_a_step(framework, python):
    assert (
        python(LIVE / "interrupted.py", framework, "1000") == "1000 of 1000 went on\n"
    )


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits the memory")
@pytest.mark.parametrize("program", ["team.py", "few_threads.py"])
def test_it_steps_with_the_threads_that_there_are(program, python):
    assert python(LIVE / program, LARSKIT_NUM_THREADS="64") == "done\n"


@pytest.mark.distributed
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_the_interpreter_may_end_during_a_step(framework, python):
    for _ in range(5):
        said = python(LIVE / "ending.py", framework, LARSKIT_NUM_THREADS="2")
        assert said == "done\n"


def test_the_threads_for_numpy_arrays(monkeypatch):
    monkeypatch.setenv("LARSKIT_NUM_THREADS", "3")
    assert native.threads() == native.threads(np.ones(1)) == 3
    assert native.threads(torch.ones(1)) == torch.get_num_threads()
    monkeypatch.setenv("LARSKIT_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="LARSKIT_NUM_THREADS is 'many', expected a w"):
        native.threads()
    monkeypatch.delenv("LARSKIT_NUM_THREADS")
    assert native.threads() == len(os.sched_getaffinity(0))
