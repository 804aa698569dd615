"""Triton's kernels run in its interpreter, which is chosen before it is loaded."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ["TRITON_INTERPRET"] == "1":
    import torch
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(self, src, dst_type):
        """Round to the nearest bfloat16 as GPUs do; the interpreter cuts the bits."""
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar == tl.bfloat16:
            return cast(self, src, dst_type)
        wide = torch.from_numpy(src.data.copy())
        bits = wide.to(torch.bfloat16).view(torch.uint16).numpy()
        return TensorHandle(bits, dst_type.scalar)

    InterpreterBuilder.cast_impl = rounded
