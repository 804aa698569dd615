"""What is shipped: the source distribution, the wheel, and an install without g++.

The installs see the packages of this environment, but not its larskit.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[1]
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for folder in ("native", "src")
    for path in (ROOT / folder).rglob("*.*")
    if path.suffix != ".pyc"
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(folder: Path, *what: str) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", *what, "-o", folder, ROOT)
    return folder


@pytest.fixture
def environment(tmp_path):
    """Make an environment of the packages of this one, and return its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", ask).strip())
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_source_distribution_holds_the_sources_and_nothing_else(tmp_path):
    (sdist,) = build(tmp_path, "--sdist").iterdir()
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    shipped = {"CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert set(names) == SOURCES | shipped


@pytest.mark.slow
def test_the_wheel_from_the_source_distribution_works(tmp_path, environment):
    (wheel,) = build(tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    python = {name.removeprefix("src/") for name in SOURCES if "src/" in name}
    assert python < names
    (kernel,) = (name for name in names - python if ".dist-info/" not in name)
    assert kernel.startswith("larskit/_native.")
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    run(*PIP, "--python", environment, "install", "--no-index", "--no-deps", wheel)
    table = run(environment, "-I", ROOT / "tests" / "smoke_wheel.py")
    assert str(environment) in table


@pytest.mark.slow
def test_without_a_compiler_the_install_says_so(tmp_path, environment):
    (sdist,) = build(tmp_path / "dist", "--sdist").iterdir()
    install = ("install", "--no-index", "--no-deps", "--no-build-isolation", "-v")
    said = run(*PIP, "--python", environment, *install, sdist, CXX="/bin/false")
    assert "kernel cannot be compiled here; installed without the native eng" in said
    assert "py3-none-any.whl" in said
    table = run(environment, "-I", "-m", "larskit", "doctor")
    assert "larskit was installed without its C++ kernel" in table
