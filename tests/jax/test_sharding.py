"""Sharded arrays step as the whole ones, on eight devices."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).parent / "live" / "sharded.py"


@pytest.fixture(scope="module")
def results():
    command = [sys.executable, PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_sharded_steps_are_those_of_whole_arrays(results):
    assert len(results) == 60
    assert not [name for name, found in results.items() if not found["equal"]]


def test_one_all_reduce_for_each_set_of_mesh_axes_and_nothing_else(results):
    for name, found in results.items():
        assert set(found["collectives"]) == {"all-reduce"}, name
        assert len(found["collectives"]) <= found["sets"], name
