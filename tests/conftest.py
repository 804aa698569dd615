"""Without a GPU, Triton's kernels run in its interpreter: that is asked for here.

Triton reads the environment when it is imported. On a GPU, LARSKIT_TEST_DEVICE=cuda.
The environments of the seed packages are without it.
"""

import os
from importlib.util import find_spec

ON_CPU = os.environ.get("LARSKIT_TEST_DEVICE", "cpu") == "cpu"
os.environ.setdefault("TRITON_INTERPRET", "1" if ON_CPU else "0")

if ON_CPU and find_spec("torch") and find_spec("triton"):
    import torch
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def as_gpus_do(self, src, dst_type):
        """Cast bfloat16 as GPUs do: the interpreter cuts bits, and loses subnormals."""
        before, after = src.dtype.scalar, dst_type.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, src, dst_type)
        x = torch.from_numpy(src.data.copy())
        if before == tl.bfloat16:
            wide = x.view(torch.bfloat16).to(torch.float32).numpy()
            return cast(self, TensorHandle(wide, tl.float32), dst_type)
        bits = x.to(torch.bfloat16).view(torch.uint16).numpy()
        return TensorHandle(bits, after)

    InterpreterBuilder.cast_impl = as_gpus_do
