"""`import larskit` is light, and a missing framework is named."""

import subprocess
import sys

import pytest

FRAMEWORKS = (
    "torch", "jax", "jaxlib", "keras", "tensorflow", "paddle", "flax", "optax",
    "brainpy", "chainer", "ivy", "safetensors", "matplotlib", "rich", "sklearn", "PIL",
)  # fmt: skip
SLACK = 0.2


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_framework():
    code = f"import sys, larskit; print([f for f in {FRAMEWORKS} if f in sys.modules])"
    assert python(code) == "[]"
    listed = "import larskit; print({'torch', 'jax', 'keras'} <= set(dir(larskit)))"
    assert python(listed) == "True"


def test_a_star_imports_no_framework_either():
    code = (
        "import sys\n"
        "from larskit import *\n"
        f"print([f for f in {FRAMEWORKS} if f in sys.modules], lars_update.__name__)"
    )
    assert python(code) == "[] lars_update"


def test_modules_are_imported_when_they_are_used():
    code = "import larskit; print(larskit.state.save_optimizer.__module__)"
    assert python(code) == "larskit.state.portable"


def test_import_is_light():
    code = (
        "import time, numpy; start = time.perf_counter(); import larskit; "
        "print(time.perf_counter() - start)"
    )
    assert min(float(python(code)) for _ in range(5)) < SLACK


@pytest.mark.parametrize(
    ("face", "framework", "named"),
    [("torch", "torch", "PyTorch"), ("jax", "jax", "JAX"), ("keras", "keras", "Keras")],
)
@pytest.mark.parametrize("way", ["import larskit; larskit.{0}", "import larskit.{0}"])
def test_a_missing_framework_is_named_with_its_extra(face, framework, named, way):
    code = f"""
import sys
sys.modules["{framework}"] = None
try:
    {way.format(face)}
except ImportError as why:
    print(why)
"""
    message = f"larskit.{face} needs {named}: pip install 'larskit[{face}]'"
    assert python(code) == message


def test_a_missing_backend_is_not_taken_for_a_missing_keras():
    code = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
sys.modules["torch"] = None
try:
    import larskit.keras
except ImportError as why:
    print(why.name)
"""
    assert python(code).partition(".")[0] == "torch"


def test_an_unknown_name():
    code = (
        "import larskit\ntry: larskit.tensorflow\nexcept AttributeError as e: print(e)"
    )
    assert python(code) == "module 'larskit' has no attribute 'tensorflow'"
