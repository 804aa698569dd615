"""Distributed checkpoints of real processes, loaded by as many and by fewer."""

import pytest

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(launch):
    return launch("checkpoint.py", 4)


def test_a_loaded_run_goes_on_as_if_nothing_had_been(results):
    assert not {name: differ for name, differ in results.items() if differ}
    assert len(results) == 3 * 9
