import copy
import gc
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larskit.jax import TrainVar, Variable
from larskit.jax.graph import Node
from larskit.state import files


class Box(Node):
    """A node of the attributes it is given."""

    weight: Any
    x: Any

    def __init__(self, name=None, **attributes):
        super().__init__()
        self.__dict__.update(attributes)
        self.name = name


def family():
    """A root with a variable, a child by attribute, and an implicit grandchild."""
    leaf = Box("leaf", deep=TrainVar([3.0]))
    child = Box("child", state=Variable([2.0]))
    child.register_implicit_nodes(leaf)
    root = Box("root", weight=TrainVar([1.0]), child=child, note="static")
    root.register_implicit_vars(extra=Variable([4.0]))
    return root


# ------------------------------------------------------------------ variables


def test_a_variable_holds_a_copy_of_what_it_is_given():
    source = np.ones(3, "float32")
    first, second = Variable(source), Variable(jnp.zeros(3))
    second.value = source
    source[:] = 7
    np.testing.assert_array_equal(first.value, [1, 1, 1])
    np.testing.assert_array_equal(second.value, [1, 1, 1])


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ([1.0, 2.0], None, "float32"),
        (3, None, "int32"),
        (0.5, None, "float32"),
        (np.ones(2), None, "float32"),
        ([1, 2], "bfloat16", "bfloat16"),
        (Variable([1.0]), None, "float32"),
    ],
)
def test_the_dtype_is_that_of_jax_by_default(value, dtype, expected):
    variable = TrainVar(value, dtype)
    assert variable.dtype == expected
    assert not variable.value.weak_type
    assert variable.shape == np.shape(value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            np.ones(3, "float32"),
            ValueError,
            r"the shape \(3,\), expected .*, \(2,\)",
        ),
        (np.ones(2), TypeError, "the dtype float64, expected float32: convert"),
        (jnp.ones(2, "float16"), TypeError, "the TrainVar's value has the dtype float"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(value, error, message):
    variable = TrainVar([1.0, 2.0])
    with pytest.raises(error, match=message):
        variable.value = value
    np.testing.assert_array_equal(variable.value, [1, 2])


def test_a_value_may_be_a_variable_or_a_list():
    variable = Variable([1.0, 2.0])
    variable.value = [3, 4]
    np.testing.assert_array_equal(variable.value, [3, 4])
    variable.value = Variable([5.0, 6.0])
    np.testing.assert_array_equal(variable.value, [5, 6])


def test_a_variable_goes_where_an_array_goes():
    variable = TrainVar([3.0, 4.0])
    assert jnp.linalg.norm(variable) == 5
    assert np.asarray(variable).sum() == 7
    assert repr(variable) == "TrainVar(Array([3., 4.], dtype=float32))"


@pytest.mark.parametrize("kind", [Variable, TrainVar])
def test_a_variable_is_a_pytree_of_its_kind(kind):
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))(kind([1.0]))
    assert type(doubled) is kind
    assert doubled.value == 2
    gradient = jax.grad(lambda v: (v.value**2).sum())(kind([3.0]))
    assert type(gradient) is kind
    assert gradient.value == 6


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_another_box(copied):
    variable = TrainVar([1.0], "bfloat16")
    other = copied(variable)
    other.value = jnp.asarray([2.0], "bfloat16")
    assert type(other) is TrainVar
    assert variable.value == 1


@pytest.mark.parametrize(
    "transformation",
    [jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())],
    ids=["jit", "vmap", "grad"],
)
def test_a_variable_of_outside_cannot_be_set_inside(transformation):
    variable = Variable([1.0])

    @transformation
    def leak(x):
        variable.value = x
        return x

    with pytest.raises(RuntimeError, match="inside a JAX transformation that it was"):
        leak(jnp.ones((1,) if transformation is not jax.vmap else (2, 1)))
    assert variable.value == 1


def test_a_variable_made_or_passed_inside_can_be_set_there():
    @jax.jit
    def total(passed, x):
        made = Variable(x)
        made.value = made.value + passed.value
        passed.value = 2 * passed.value
        return made, passed

    made, passed = total(Variable([1.0]), jnp.asarray([5.0]))
    assert (made.value, passed.value) == (6, 2)


# ---------------------------------------------------------------------- names


def test_default_names_count_upwards_and_skip_taken_ones():
    class Fresh(Box):
        pass

    taken = Fresh("Fresh1")
    assert [Fresh().name, Fresh().name, taken.name] == ["Fresh0", "Fresh2", "Fresh1"]


def test_a_name_belongs_to_one_living_node():
    first = Box("only")
    assert first.unique_name("only") == "only"
    with pytest.raises(ValueError, match="'only' is taken by another Box: choose"):
        Box("only")
    with pytest.raises(ValueError, match="'only' is taken"):
        Box().unique_name("only")
    del first
    gc.collect()
    assert Box("only").name == "only"


def test_renaming_frees_the_old_name():
    first = Box("before")
    first.name = "after"
    second = Box("before")
    with pytest.raises(ValueError, match="'before' is taken"):
        first.name = "before"
    assert (first.name, second.name) == ("after", "before")
    first.name = None
    assert first.name.startswith("Box")


def test_unique_name_makes_names_of_any_type():
    node = Box()
    assert node.unique_name(type_="Odd") == "Odd0"
    assert node.unique_name(type_="Odd") == "Odd1"
    assert node.unique_name().startswith("Box")
    assert node.unique_name() != node.unique_name()


@pytest.mark.parametrize("name", ["a.b", "1st", ""])
def test_a_name_is_an_identifier(name):
    with pytest.raises(ValueError, match="must be a Python identifier, got"):
        Box(name)


# ---------------------------------------------------------------------- graph


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["root", "child", "leaf"]),
        ({"method": "relative"}, ["", "child", "child.leaf"]),
        ({"level": 0}, ["root"]),
        ({"level": 1}, ["root", "child"]),
        ({"level": 2, "method": "relative"}, ["", "child", "child.leaf"]),
        ({"include_self": False}, ["child", "leaf"]),
        ({"include_self": False, "level": 0}, []),
        ({"include_self": False, "level": 1, "method": "relative"}, ["child"]),
    ],
)
def test_nodes(arguments, expected):
    root = family()
    found = root.nodes(**arguments)
    assert list(found) == expected
    for node in found.values():
        assert isinstance(node, Box)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["root.weight", "root.extra", "child.state", "leaf.deep"]),
        ({"method": "relative"}, ["weight", "extra", "child.state", "child.leaf.deep"]),
        ({"level": 0}, ["root.weight", "root.extra"]),
        ({"level": 1, "include_self": False}, ["child.state"]),
        ({"exclude_types": (TrainVar,)}, ["root.extra", "child.state"]),
        ({"exclude_types": None, "level": 0}, ["root.weight", "root.extra"]),
    ],
)
def test_vars(arguments, expected):
    found = family().vars(**arguments)
    assert list(found) == expected
    assert all(isinstance(x, Variable) for x in found.values())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["root.weight", "leaf.deep"]),
        ({"method": "relative"}, ["weight", "child.leaf.deep"]),
        ({"level": 1}, ["root.weight"]),
        ({"include_self": False}, ["leaf.deep"]),
    ],
)
def test_train_vars(arguments, expected):
    assert list(family().train_vars(**arguments)) == expected


@pytest.mark.parametrize("method", ["nodes", "vars", "train_vars"])
def test_an_unknown_method_is_refused(method):
    with pytest.raises(ValueError, match="'absolute' or 'relative', got 'upwards'"):
        getattr(Box(), method)("upwards")


def test_a_ring_of_nodes_is_walked_once():
    first, second = Box("first", a=Variable(1.0)), Box("second", b=Variable(2.0))
    first.register_implicit_nodes(second)
    second.register_implicit_nodes(first)
    assert list(first.nodes()) == ["first", "second"]
    assert list(first.vars()) == ["first.a", "second.b"]
    assert list(first.nodes("relative")) == ["", "second", "second.first"]


def test_two_nodes_of_one_name_are_an_error_not_a_loss():
    inner = Box("same", a=Variable(1.0))
    outer = Box("outer", one=inner, two=pickle.loads(pickle.dumps(inner)))
    with pytest.raises(ValueError, match="'same' is the name of more than one Box"):
        outer.nodes()
    assert list(outer.vars("relative")) == ["one.a", "two.a"]


def test_register_implicit_vars_takes_all_forms():
    a, b, c, d, e = (Variable(float(i)) for i in range(5))
    node = Box()
    node.register_implicit_vars(a, [b], (c,), {"four": d}, five=e)
    assert node.implicit_vars == {"var0": a, "var1": b, "var2": c, "four": d, "five": e}
    node.register_implicit_vars(four=d)
    assert len(node.implicit_vars) == 5


def test_register_implicit_nodes_takes_all_forms():
    a, b, c, d = Box("a"), Box("b"), Box("c"), Box("d")
    node = Box()
    node.register_implicit_nodes(a, [b], {"three": c}, four=d)
    assert node.implicit_nodes == {"a": a, "b": b, "three": c, "four": d}
    assert list(node.nodes("relative")) == ["", "a", "b", "three", "four"]


@pytest.mark.parametrize(
    ("given", "named", "error", "message"),
    [
        ([Variable(1.0), 3], {}, TypeError, "an item to register is a int"),
        ([{"x": jnp.ones(1)}], {}, TypeError, "x to register is a "),
        ([], {"taken": Variable(2.0)}, ValueError, "'taken' is the name of more than"),
        ([Variable(1.0)], {"var_cls": TrainVar}, TypeError, "expected .*TrainVar"),
    ],
)
def test_what_cannot_be_registered_leaves_nothing_behind(given, named, error, message):
    node, taken = Box(), Variable(1.0)
    node.register_implicit_vars(taken=taken)
    with pytest.raises(error, match=message):
        node.register_implicit_vars(*given, **named)
    assert node.implicit_vars == {"taken": taken}


def test_only_nodes_of_the_wanted_class_are_registered():
    node = Box()
    with pytest.raises(TypeError, match=r"is a Variable, expected .*Node"):
        node.register_implicit_nodes(Variable(1.0))
    with pytest.raises(TypeError, match=r"is a Box, expected .*Special"):
        node.register_implicit_nodes(Box(), node_cls=type("Special", (Box,), {}))
    assert node.implicit_nodes == {}


def test_a_node_and_all_below_it_is_a_pytree():
    root = family()
    doubled = jax.jit(lambda node: jax.tree.map(lambda x: 2 * x, node))(root)
    assert {key: float(x.value[0]) for key, x in doubled.vars().items()} == {
        "root.weight": 2,
        "root.extra": 8,
        "child.state": 4,
        "leaf.deep": 6,
    }
    assert (doubled.name, doubled.note) == ("root", "static")
    values, aux = root.tree_flatten()
    assert Box.tree_unflatten(aux, values).vars() == root.vars()


# ---------------------------------------------------------------------- state


def values_of(node):
    return {key: float(x.value[0]) for key, x in node.vars("relative").items()}


def changed(node):
    for variable in node.vars().values():
        variable.value = variable.value + 10
    return node


def test_state_dict_is_keyed_as_that_of_brainpy():
    state = family().state_dict()
    assert {node: list(arrays) for node, arrays in state.items()} == {
        "root": ["root.weight", "root.extra"],
        "child": ["child.state"],
        "leaf": ["leaf.deep"],
    }
    assert state["child"]["child.state"] == 2


@pytest.mark.parametrize("compatible", ["v2", "v1"])
def test_load_state_dict_restores_both_versions(compatible):
    root = family()
    before, state = values_of(root), root.state_dict()
    if compatible == "v1":
        state = {key: x for arrays in state.values() for key, x in arrays.items()}
    result = changed(root).load_state_dict(state, compatible=compatible)
    assert values_of(root) == before
    assert result == ([], [])


def test_load_state_dict_reports_what_it_could_not_match():
    root = family()
    state = {"root": {"root.weight": [9.0]}, "stranger": {"stranger.x": [1.0]}}
    with (
        pytest.warns(UserWarning, match="misses 'root.extra', 'child.state', 'leaf.d"),
        pytest.warns(UserWarning, match=r"state_dict has unexpected 'stranger\.x'"),
    ):
        result = root.load_state_dict(state)
    assert result.missing_keys == ["root.extra", "child.state", "leaf.deep"]
    assert result.unexpected_keys == ["stranger.x"]
    assert root.load_state_dict(state, warn=False) == result
    assert root.weight.value == 9


@pytest.mark.parametrize(
    ("state", "compatible", "error", "message"),
    [
        (
            {"leaf": {"leaf.deep": [1.0, 2.0]}},
            "v2",
            ValueError,
            "'leaf.deep' has the s",
        ),
        (
            {"leaf": {"leaf.deep": np.ones(1)}},
            "v2",
            TypeError,
            "the dtype float64, exp",
        ),
        ({"leaf.deep": [1.0]}, "v2", TypeError, "pass compatible='v1' for a flat one"),
        ({}, "v3", ValueError, "compatible must be 'v2' or 'v1', got 'v3'"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state, compatible, error, message):
    root = family()
    before = values_of(root)
    whole = {"root": {"root.weight": jnp.asarray([9.0])}, **state}
    with pytest.raises(error, match=message):
        root.load_state_dict(whole, compatible=compatible)
    assert values_of(root) == before


def test_states_are_saved_and_loaded_whatever_the_names(tmp_path, capsys):
    root = family()
    before = values_of(root)
    root.save_states(tmp_path / "state")
    for node in root.nodes().values():
        node.name = None
    changed(root).load_states(tmp_path / "state", verbose=True)
    assert values_of(root) == before
    lines = capsys.readouterr().out.splitlines()
    assert "loaded child.leaf.deep: float32 (1,)" in lines
    assert len(lines) == 4
    root.load_states(tmp_path / "state")
    assert capsys.readouterr().out == ""


def test_bfloat16_survives_the_file(tmp_path):
    node = Box(x=Variable([1.5, -2.0], "bfloat16"))
    node.save_states(tmp_path / "state")
    node.x.value = jnp.zeros(2, "bfloat16")
    node.load_states(tmp_path / "state")
    assert node.x.dtype == "bfloat16"
    np.testing.assert_array_equal(node.x.value, jnp.asarray([1.5, -2.0], "bfloat16"))


def test_save_states_writes_the_variables_it_is_given(tmp_path):
    root = family()
    root.save_states(tmp_path / "state", {"a": root.weight, "b": jnp.ones(2)})
    loaded = files.load(tmp_path / "state")
    assert {key: x.tolist() for key, x in loaded.items()} == {"a": [1], "b": [1, 1]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"extra": None}, ValueError, "does not fit root, it misses 'extra', expected"),
        ({"more": [1.0]}, ValueError, "it has the extra 'more'"),
        ({"extra": [1.0, 2.0]}, ValueError, r"'extra' has the shape \(2,\), expected"),
        ({"extra": np.ones(1)}, TypeError, "'extra' has the dtype float64, expected"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, change, error, message):
    root = family()
    tensors = {key: x.value + 5 for key, x in root.vars("relative").items()}
    for key, x in change.items():
        tensors[key] = np.asarray(x, "float32") if isinstance(x, list) else x
    kept = {key: x for key, x in tensors.items() if x is not None}
    files.save(kept, tmp_path / "state")
    before = values_of(root)
    with pytest.raises(error, match=message):
        root.load_states(tmp_path / "state")
    assert values_of(root) == before


def test_a_failed_save_leaves_the_old_file(tmp_path):
    root = family()
    root.save_states(tmp_path / "state")
    old = (tmp_path / "state").read_bytes()
    with pytest.raises(TypeError, match="'weight' has the dtype object"):
        root.save_states(tmp_path / "state", {"weight": object()})
    assert (tmp_path / "state").read_bytes() == old


# -------------------------------------------------------------------- devices


def test_to_takes_a_device_or_a_platform():
    root = family()
    before, cpu = values_of(root), jax.devices("cpu")[0]
    for moved in (root.to(cpu), root.to("cpu"), root.cpu()):
        assert moved is root
    assert values_of(root) == before
    assert root.weight.value.devices() == {cpu}


@pytest.mark.parametrize("move", ["cuda", "tpu"])
def test_a_device_that_is_not_there_is_one_clear_error(move):
    platform = {"cuda": "gpu"}.get(move, move)
    if platform == jax.default_backend():
        pytest.skip(f"this machine has a {platform}")
    root = family()
    before = {key: x.value for key, x in root.vars().items()}
    with pytest.raises(RuntimeError, match=f"no '{platform}' device, JAX sees .*'cpu'"):
        getattr(root, move)()
    assert all(x.value is before[key] for key, x in root.vars().items())


@pytest.mark.parametrize("device", [None, 0])
def test_what_is_no_device_is_refused(device):
    with pytest.raises(TypeError, match=f"the name of a platform, got {device}"):
        family().to(device)
