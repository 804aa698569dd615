"""The tiers of the tests, the profiles of hypothesis, and readable test ids."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ON_CPU = os.environ.get("LARSKIT_TEST_DEVICE", "cpu") == "cpu"
# Triton reads it when it is imported: without a GPU its kernels run in an interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1" if ON_CPU else "0")

# A test without a mark is in-process. Where a test has several, the last one counts.
TIERS = ("integration", "distributed", "slow")
TIMEOUT = 300.0  # seconds, of a program that should take a few
SYMBOLS = {"weight_decay": "wd", "trust_coefficient": "eta", "dampening": "damp"}
# Of a `Config`: they are the same in nearly every test.
UNNAMED = {"weight_decay", "trust_coefficient", "eps"}

# The environments of the ported packages have neither Triton nor hypothesis.
if ON_CPU and find_spec("torch") and find_spec("triton"):
    import interpreter  # noqa: F401

if find_spec("hypothesis"):
    from hypothesis import settings

    # Without a deadline: a busy machine is no failure.
    settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
    settings.register_profile("fuzz", max_examples=400, deadline=None, print_blob=True)
    settings.load_profile("quick")


@pytest.fixture
def every_layer_carries() -> Iterator[None]:
    """Have small layers carry their norms too."""
    from cases import carrying

    with carrying(0):
        yield


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """Return what runs a program in a fresh Python, and gives what it has printed."""

    def run(*command: Path | str, code: int = 0, cwd: Any = None, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            cwd=cwd,
            env=os.environ | env,
        )
        assert done.returncode == code, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return what starts a Python in a session of its own, none of which is left."""
    started = []

    def begin(*command: object, until: Path | None = None, **env: str) -> Any:
        """Start it, and return when it has ended or a file is there."""
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            text=True,
            env=os.environ | env,
            start_new_session=True,
            **pipes,
        )
        started.append(process)
        patience = TIMEOUT
        while until and not until.exists() and process.poll() is None and patience > 0:
            time.sleep(0.01)
            patience -= 0.01
        return process

    yield begin
    for process in started:
        end(process)


def end(process: Any) -> None:
    """End a process that is still there, and close what it was read through."""
    if process.poll() is None:
        process.terminate()  # which torchrun passes on
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()
    process.stderr.close()


def tier(item: pytest.Item) -> str | None:
    """Return the tier that a test is marked with; None where it is in-process."""
    return next((name for name in TIERS[::-1] if item.get_closest_marker(name)), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Fail an in-process test that starts Python, which takes seconds."""
    if tier(item):
        return (yield)
    start = subprocess.Popen.__init__

    def checked(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        if sys.executable in map(str, args):
            pytest.fail("a test that starts Python needs the mark of a tier")
        start(self, args, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", checked)
        return (yield)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name the parameters of tests that give no `ids=`."""
    if getattr(val, "__name__", "") == "<lambda>":
        return argname
    return described(val)


def described(x: object) -> str | None:
    """Return a short name of a parameter; None leaves it to pytest."""
    if isinstance(x, str):
        return shortened(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        x = changed(x)
    if isinstance(x, Mapping):
        options: Any = x.get("kwargs", x)  # of a golden case
        words = [option(str(name), value) for name, value in options.items()]
        return "-".join(words) or "defaults"
    if isinstance(x, list | tuple):
        return shortened(" ".join(map(word, x)))
    if isinstance(x, partial):
        return described(x.func)
    if type(x).__name__ == "dtype":
        return str(x).removeprefix("torch.")
    return None


def shortened(text: str, longest: int = 20) -> str:
    """Return the first words of a text."""
    text = text.replace("\\", "")
    return (
        textwrap.shorten(text, longest, placeholder="...").strip(".") or text[:longest]
    )


def changed(settings: Any) -> dict[str, object]:
    """Return the public fields of a dataclass that are not at their defaults."""
    return {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default
        and field.name not in UNNAMED
        and not field.name.startswith("_")
    }


def option(name: str, value: object) -> str:
    """Return ``clip``, ``no_clip``, ``outside`` or ``momentum=0.5``."""
    name = SYMBOLS.get(name, name)
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    if isinstance(value, str) and value.isidentifier():
        return value
    return (
        f"{name}={type(value).__name__ if isinstance(value, Mapping) else word(value)}"
    )


def word(x: object) -> str:
    """Return `described`, and of what has no description its type."""
    if x is None or isinstance(x, int | float):
        return str(x)
    return described(x) or getattr(x, "__name__", type(x).__name__)
