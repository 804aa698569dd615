"""The options, dtypes and layers that every engine is driven with."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import strategies as st

from larskit.config import Config
from larskit.engines import Layers, Switches, native
from larskit.rule import LayerStats

DEVICE = os.environ.get("LARSKIT_TEST_DEVICE", "cpu")  # where Triton's kernels run

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


def _configs():
    for values in itertools.product(*AXES.values()):
        options = dict(zip(AXES, values, strict=True))
        try:
            yield Config(weight_decay=0.01, trust_coefficient=0.02, **options)
        except ValueError:
            continue
    for options in EXTRAS:
        yield Config(**{"weight_decay": 0.01, "trust_coefficient": 0.02} | options)


@contextmanager
def carrying(least: int) -> Iterator[None]:
    """Have the native engine carry the norms of layers of at least as many elements."""
    before = native.CARRIES_ABOVE
    native.CARRIES_ABOVE = least - 1
    try:
        yield
    finally:
        native.CARRIES_ABOVE = before


CONFIGS = list(_configs())
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def _values(config: Config) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in AXES)


def pairwise(rows: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Choose some of the rows: any two values that are in one row are in one of them.

    Greedily and always the same: the first row with the most pairs that are missing.
    """
    pairs = {row: {*itertools.combinations(enumerate(row), 2)} for row in rows}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        chosen.append(max(pairs, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def covering(dtypes: Sequence[Any]) -> list[tuple[Config, Any]]:
    """Return configurations with dtypes: any two values meet; then the extras."""
    configs = {_values(config): config for config in CONFIGS[: -len(EXTRAS)]}
    rows = pairwise((*row, dtype) for row in configs for dtype in dtypes)
    extras = zip(CONFIGS[-len(EXTRAS) :], itertools.cycle(dtypes), strict=False)
    return [*((configs[row[:-1]], row[-1]) for row in rows), *extras]


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


# Weights and gradients whose steps are bitwise the reference's. (float64 norms may
# differ by an ulp: torch's own square root is not always exact.)
EXACT = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
LAYOUTS = st.sampled_from(["contiguous", "transposed", "channels_last"])


def array(generator, dtype, n, layout="contiguous"):
    x = torch.randn(n, generator=generator).to(dtype)
    if layout == "transposed":
        return x.view(-1, 7).T if n % 7 == 0 else x.view(n, 1).T
    if layout == "channels_last":
        if n % 12:
            return x.view(1, n, 1, 1)
        return x.view(2, 2, 3, -1).to(memory_format=torch.channels_last)
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x])[1:]
    return x


def steps(
    engine: Any, sizes, dtypes, config, layout="contiguous", count=3, **options
) -> list[torch.Tensor]:
    """Take some steps, and return the weights and buffers."""
    device = options.pop("device", "cpu")
    generator = torch.Generator().manual_seed(0)
    w_dtype, g_dtype = dtypes
    w = [array(generator, w_dtype, n, layout).to(device) for n in sizes]
    v: list[Any] = [None] * len(w)
    for i in range(count):
        g = [array(generator, g_dtype, n, layout).to(device) for n in sizes]
        step_(engine, w, g, v, 0.37 / (1 + i), config, **options)
    return w + [x for x in v if x is not None]


def step_(
    engine: Any, w, g, v, lr, config: Config, norms=None, **switches: Any
) -> LayerStats:
    """Take a step in place, put new buffers into `v`, and return the statistics."""
    flags = [config.adapt] * len(w), [config.decay] * len(w)
    group = engine.bind(Layers(w, g, v, *flags), config, Switches(**switches))
    group.step_(lr, config, norms)
    v[:] = group.buffers
    return group.stats


def strange_step(engine: Any, value, dtypes, device="cpu") -> torch.Tensor:
    """Take a step with a strange number among weights and gradients."""
    w = torch.linspace(-2, 2, 100).to(dtypes[0])
    g = torch.linspace(3, -1, 100).to(dtypes[1])
    w[17] = value
    g[40] = value
    ours: list[Any] = [w.to(device)]
    config = Config(weight_decay=0.01, trust_coefficient=1.0)
    step_(engine, ours, [g.to(device)], [None], 0.5, config)
    return ours[0].cpu()


def same(ours, theirs):
    """Whether tensors are bitwise identical, on any devices."""
    pairs = [(a, b.to(a.device)) for a, b in zip(ours, theirs, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
