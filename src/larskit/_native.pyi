from collections.abc import Iterable, Sequence

FIELDS: list[str]
serial_below: int
undivided: int

class Options:
    def __init__(self, config: object, lr: object, /) -> None: ...

Row = tuple[int, int, int, int, int, int, bool, bool, bool]

class Group:
    def __init__(
        self,
        dtype: str,
        gradient_dtype: str,
        rows: Iterable[Row],
        scales: bool,
        in_place: bool,
        with_torch: bool,
        /,
    ) -> None: ...
    def collides(self) -> bool: ...
    def snapshot(
        self, exchange: object, fixed: list[object], gradients: list[object], /
    ) -> bool: ...
    def rebind(self, fixed: list[object], gradients: list[object], /) -> bool: ...
    def use_gradients(self, gradients: Sequence[int], /) -> None: ...
    def measure(self, options: Options, stats: int, threads: int, /) -> None: ...
    def step(
        self,
        options: Options,
        stats: int,
        threads: int,
        update_norms: bool,
        /,
    ) -> None: ...
    def scale(self, options: Options, stats: int, threads: int, /) -> None: ...

def scale_array(
    options: Options, weights: object, gradient: object, threads: int, /
) -> bool: ...
def end() -> None: ...
def variant() -> str: ...
