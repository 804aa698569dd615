"""Whole layers in two processes: DDP, ZeroRedundancyOptimizer, and what is refused."""

import re

import pytest

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(launch):
    return launch("data_parallel.py", 2)


def test_ddp_and_zero_step_as_one_process_does(results):
    found = {name: x for name, x in results.items() if isinstance(x, bool)}
    assert len(found) == 6
    assert all(found.values()), found


def test_zero_loads_what_it_collected(results):
    found = {name: x for name, x in results.items() if isinstance(x, list)}
    assert len(found) == 2
    assert all(all(x) for x in found.values()), found


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("plain gradient", "is a DTensor and its gradient a Tensor: distribute both"),
        *(
            (
                f"FSDP1, {face}, own {own}",
                "of FSDP1.* no layer has a norm of its own.*FSDP2",
            )
            for face in ("LARS", "hook")
            for own in (False, True)
        ),
    ],
)
def test_refusals_say_what_to_do(results, what, message):
    assert re.search(message, results["refusals"][what])
