"""The engine contract: every method of every engine, on every axis of the rule.

The reference engine is held against the rule; the others against the reference.
"""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CONFIGS, DEVICE, covering

from larskit import engines, rule
from larskit.config import Config
from larskit.engines import (
    Engine,
    Layers,
    Switches,
    Unsupported,
    foreach,
    native,
    reference,
    triton,
)
from larskit.norm import norm

# The assignment is the check: pyright compares each module with the Protocol.
ENGINES: dict[str, Engine] = {
    "reference": reference,
    "foreach": foreach,
    "native": native,
    "triton": triton,
}
if DEVICE != "cpu":
    del ENGINES["native"]
FUSED = {"native", "triton"}
# In float32: the fused engines are bitwise equal to the reference, foreach is not.
CLOSE = {"reference": 0.0, "native": 0.0, "triton": 0.0, "foreach": 3e-7}
SHAPES = [(4, 3), (3,), (5, 2, 2)]
ADAPT, DECAY = [True, False, True], [True, False, False]  # three of the four pairs


def full(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(value), device=DEVICE)


def layers(buffers: bool = True, out: Any = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    w, g, v = (
        [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES]
        for _ in range(3)
    )
    return Layers(w, g, v if buffers else [None] * len(SHAPES), ADAPT, DECAY, out)


def restated(found: Any, lr: float, config: Config) -> list[Any]:
    """Return (w', v', stats, y) of each layer, by the rule."""
    rows = []
    for w, g, v, adapt, decay in zip(*found[:5], strict=True):
        own = Config(**{**vars(config), "adapt": adapt, "decay": decay})
        y = rule.displacement(w, g, v, lr, own)[0]
        rows.append((*rule.step(w, g, v, lr, own), y))
    return rows


def assert_close(engine: str, found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        bound = CLOSE[engine]
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def assert_stats(engine: str, group: Any, rows: list[Any]) -> None:
    stats = group.stats
    assert list(stats.adapted) == ADAPT
    assert list(stats.decayed) == DECAY
    columns = zip(*(row[2][:3] for row in rows), strict=True)
    for vector, column in zip(stats[:3], columns, strict=True):
        expected = torch.stack(list(column)).double()
        bound = 1e-6 if engine == "foreach" else 1e-14
        torch.testing.assert_close(vector, expected, rtol=bound, atol=0)


# Triton's interpreter is slow: there, each pair of options is in some configuration.
PAIRS = [config for config, _ in covering([torch.float32])]
every_engine = pytest.mark.parametrize("engine", ENGINES)


def on(all_configs: list[Config], interpreted: list[Config]) -> Any:
    """Run a test on every engine, with as many configurations as it has time for."""
    rows = [
        (engine, config)
        for engine in ENGINES
        for config in (
            interpreted if engine == "triton" and DEVICE == "cpu" else all_configs
        )
    ]
    return pytest.mark.parametrize(("engine", "config"), rows)


every_config = on(CONFIGS, PAIRS)
some_configs = on(CONFIGS[::5], PAIRS[::6])


@every_config
@pytest.mark.parametrize("buffers", [True, False], ids=["v", "no v"])
def test_a_step(engine: str, config: Config, buffers: bool) -> None:
    bound = layers(buffers)
    rows = restated(bound, 0.5, config)
    group = ENGINES[engine].bind(bound, config)
    group.check(0.5, config)
    group.step_(0.5, config)
    assert_close(engine, group.weights, [row[0] for row in rows])
    assert all(a is b for a, b in zip(group.weights, bound.weights, strict=True))
    if config.momentum or buffers:
        assert_close(engine, group.buffers, [row[1] for row in rows])
    else:
        assert group.buffers == [None] * len(rows)
    assert_stats(engine, group, rows)
    assert group.stats.update_norm is None


@every_config
def test_norms_before_the_step(engine: str, config: Config) -> None:
    bound = layers()
    before = [x.clone() for column in bound[:3] for x in column]
    group = ENGINES[engine].bind(bound, config)
    w_norms, q = group.norms(config)
    rows = restated(bound, 0.5, config)
    tolerance = 1e-6 if engine == "foreach" else 1e-14
    for found, place in ((w_norms, 0), (q, 1)):
        expected = torch.stack([row[2][place] for row in rows])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    after = [x for column in bound[:3] for x in column]
    assert all(map(torch.equal, before, after))
    group.step_(0.5, config, (w_norms, q))
    assert_close(engine, group.weights, [row[0] for row in rows])


@every_engine
def test_other_norms_are_used(engine: str) -> None:
    bound = Layers([full(1, 4)], [full(1, 4)], [None], [True], [True])
    config = Config(trust_coefficient=1.0)
    group = ENGINES[engine].bind(bound, config)
    group.step_(0.25, config, (full(8, 1).double(), full(2, 1).double()))
    assert group.stats.trust_ratio.tolist() == [4.0]
    torch.testing.assert_close(group.weights[0], full(0, 4))


@some_configs
def test_full_statistics(engine: str, config: Config) -> None:
    bound = layers()
    expected = [norm(row[3]) for row in restated(bound, 0.5, config)]
    group = ENGINES[engine].bind(bound, config)
    group.step_(0.5, config, full_stats=True)
    found = group.stats.update_norm
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)


@some_configs
@pytest.mark.parametrize("on_device", [True, False], ids=["dev", "bool"])
def test_full_statistics_of_a_skipped_step(
    engine: str, config: Config, on_device: bool
) -> None:
    bound = layers()
    before = [x.clone() for x in bound.weights]
    expected = [norm(row[3]) for row in restated(bound, 0.5, config)]
    switches = Switches(capturable=engine != "native")
    group = ENGINES[engine].bind(bound, config, switches)
    apply_if = torch.tensor(False, device=DEVICE) if on_device else False
    group.step_(0.5, config, apply_if=apply_if, full_stats=True)
    found = group.stats.update_norm
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)
    assert all(map(torch.equal, group.weights, before))


@every_engine
@pytest.mark.parametrize("scales", [False, True], ids=["step", "scale"])
def test_no_gradient_is_held_after_the_call(engine: str, scales: bool) -> None:
    bound = layers()
    group = ENGINES[engine].bind(bound, Config(), scales_gradients=scales)
    held = [weakref.ref(g) for g in bound.gradients]
    if scales:
        group.scale_gradients(Config())
    else:
        group.step_(0.5, Config())
    del bound
    assert [ref() for ref in held] == [None] * len(held)


@some_configs
@pytest.mark.parametrize("buffers", [True, False], ids=["v", "no v"])
@pytest.mark.parametrize("on_device", [True, False], ids=["dev", "bool"])
@pytest.mark.parametrize("flag", [True, False], ids=["apply", "skip"])
def test_a_conditional_step(
    engine: str, config: Config, buffers: bool, on_device: bool, flag: bool
) -> None:
    bound = layers(buffers)
    rows = restated(bound, 0.5, config)
    before = [x.clone() for x in bound.weights]
    kept: list[Any] = [None if v is None else v.clone() for v in bound.buffers]
    switches = Switches(capturable=engine != "native")
    group: Any = ENGINES[engine].bind(bound, config, switches)
    apply_if = torch.tensor(flag, device=DEVICE) if on_device else flag
    group.step_(0.5, config, apply_if=apply_if)
    assert_stats(engine, group, rows)
    if flag:
        assert_close(engine, group.weights, [row[0] for row in rows])
        return
    assert all(map(torch.equal, group.weights, before))
    for v, old in zip(group.buffers, kept, strict=True):
        if old is None:
            assert v is None or not v.any()
        else:
            assert v is not None
            assert torch.equal(v, old)


@some_configs
def test_the_scale_of_the_loss_is_divided_out(engine: str, config: Config) -> None:
    bound = layers()
    rows = restated(bound, 0.5, config)
    scaled = [g * 1024 for g in bound.gradients]
    kept = [g.clone() for g in scaled]
    for measures_first in (False, True):
        again = layers()._replace(gradients=scaled)
        group = ENGINES[engine].bind(again, config)
        known = group.norms(config, full(1024)) if measures_first else None
        group.step_(0.5, config, known, grad_scale=full(1024))
        assert_close(engine, group.weights, [row[0] for row in rows])
        assert_stats(engine, group, rows)
        assert all(map(torch.equal, scaled, kept))


@every_engine
def test_hyper_parameters_may_be_tensors(engine: str) -> None:
    config = Config(weight_decay=0.25, momentum=0.5)
    as_tensors = Config(weight_decay=full(0.25), momentum=full(0.5))
    rows = restated(layers(), 0.5, config)
    group = ENGINES[engine].bind(layers(), as_tensors)
    group.step_(full(0.5), as_tensors)
    assert_close(engine, group.weights, [row[0] for row in rows])


@some_configs
def test_rebinding_other_gradients(engine: str, config: Config) -> None:
    """An engine that cannot says so; a group that was bound again must step alike."""
    bound, expected = layers(), layers()
    group = ENGINES[engine].bind(bound, config)
    for step in range(3):
        gradients = [g * (step + 1) for g in bound.gradients]
        if not group.rebind(gradients):
            assert engine not in FUSED
            state = bound._replace(gradients=gradients, buffers=group.buffers)
            group = ENGINES[engine].bind(state, config)
        rows = restated(expected._replace(gradients=gradients), 0.5, config)
        expected = expected._replace(
            weights=[row[0] for row in rows], buffers=[row[1] for row in rows]
        )
        group.step_(0.5, config)
    bound_again = Layers(group.weights, [], group.buffers, [], [])
    if engine == "foreach":
        torch.testing.assert_close(
            list(bound_again.weights), list(expected.weights), rtol=1e-5, atol=1e-6
        )
    else:
        assert_close(engine, bound_again.weights, expected.weights)
        assert_close(engine, bound_again.buffers, expected.buffers)


@every_engine
@pytest.mark.usefixtures("every_layer_carries")
def test_carried_norms_are_refused_or_used(engine: str) -> None:
    config, switches = Config(), Switches(carry_norms=True)
    if engine not in FUSED:
        with pytest.raises(Unsupported, match=f"the {engine} engine carries no norms"):
            ENGINES[engine].bind(layers(), config, switches)
        return
    bound = layers()
    group = ENGINES[engine].bind(bound, config, switches)
    group.step_(0.5, config)
    after = [norm(w).item() for w in bound.weights]
    with torch.no_grad():
        bound.weights[0].data.zero_()  # which nothing can see
    assert group.rebind(bound.gradients)
    group.step_(0.5, config)
    assert group.stats.weight_norm.tolist() == pytest.approx(after, rel=1e-14)


@every_engine
@pytest.mark.parametrize("buffers", [True, False], ids=["v", "no v"])
def test_results_go_where_they_are_to(engine: str, buffers: bool) -> None:
    config = Config(weight_decay=0.1)
    given = full(7, 4, 3)
    bound = layers(buffers, out=[given, None, None])
    if engine in ("foreach", "triton"):
        with pytest.raises(Unsupported, match="weights in place only"):
            ENGINES[engine].bind(bound, config)
        return
    before = [x.clone() for x in bound.weights]
    rows = restated(bound, 0.5, config)
    group = ENGINES[engine].bind(bound, config)
    group.step_(0.5, config)
    assert group.weights[0] is given
    assert_close(engine, group.weights, [row[0] for row in rows])
    assert all(map(torch.equal, bound.weights, before))
    if buffers:
        assert_close(engine, group.buffers, [row[1] for row in rows])


HOOK = [
    Config(trust_coefficient=1.0, zero_guard=False, eps=1e-9, threshold=1e-2),
    Config(trust_coefficient=1.0, zero_guard=False, weight_decay=0.25),
    Config(weight_decay=0.25, denominator="decayed_gradient"),
    Config(
        weight_decay=0.25,
        dampening=0.5,
        denominator="momentum",
        lr_placement="outside",
    ),
]
HOOK_IDS = ["no decay", "decay", "decayed gradient", "momentum"]


@every_engine
@pytest.mark.parametrize("config", HOOK, ids=HOOK_IDS)
@pytest.mark.parametrize("where", ["in place", "new", "given"])
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("known", [False, True], ids=["measured", "given norms"])
def test_scaled_gradients(
    engine: str, config: Config, where: str, scale: Any, known: bool
) -> None:
    given = [full(7, *shape) for shape in SHAPES]
    out = {"in place": None, "new": [None] * len(SHAPES), "given": given}[where]
    bound = layers(buffers=False, out=out)
    bound = bound._replace(gradients=[g * (scale or 1) for g in bound.gradients])
    expected = [
        rule.scaled_gradient(
            w, g, Config(**{**vars(config), "adapt": a, "decay": d}), scale or 1.0
        )
        for w, g, _, a, d in zip(*bound[:5], strict=True)
    ]
    group = ENGINES[engine].bind(bound, config, scales_gradients=True)
    grad_scale = None if scale is None else full(scale)
    # The decay in the norms that are given is scaled as the gradients are.
    scaled = replace(config, weight_decay=config.weight_decay * (scale or 1))
    norms = group.norms(scaled) if known else None
    found = group.scale_gradients(config, norms, grad_scale)
    if engine == "foreach":
        torch.testing.assert_close(list(found), expected, rtol=1e-6, atol=1e-6)
    else:
        assert_close(engine, found, expected)
    receivers = {"in place": bound.gradients, "given": given}.get(where, found)
    assert all(a is b for a, b in zip(found, receivers, strict=True))
    if where != "in place" and group.rebind(bound.gradients):  # without new memory
        again = group.scale_gradients(config, norms, grad_scale)
        assert all(a is b for a, b in zip(found, again, strict=True))


@every_engine
def test_gradients_are_not_written(engine: str) -> None:
    for config in CONFIGS[::7]:
        bound = layers()
        before = [g.clone() for g in bound.gradients]
        group = ENGINES[engine].bind(bound, config)
        group.step_(0.1, config)
        assert all(map(torch.equal, bound.gradients, before))
        buffers = {x.data_ptr() for x in group.buffers if x is not None}
        assert not buffers & {g.data_ptr() for g in bound.gradients}


def test_who_is_chosen() -> None:
    """The fastest engine that takes the layers, unless a switch asks for another."""
    config = Config()
    rows = [
        (Switches(), native if DEVICE == "cpu" else triton),
        (Switches(fused=True), native if DEVICE == "cpu" else triton),
        (Switches(fused=False), foreach),
        (Switches(foreach=True), foreach),
        (Switches(foreach=False), reference),
        (Switches(differentiable=True), reference),
    ]
    for switches, engine in rows:
        group = engines.choose(layers(), config, switches)
        assert isinstance(group, engine.Group), switches


def test_why_no_engine_is_chosen() -> None:
    strided = layers()._replace(weights=[full(1, *s, 2)[..., 0] for s in SHAPES])
    with pytest.raises(Unsupported, match="weight 0 is not contiguous") as raised:
        engines.choose(strided, Config(), Switches(fused=True))
    assert set(raised.value.reasons) == {"native" if DEVICE == "cpu" else "triton"}
    group = engines.choose(strided, Config())
    assert isinstance(group, foreach.Group)


def test_availability_names_every_engine() -> None:
    assert set(engines.availability()) == set(engines.NAMES)
