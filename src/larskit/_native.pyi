from collections.abc import Sequence
from typing import Any

class Dtype:
    float32: Dtype
    float64: Dtype
    bfloat16: Dtype
    float16: Dtype

class Denominator:
    paper: Denominator
    decayed_gradient: Denominator
    gradient: Denominator
    momentum: Denominator

class Options:
    def __init__(
        self,
        *,
        weights: Dtype,
        gradients: Dtype,
        denominator: Denominator,
        inside: bool,
        nesterov: bool,
        clip: bool,
        adapt: bool,
        maximize: bool,
        zero_guard: bool,
        measure_result: bool,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
        eps: float,
        dampening: float,
        threshold: float,
    ) -> None: ...

Addresses = Sequence[int]

class Group:
    def __init__(
        self,
        weights: Addresses,
        gradients: Addresses,
        buffers: Addresses,
        results: Addresses,
        new_buffers: Addresses,
        sizes: Sequence[int],
        bytes: int,
        gradient_bytes: int,
        rescales: bool,
        /,
    ) -> None: ...
    def collides(self) -> bool: ...
    def remember(
        self, exchange: object, fixed: list[Any], gradients: list[Any], /
    ) -> bool: ...
    def aim(self, fixed: list[Any], gradients: list[Any], /) -> bool: ...
    def step(self, options: Options, lengths: int, threads: int, /) -> None: ...
    def rescale(self, options: Options, lengths: int, threads: int, /) -> None: ...
    def measure(self, options: Options, lengths: int, threads: int, /) -> None: ...

alone: int

def rescale_array(
    options: Options, weights: object, gradient: object, threads: int, /
) -> bool: ...
def end() -> None: ...
def variant() -> str: ...
