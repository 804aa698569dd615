"""The C++ kernel under the sanitizers of addresses, undefined behaviour and threads.

The thread sanitizer understands neither OpenMP nor forks: it sees a program that uses
the pool alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LIVE = Path(__file__).parent / "live"
ROOT = LIVE.parents[2]
CXX = os.environ.get("CXX", "g++")


def run(*command: object, **env: str) -> str:
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | env,
        cwd=ROOT,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def needs(flag: str, folder: Path) -> None:
    """Skip where the compiler makes no program that runs under a sanitizer."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    program = folder / "empty"
    try:
        run(CXX, flag, source, "-o", program)
        run(program)
    except (OSError, AssertionError) as why:
        pytest.skip(f"{CXX} {flag} makes no program that runs: {str(why)[-200:]}")


def library(name: str) -> str:
    """Return the path of a library of the compiler."""
    return run(CXX, f"-print-file-name={name}").strip()


def test_threads(tmp_path):
    flag = "-fsanitize=thread"
    needs(flag, tmp_path)
    sources = [ROOT / "native" / f"{name}.cpp" for name in ("kernel", "loops", "pool")]
    program = tmp_path / "threads"
    options = ("-std=c++17", "-O1", "-g", "-DLARSKIT_LOOPS=baseline", "-Inative")
    sources.append(LIVE / "threads.cpp")
    run(CXX, flag, *sources, "-o", program, *options, "-pthread", "-ldl")
    assert run(program) == "4 of 4 are equal\n"


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library of Linux")
def test_addresses_and_undefined_behaviour(tmp_path):
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    needs("-fsanitize=address", tmp_path)
    needs("-fsanitize=undefined", tmp_path)
    build = tmp_path / "build"
    chosen = {
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": run(sys.executable, "-m", "nanobind", "--cmake_dir").strip(),
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_COMPILER": CXX,
        "CMAKE_CXX_FLAGS": flags,
    }
    run("cmake", "-S", ROOT, "-B", build, *(f"-D{k}={v}" for k, v in chosen.items()))
    run("cmake", "--build", build, "--parallel", "2")
    (module,) = build.glob("_native*.so")
    said = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "sanitized"),
        *("-p", "no:cacheprovider", "-m", "not (integration or distributed or slow)"),
        *("tests/engines/test_native.py", "tests/torch/test_turn.py"),
        LARSKIT_NATIVE=str(module),
        # C++'s library too: the sanitizer looks for its functions when it begins.
        LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so')}",
        # What Python and torch leave behind at their end is not the kernel's.
        ASAN_OPTIONS="detect_leaks=0:alloc_dealloc_mismatch=0",
        PYTHONPATH=str(LIVE),
    )
    assert " passed" in said
    assert "failed" not in said
