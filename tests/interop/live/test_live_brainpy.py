"""larskit.jax.LARS beside the real brainpy.optim.LARS; runs where BrainPy is."""

import brainpy  # pyright: ignore[reportMissingImports]
import brainpy.math as bm  # pyright: ignore[reportMissingImports]
import implementations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larskit.jax import LARS

STEPS = 20
MAKERS = (LARS, brainpy.optim.LARS)
X = np.linspace(-2, 2, 64, dtype="float32")[:, None]
Y = np.sin(2 * X) + X**2 / 4


def network():
    """Return two layers; a bias of zero would take its first step at the raw rate."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (1, 16), "b1": (16,), "w2": (16, 1), "b2": (1,)}
    return {
        key: bm.TrainVar(jnp.asarray(rng.normal(size=shape), "float32"))
        for key, shape in shapes.items()
    }


def fit(make, lr, jit=bm.jit, **arguments):
    """Train the network, and return what was made and the loss of each step."""
    weights = network()
    optimizer = make(lr, weights, **arguments)

    def loss():
        hidden = bm.tanh(X @ weights["w1"].value + weights["b1"].value)
        return ((hidden @ weights["w2"].value + weights["b2"].value - Y) ** 2).mean()

    @jit
    def step():
        grads, value = bm.grad(loss, grad_vars=weights, return_value=True)()
        optimizer.update(grads)
        return value

    return weights, optimizer, [float(step()) for _ in range(STEPS)]


def assert_equal(ours, theirs):
    assert list(ours) == list(theirs)
    for key, expected in theirs.items():
        expected = np.asarray(expected.value)
        atol = 2e-6 * np.abs(expected).max()
        np.testing.assert_allclose(ours[key].value, expected, rtol=0, atol=atol)


SCHEDULES = {
    "constant": lambda: 2.0,
    "variable": lambda: bm.Variable(jnp.asarray(2.0)),
    "exponential": lambda: brainpy.optim.ExponentialDecayLR(4.0, 5, 0.5),
    "polynomial": lambda: brainpy.optim.PolynomialDecayLR(4.0, 20, 0.1, power=2.0),
    "cosine": lambda: brainpy.optim.CosineAnnealingWarmRestarts(4.0, 2, 5),
}


OTHERS = {"momentum": 0.5, "weight_decay": 0.01, "tc": 0.02, "eps": 0.0}


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [*((schedule, {}) for schedule in SCHEDULES), ("exponential", OTHERS)],
)
def test_a_fit_under_jit_is_that_of_brainpy(schedule, arguments):
    expected, theirs, their_losses = fit(
        brainpy.optim.LARS, SCHEDULES[schedule](), **arguments
    )
    found, ours, losses = fit(LARS, SCHEDULES[schedule](), **arguments)
    assert_equal(found, expected)
    assert_equal(ours.implicit_vars, theirs.implicit_vars)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-5)
    assert float(ours.lr()) == pytest.approx(float(theirs.lr()))
    assert losses[-1] < losses[0]
    assert ours.step_count.value == STEPS


def test_a_fit_without_jit_is_that_of_brainpy():
    arguments = {"jit": lambda step: step}
    expected, theirs, _ = fit(brainpy.optim.LARS, 2.0, **arguments)
    found, ours, _ = fit(LARS, 2.0, **arguments)
    assert_equal(found, expected)
    assert_equal(ours.implicit_vars, theirs.implicit_vars)


def test_a_schedule_of_the_step_count_is_traced_by_jit():
    expected, *_ = fit(brainpy.optim.LARS, SCHEDULES["exponential"]())
    found, *_ = fit(LARS, lambda count: 4.0 * 0.5 ** (count / 5))
    assert_equal(found, expected)


def test_the_configuration_of_the_page_is_that_of_brainpy():
    momentum, weight_decay, tc = implementations.HYPERPARAMETERS.values()

    def theirs():
        lr = bm.Variable(jnp.asarray(0.0))
        weights = {
            k: bm.TrainVar(jnp.asarray(w)) for k, w in implementations.WEIGHTS.items()
        }
        optimizer = brainpy.optim.LARS(lr, weights, momentum, weight_decay, tc)
        for gradients, rate in implementations.steps():
            lr.value = jnp.asarray(rate)
            optimizer.update({k: jnp.asarray(g) for k, g in gradients.items()})
            yield {k: np.asarray(w.value) for k, w in weights.items()}

    ours = implementations.larskit_run(
        **implementations.configurations()["brainpy.optim.LARS"]
    )
    with jax.enable_x64(True):
        implementations.assert_same(ours, theirs())


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_layer_without_length_is_that_of_brainpy(weight, gradient):
    weights = {make: bm.TrainVar(bm.ones(3) * weight) for make in MAKERS}
    for make, variable in weights.items():
        optimizer = make(0.1, {"w": variable})
        for _ in range(3):
            optimizer.update({"w": jnp.full(3, gradient)})
    ours, theirs = ({"w": variable} for variable in weights.values())
    assert_equal(ours, theirs)


def test_the_state_is_made_of_variables_of_brainpy():
    optimizer = LARS(1.0, network())
    assert {type(x) for x in optimizer.vars().values()} == {bm.Variable}


def test_a_scheduler_of_brainpy_is_a_node():
    lr = SCHEDULES["exponential"]()
    lr.register_implicit_vars(extra=bm.Variable(jnp.ones(1)))
    arguments = {"lr": lr, "train_vars": network()}
    ours, theirs = LARS(**arguments), brainpy.optim.LARS(**arguments)
    assert list(ours.nodes("relative")) == list(theirs.nodes("relative")) == ["", "lr"]
    assert ours.nodes("relative")["lr"] is ours.lr is lr
    assert set(ours.vars("relative")) == {
        "step_count",
        *(f"{key}_m" for key in network()),
        "lr.last_epoch",
        "lr.last_call",
        "lr.extra",
    }
    own = {f"{ours.name}.step_count"}
    renamed = {key.replace(theirs.name, ours.name) for key in theirs.vars()}
    assert set(ours.vars()) - own == renamed
    assert list(ours.train_vars("relative")) == list(network())


def test_states_of_brainpy_are_loaded():
    lr = SCHEDULES["exponential"]()
    _, theirs, _ = fit(brainpy.optim.LARS, lr, name="moved")
    ours = LARS(lr, network(), name="moved")
    result = ours.load_state_dict(theirs.state_dict(), warn=False)
    assert result == (["moved.step_count"], [])
    assert_equal(ours.implicit_vars, theirs.implicit_vars)


def test_a_resumed_fit_goes_on_with_its_scheduler(tmp_path):
    _, first, _ = fit(LARS, SCHEDULES["polynomial"]())
    first.save_states(tmp_path / "state")
    second = LARS(SCHEDULES["polynomial"](), network())
    second.load_states(tmp_path / "state")
    assert float(second.lr()) == float(first.lr())
    assert second.lr.last_call.value == STEPS - 1
    assert_equal(second.implicit_vars, first.implicit_vars)


def test_gradients_may_be_arrays_of_brainpy():
    weights = network()
    optimizer = LARS(1.0, weights)
    before = {key: np.asarray(w.value) for key, w in weights.items()}
    optimizer.update({key: bm.ones_like(w) for key, w in weights.items()})
    optimizer.update({key: bm.Array(jnp.ones(w.shape)) for key, w in weights.items()})
    for key, w in weights.items():
        assert (np.asarray(w.value) < before[key]).all()


def test_variables_of_brainpy_move_too():
    optimizer = LARS(SCHEDULES["exponential"](), network())
    assert optimizer.cpu() is optimizer
    with pytest.raises(RuntimeError, match="there is no 'tpu' device"):
        optimizer.tpu()


def test_as_a_pytree_it_refuses_a_scheduler_that_is_none():
    optimizer = LARS(SCHEDULES["exponential"](), network())
    with pytest.raises(TypeError, match="is not a pytree"):
        jax.jit(lambda optimizer: optimizer)(optimizer)
