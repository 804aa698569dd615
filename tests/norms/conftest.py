import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Return what runs a program of `live` in several processes, through torchrun.

    It gives the JSON object that the first of them wrote.
    """

    def launched(program: str, processes: int):
        file = tmp_path_factory.mktemp("live") / "results.json"
        path = Path(__file__).parent / "live" / program
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [sys.executable, "-m", *launcher, str(processes), path, file]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        # It is written when all have come to the end. After that the threads of gloo
        # may still abort a process if another has left first.
        assert file.exists(), done.stderr[-3000:]
        return json.loads(file.read_text())

    return launched
