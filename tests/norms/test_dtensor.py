"""The lengths of sharded layers, in real processes, against the layers whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "live" / "sharded.py"
# An all-reduce for all lengths; one more for each layer whose gradient is a sum that is
# not complete, which is completed first.
LENGTHS = "c10d.allreduce_"


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def results(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("sharded") / "results.json"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [sys.executable, "-m", *launcher, str(request.param), PROGRAM, file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


def test_sharded_steps_are_those_of_whole_layers(results):
    wrong = {
        name: found
        for name, found in results.items()
        if found["weights"] or found["buffers"]
    }
    assert not wrong
    assert len(results) > 90


def test_one_collective_finds_all_lengths(results):
    for name, found in results.items():
        if "partial True" in name:
            continue
        expected = {} if "all replicated" in name else {LENGTHS: 1}
        assert found["collectives"] == expected, name
