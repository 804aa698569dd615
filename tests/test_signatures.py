"""The same hyper-parameter bears the same name, order and default in every face."""

import inspect
import os

import pytest

from larskit import functional
from larskit.config import NAMES, Config
from larskit.torch import LARS

os.environ.setdefault("KERAS_BACKEND", "jax")
from larskit import keras

# Decided for each layer before the rule sees it, or bound to one seed.
SELECTED, SEED_ONLY = ("adapt", "decay"), ("zero_guard",)
FACES = {
    "torch": LARS.__init__,
    "keras": keras.LARS.__init__,
    "functional": functional.update,
}
EXPECTED = [name for name in NAMES if name not in SEED_ONLY]


@pytest.mark.parametrize("face", FACES)
def test_names_order_and_defaults(face):
    parameters = inspect.signature(FACES[face]).parameters
    shared = [name for name in parameters if name in NAMES]
    assert shared == EXPECTED
    for name in shared:
        default = None if name in SELECTED else getattr(Config, name)
        assert parameters[name].default == default, name
