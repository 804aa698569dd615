"""An attached hook on sharded layers, in real processes, against the layers whole."""

import pytest

pytestmark = pytest.mark.distributed

LENGTHS = "c10d.allreduce_"


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def results(request, launch):
    return launch("hook.py", request.param)


def test_sharded_gradients_are_rescaled_as_whole_ones(results):
    assert not {name: x["weights"] for name, x in results.items() if x["weights"]}
    assert len(results) >= 20


def test_one_collective_for_each_mesh_finds_all_lengths(results):
    for name, found in results.items():
        lengths = found["collectives"].pop(LENGTHS, 0)
        meshes = {"two meshes": 2}.get(name, int("all replicated" not in name))
        assert lengths == meshes, name
        # Sums are completed, and GradScaler looks for what is not finite.
        assert bool(found["collectives"]) == (
            "partial True" in name or name == "scaled"
        )
