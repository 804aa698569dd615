"""Steps where no thread can be started: their stacks would not fit in the memory.

Run by test_native.py with many threads asked for.
"""

import resource
from pathlib import Path

import numpy as np

from larskit import lars_update

w = np.ones((2000, 2000), np.float32)
expected = lars_update(w[:10], w[:10], 0.1)
out, alone = np.empty_like(w), np.empty_like(w)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 40 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
lars_update(w, w, 0.1, out=out)
assert (out == out[0, 0]).all()
assert abs(out[0, 0] - expected[0, 0]) < 1e-6
print("done")
