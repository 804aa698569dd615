"""The C++ engine: the reference's bits, whatever the threads, the sizes, the dtypes."""

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larskit.config import Config
from larskit.engines import native, reference

# float64 lengths may differ by an ulp: torch's own square root is not always exact.
EXACT = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([1023, 1024, 1025, 5003, 70_001]))


def test_it_is_there():
    assert native.unavailable() is None


@st.composite
def configs(draw):
    denominator = draw(
        st.sampled_from(["paper", "decayed_gradient", "gradient", "momentum"])
    )
    placements = ["outside"] if denominator == "momentum" else ["inside", "outside"]
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    return Config(
        denominator=denominator,
        lr_placement=draw(st.sampled_from(placements)),
        momentum=momentum,
        nesterov=momentum > 0 and draw(st.booleans()),
        dampening=draw(st.sampled_from([0.0, 0.3])) if momentum else 0.0,
        weight_decay=draw(st.sampled_from([0.0, 1e-2])),
        trust_coefficient=draw(st.sampled_from([1e-3, 1.0])),
        eps=draw(st.sampled_from([0.0, 1e-3])),
        threshold=draw(st.sampled_from([0.0, 5.0])),
        clip=draw(st.booleans()),
        adapt=draw(st.booleans()),
        maximize=draw(st.booleans()),
        zero_guard=draw(st.booleans()),
    )


def steps(engine: Any, sizes, dtypes, config, seed=0, count=3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w_dtype, g_dtype = dtypes
    w = [torch.randn(n, generator=generator).to(w_dtype) for n in sizes]
    v: list[Any] = [None] * len(w)
    for i in range(count):
        g = [torch.randn(n, generator=generator).to(g_dtype) for n in sizes]
        engine.step_(w, g, v, 0.37 / (1 + i), config)
    return w + [x for x in v if x is not None]


@settings(max_examples=150, deadline=None)
@given(configs(), st.lists(SIZES, min_size=1, max_size=5), st.sampled_from(EXACT))
def test_the_bits_are_those_of_the_reference(config, sizes, dtypes):
    ours = steps(native, sizes, dtypes, config)
    theirs = steps(reference, sizes, dtypes, config)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads, monkeypatch):
    sizes = [900_000, 3, 40_000, 0, 300_007, 1024]
    results = []
    for n in (1, threads):
        monkeypatch.setattr(native, "_threads", lambda like, n=n: n)
        results.append(steps(native, sizes, EXACT[0], Config(weight_decay=0.01)))
    assert all(map(torch.equal, *results))


def test_float64_is_within_four_ulp():
    dtypes = torch.float64, torch.float64
    config = Config(weight_decay=0.01, nesterov=True)
    ours = steps(native, [5000, 31, 147], dtypes, config)
    theirs = steps(reference, [5000, 31, 147], dtypes, config)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * 2.3e-16, atol=4 * 2.3e-16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65504.0, 6e-8, -0.0, 1e-40])
@pytest.mark.parametrize("dtypes", EXACT, ids=str)
def test_strange_numbers(value, dtypes):
    config = Config(weight_decay=0.01, trust_coefficient=1.0)
    w = torch.linspace(-2, 2, 100).to(dtypes[0])
    g = torch.linspace(3, -1, 100).to(dtypes[1])
    w[17] = value
    g[40] = value
    results = []
    for engine in (native, reference):
        ours, v = [w.clone()], [None]
        engine.step_(ours, [g], v, 0.5, config)
        results.append(ours[0])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_every_float16_survives_the_kernel():
    bits = torch.arange(-32768, 32768, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        w = bits.view(dtype)
        w = w[w.isfinite()].clone()
        before = w.clone()
        config = Config(adapt=False, momentum=0.0)
        native.step_([w], [torch.zeros_like(w)], [None], 1.0, config)
        assert torch.equal(w, before)


def test_numpy_arrays_step_in_place():
    w, g = np.ones((3, 4), "float32"), np.full((3, 4), 2.0, "float32")
    v: list[Any] = [None]
    found = native.step_([w], [g], v, 0.5, Config(trust_coefficient=1.0))
    assert type(found.ratio) is np.ndarray
    assert found.ratio.tolist() == [0.5]
    np.testing.assert_array_equal(w, np.full((3, 4), 0.5, "float32"))
    np.testing.assert_array_equal(v[0], np.full((3, 4), 0.5, "float32"))


def test_autograd_sees_the_write():
    w, v = torch.ones(3), torch.zeros(3)
    before = w._version, v._version
    native.step_([w], [torch.ones(3)], [v], 0.1, Config())
    assert w._version > before[0]
    assert v._version > before[1]


SHARED = torch.ones(8)
REFUSED = [
    (torch.ones(3, 4).T, torch.ones(4, 3), "weight 0 is not contiguous"),
    (torch.ones(4), torch.ones(8)[::2], "gradient 0 is not contiguous"),
    (torch.ones(4), torch.ones(5), r"gradient 0 has the shape \(5,\), its weight \(4,"),
    (torch.ones(4), torch.ones(4).double(), "weight 0 is float32 and its gradient flo"),
    (torch.ones(2, dtype=torch.complex64),) * 2 + ("weight 0 is complex64",),
    (torch.ones(2, device="meta"),) * 2 + ("weight 0 is on the device meta",),
    (SHARED, SHARED, "two of the arrays share memory"),
    (SHARED[:4], SHARED[2:6], "two of the arrays share memory"),
    (np.ones(2, ">f4"), np.ones(2, "f4"), "weight 0 is not contiguous"),
]


@pytest.mark.parametrize(("w", "g", "why"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_it_refuses(w, g, why):
    with pytest.raises(RuntimeError, match=f"cannot take this step: {why}"):
        native.step_([w], [g], [None], 0.1, Config())


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


FORKING = """
import os, signal
import numpy as np
from larskit.config import Config
from larskit.engines import native

def step():
    w = np.ones(500_000, "float32")
    config = Config(trust_coefficient=1.0)
    native.step_([w, w.copy()], [w.copy(), w.copy()], [None, None], 0.5, config)
    return float(w[-1])

native._threads = lambda like: 2
assert step() == 0.5
if os.fork() == 0:
    signal.alarm(30)
    os._exit(0 if step() == 0.5 else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]), step())
"""


def test_a_forked_child_has_a_pool_of_its_own():
    command = [sys.executable, "-c", FORKING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0 0.5\n", done.stderr
