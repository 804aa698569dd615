"""`lars_update` against results recorded from the real ivy 1.0.0.5 without decay."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import larskit
from larskit.tree import broadcast_leaves, flatten

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ivy.json").read_text())
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}
MIN_DENOMINATOR = 1e-12  # what ivy adds to |dcdw|, and larskit does not
KINDS = {
    "numpy": np.asarray,
    "torch": lambda x: torch.from_numpy(x),
    "jax": jnp.asarray,
}


def tree(kind: str, case: dict, what: str) -> Any:
    """Return the dictionaries of a case with arrays for its lists of numbers."""

    def convert(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: convert(value) for key, value in x.items()}
        return KINDS[kind](np.array(x, case["dtype"]))

    return convert(case[what])


def assert_agree(ours: Any, case: dict) -> None:
    paths, leaves, _ = flatten(ours)
    w, g, theirs = (
        broadcast_leaves(tree("numpy", case, what), paths, what)
        for what in ("w", "dcdw", "result")
    )
    for found, before, slope, after in zip(leaves, w, g, theirs, strict=True):
        x = np.asarray(found)
        assert x.dtype == case["dtype"]
        shorter = MIN_DENOMINATOR / (np.linalg.norm(slope) + MIN_DENOMINATOR)
        allowed = TOLERANCE[case["dtype"]] * np.abs(after).max()
        allowed += shorter * np.abs(after - before).max()
        assert np.abs(x - after).max() <= allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["kind"])
def test_golden(kind, case):
    with jax.enable_x64(case["dtype"] == "float64"):
        w, g = tree(kind, case, "w"), tree(kind, case, "dcdw")
        assert_agree(larskit.lars_update(w, g, case["lr"]), case)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["kind"])
def test_golden_through_the_method_forms(case):
    w, g = tree("numpy", case, "w"), tree("numpy", case, "dcdw")
    if case["kind"] == "array":
        ours = larskit.Array(w).lars_update(g, case["lr"])
        assert type(ours) is larskit.Array
        ours = ours.native
    else:
        ours = larskit.Container(w).lars_update(g, case["lr"])
        assert type(ours) is larskit.Container
    assert_agree(ours, case)
    out = tree("numpy", case, "w")
    assert larskit.lars_update(w, g, case["lr"], out=out) is out
    assert_agree(out, case)


def test_every_kind_of_case_was_recorded():
    kinds = {(case["kind"], case["dtype"]) for case in GOLDEN["cases"]}
    shapes = ("array", "container", "container_w_array_grad")
    assert kinds == {(kind, dtype) for kind in shapes for dtype in TOLERANCE}
