"""A non-finite norm in one process stops the step in all of them."""

import re

import pytest

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(launch):
    return launch("nonfinite.py", 2)


def test_no_process_takes_the_step(results):
    assert len(results) == 12
    for case, processes in results.items():
        for rank, seen in enumerate(processes):
            assert seen["same"], (case, rank)
            assert seen["finite"], (case, rank)


def test_every_process_raises_and_says_what_it_knows(results):
    for case, processes in results.items():
        here, there = (seen["message"] for seen in processes)
        if "skip" in case:
            assert (here, there) == ("", "")
        elif case.startswith("0"):  # all processes know the norm of a sharded layer
            assert here == there
            assert re.search(r"the gradient of '0.0' \(inf\) is not finite", here)
        else:
            assert "the gradient of '0.1' (inf) is not finite" in here
            assert "a norm in another process is not finite" in there
