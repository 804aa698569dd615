"""A plugin of pytest: tests use the C++ module whose path ``LARSKIT_NATIVE`` is."""

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location(
    "larskit._native", os.environ["LARSKIT_NATIVE"]
)
assert spec is not None
assert spec.loader is not None
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
