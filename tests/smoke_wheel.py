"""Try an installed larskit: ``python -I tests/smoke_wheel.py``, in its environment."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

import larskit
from larskit.config import Config
from larskit.engines import Layers, native


def main() -> None:
    """Fail with a traceback at the first thing that is not right."""
    assert Path(larskit.__file__).is_relative_to(sys.prefix), larskit.__file__
    assert native.unavailable() is None, native.unavailable()
    w, g = np.full(4, 2.0, "float32"), np.full(4, 4.0, "float32")
    assert larskit.lars_update(w, g, 0.5).tolist() == [1.0] * 4
    layers = Layers([w], [g], [None], [True], [True])
    config = Config(trust_coefficient=1.0)
    native.bind(layers, config).step_(0.5, config)
    assert w.tolist() == [1.0] * 4
    command = Path(sysconfig.get_path("scripts")) / "larskit"
    table = subprocess.run([command, "doctor"], capture_output=True, check=True).stdout
    assert native.variant() in table.decode()
    sys.stdout.write(table.decode())


if __name__ == "__main__":
    main()
