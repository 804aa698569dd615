"""What an import of larskit loads, says and needs: one function, run in a fresh Python.

Run by test_imports.py: the name of the function, and its arguments.
"""

import importlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

FRAMEWORKS = {
    "torch", "jax", "jaxlib", "keras", "tensorflow", "paddle", "flax", "optax",
    "brainpy", "chainer", "ivy", "safetensors", "matplotlib", "rich", "sklearn", "PIL",
    "cupy",
}  # fmt: skip


def loaded() -> None:
    """Print which frameworks are loaded by now."""
    print(sorted(FRAMEWORKS & set(sys.modules)))


def modules(*names: str) -> None:
    """Import modules, and print what that loads."""
    for name in names:
        importlib.import_module(name)
    loaded()


def star() -> None:
    """Import all public names, and use a module that is imported when it is used."""
    scope: dict[str, Any] = {}
    exec("from larskit import *", scope)
    assert scope["lars_update"].__name__ == "lars_update"
    larskit = importlib.import_module("larskit")
    assert larskit.state.save_optimizer.__module__ == "larskit.state.portable"
    loaded()


def light() -> None:
    """Print which packages larskit loads beside NumPy, and how many modules."""
    importlib.import_module("numpy")
    before = set(sys.modules)
    importlib.import_module("larskit")
    new = set(sys.modules) - before
    packages = {name.partition(".")[0] for name in new} - sys.stdlib_module_names
    print(json.dumps([sorted(packages), len(new)]))


def names() -> None:
    """Look at larskit's names; print what that loads, and what a wrong one gives."""
    larskit = importlib.import_module("larskit")
    assert {"torch", "jax", "keras"} <= set(dir(larskit))
    loaded()
    try:
        print(larskit.tensorflow)
    except AttributeError as why:
        print(why)


def without(framework: str, api: str, way: str) -> None:
    """Print what the import of an API says where its framework is missing."""
    sys.modules[framework] = None  # pyright: ignore[reportArgumentType]
    try:
        if way == "attribute":
            getattr(importlib.import_module("larskit"), api)
        else:
            importlib.import_module(f"larskit.{api}")
    except ImportError as why:
        print(why)


def without_backend() -> None:
    """Print which module is missing where Keras is there and its backend is not."""
    os.environ["KERAS_BACKEND"] = "torch"
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        importlib.import_module("larskit.keras")
    except ImportError as why:
        print(why.name)


def function() -> None:
    """Call `lars_update` on arrays of NumPy."""
    import numpy as np

    import larskit

    larskit.Container(a=np.ones(2)).lars_update(np.ones(2), 0.1)
    loaded()


def hook() -> None:
    """Call the hook as Chainer does."""
    import numpy as np

    import larskit

    layer: Any = SimpleNamespace(data=np.ones(2), grad=np.full(2, 2.0))
    larskit.GradientLARS(eps=0.0)(None, layer)
    assert (layer.grad == 1).all()
    loaded()


def attach() -> None:
    """Attach the hook to what is no optimizer."""
    import larskit

    try:
        print(larskit.GradientLARS().attach(object()))  # pyright: ignore
    except TypeError as why:
        print(why)
    loaded()


def command_help() -> None:
    from larskit.cli import main

    try:
        main(["train", "--help"])
    except SystemExit:
        loaded()


def command_without(*packages: str) -> None:
    """Print, one after the other, which missing package the study names."""
    from larskit.cli import main

    sys.stderr = sys.stdout
    for name in packages:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    for name in packages:
        assert main(["study"]) == 2
        del sys.modules[name]


if __name__ == "__main__":
    _, name, *arguments = sys.argv
    globals()[name](*arguments)
