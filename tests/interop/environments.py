"""Create the virtual environments of other packages, and keep them for the next run.

They are in the user's cache folder, under names with a digest of their requirements,
so that another clone finds them. Run as a script, this creates them all.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
PORTED = ("brainpy", "chainer", "ivy")
MATRIX_ONLY = ("ivy-paddle", "transformers")
NEWEST_PYTHON = {"chainer": (3, 11)}
# timm and pytorch-optimizer, beside the torch of the development environment.
TORCH_OTHERS = (
    "torch-others",
    Path(__file__).parents[2] / "benchmarks" / "requirements",
)


def python(name: str, requirements: Path = REQUIREMENTS) -> Path:
    """Return the interpreter of an environment, which may not exist yet."""
    return _folder(name, requirements) / "bin" / "python"


def unsupported(name: str) -> str | None:
    """Say why this machine's Python cannot run a package; None where it can."""
    newest = NEWEST_PYTHON.get(name)
    if newest and sys.version_info[:2] > newest:
        return f"{name} needs Python {newest[0]}.{newest[1]} or older"
    return None


def make(name: str, requirements: Path = REQUIREMENTS) -> None:
    """Create an environment: the requirements, then those without dependencies."""
    folder = _folder(name, requirements)
    complete = folder / "complete"
    if complete.exists():
        return
    print(f"creating the environment of {name} in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for file, *options in (
        (f"{name}.txt",),
        (f"{name}.no-deps.txt", "--no-deps", "--no-build-isolation"),
    ):
        if (requirements / file).exists():
            pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *options, "-r", requirements / file], check=True)
    complete.touch()


def _folder(name: str, requirements: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(requirements.glob(f"{name}.*")):
        digest.update(file.read_bytes())
    return cache / "larskit" / "environments" / f"{name}-{digest.hexdigest()[:16]}"


if __name__ == "__main__":
    for name in (*PORTED, *MATRIX_ONLY):
        print(unsupported(name) or make(name) or f"{name}: {python(name)}")
    print(make(*TORCH_OTHERS) or f"{TORCH_OTHERS[0]}: {python(*TORCH_OTHERS)}")
