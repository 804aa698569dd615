"""larskit beside other implementations of LARS: real ones, and some restated.

brainpy, Chainer and ivy have environments of their own: `live/`. Where another
implementation is wrong, a test says so; it fails once that is fixed, and then
docs/implementations.md must change too.
"""

import importlib
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import environments
import implementations
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from implementations import HYPERPARAMETERS, WEIGHTS, Weights, assert_same, steps

import larskit.jax
from larskit import functional
from larskit.torch import LARS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import paddle

pytestmark = pytest.mark.integration
MU, WD, ETA = HYPERPARAMETERS.values()
LIVE = {"brainpy.optim.LARS", "Chainer GradientLARS, MomentumSGD", "ivy.lars_update"}
Trajectory = Iterable[Weights]


# --- larskit --------------------------------------------------------------------------


def by_jax(**configuration: Any) -> Trajectory:
    weights, update = jax.tree.map(jnp.asarray, WEIGHTS), functional.update
    state = functional.init(weights)
    for g, lr in steps():
        g = jax.tree.map(jnp.asarray, g)
        weights, state = update(
            weights, g, state, lr, **{**HYPERPARAMETERS, **configuration}
        )
        yield weights


def by_torch(make: Callable[[dict[str, torch.nn.Parameter]], Any]) -> Trajectory:
    """Yield the weights after each step of any torch optimizer."""
    params = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in WEIGHTS.items()}
    optimizer = make(params)
    for gradients, lr in steps():
        optimizer.param_groups[0]["lr"] = lr
        for name, p in params.items():
            p.grad = torch.tensor(gradients[name])
        optimizer.step()
        yield {name: p.detach().numpy().copy() for name, p in params.items()}


def by_optax(make: Callable[..., Any], **arguments: Any) -> Trajectory:
    """Yield the weights after each step of an optax transformation."""
    rates = jnp.asarray(implementations.RATES)
    optimizer = make(lambda count: rates[count], **{**HYPERPARAMETERS, **arguments})
    weights: Any = jax.tree.map(jnp.asarray, WEIGHTS)
    state = optimizer.init(weights)
    for g, _ in steps():
        updates, state = optimizer.update(g, state, weights)
        weights = optax.apply_updates(weights, updates)
        yield weights


APIS: dict[str, Callable[..., Trajectory]] = {
    "functional, NumPy": implementations.larskit_run,
    "functional, JAX": by_jax,
    "jax.lars": partial(by_optax, larskit.jax.lars),
    "torch.LARS": lambda **configuration: by_torch(
        lambda params: LARS(
            list(params.items()), 1.0, **{**HYPERPARAMETERS, **configuration}
        )
    ),
}


# --- the real ones --------------------------------------------------------------------


optax_lars = partial(by_optax, optax.lars)


@cache
def import_other(module: str) -> ModuleType:
    """Import from their environment; of timm one folder, as timm needs torchvision."""
    python = environments.python(*environments.TORCH_OTHERS)
    assert python.exists(), "no other torch implementations: run `make environments`"
    folder = next(python.parents[1].glob("lib/python*/site-packages"))
    timm = ModuleType("timm_optim")
    timm.__path__ = [str(folder / "timm" / "optim")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        sys.modules.setdefault(timm.__name__, timm)
        return importlib.import_module(module)


def timm_lars(params: Iterable[Any], lr: float = 1.0, **arguments: Any) -> Any:
    trust = {"trust_coeff": ETA, "momentum": MU, "weight_decay": WD}
    make = import_other("timm_optim.lars").Lars
    return make(params, lr, **{**trust, **arguments})


def pytorch_optimizer(params: Iterable[Any], lr: float = 1.0, **arguments: Any) -> Any:
    make = import_other("pytorch_optimizer").LARS
    return make(params, lr, **{**HYPERPARAMETERS, **arguments})


def torch_run(make: Callable[..., Any], **arguments: Any) -> Trajectory:
    return by_torch(lambda params: make(params.values(), **arguments))


_made = itertools.count()  # Paddle takes a name of a parameter once


def paddle_lars(params: Weights, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Return the optimizer, and its parameters by their names here."""
    own = {
        name: paddle.create_parameter(
            list(np.shape(w)),
            "float64",
            name=f"{name}_{next(_made)}",
            default_initializer=paddle.nn.initializer.Assign(np.asarray(w)),
        )
        for name, w in params.items()
    }
    arguments = {
        "momentum": MU,
        "lars_coeff": ETA,
        "lars_weight_decay": WD,
        **arguments,
    }
    make = paddle.incubate.optimizer.LarsMomentumOptimizer
    return make(1.0, parameter_list=list(own.values()), **arguments), own


def paddle_run(**arguments: Any) -> Trajectory:
    optimizer, params = paddle_lars(WEIGHTS, **arguments)
    for gradients, lr in steps():
        optimizer.set_lr(lr)
        for name, p in params.items():
            p.grad = paddle.to_tensor(gradients[name])
        optimizer.step()
        yield {name: p.numpy().copy() for name, p in params.items()}


# --- those restated: one layer each, written from their equations ---------------------

EXCLUDED = ("batch_normalization", "bias", "head_supervised")


def ratio(w: Any, x: Any) -> Any:
    """Return ``eta*|w| / |x|``, and 1 where either norm is 0."""
    norms = np.linalg.norm(w), np.linalg.norm(x)
    return ETA * norms[0] / norms[1] if all(norms) else 1.0


def simclr(name: str, w: Any, g: Any, v: Any, lr: float, nesterov: bool = False) -> Any:
    """google-research/simclr, lars_optimizer.py, with classic momentum."""
    kept = not any(re.search(pattern, name) for pattern in EXCLUDED)
    u = g + WD * w if kept else g
    x = lr * (ratio(w, u) if kept else 1) * u
    v = MU * v + x
    return w - (MU * v + x if nesterov else v), v


def simclr_popular(
    name: str, w: Any, g: Any, v: Any, lr: float, nesterov: bool = False
) -> Any:
    """google-research/simclr, lars_optimizer.py, with ``classic_momentum=False``."""
    kept = not any(re.search(pattern, name) for pattern in EXCLUDED)
    u = g + WD * w if kept else g
    v = MU * v + u
    y = MU * v + u if nesterov else v
    return w - lr * (ratio(w, y) if kept else 1) * y, v


def mlperf(name: str, w: Any, g: Any, v: Any, lr: float, nesterov: bool = False) -> Any:
    """mlcommons/training, image_classification/tensorflow2/lars_optimizer.py."""
    if not any(part in name for part in EXCLUDED):
        w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
        if w_norm > 0 and g_norm > 0:
            lr *= ETA * float(w_norm / (g_norm + WD * w_norm + 1e-7))
        g = g + WD * w
    v = MU * v - lr * g
    return (w + MU * v - lr * g if nesterov else w + v), v


def mae(name: str, w: Any, g: Any, v: Any, lr: float) -> Any:
    """facebookresearch/mae, util/lars.py; moco-v3, moco/optimizer.py."""
    if w.ndim > 1:
        g = g + WD * w
        g = g * ratio(w, g)
    v = MU * v + g
    return w - lr * v, v


def barlow_twins(
    name: str,
    w: Any,
    g: Any,
    v: Any,
    lr: float,
    weight_decay_filter: bool = True,
    lars_adaptation_filter: bool = True,
) -> Any:
    """facebookresearch/barlowtwins, main.py, both filters ``exclude_bias_and_norm``."""
    if not (weight_decay_filter and w.ndim == 1):
        g = g + WD * w
    if not (lars_adaptation_filter and w.ndim == 1):
        g = g * ratio(w, g)
    v = MU * v + g
    return w - lr * v, v


def byol(name: str, w: Any, g: Any, v: Any, lr: float) -> Any:
    """deepmind-research, byol/utils/optimizers.py, both ``exclude_bias_and_norm``."""
    *_, module, last = name.split(".")
    if not (last == "b" or "norm" in module):
        u = g + WD * w
        g = ratio(w, u) * u
    v = MU * v + g
    return w - lr * v, v


def restated(rule: Callable[..., Any], **arguments: Any) -> Trajectory:
    weights = dict(WEIGHTS)
    buffers = {name: np.zeros_like(w) for name, w in weights.items()}
    for gradients, lr in steps():
        for name, g in gradients.items():
            weights[name], buffers[name] = rule(
                name, weights[name], g, buffers[name], lr, **arguments
            )
        yield dict(weights)


# --- the same numbers -----------------------------------------------------------------


class Case(NamedTuple):
    """An implementation, by its name in the docs, and what differs from that page."""

    name: str
    run: Callable[[], Trajectory]
    changed: dict[str, Any] = {}  # noqa: RUF012


NESTEROV = {"nesterov": True}
DAMPENING = {"dampening": 0.3}
CASES = (
    Case("optax.lars", optax_lars),
    Case(
        "optax.lars",
        partial(optax_lars, **NESTEROV, eps=1e-3),
        {**NESTEROV, "eps": 1e-3},
    ),
    Case(
        "optax.lars",
        partial(
            optax_lars,
            weight_decay_mask={name: w.ndim > 1 for name, w in WEIGHTS.items()},
            trust_ratio_mask={name: name != "conv.w" for name in WEIGHTS},
        ),
        {"decay": None, "adapt": lambda name, _: name != "conv.w"},
    ),
    *(
        Case(
            name, partial(torch_run, timm_lars, foreach=foreach, **theirs, **more), more
        )
        for name, theirs in (
            ("timm Lars", {}),
            ("timm Lars, trust_clip=True", {"trust_clip": True}),
        )
        for more in ({}, NESTEROV, DAMPENING)
        for foreach in (False, True)
    ),
    Case(
        "timm Lars",
        partial(torch_run, timm_lars, weight_decay=0, always_adapt=True),
        {"weight_decay": 0},
    ),
    Case(
        "pytorch-optimizer LARS", partial(torch_run, pytorch_optimizer, foreach=False)
    ),
    Case("pytorch-optimizer LARS", partial(torch_run, pytorch_optimizer, foreach=True)),
    Case(
        "pytorch-optimizer LARS",
        partial(torch_run, pytorch_optimizer, **NESTEROV, maximize=True),
        {**NESTEROV, "maximize": True},
    ),
    Case(
        "Paddle LarsMomentumOptimizer",
        partial(paddle_run, exclude_from_weight_decay=list(EXCLUDED)),
    ),
    Case(
        "Paddle LarsMomentumOptimizer",
        partial(paddle_run, epsilon=1 / 8),
        {"eps": 1 / 8, "adapt": True, "decay": True},
    ),
    *(
        Case(name, partial(restated, rule, **more), more)
        for name, rule in (
            ("SimCLR, TensorFlow models", simclr),
            ("SimCLR, classic_momentum=False", simclr_popular),
            ("MLPerf reference", mlperf),
        )
        for more in ({}, NESTEROV)
    ),
    Case("MAE, MoCo v3", partial(restated, mae)),
    Case("Barlow Twins, VICReg", partial(restated, barlow_twins)),
    Case(
        "Barlow Twins, VICReg",
        partial(restated, barlow_twins, weight_decay_filter=False),
        {"decay": True},
    ),
    Case(
        "Barlow Twins, VICReg",
        partial(restated, barlow_twins, lars_adaptation_filter=False),
        {"adapt": True},
    ),
    Case("BYOL", partial(restated, byol)),
)


@cache
def theirs(case: int) -> list[Weights]:
    with jax.enable_x64(True):
        return list(CASES[case].run())


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=lambda i: f"{CASES[i].name}-{i}"
)
def test_the_page_configures_larskit_as_the_implementation(case, api):
    configuration = (
        implementations.configurations()[CASES[case].name] | CASES[case].changed
    )
    with jax.enable_x64(True):
        assert_same(APIS[api](**configuration), theirs(case))


def test_every_configuration_of_the_page_is_tested():
    assert {case.name for case in CASES} | LIVE == set(implementations.configurations())


def test_the_run_distinguishes_the_configurations():
    """Every difference of two configurations shows, except a tiny eps."""
    found = {}
    for name, configuration in implementations.configurations().items():
        visible = {key: x for key, x in configuration.items() if key != "eps"}
        *_, found[repr(sorted(visible.items())), name] = implementations.larskit_run(
            **configuration
        )
    for ((a, name), x), ((b, other), y) in itertools.combinations(found.items(), 2):
        apart = max(np.abs(x[layer] - y[layer]).max() for layer in WEIGHTS)
        assert a == b or apart > 1e-3, f"{name} and {other} are the same: {apart}"


# --- known differences and bugs -------------------------------------------------------


W, G = np.array([[3.0, 4.0]]), np.array([[1.0, 2.0]])
ZERO = np.zeros_like(W)


def one_torch_step(make: Callable[..., Any], w: Any, g: Any, **arguments: Any) -> Any:
    """Return the weights after a step, and what the gradient is by then."""
    param = torch.nn.Parameter(torch.tensor(w))
    param.grad = torch.tensor(g)
    make([param], **arguments).step()
    return param.detach().numpy(), param.grad.numpy()


def our_step(name: str, w: Any, g: Any, lr: float = 1.0, **changed: Any) -> Any:
    configuration = {
        **HYPERPARAMETERS,
        **implementations.configurations()[name],
        **changed,
    }
    return functional.update(w, g, functional.init(w), lr, **configuration)[0]


def same(found: Any, expected: Any) -> bool:
    return np.allclose(found, expected, rtol=0, atol=1e-7)


def paper_step(decay: float) -> Any:
    w_norm, g_norm = np.linalg.norm(W), np.linalg.norm(G)
    return W - ETA * w_norm / (g_norm + decay * w_norm) * (G + decay * W)


def test_timm_without_decay_is_sgd():
    theirs, _ = one_torch_step(timm_lars, W, G, weight_decay=0)
    assert same(theirs, W - G)
    assert same(our_step("timm Lars", W, G, weight_decay=0), paper_step(0))


def test_timm_clips_the_step_of_a_zero_layer():
    """Its ratio of 1 is divided by the rate too, when that is above 1."""
    theirs, _ = one_torch_step(timm_lars, ZERO, G, lr=4.0, trust_clip=True)
    assert same(theirs, -G)
    unclipped, _ = one_torch_step(timm_lars, ZERO, G, lr=4.0)
    ours = our_step("timm Lars, trust_clip=True", ZERO, G, lr=4.0)
    assert same(unclipped, -4 * G)
    assert same(ours, -4 * G)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("make", "kept"),
    [(timm_lars, True), (pytorch_optimizer, False), (partial(LARS, lr=1.0), True)],
)
def test_only_pytorch_optimizer_writes_into_the_gradients(make, kept, foreach):
    """They hold the momentum buffer afterwards, to which the next backward adds."""
    moved, gradient = one_torch_step(make, W, G, foreach=foreach)
    assert (gradient == G).all() == kept
    assert same(gradient, W - moved) != kept


@pytest.mark.parametrize("foreach", [False, True])
def test_pytorch_optimizer_adapts_a_layer_of_zero_gradient(foreach):
    """Its decay becomes ``eta*w``, whatever the decay is."""
    theirs, _ = one_torch_step(pytorch_optimizer, W, ZERO, foreach=foreach)
    assert same(theirs, W - ETA * W)
    assert same(our_step("pytorch-optimizer LARS", W, ZERO), W - WD * W)


def test_pytorch_optimizer_dampens_the_first_step():
    arguments = {"momentum": 0.5, "dampening": 0.25}
    theirs, _ = one_torch_step(pytorch_optimizer, W[0], G[0], **arguments)
    sgd, _ = one_torch_step(torch.optim.SGD, W[0], G[0], lr=1.0, **arguments)
    assert same(theirs, W[0] - 0.75 * G[0])
    ours = our_step("pytorch-optimizer LARS", W[0], G[0], **arguments)
    assert same(sgd, W[0] - G[0])
    assert same(ours, sgd)


def test_pytorch_optimizer_ignores_unknown_arguments():
    theirs, _ = one_torch_step(pytorch_optimizer, W, G, eps=100.0, trust_clip=True)
    assert same(theirs, paper_step(WD))
    with pytest.raises(TypeError, match="trust_clip"):
        LARS([torch.nn.Parameter()], lr=1.0, trust_clip=True)  # pyright: ignore


def test_optax_overflows_in_float16():
    w, g = jnp.full((100, 100), 4, "float16"), jnp.full((100, 100), 8, "float16")
    optimizer = optax.lars(1.0, trust_coefficient=ETA)
    updates, _ = optimizer.update(g, optimizer.init(w), w)
    assert np.isnan(np.asarray(updates)).all()
    ours = our_step("optax.lars", w, g, weight_decay=0)
    assert ours.dtype == w.dtype
    assert same(ours, np.float16(4 - ETA * 4))


def paddle_step(**arguments: Any) -> Any:
    optimizer, params = paddle_lars({"w": W}, **arguments)
    params["w"].grad = paddle.to_tensor(G)
    optimizer.step()
    return params["w"].numpy()


@pytest.mark.parametrize(
    "arguments", [{"lars_weight_decay": 0.0}, {"exclude_from_weight_decay": ["w"]}]
)
def test_paddle_without_decay_is_sgd(arguments):
    assert same(paddle_step(), paper_step(WD))
    assert same(paddle_step(**arguments), W - G)
    ours = our_step("Paddle LarsMomentumOptimizer", W, G, adapt=True, decay=False)
    assert same(ours, paper_step(0))
