from pathlib import Path

import numpy as np
import pytest
import torch

from larskit.app import data


@pytest.fixture(autouse=True)
def _one_thread():
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(scope="session")
def digits() -> data.Data:
    return data.read("digits")


@pytest.fixture(scope="session")
def few(tmp_path_factory, digits) -> str:
    """Return the path of a file with the first 100 images of three digits."""
    path: Path = tmp_path_factory.mktemp("few") / "few.npz"
    some = np.flatnonzero(digits.y < 3)[:100]
    np.savez(path, x=digits.x[some], y=digits.y[some])
    return str(path)
