"""Containers and a JAX that is imported before, after, or never: one function each.

Run by test_tree.py: the name of the function, and an empty folder.
"""

import importlib
import importlib.util
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def imported(name: str) -> Any:
    return importlib.import_module(name)


def leaves_of_a_container() -> list[Any]:
    return imported("jax").tree.leaves(imported("larskit").Container(b=1, a=2))


def after_a_container(folder: Path) -> None:
    import numpy as np

    larskit = imported("larskit")
    old = larskit.Container(b=np.ones(2), a={"k": np.ones(3)})
    assert importlib.util.find_spec("jax") is not None  # a mere look does not count
    hooks = len(sys.meta_path)
    jax = imported("jax")
    assert len(sys.meta_path) == hooks - 1
    doubled = jax.tree.map(lambda x: 2 * x, old)
    assert type(doubled) is type(doubled.a) is larskit.Container
    assert jax.jit(lambda c: c.a.k.sum())(old) == 3


def submodule_first(folder: Path) -> None:
    imported("larskit")
    imported("jax.numpy")
    assert leaves_of_a_container() == [2, 1]


def before_larskit(folder: Path) -> None:
    imported("jax")
    assert leaves_of_a_container() == [2, 1]
    assert not any(type(f).__module__ == "larskit.tree" for f in sys.meta_path)


def after_two_failures(folder: Path) -> None:
    imported("larskit")
    (folder / "jax.py").write_text("1 / 0")
    sys.path.insert(0, str(folder))
    for _ in range(2):
        with suppress(ZeroDivisionError):
            imported("jax")
    sys.path.remove(str(folder))
    assert leaves_of_a_container() == [2, 1]


def with_a_loader_of_several(folder: Path) -> None:
    larskit = imported("larskit")
    with zipfile.ZipFile(folder / "all.zip", "w") as file:
        file.writestr("jax.py", "import part as tree_util")
        register = "register_pytree_with_keys = lambda *a: calls.append(a)"
        file.writestr("part.py", f"{register}\ncalls = []")
    sys.path.insert(0, str(folder / "all.zip"))
    calls = imported("jax").tree_util.calls
    assert [arguments[0] for arguments in calls] == [larskit.Container]


def never(folder: Path) -> None:
    sys.modules["jax"] = None  # pyright: ignore[reportArgumentType]
    assert imported("larskit").Container(b=1).b == 1


if __name__ == "__main__":
    _, name, folder = sys.argv
    globals()[name](Path(folder))
