"""An attached hook on sharded layers, in real processes, against unsharded layers."""

import pytest

pytestmark = pytest.mark.distributed

NORMS = "c10d.allreduce_"


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def results(request, launch):
    return launch("hook.py", request.param)


def test_sharded_gradients_are_rescaled_as_whole_ones(results):
    assert not {name: x["weights"] for name, x in results.items() if x["weights"]}
    assert len(results) >= 20


def test_one_collective_for_each_mesh_finds_all_norms(results):
    for name, found in results.items():
        norms = found["collectives"].pop(NORMS, 0)
        meshes = {"two meshes": 2}.get(name, int("all replicated" not in name))
        assert norms == meshes, name
        # Sums are completed, and GradScaler looks for what is not finite.
        assert bool(found["collectives"]) == (
            "partial True" in name or name == "scaled"
        )
