import copy
import inspect
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import TraceContextError

import larskit
from larskit.config import Config
from larskit.jax import LARS, TrainVar, Variable
from larskit.jax.graph import Node
from larskit.jax.variables import read

FAMILIES = {"larskit": (TrainVar, Variable), "nnx": (nnx.Param, nnx.Variable)}
W = {"kernel": [[3.0, 0.0], [0.0, 4.0]], "bias": [0.6, 0.8]}
G = {"kernel": [[0.0, 2.0], [0.0, 0.0]], "bias": [1.0, -1.0]}


@pytest.fixture(params=FAMILIES, name="kind")
def fixture_kind(request):
    return FAMILIES[request.param][0]


DEVICES = Path(__file__).parent / "live" / "devices.py"


def weights(kind=TrainVar, dtype="float32"):
    return {key: kind(jnp.asarray(w, dtype)) for key, w in W.items()}


def gradients(dtype="float32"):
    return {key: jnp.asarray(g, dtype) for key, g in G.items()}


def arrays(variables):
    return {key: np.asarray(read(x), "float64") for key, x in variables.items()}


def snapshot(optimizer):
    return {
        key: np.asarray(read(x))
        for key, x in {**optimizer.train_vars(), **optimizer.vars()}.items()
    }


def assert_same(found, expected, **tolerance):
    assert set(found) == set(expected)
    for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, **(tolerance or {"rtol": 0}))


@dataclass
class Halving:
    """A scheduler that counts in Python."""

    lr: float
    calls: int = 0

    def step_call(self):
        self.calls += 1

    def __call__(self):
        return self.lr * 0.5**self.calls


@jax.tree_util.register_dataclass
@dataclass
class TracedHalving:
    """A scheduler whose count JAX can trace."""

    calls: jax.Array = field(default_factory=lambda: jnp.asarray(0))
    lr: float = field(default=8.0, metadata={"static": True})

    def step_call(self):
        self.calls = self.calls + 1

    def __call__(self):
        return self.lr * 0.5**self.calls


# ------------------------------------------------------------------- the rule


def paper(w, g, v, lr, mu=0.9, wd=1e-4, tc=1e-3, eps=1e-5):
    """Restate one step in float64, apart from `larskit.rule`."""
    w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
    plain = w_norm == 0 or g_norm == 0
    ratio = 1.0 if plain else tc * w_norm / (g_norm + wd * w_norm + eps)
    v = mu * v + lr * ratio * (g + wd * w)
    return w - v, v


def printed(w, g, v, lr, mu=0.9, wd=1e-4, tc=1e-3, eps=1e-5):
    """Restate one step of the formula on the seed's page in float64."""
    v = mu * v + (1 - mu) * (g + wd * w)
    w_norm, v_norm = np.linalg.norm(w), np.linalg.norm(v)
    ratio = 1.0 if w_norm == 0 or v_norm == 0 else tc * w_norm / (v_norm + eps)
    return w - lr * ratio * v, v


@pytest.mark.parametrize(
    ("make", "oracle"), [(LARS, paper), (LARS.lamb_paper, printed)]
)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": 0.5, "weight_decay": 0.1, "tc": 0.02, "eps": 0.01},
        {"momentum": 0.0, "weight_decay": 0.0, "tc": 1.0, "eps": 0.0},
    ],
    ids=["defaults", "others", "edges"],
)
def test_it_follows_a_restatement_in_float64(
    make, oracle, arguments: dict[str, float], kind
):
    variables, rng = weights(kind), np.random.default_rng(0)
    optimizer = make(0.5, variables, **arguments)
    names: dict[str, str] = {"momentum": "mu", "weight_decay": "wd"}
    given = {names.get(k, k): x for k, x in arguments.items()}
    w, v = arrays(variables), {key: np.zeros_like(x) for key, x in W.items()}
    for _ in range(6):
        g = {key: np.float32(rng.normal(size=np.shape(x))) for key, x in W.items()}
        optimizer.update(g)
        for key in W:
            w[key], v[key] = oracle(w[key], np.float64(g[key]), v[key], 0.5, **given)
    assert_same(arrays(variables), w, rtol=2e-6, atol=2e-6)
    momenta = {f"{key}_m": x for key, x in v.items()}
    assert_same(arrays(optimizer.implicit_vars), momenta, rtol=2e-6, atol=2e-6)


def test_the_printed_formula_is_another_than_the_default():
    default, printed = (make(1.0, weights()) for make in (LARS, LARS.lamb_paper))
    for optimizer in (default, printed):
        optimizer.update(gradients())
        optimizer.update(gradients())
    difference = read(default.vars_to_train["kernel"]) - read(
        printed.vars_to_train["kernel"]
    )
    assert jnp.abs(difference).max() > 1e-3
    assert repr(printed).startswith("LARS.lamb_paper(lr=1.0, momentum=0.9")


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_a_layer_without_length_steps_at_the_raw_rate(zero):
    w = np.asarray([0, 0] if zero == "weight" else [3, 4], "float32")
    g = np.asarray([0, 0] if zero == "gradient" else [3, 4], "float32")
    variable = TrainVar(w)
    LARS(0.5, {"w": variable}, weight_decay=0.1).update({"w": g})
    np.testing.assert_allclose(variable.value, w - 0.5 * (g + 0.1 * w), rtol=1e-6)


def test_the_signature_is_that_of_the_seed():
    expected = (
        "(lr, train_vars=None, momentum=0.9, weight_decay=0.0001, tc=0.001, "
        "eps=1e-05, name=None)"
    )
    for make in (LARS, LARS.lamb_paper):
        signature = inspect.signature(make)
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == expected


def test_the_hyper_parameters_are_those_of_the_rule():
    optimizer = LARS(1.0, momentum=0.5, weight_decay=0.1, tc=0.2, eps=0.3)
    expected = Config(momentum=0.5, weight_decay=0.1, trust_coefficient=0.2, eps=0.3)
    assert optimizer.config == expected
    described = "LARS(lr=1.0, momentum=0.5, weight_decay=0.1, tc=0.2, eps=0.3)"
    assert repr(optimizer) == described


# ------------------------------------------------------------------- the rate


@pytest.mark.parametrize(
    "lr",
    [
        8.0,
        np.float32(8),
        np.asarray(8.0),
        jnp.asarray(8.0),
        Variable(8.0),
        nnx.Variable(jnp.asarray(8.0)),
    ],
    ids=["float", "scalar", "numpy", "jax", "variable", "nnx"],
)
def test_a_constant_rate_is_called_without_arguments(lr):
    variables = weights()
    optimizer = LARS(lr, variables)
    assert optimizer.lr() == optimizer.lr(5) == 8
    optimizer.update(gradients())
    expected = paper(np.float64(W["bias"]), np.float64(G["bias"]), 0, 8.0)[0]
    np.testing.assert_allclose(variables["bias"].value, expected, rtol=2e-6)


def test_a_schedule_is_called_with_the_updates_made():
    optimizer = LARS(optax.exponential_decay(8.0, 1, 0.5), weights())
    seen = []
    for _ in range(3):
        seen.append(float(optimizer.lr()))
        optimizer.update(gradients())
    assert seen == [8, 4, 2]
    assert optimizer.lr(5) == 0.25
    assert optimizer.step_count.value == 3


@pytest.mark.parametrize("scheduler", [Halving(8.0), TracedHalving()])
def test_a_scheduler_is_called_after_each_update(scheduler):
    optimizer, by_hand = LARS(scheduler, weights()), LARS(8.0, weights())
    assert optimizer.lr is scheduler
    for expected in (8.0, 4.0, 2.0):
        assert optimizer.lr() == expected
        by_hand.lr = expected
        optimizer.update(gradients())
        by_hand.update(gradients())
    assert scheduler.calls == 3
    assert_same(
        arrays(optimizer.vars_to_train), arrays(by_hand.vars_to_train), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (-1.0, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        (float("nan"), ValueError, "lr must be a finite number"),
        (None, TypeError, "lr must be a finite number of at least 0, got None"),
        ("0.1", TypeError, "lr must be a finite number of at least 0, got '0.1'"),
        (object(), TypeError, "lr is a object, expected a number, a variable, a sched"),
        (jnp.ones(2), ValueError, r"lr has the shape \(2,\), expected one number"),
        (Variable([1.0]), ValueError, r"lr has the shape \(1,\), expected one number"),
    ],
)
def test_what_is_no_rate_is_refused(lr, error, message):
    with pytest.raises(error, match=message):
        LARS(lr)
    optimizer = LARS(0.5)
    with pytest.raises(error, match=message):
        optimizer.lr = lr
    assert optimizer.lr() == 0.5


def test_a_rate_of_zero_moves_nothing():
    variables = weights()
    LARS(0.0, variables).update(gradients())
    assert_same(arrays(variables), {key: np.float32(w) for key, w in W.items()})


@pytest.mark.parametrize("name", ["momentum", "weight_decay", "tc", "eps"])
def test_what_is_no_hyper_parameter_is_refused_and_takes_no_name(name):
    with pytest.raises(ValueError, match="got -1"):
        LARS(0.1, **{"name": "refused", name: -1})
    assert LARS(0.1, name="refused").name == "refused"


# ------------------------------------------------------------- the variables


def test_the_state_is_of_the_family_of_the_weights(kind):
    state = dict(FAMILIES.values())[kind]
    optimizer = LARS(0.1, weights(kind))
    assert list(optimizer.implicit_vars) == ["kernel_m", "bias_m"]
    assert {type(x) for x in optimizer.implicit_vars.values()} == {state}
    assert type(optimizer.step_count) is state
    assert all(not read(x).any() for x in optimizer.vars().values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_everything_keeps_its_dtype(dtype):
    variables = weights(dtype=dtype)
    optimizer = LARS(1.0, variables)
    optimizer.update(gradients(dtype))
    found = {x.dtype.name for x in (*variables.values(), *optimizer.vars().values())}
    assert found == {dtype, "int32"}
    assert not optimizer.implicit_vars["bias_m"].value.weak_type


def test_variables_can_be_registered_later_and_again(kind):
    variables = weights(kind)
    optimizer = LARS(1.0)
    assert optimizer.vars_to_train == {}
    optimizer.register_train_vars()
    optimizer.register_train_vars({"kernel": variables["kernel"]})
    optimizer.update({"kernel": gradients()["kernel"]})
    momentum = optimizer.implicit_vars["kernel_m"]
    optimizer.register_train_vars(variables)
    assert optimizer.vars_to_train == variables
    assert optimizer.implicit_vars["kernel_m"] is momentum
    assert read(momentum).any()
    optimizer.update(gradients())
    assert read(optimizer.step_count) == 2


def test_register_vars_warns_and_registers():
    optimizer, variables = LARS(1.0), weights()
    with pytest.warns(UserWarning, match="register_train_vars"):
        optimizer.register_vars(variables)
    assert optimizer.vars_to_train == variables
    assert list(optimizer.implicit_vars) == ["kernel_m", "bias_m"]


SHARED = TrainVar([1.0])


@pytest.mark.parametrize(
    ("train_vars", "error", "message"),
    [
        ([SHARED], TypeError, "train_vars is a list, expected a dict of variables"),
        ({1: SHARED}, TypeError, "train_vars has the key 1, expected a string"),
        ({"x": jnp.ones(1)}, TypeError, r"train_vars\['x'\] is a .*, expected a varia"),
        ({"x": TrainVar([1])}, TypeError, r"train_vars\['x'\] has the dtype int32"),
        ({"bias": SHARED}, ValueError, r"train_vars\['bias'\] is another variable"),
        ({"x": SHARED, "y": SHARED}, ValueError, "one variable under two names"),
        ({"x": nnx.Param(jnp.ones(1))}, TypeError, "mixes variables of larskit.jax"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(train_vars, error, message):
    variables = weights()
    optimizer = LARS(1.0, variables)
    before = dict(optimizer.implicit_vars)
    with pytest.raises(error, match=message):
        optimizer.register_train_vars(train_vars)
    assert optimizer.vars_to_train == variables
    assert optimizer.implicit_vars == before


def test_a_state_variable_of_the_users_is_not_overwritten():
    optimizer = LARS(1.0)
    optimizer.register_implicit_vars(w_m=SHARED)
    with pytest.raises(ValueError, match="'w_m' is the name of more than one"):
        optimizer.register_train_vars({"w": TrainVar([1.0])})
    assert (optimizer.vars_to_train, optimizer.implicit_vars) == ({}, {"w_m": SHARED})


# -------------------------------------------------------------- the gradients


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bias": None}, TypeError, r"grads\['bias'\] is a NoneType, expected an arr"),
        ({"bias": [1.0, 2.0]}, TypeError, r"grads\['bias'\] is a list, expected an a"),
        ({"bias": jnp.ones(3)}, ValueError, r"grads\['bias'\] has the shape \(3,\), e"),
        ({"bias": jnp.ones((2, 1))}, ValueError, r"grads\['bias'\] has the shape"),
        ({"bias": np.ones(2)}, TypeError, r"grads\['bias'\] has the dtype float64, ex"),
        ({"bias": jnp.ones(2, int)}, TypeError, r"grads\['bias'\] has the dtype int32"),
        ({"more": jnp.ones(2)}, ValueError, "grads has the extra 'more', expected one"),
        ({"bias": "missing"}, ValueError, "grads misses 'bias', expected one for each"),
    ],
)
def test_gradients_that_do_not_fit_change_nothing(change, error, message, kind):
    grads = {**gradients(), **change}
    grads = {key: g for key, g in grads.items() if not isinstance(g, str)}
    optimizer = LARS(Halving(1.0), weights(kind))
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.check_grads(grads)
    with pytest.raises(error, match=message):
        optimizer.update(grads)
    assert_same(snapshot(optimizer), before)
    assert optimizer.lr.calls == 0


def test_gradients_are_a_dict():
    optimizer, grads = LARS(1.0, weights()), list(gradients().values())
    with pytest.raises(TypeError, match="grads is a list, expected a dict of gradien"):
        optimizer.check_grads(grads)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrap", [np.asarray, TrainVar, nnx.Param])
def test_gradients_may_be_numpy_arrays_or_variables(wrap, kind):
    expected, found = LARS(1.0, weights(kind)), LARS(1.0, weights(kind))
    expected.update(gradients())
    wrapped = {key: wrap(g) for key, g in gradients().items()}
    found.check_grads(wrapped)
    found.update(wrapped)
    assert_same(arrays(found.vars_to_train), arrays(expected.vars_to_train))


# ------------------------------------------------------------ transformations


@pytest.mark.parametrize("make", [LARS, LARS.lamb_paper])
@pytest.mark.parametrize(
    "lr",
    [lambda: 8.0, lambda: optax.cosine_decay_schedule(8.0, 4), TracedHalving],
    ids=["float", "optax", "scheduler"],
)
def test_it_goes_through_jit_and_is_compiled_once(make, lr, kind):
    traced = []

    @jax.jit
    def step(optimizer, grads):
        traced.append(optimizer)
        optimizer.update(grads)
        return optimizer

    eager, compiled = make(lr(), weights(kind)), make(lr(), weights(kind))
    original, name = compiled, compiled.name
    before = snapshot(original)
    for _ in range(4):
        eager.update(gradients())
        compiled = step(compiled, gradients())
    assert len(traced) == 1
    assert type(compiled) is LARS
    assert compiled.name == name
    assert read(compiled.step_count) == 4
    assert compiled.config == eager.config
    close = {"rtol": 1e-6, "atol": 1e-8}
    assert_same(arrays(compiled.vars_to_train), arrays(eager.vars_to_train), **close)
    assert_same(arrays(compiled.implicit_vars), arrays(eager.implicit_vars), **close)
    assert_same(snapshot(original), before)


@pytest.mark.parametrize("make", [Variable, jnp.asarray, np.asarray])
def test_a_traced_rate_changes_without_compiling_anew(make):
    traced = []

    @jax.jit
    def step(optimizer, grads):
        traced.append(optimizer)
        optimizer.update(grads)
        return optimizer

    optimizer, by_hand = LARS(make(4.0), weights()), LARS(4.0, weights())
    for rate in (4.0, 1.0):
        optimizer.lr = make(rate)
        by_hand.lr = rate
        optimizer = step(optimizer, gradients())
        by_hand.update(gradients())
    assert_same(
        arrays(optimizer.vars_to_train), arrays(by_hand.vars_to_train), rtol=1e-6
    )
    assert len(traced) == 1


def test_it_is_carried_through_a_scan():
    def body(optimizer, _):
        optimizer.update(gradients())
        return optimizer, optimizer.lr()

    schedule = optax.exponential_decay(8.0, 1, 0.5)
    scanned, rates = jax.lax.scan(body, LARS(schedule, weights()), length=3)
    eager = LARS(schedule, weights())
    for _ in range(3):
        eager.update(gradients())
    np.testing.assert_array_equal(rates, [4, 2, 1])
    assert_same(arrays(scanned.vars_to_train), arrays(eager.vars_to_train), rtol=1e-6)


def test_a_step_can_be_differentiated_by_the_rate():
    def moved(lr):
        variable = TrainVar([3.0, 4.0])
        LARS(lr, {"w": variable}, weight_decay=0.0, tc=1.0, eps=0.0).update(
            {"w": jnp.asarray([0.0, 2.0])}
        )
        return variable.value[1]

    assert jax.grad(moved)(0.1) == pytest.approx(-5.0)


def test_inside_jit_it_must_be_an_argument(kind):
    optimizer = LARS(1.0, weights(kind))
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, TraceContextError)):
        jax.jit(optimizer.update)(gradients())
    assert_same(snapshot(optimizer), before)


def nnx_training():
    """Return a model, its optimizer, and a step that changes both in place."""
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    train_vars = {"kernel": model.kernel, "bias": model.bias}
    optimizer = LARS(optax.exponential_decay(1.0, 1, 0.5), train_vars)
    x = jnp.asarray([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]])

    def step(model, optimizer):
        grads = nnx.grad(lambda model: ((model(x) - 3) ** 2).mean())(model)
        optimizer.update({"kernel": grads["kernel"], "bias": grads["bias"]})

    return model, optimizer, step


def test_nnx_jit_changes_model_and_state_in_place():
    model, optimizer, step = nnx_training()
    eager, expected, eager_step = nnx_training()
    step, kernel = nnx.jit(step), model.kernel
    for _ in range(4):
        step(model, optimizer)
        eager_step(eager, expected)
    assert optimizer.vars_to_train["kernel"] is model.kernel is kernel
    found = {**optimizer.vars_to_train, **optimizer.vars("relative")}
    held = {**expected.vars_to_train, **expected.vars("relative")}
    assert_same(arrays(found), arrays(held), rtol=1e-5, atol=1e-7)
    assert read(optimizer.step_count) == 4


def test_tree_flatten_and_unflatten_are_inverse(kind):
    optimizer = LARS(Variable(0.5), weights(kind), name="whole")
    optimizer.update(gradients())
    values, aux = optimizer.tree_flatten()
    again = LARS.tree_unflatten(aux, values)
    assert hash(aux) == hash(again.tree_flatten()[1])
    assert again is not optimizer
    assert again.name == "whole"
    assert again.lr() == 0.5
    assert_same(snapshot(again), snapshot(optimizer))
    assert len(jax.tree.leaves(optimizer)) == 8  # two of them statistics


def test_a_scheduler_that_jax_cannot_see_does_not_go_through_jit():
    optimizer = LARS(Halving(1.0), weights())
    with pytest.raises(TypeError, match=r"the scheduler Halving.* is not a pytree, so"):
        jax.jit(lambda optimizer: optimizer)(optimizer)


def test_a_subclass_is_a_pytree_too():
    class Mine(LARS):
        pass

    assert type(jax.jit(lambda x: x)(Mine(1.0, weights()))) is Mine


# ------------------------------------------------------------------ the graph


def test_names_are_unique():
    class Own(LARS):
        pass

    first, second = Own(0.1), Own(0.1)
    assert (first.name, second.name) == ("Own0", "Own1")
    assert first.unique_name() == "Own2"
    assert first.unique_name(type_="Other") == "Other0"
    with pytest.raises(ValueError, match="the name 'Own1' is taken by another Own"):
        Own(0.1, name="Own1")
    assert LARS(0.1).name.startswith("LARS")
    first.name = "mine"
    assert list(first.nodes()) == ["mine"]


def test_the_graph_of_an_optimizer(kind):
    optimizer = LARS(Variable(0.5), weights(kind), name="graph")
    state = ["graph.lr", "graph.step_count", "graph.kernel_m", "graph.bias_m"]
    assert optimizer.nodes() == {"graph": optimizer}
    assert sorted(optimizer.vars()) == sorted(state)
    assert list(optimizer.train_vars()) == ["graph.kernel", "graph.bias"]
    assert optimizer.train_vars("relative") == optimizer.vars_to_train
    assert optimizer.train_vars(include_self=False) == {}
    assert set(optimizer.state_dict()["graph"]) == set(state)


def test_other_nodes_and_variables_join_it():
    class Model(Node):
        def __init__(self):
            super().__init__()
            self.scale = TrainVar([2.0])
            self.name = "model"

    optimizer, model, extra = LARS(0.5, weights(), name="joined"), Model(), SHARED
    optimizer.register_implicit_nodes(model)
    optimizer.register_implicit_vars(extra=extra)
    assert optimizer.nodes("relative", 1) == {"": optimizer, "model": model}
    assert optimizer.vars()["model.scale"] is model.scale
    assert optimizer.vars("relative", 0)["extra"] is extra
    assert optimizer.train_vars("relative", include_self=False) == {
        "model.scale": model.scale
    }


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_goes_on_by_itself(copied):
    optimizer = LARS(1.0, weights())
    optimizer.update(gradients())
    before = snapshot(optimizer)
    other = copied(optimizer)
    assert_same(snapshot(other), before)
    other.update(gradients())
    assert_same(snapshot(optimizer), before)


def resumed(optimizer):
    """Return an optimizer of the same weights and no history."""
    variables = {key: type(w)(read(w)) for key, w in optimizer.vars_to_train.items()}
    return LARS(optax.exponential_decay(8.0, 1, 0.5), variables)


@pytest.mark.parametrize("how", ["file", "state_dict"])
def test_it_resumes_bit_for_bit(tmp_path, how, kind):
    optimizer = LARS(optax.exponential_decay(8.0, 1, 0.5), weights(kind))
    optimizer.update(gradients())
    optimizer.update(gradients())
    other = resumed(optimizer)
    if how == "file":
        optimizer.save_states(tmp_path / "state")
        other.load_states(tmp_path / "state")
    else:
        state, optimizer.name, name = optimizer.state_dict(), None, optimizer.name
        other.name = name
        assert other.load_state_dict(state) == ([], [])
    for stepped in (optimizer, other):
        stepped.update(gradients())
    assert_same(
        {key: np.asarray(read(x)) for key, x in other.vars("relative").items()},
        {key: np.asarray(read(x)) for key, x in optimizer.vars("relative").items()},
    )
    assert_same(arrays(other.vars_to_train), arrays(optimizer.vars_to_train))


def test_a_file_may_hold_the_weights_too(tmp_path):
    optimizer = LARS(1.0, weights())
    optimizer.update(gradients())
    both = {**optimizer.train_vars("relative"), **optimizer.vars("relative")}
    optimizer.save_states(tmp_path / "state", both)
    before = snapshot(optimizer)
    optimizer.update(gradients())
    optimizer.load_states(tmp_path / "state")
    assert_same(snapshot(optimizer), before)


def test_a_file_of_other_layers_changes_nothing(tmp_path):
    other = LARS(1.0, {"bias": TrainVar([1.0])})
    other.save_states(tmp_path / "state")
    optimizer = LARS(1.0, weights())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"does not fit LARS.*, it misses 'kernel_m'"):
        optimizer.load_states(tmp_path / "state")
    assert_same(snapshot(optimizer), before)


# ----------------------------------------------------------- devices, imports


@pytest.mark.distributed
def test_weights_and_state_move_together_to_another_device(python):
    assert python("-W", "error", DEVICES) == "[1, 1, 1]\n{0}\n"


@pytest.mark.parametrize(("move", "platform"), [("cuda", "gpu"), ("tpu", "tpu")])
def test_without_the_device_nothing_moves(move, platform, kind):
    if platform == jax.default_backend():
        pytest.skip(f"this machine has a {platform}")
    optimizer = LARS(1.0, weights(kind))
    before = [read(x) for x in optimizer.train_vars().values()]
    with pytest.raises(RuntimeError, match=f"there is no '{platform}' device"):
        getattr(optimizer, move)()
    after = [read(x) for x in optimizer.train_vars().values()]
    assert all(x is y for x, y in zip(after, before, strict=True)) or kind is nnx.Param
    assert_same(dict(enumerate(after)), dict(enumerate(before)))


def test_the_public_names():
    objects, states = (
        ["LARS", "TrainVar", "Variable"],
        ["LarsState", "ScaleByLarsState"],
    )
    functions = ["lars", "layer_stats", "scale_by_lars"]
    assert sorted(larskit.jax.__all__) == sorted(objects + states + functions)


@pytest.mark.parametrize("jit", [False, True])
def test_the_statistics_of_the_last_update(jit):
    def update(optimizer, grads):
        optimizer.update(grads)
        return optimizer

    w, g = jnp.asarray([3.0, 4.0]), jnp.asarray([0.6, 0.8])
    optimizer = LARS(0.1, {"w": TrainVar(w)}, weight_decay=0.5, tc=1.0, eps=0.25)
    assert optimizer.layer_stats() == {}
    names = set(optimizer.vars())
    optimizer = (jax.jit(update) if jit else update)(optimizer, {"w": g})
    found = optimizer.layer_stats()
    assert set(found) == {"w"}
    assert found["w"][:3] == pytest.approx((5, 1, 5 / 3.75), rel=1e-6)
    assert found["w"][3:] == (True, True, None)
    assert set(optimizer.vars()) == names  # they are no part of the state in files
