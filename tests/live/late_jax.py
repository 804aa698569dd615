"""Containers and a JAX that is imported before, after, or never: one function each.

Run by test_tree.py with the name of the function.
"""

import importlib
import pickle
import sys
from typing import Any

import numpy as np
import pytest


def imported(name: str) -> Any:
    return importlib.import_module(name)


def old_container() -> Any:
    return imported("larskit").Container(b=np.ones(2), a={"k": np.ones(3)})


def made_after_jax() -> None:
    old, jax = old_container(), imported("jax")
    kind = type(old)
    assert type(kind()) is kind
    doubled = jax.tree.map(lambda x: 2 * x, old)
    assert type(doubled) is type(doubled.a) is kind


def unpickled_after_jax() -> None:
    data = pickle.dumps(imported("larskit").Container(b=1, a=2))
    assert imported("jax").tree.leaves(pickle.loads(data)) == [2, 1]


def larskit_jax_imported() -> None:
    old = old_container()
    imported("larskit.jax")
    assert imported("jax").jit(lambda c: c.a.k.sum())(old) == 3


def handed_to_jit() -> None:
    old, jax = old_container(), imported("jax")
    for function in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(RuntimeError, match=r"import larskit\.jax first"):
            function(lambda c: c.b.sum())(old)
    imported("larskit.jax")
    assert jax.jit(lambda c: c.b.sum())(old) == 2
    assert not hasattr(old, "__jax_array__")


def submodule_first() -> None:
    larskit = imported("larskit")
    imported("jax.numpy")
    assert imported("jax").tree.leaves(larskit.Container(b=1, a=2)) == [2, 1]


def before_larskit() -> None:
    jax = imported("jax")
    assert jax.tree.leaves(imported("larskit").Container(b=1, a=2)) == [2, 1]


def never() -> None:
    sys.modules["jax"] = None  # pyright: ignore[reportArgumentType]
    larskit = imported("larskit")
    assert larskit.Container(b=1).b == 1
    assert not hasattr(larskit.Container(), "__jax_array__")


def nothing_else_changes() -> None:
    finders, hooks = [*sys.meta_path], [*sys.path_hooks]
    imported("larskit")
    assert (sys.meta_path, sys.path_hooks) == (finders, hooks)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
