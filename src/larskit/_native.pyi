from collections.abc import Sequence
from typing import Any

class Dtype:
    float32: Dtype
    float64: Dtype
    bfloat16: Dtype
    float16: Dtype

class Options:
    def __init__(self, config: object, lr: float, /) -> None: ...

Addresses = Sequence[int]

class Group:
    def __init__(
        self,
        weight_dtype: Dtype,
        gradient_dtype: Dtype,
        weights: Addresses,
        gradients: Addresses,
        buffers: Addresses,
        results: Addresses,
        new_buffers: Addresses,
        sizes: Sequence[int],
        adapt: Sequence[bool],
        decay: Sequence[bool],
        scales: bool,
        /,
    ) -> None: ...
    def collides(self) -> bool: ...
    def snapshot(
        self, exchange: object, fixed: list[Any], gradients: list[Any], /
    ) -> bool: ...
    def rebind(self, fixed: list[Any], gradients: list[Any], /) -> bool: ...
    def point(self, gradients: Addresses, /) -> None: ...
    def step(
        self,
        options: Options,
        stats: int,
        threads: int,
        update_norms: bool,
        result_norms: bool,
        /,
    ) -> None: ...
    def scale(self, options: Options, stats: int, threads: int, /) -> None: ...
    def measure(self, options: Options, stats: int, threads: int, /) -> None: ...

serial_below: int
FIELDS: list[str]

def scale_array(
    options: Options, weights: object, gradient: object, threads: int, /
) -> bool: ...
def end() -> None: ...
def variant() -> str: ...
