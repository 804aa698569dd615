"""The portable state of sharded layers, in real processes."""

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("processes", "ways"), [(2, ["fsdp"]), (4, ["fsdp", "fsdp and tensor parallel"])]
)
def test_sharded_layers_are_saved_whole(launch, processes, ways):
    assert launch("portable.py", processes) == ways
