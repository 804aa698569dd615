from collections.abc import Sequence

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
    weights: Dtype
    gradients: Dtype
    denominator: Denominator
    inside: bool
    nesterov: bool
    clip: bool
    adapt: bool
    maximize: bool
    zero_guard: bool
    has_momentum: bool
    lr: float
    momentum: float
    weight_decay: float
    trust_coefficient: float
    eps: float
    dampening: float
    threshold: float

def step(
    options: Options,
    weights: Sequence[int],
    gradients: Sequence[int],
    buffers: Sequence[int],
    first: Sequence[bool],
    sizes: Sequence[int],
    threads: int,
    w_norms: Sequence[float],
    q: Sequence[float],
    /,
) -> tuple[list[float], list[float], list[float]]: ...
def variant() -> str: ...
