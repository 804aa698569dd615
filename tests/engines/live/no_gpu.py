"""Prints why there is no Triton engine here. Run by test_triton_compiled.py."""

import torch

from larskit.config import Config
from larskit.engines import Layers, triton

if torch.cuda.is_available():
    print("there is a GPU")
else:
    print(triton.unavailable())
    try:
        w, every = [torch.ones(2)], [True]
        triton.bind(Layers(w, w, [None], every, every), Config())
    except RuntimeError as why:
        print(why)
