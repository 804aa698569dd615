"""The examples run as a user runs them, learn, and warn of nothing of their own."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import environments
import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "jax"
VARIABLES = {"PYTHONWARNINGS": "always", "JAX_PLATFORMS": "cpu"}
BRAINPY_LACKS = ("sklearn", "cloudpickle", "joblib", "narwhals", "threadpoolctl")


def run(script, *options, python=Path(sys.executable), **variables):
    done = subprocess.run(
        [python, EXAMPLES / script, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | VARIABLES | variables,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    warnings = [line for line in done.stderr.splitlines() if "Warning:" in line]
    ours = (f"{ROOT / 'src'}", f"{EXAMPLES}")
    assert not [line for line in warnings if line.startswith(ours)]
    return done.stdout


def accuracy(out):
    (found,) = re.findall(r"accuracy ([\d.]+)%", out)
    return float(found)


@pytest.mark.parametrize("name", ["nnx", "equinox", "variables"])
def test_digits(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert accuracy(run(f"{name}_digits.py")) > 95
    assert not list(tmp_path.iterdir())


def test_linen_goes_on_from_its_checkpoint_to_the_same_end(tmp_path):
    options = ("linen_digits.py", "--checkpoints", tmp_path / "linen")
    first, *whole = run(*options).splitlines()
    assert first == "from step 0"
    assert accuracy(*whole) > 95
    shutil.rmtree(tmp_path / "linen" / "120")
    assert run(*options).splitlines() == ["from step 60", *whole]


@pytest.mark.distributed
def test_sharded_digits():
    flags = "--xla_force_host_platform_device_count=8"
    out = run("sharded_digits.py", XLA_FLAGS=flags)
    assert accuracy(out) > 95
    assert out.count("on each device: (8, 256) of (64, 256)") == 2


def test_brainpy_digits(tmp_path):
    """In BrainPy's own environment, which borrows scikit-learn from ours."""
    python = environments.python("brainpy")
    assert python.exists(), "brainpy has no environment: `make environments` makes it"
    for name in BRAINPY_LACKS:
        spec = find_spec(name)
        assert spec
        assert spec.origin
        file = Path(spec.origin)
        lent = file.parent if file.name == "__init__.py" else file
        (tmp_path / lent.name).symlink_to(lent)
    path = os.pathsep.join([f"{ROOT / 'src'}", f"{tmp_path}"])
    assert accuracy(run("brainpy_digits.py", python=python, PYTHONPATH=path)) > 95
