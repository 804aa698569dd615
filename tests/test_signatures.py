"""A hyper-parameter has one name, place, default and description in every API."""

import inspect
import os
import subprocess
import sys

import pytest

import larskit.jax
from larskit import functional
from larskit.config import NAMES, PER_LAYER, SHARED, Config, documented
from larskit.torch import LARS

os.environ.setdefault("KERAS_BACKEND", "jax")
from larskit import keras

# Bound to the hook of Chainer.
HOOK_ONLY = ("zero_guard",)
APIS = {
    "torch": LARS.__init__,
    "jax": larskit.jax.lars,
    "keras": keras.LARS.__init__,
    "functional": functional.update,
}
EXPECTED = [name for name in NAMES if name not in HOOK_ONLY]
DOCUMENTED = {
    "torch": LARS,
    "jax.lars": larskit.jax.lars,
    "jax.scale_by_lars": larskit.jax.scale_by_lars,
    "keras": keras.LARS,
    "functional": functional.update,
}
SCHEDULED = {("jax.lars", "weight_decay")}  # it may be a callable there


@pytest.mark.parametrize("api", APIS)
def test_names_order_and_defaults(api):
    parameters = inspect.signature(APIS[api]).parameters
    shared = [name for name in parameters if name in NAMES]
    assert shared == EXPECTED
    for name in shared:
        default = None if name in PER_LAYER else getattr(Config, name)
        assert parameters[name].default == default, name


def test_the_part_of_them_that_scale_by_lars_has():
    parameters = inspect.signature(larskit.jax.scale_by_lars).parameters
    shared = [name for name in parameters if name in SHARED]
    assert shared == [name for name in SHARED if name in shared]
    assert all(parameters[x].default == getattr(Config, x) for x in shared)


@pytest.mark.parametrize("api", DOCUMENTED)
def test_descriptions(api):
    text, own = inspect.getdoc(DOCUMENTED[api]), inspect.getdoc(Config)
    assert text is not None
    assert own is not None
    assert "{" not in text.replace('{"', "")
    for name in inspect.signature(DOCUMENTED[api]).parameters:
        if name in SHARED and (api, name) not in SCHEDULED:
            assert described(name, text) == described(name, own), name


def described(name, text):
    """Return what a docstring says of a parameter."""
    lines = text[text.index(f"\n{name} : ") + 1 :].split("\n")
    ends = (i for i, line in enumerate(lines) if i and not line.startswith(" "))
    return "\n".join(lines[: next(ends, None)])


def test_placeholders_stand_alone_in_their_lines():
    def function():
        """Do it with {momentum}.

        Parameters
        ----------
        {momentum:weight_decay}
        {maximize}
        x : {"a", "b"}
        """

    documented(function)
    text = inspect.getdoc(function) or ""
    assert "it with {momentum}" in text
    assert [line.split(" : ")[0] for line in text.split("\n") if " : " in line] == [
        *("momentum", "weight_decay", "maximize", "x")
    ]


@pytest.mark.integration
def test_docstrings_may_be_stripped():
    code = "from larskit.functional import update; print(update.__doc__)"
    command = [sys.executable, "-OO", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "None\n"
