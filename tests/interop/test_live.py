"""Run the ported APIs beside the real packages, each in its own environment."""

import os
import re
import subprocess
from pathlib import Path

import environments
import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("PYTEST_", "COV_"))
}


@pytest.mark.parametrize("package", environments.PORTED)
def test_live(package: str, tmp_path: Path) -> None:
    why = environments.unsupported(package)
    if why and not os.environ.get("LARSKIT_REQUIRE_LIVE"):
        pytest.skip(why)
    assert environments.python(package).exists(), (
        f"{package} has no environment: run `make environments`"
    )
    done = subprocess.run(
        [
            *(environments.python(package), "-m", "pytest", "-q", "-ra"),
            *("-p", "no:cacheprovider", "-o", "filterwarnings=default"),
            ROOT / "tests" / "interop" / "live" / f"test_live_{package}.py",
        ],
        cwd=tmp_path,  # some packages leave logs behind
        env={**CLEAN, "PYTHONPATH": str(ROOT / "src"), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed( in|, \d+ warnings? in)", done.stdout, re.M), (
        f"{package} did not run every test:\n{done.stdout}"
    )
