"""Prints why there is no Triton engine here. Run by test_triton_compiled.py."""

import torch

from larskit.engines import triton

if torch.cuda.is_available():
    print("there is a GPU")
else:
    print(triton.unavailable())
    try:
        triton.Group([torch.ones(2)], [torch.ones(2)], [None])
    except RuntimeError as why:
        print(why)
