"""Walking containers; `Container`, and the wrapper `Array`."""

import copy
import dataclasses
import inspect
import os
import pickle
import types
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import flax.core
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch
from flax import struct
from hypothesis import given
from hypothesis import strategies as st

from larskit import Array, Container, lars_update, tree

LATE_JAX = Path(__file__).parent / "live" / "late_jax.py"
Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Plain:
    kernel: Any
    bias: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    kernel: Any
    units: int = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="dense", metadata={"pytree_node": False})


@dataclasses.dataclass
class Derived:
    kernel: Any
    twice: Any = dataclasses.field(init=False)

    def __post_init__(self):
        self.twice = (self.kernel, self.kernel)


@struct.dataclass
class Flax:
    kernel: Any
    name: str = struct.field(pytree_node=False, default="dense")


class Weights(Container):
    pass


CONTAINERS = [
    (3.0, [()]),
    ({"b": 1, "a": 2}, [("a",), ("b",)]),
    ([1, [2, 3]], [(0,), (1, 0), (1, 1)]),
    ((1, (2,)), [(0,), (1, 0)]),
    (Point(1, {"k": 2}), [("x",), ("y", "k")]),
    (OrderedDict(b=1, a=2), [("a",), ("b",)]),
    (defaultdict(list, b=1, a=2), [("a",), ("b",)]),
    (deque([1, 2]), [(0,), (1,)]),
    (UserDict(b=1), [("b",)]),
    (types.MappingProxyType({"a": 1}), [("a",)]),
    (flax.core.FrozenDict(a={"b": 1}, c=2), [("a", "b"), ("c",)]),
    (flax.nnx.State({"a": 1}), [("a",)]),
    (Plain(1, [2]), [("bias", 0), ("kernel",)]),
    (Frozen(1, 4), [("kernel",)]),
    (Flax(1, name="mine"), [("kernel",)]),
    (Derived(1), [("kernel",)]),
    (Container(b=1, a={"k": 2}), [("a", "k"), ("b",)]),
    (Weights(b=1, a=2), [("a",), ("b",)]),
    ({"a": None, "b": (None, 1), "c": {}, "d": []}, [("b", 1)]),
    ({1: 1, "1": 2, (1, 2): 3}, [(1,), ("1",), ((1, 2),)]),
    (
        {"list": [Plain(1, Frozen(2, 3))]},
        [("list", 0, "bias", "kernel"), ("list", 0, "kernel")],
    ),
    ({}, []),
    (None, []),
]


@pytest.mark.parametrize(("nested", "paths"), CONTAINERS)
def test_flatten_and_back(nested, paths):
    found, leaves, structure = tree.flatten(nested)
    assert sorted(found, key=str) == sorted(paths, key=str)
    assert len(leaves) == len(found)
    back = tree.unflatten(structure, leaves)
    assert type(back) is type(nested)
    assert back == nested
    if isinstance(nested, dict):
        assert list(back) == list(nested), "the order of the keys is kept"


def test_leaves_follow_their_paths():
    paths, leaves, structure = tree.flatten({"b": [1, Point(2, 3)], "a": Plain(4, 5)})
    found = dict(zip(map(tree.path_str, paths), leaves, strict=True))
    assert found == {"b.0": 1, "b.1.x": 2, "b.1.y": 3, "a.kernel": 4, "a.bias": 5}
    doubled = tree.unflatten(structure, [leaf * 2 for leaf in leaves])
    assert doubled == {"b": [2, Point(4, 6)], "a": Plain(8, 10)}


def test_static_fields_are_carried_and_derived_ones_made_anew():
    _, leaves, structure = tree.flatten([Frozen(1, 4, "mine"), Derived(2)])
    assert leaves == [1, 2]
    frozen, derived = tree.unflatten(structure, [10, 20])
    assert frozen == Frozen(10, 4, "mine")
    assert derived.twice == (20, 20)


@pytest.mark.parametrize("leaf", [1.0, np.ones(2), torch.ones(2), "a", Plain, Array(1)])
def test_leaves_are_no_containers(leaf):
    assert tree.is_leaf(leaf)


@pytest.mark.parametrize("nested", [x for x, paths in CONTAINERS if paths != [()]])
def test_containers_are_no_leaves(nested):
    assert not tree.is_leaf(nested)


PATHS = [("a", "b"), ("c", 0)]
SPREADS = [
    (7, [7, 7]),
    (None, [None, None]),
    ({"a": {"b": 1}, "c": [2]}, [1, 2]),
    ({"c": (2,), "a": Container(b=1)}, [1, 2]),
    (Container(c={0: 2}, a=OrderedDict(b=1)), [1, 2]),
    (Array(7), None),
]


@pytest.mark.parametrize(("nested", "expected"), SPREADS)
def test_broadcast_leaves(nested, expected):
    assert tree.broadcast_leaves(nested, PATHS, "lr") == (expected or [nested, nested])


WRONG_SPREADS = [
    (
        {"a": {"b": 1}},
        PATHS,
        ValueError,
        "lr misses 'c.0', expected the same leaves .* give both",
    ),
    ({"x": 1}, PATHS, ValueError, r"lr misses 'a.b', 'c.0', "),
    (
        {"a": {"b": 1}, "c": [2, 3]},
        PATHS,
        ValueError,
        "lr has the extra 'c.1', .*: give both",
    ),
    ({"a": {"b": 1}, "c": [None]}, PATHS, ValueError, "lr misses 'c.0'"),
    ({"a": {"b": {"d": 1}}, "c": [2]}, PATHS, ValueError, "lr misses 'a.b'"),
    ((1,), [("x",)], ValueError, "lr misses 'x'"),
    ([1], [()], TypeError, "lr is a list, but the weights are one array"),
    ({}, [()], TypeError, "lr is a dict, but the weights are one array"),
]


@pytest.mark.parametrize(("nested", "paths", "error", "message"), WRONG_SPREADS)
def test_broadcast_leaves_names_what_is_wrong(nested, paths, error, message):
    with pytest.raises(error, match=message):
        tree.broadcast_leaves(nested, paths, "lr")


def test_wrappers():
    array = np.ones(2)
    held = Array(array)
    assert tree.unwrap(held) is array
    assert tree.unwrap(array) is array
    assert type(tree.rewrap(array, held)) is Array
    assert tree.rewrap(array, array) is array


def container() -> Container:
    return Container({"b": np.arange(3.0)}, a={"k": {"l": 1}}, l=[{"x": 1}], n=None)


def test_items_are_attributes():
    c = container()
    assert c.a.k.l == c["a"]["k"]["l"] == 1
    assert type(c.a.k) is Container
    c.a.new = {"z": 3}
    assert c["a"]["new"].z == 3
    c["a"]["other"] = {"y": 4}
    assert c.a.other.y == 4
    del c.a.new
    assert "new" not in c.a
    assert hasattr(c, "b")
    assert not hasattr(c, "c")
    assert c.get("c", 5) == 5


def test_dictionaries_in_lists_stay():
    inner = {"x": 1}
    assert Container(l=[inner]).l[0] is inner


def test_every_way_in_makes_containers():
    d = {"x": {"y": 1}}
    c = Container(d)
    c.update({"u": d}, v=d)
    c |= {"w": d}
    assert c.setdefault("s", d) is c.s
    assert c.setdefault("s", 1) is c.s
    c = c | {"o": d}
    merged: Any = {"r": d} | c
    keyed: Any = Container.fromkeys("f", d)
    for found in (c.u, c.v, c.w, c.s, c.o, merged.r, keyed.f):
        assert type(found) is type(found.x) is Container
        assert found == d
    assert type(merged) is Container
    assert Container([("a", d)]).a.x.y == 1
    assert type(d["x"]) is dict, "what came in is left alone"


def test_union_as_of_dictionaries():
    a, b = Container(x=1, y=2), {"y": 3, "z": 4}
    assert a | b == {"x": 1, "y": 3, "z": 4}
    assert b | a == {"x": 1, "y": 2, "z": 4}
    assert a == {"x": 1, "y": 2}
    for wrong in (lambda: a | [1], lambda: [1] | a):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()


def test_names_of_methods_are_items_only():
    c: Any = Container(items=1, self=2, mapping=3, **{"no name": 4, "lars_update": 5})
    c[7] = 8
    assert c["items"] == 1
    assert c.self == 2
    assert c.mapping == 3
    assert callable(c.items)
    assert callable(c.lars_update)
    with pytest.raises(
        AttributeError, match=r"'items' is a method .* container\['items'\]"
    ):
        c.items = 3
    assert jax.tree.map(lambda x: x, c) == c
    assert {"self", "mapping", "lars_update", "keys"} <= set(dir(c))
    assert not {"no name", 7} & set(dir(c))


@pytest.mark.parametrize("act", [lambda c: c.oops, lambda c: delattr(c, "oops")])
def test_a_missing_item_is_an_attribute_error(act):
    with pytest.raises(AttributeError, match="no item 'oops', it has: 'x', 7"):
        act(Container({"x": 1, 7: 2}))


COPIES = [
    copy.copy,
    copy.deepcopy,
    Container.copy,
    Container,
    lambda c: c | {},
    *(lambda c, p=p: pickle.loads(pickle.dumps(c, p)) for p in range(2, 6)),
]


@pytest.mark.parametrize("copied", COPIES)
def test_copies(copied):
    c = container()
    new = copied(c)
    assert new is not c
    assert type(new) is type(new.a.k) is Container
    assert new == c
    assert list(new) == list(c)
    new.b2 = 1
    assert "b2" not in c


def test_deep_copies_share_nothing_and_shallow_ones_all():
    c = container()
    deep = copy.deepcopy(c)
    deep.b[0] = deep.a.k.l = 9
    assert c == container()
    shallow = c.copy()
    assert shallow.b is c.b
    assert shallow.a is c.a


EQUAL = [
    (Container(), {}),
    (Container(a=1, b=2), Container(b=2, a=1)),
    (Container(a={"b": 1}), {"a": {"b": 1}}),
    (Container(a=np.ones(2)), Container(a=np.ones(2))),
    (
        Container(a=[np.ones(2), (1, jnp.ones(1))]),
        {"a": [np.ones(2), (1, jnp.ones(1))]},
    ),
    (Container(a=torch.ones(2)), Container(a=torch.nn.Parameter(torch.ones(2)))),
    (Container(a=Array(np.ones(2))), Container(a=Array(np.ones(2)))),
    (Container(a=np.zeros((0, 2))), Container(a=np.zeros((0, 2)))),
]
DIFFERENT = [
    (Container(a=1), Container(a=2)),
    (Container(a=1), Container(b=1)),
    (Container(a=1), Container(a=1, b=None)),
    (Container(a=1), 1),
    (Container(a=1), None),
    (Container(a=np.ones(2)), Container(a=np.array([1.0, 2.0]))),
    (Container(a=np.ones(2)), Container(a=np.ones((2, 1)))),
    (Container(a=np.ones(2)), Container(a=np.ones(2, "float32"))),
    (Container(a=np.ones(2)), Container(a=torch.ones(2).double())),
    (Container(a=np.ones(2)), Container(a=None)),
    (Container(a=None), Container(a=np.ones(2))),
    (Container(a=[np.ones(2)]), Container(a=(np.ones(2),))),
    (Container(a=[np.ones(2)]), Container(a=[np.ones(2), 1])),
    (Container(a={}), Container(a=1)),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal(one, other):
    assert one == other
    assert other == one
    assert not one != other  # noqa: SIM202


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different(one, other):
    assert one != other
    assert other != one
    assert not one == other  # noqa: SIM201


def test_a_container_has_no_hash():
    with pytest.raises(TypeError, match="unhashable"):
        hash(Container())


def test_repr():
    c = Container(encoder={"kernel": np.eye(2)}, bias=1.0)
    assert repr(c) == (
        "Container(\n"
        "  encoder: Container(\n"
        "    kernel: array([[1., 0.],\n"
        "           [0., 1.]])\n"
        "  ),\n"
        "  bias: 1.0\n"
        ")"
    )
    assert repr(Container()) == "Container()"
    assert repr(Array(1.5)) == "Array(1.5)"


def test_optree_walks_containers_and_shows_readable_paths():
    c: Any = Container(b=1, a={"k": [2, Frozen(3, 4)]})
    doubled = optree.tree_map(lambda x: x * 2, c, namespace="larskit")
    assert type(doubled) is type(doubled.a) is Container
    assert doubled.a.k[1].kernel == 6
    shown = [a.codify("c") for a in optree.tree_accessors(c, namespace="larskit")]
    assert shown == ["c['a']['k'][0]", "c['a']['k'][1].kernel", "c['b']"]


def test_optree_and_jax_match_keys_and_not_their_order():
    one: Any = Container(a=1, b=2)
    other: Any = Container(b=20, a=10)
    for mapped in (
        optree.tree_map(lambda x, y: x + y, one, other, namespace="larskit"),
        jax.tree.map(lambda x, y: x + y, one, other),
    ):
        assert mapped == {"a": 11, "b": 22}
        assert list(mapped) == ["a", "b"]
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.structure(one) != jax.tree.structure(Container(a=1, c=2))
    assert len({jax.tree.structure(one), jax.tree.structure(other)}) == 1


def test_jax_walks_containers():
    c = Container(w=jnp.ones((2, 2)), a={"b": jnp.arange(3.0)}, n=None)

    @jax.jit
    def loss(c):
        assert type(c) is type(c.a) is Container
        return (c.w**2).sum() + (c.a.b**2).sum()

    grads = jax.grad(loss)(c)
    assert grads == jax.tree.map(lambda x: 2 * x, c)
    assert list(grads) == ["w", "a", "n"]
    stepped = jax.jit(Container.lars_update)(c, grads, 0.1)
    assert type(stepped) is type(stepped.a) is Container
    for new, old in zip(jax.tree.leaves(stepped), jax.tree.leaves(c), strict=True):
        np.testing.assert_allclose(new, 0.9 * old, rtol=1e-6)
    named = jax.tree_util.tree_flatten_with_path(c)[0]
    shown = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in named]
    assert shown == ["a.b", "w"]
    assert jax.vmap(lambda c: c.w.sum())(Container(w=jnp.ones((3, 2)))).shape == (3,)


@given(
    st.dictionaries(st.one_of(st.text(), st.integers(), st.booleans()), st.integers())
)
def test_any_keys_make_the_round_trip(items):
    c = Container(items)
    paths, leaves, structure = tree.flatten(c)
    assert dict(zip(paths, leaves, strict=True)) == {(k,): v for k, v in items.items()}
    assert list(tree.unflatten(structure, leaves).items()) == list(items.items())
    assert jax.tree.map(lambda x: x, c) == c
    assert pickle.loads(pickle.dumps(c)) == c


@pytest.mark.integration
@pytest.mark.parametrize(
    "case",
    [
        "made_after_jax",
        "unpickled_after_jax",
        "larskit_jax_imported",
        "handed_to_jit",
        "submodule_first",
        "before_larskit",
        "never",
        "nothing_else_changes",
    ],
)
def test_jax_may_come_late(python, case):
    python("-W", "error", LATE_JAX, case)


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_fork_waits_for_other_threads(python):
    python(Path(__file__).parent / "live" / "fork_in_walk.py")


SEED = "(self, dcdw, lr, /, *, decay_lambda=0, stop_gradients=True, out=None)"


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (lars_update, SEED.replace("self", "w")),
        (Array.lars_update, SEED),
        (Container.lars_update, SEED),
    ],
)
def test_signatures_are_those_of_the_seed(function, signature):
    found = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(bare)) == signature
    for name in list(found.parameters)[1:]:
        assert f" {name} : " in function.__doc__, f"{name} is not documented"


def test_the_method_forms_do_what_the_function_does():
    w, g = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    options: dict[str, Any] = {"decay_lambda": 0.1, "stop_gradients": False}
    expected = lars_update(w, g, 0.1, **options)
    one = Array(w).lars_update(Array(g), 0.1, **options)
    assert type(one) is Array
    np.testing.assert_array_equal(one.native, expected)
    many = Container(a=w, b={"c": w}).lars_update(
        {"a": g, "b": {"c": g}}, 0.1, **options
    )
    assert many == {"a": expected, "b": {"c": expected}}
    assert type(many.b) is Container
    out = Container(a=np.zeros(2))
    assert Container(a=w).lars_update(g, 0.1, **options, out=out) is out
    assert out == {"a": expected}


def test_array_holds_one_array():
    w = np.array([3.0, 4.0])
    assert Array(Array(w)).native is w
    assert copy.copy(Array(w)).native is w
    assert pickle.loads(pickle.dumps(Array(w))).native.tolist() == [3, 4]
    mixed = lars_update(Container(a=Array(w), b=w), w, 0.5)
    assert type(mixed.a) is Array
    assert type(mixed.b) is np.ndarray


def test_array_as_out_is_written_or_takes_up_the_new_one():
    w, g = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    native = np.zeros(2)
    out = Array(native)
    assert Array(w).lars_update(g, 0.1, out=out) is out
    assert out.native is native
    np.testing.assert_array_equal(native, lars_update(w, g, 0.1))
    out = Array(jnp.zeros(2))
    w, g = jnp.asarray(w), jnp.asarray(g)
    assert Array(w).lars_update(g, 0.1, out=out) is out
    np.testing.assert_array_equal(out.native, lars_update(w, g, 0.1))
