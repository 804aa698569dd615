"""Make Triton's interpreter cast bfloat16 as GPUs do: importing this is enough."""

from typing import Any

import torch
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

original = InterpreterBuilder.cast_impl


def cast(self: Any, src: Any, dst_type: Any) -> Any:
    """Round to bfloat16, where the interpreter truncates and loses subnormals."""
    before, after = src.dtype.scalar, dst_type.scalar
    if before == after or tl.bfloat16 not in (before, after):
        return original(self, src, dst_type)
    x = torch.from_numpy(src.data.copy())
    if before == tl.bfloat16:
        wide = x.view(torch.bfloat16).to(torch.float32).numpy()
        return original(self, TensorHandle(wide, tl.float32), dst_type)
    bits = x.to(torch.bfloat16).view(torch.uint16).numpy()
    return TensorHandle(bits, after)


InterpreterBuilder.cast_impl = cast
