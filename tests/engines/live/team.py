"""Steps after an operation of torch, in whose threads. Run by test_native.py."""

import os

import torch

from larskit.torch import LARS

torch.set_num_threads(3)
torch.ones(4_000_000).mul_(2.0)
before = len(os.listdir("/proc/self/task"))
p = torch.nn.Parameter(torch.ones(1_000_000))
p.grad = torch.ones(1_000_000)
LARS([p], lr=0.1).step()
after = len(os.listdir("/proc/self/task"))
assert (before >= 3) & (after == before), (before, after)
print("done")
