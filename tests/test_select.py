"""Which layers a selection selects."""

import re

import numpy as np
import pytest

from larskit.select import check_matched, select

NAMES = ["conv.weight", "conv.bias", "bn.weight", "head.0.weight"]
LAYERS = [np.ones((3, 3)), np.ones(3), np.ones(3), np.ones((2, 3, 1))]


@pytest.mark.parametrize(
    ("selection", "selected"),
    [
        (None, (True, False, False, True)),
        (True, (True, True, True, True)),
        (False, (False, False, False, False)),
        ("*.weight", (True, False, True, True)),
        ("conv.*", (True, True, False, False)),
        ("CONV.*", (False, False, False, False)),
        (["conv.*", "head.*"], (True, True, False, True)),
        (re.compile(r"^(?!bn).*weight$"), (True, False, False, True)),
        ((re.compile("0"), "*.bias"), (False, True, False, True)),
        (lambda name, w: w.ndim == 1 and "bn" in name, (False, False, True, False)),
    ],
)
def test_select(selection, selected):
    assert select(selection, NAMES, LAYERS, "adapt") == selected


@pytest.mark.parametrize("selection", [None, True, False])
def test_names_are_not_needed(selection):
    assert len(select(selection, None, LAYERS, "adapt")) == 4


@pytest.mark.parametrize("selection", ["*.weight", ["a"], lambda name, w: True])
def test_names_are_needed(selection):
    with pytest.raises(ValueError, match=r"decay=.* needs names.*named_parameters"):
        select(selection, None, LAYERS, "decay")


@pytest.mark.parametrize("selection", [3, 0.5, [1, 2], [], object()])
def test_kinds_that_select_nothing(selection):
    with pytest.raises(TypeError, match="adapt must be None, True, False, a name"):
        select(selection, NAMES, LAYERS, "adapt")


@pytest.mark.parametrize("selection", ["*.wieght", re.compile("x"), ["a", "b"]])
def test_a_pattern_that_matches_nothing(selection):
    selected = select(selection, NAMES, LAYERS, "adapt")
    with pytest.raises(ValueError, match="matches no parameter: check the names"):
        check_matched(selection, selected, "adapt")


def test_what_is_no_pattern_may_select_nothing():
    for selection in (None, False, lambda name, w: False):
        assert check_matched(selection, (False,), "adapt") is None
