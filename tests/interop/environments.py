"""Make the virtual environments of seeds and peers, and keep them for the next time.

They lie in the user's cache folder under a name that holds a digest of what they
require, so that another clone finds them again. Run as a script, this makes them all.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
SEEDS = ("brainpy", "chainer", "ivy")
CLIENTS = ("ivy-paddle", "transformers")  # of the matrix, beside the seeds
NEWEST_PYTHON = {"chainer": (3, 11)}
# timm and pytorch-optimizer, beside the torch of the development environment.
TORCH_PEERS = ("torch-peers", Path(__file__).parents[2] / "benchmarks" / "requirements")


def python(seed: str, requirements: Path = REQUIREMENTS) -> Path:
    """Return the interpreter of a seed's environment, made or not."""
    return _folder(seed, requirements) / "bin" / "python"


def unsupported(seed: str) -> str | None:
    """Say why this machine's Python cannot host a seed; None where it can."""
    newest = NEWEST_PYTHON.get(seed)
    if newest and sys.version_info[:2] > newest:
        return f"{seed} needs Python {newest[0]}.{newest[1]} or older"
    return None


def make(seed: str, requirements: Path = REQUIREMENTS) -> None:
    """Install a seed's requirements, and then what must come without its own."""
    folder = _folder(seed, requirements)
    complete = folder / "complete"
    if complete.exists():
        return
    print(f"making the environment of {seed} in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for file, *options in (
        (f"{seed}.txt",),
        (f"{seed}.no-deps.txt", "--no-deps", "--no-build-isolation"),
    ):
        if (requirements / file).exists():
            pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *options, "-r", requirements / file], check=True)
    complete.touch()


def _folder(seed: str, requirements: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(requirements.glob(f"{seed}.*")):
        digest.update(file.read_bytes())
    return cache / "larskit" / "environments" / f"{seed}-{digest.hexdigest()[:16]}"


if __name__ == "__main__":
    for name in (*SEEDS, *CLIENTS):
        print(unsupported(name) or make(name) or f"{name}: {python(name)}")
    print(make(*TORCH_PEERS) or f"{TORCH_PEERS[0]}: {python(*TORCH_PEERS)}")
