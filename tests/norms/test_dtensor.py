"""The norms of sharded layers, in real processes, against unsharded layers."""

import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from larskit.norms import dtensor

# One all-reduce for all norms, and one for each layer with a Partial gradient.
NORMS = "c10d.allreduce_"

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def results(request, launch):
    return launch("sharded.py", request.param)


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
        if "partial True" in name or name == "masters":
            continue
        expected = {} if "all replicated" in name else {NORMS: 1}
        assert found["collectives"] == expected, name


def test_an_equal_mesh_of_new_processes_has_groups_of_its_own():
    for _ in range(2):
        distributed.init_process_group(
            "gloo", store=distributed.HashStore(), rank=0, world_size=1
        )
        mesh = init_device_mesh("cpu", (1,))
        assert dtensor._groups(mesh, (0,)) == [mesh.get_group(0)]
        distributed.destroy_process_group()
