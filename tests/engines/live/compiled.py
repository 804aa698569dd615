"""Compiles the kernels for several GPUs, none of which is needed, and says how.

Run by test_triton_compiled.py. Writes a JSON array.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from larskit.config import Config
from larskit.engines.triton import group, kernels

TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("hip", "gfx942", 64),
]
STEPPING = (kernels.measure, kernels.finish, kernels.move, kernels.finish_update)
Options = tuple[tuple[str, str], dict[str, Any], dict[str, bool]]
# The dtypes of weights and gradients, the hyper-parameters, and what a step asks for.
VARIANTS: list[Options] = [
    (("float32", "float32"), {}, {}),
    (("bfloat16", "bfloat16"), {}, {}),
    (("float64", "float64"), {"clip": True}, {}),
    (("float16", "float16"), {"momentum": 0.0}, {}),
    (
        ("bfloat16", "float32"),
        {"denominator": "momentum", "lr_placement": "outside", "nesterov": True},
        {},
    ),
    (
        ("float32", "float32"),
        {"denominator": "decayed_gradient"},
        {"unscales": True, "conditional": True, "carries": True},
    ),
    (("float32", "float32"), {}, {"full_stats": True}),
    (
        ("float32", "float32"),
        {},
        {"full_stats": True, "conditional": True, "carries": True},
    ),
]
# What scales gradients has no buffers.
SCALING: list[Options] = [
    (("float32", "float32"), {}, {}),
    (("bfloat16", "bfloat16"), {}, {"keeps_scale": True}),
]
TYPES = {
    "table_ptr": "*i64", "owners_ptr": "*i64", "layers": "i32", "blocks": "i32",
    "sums_ptr": "*fp64", "stats_ptr": "*fp64", "lr_ptr": "*fp64",
    "numbers_ptr": "*fp64", "scale_ptr": "*fp32", "apply_if_ptr": "*i1",
    "HOW": "constexpr", "GIVEN": "constexpr",
}  # fmt: skip
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled(kernel: Any, how: Any, target: GPUTarget) -> Any:
    constants = {"HOW": how, "GIVEN": False}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: TYPES[name] for name in names},
        {name: value for name, value in constants.items() if name in names},
    )
    options = {"num_warps": group._WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def described(binary: Any) -> dict[str, Any]:
    """Say which instructions a CUDA kernel consists of, and what it takes."""
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [TOOL, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    operations = re.findall(r"\b(?:fma|mul|add|sub|div|sqrt|cvt)\.[\w.]*f\d\d\b", ptx)
    return {
        "float64_sums": len(re.findall(r"\badd\.[\w.]*f64\b", ptx)),
        "loads": Counter(re.findall(r"ld\.global\.[\w.]+", ptx)),
        "roundings": sorted({part for op in operations for part in op.split(".")}),
        "registers": int(numbers["REG"]),
        "local": int(numbers["LOCAL"]) + int(numbers["STACK"]),
    }


def variant(options: Options, buffers: bool) -> Any:
    """Return what the kernels are compiled for, for layers that adapt and decay."""
    dtypes, given, asked = options
    config = Config(**{"weight_decay": 0.1, **given})
    choices = tuple(getattr(config, name) for name in kernels.CHOICES)
    has = buffers and config.momentum != 0
    return group._variant(*dtypes, choices, momentum=has, carried=False, **asked)


def programs() -> Iterator[tuple[Any, Any]]:
    """Yield each kernel, with what it is compiled for."""
    for options in VARIANTS:
        how = variant(options, buffers=True)
        yield from ((kernel, how) for kernel in STEPPING)
    for options in SCALING:
        yield kernels.scale, variant(options, buffers=False)


def main() -> None:
    rows = []
    for target in TARGETS:
        for kernel, how in programs():
            binary = compiled(kernel, how, target)
            row: dict[str, Any] = {
                "target": f"{target.backend} {target.arch}",
                "kernel": kernel.__name__,
                "momentum": how.momentum,
                "leaves_squares": how.carries or how.full_stats,
                "denominator": how.denominator,
                "bytes": [x.primitive_bitwidth // 8 for x in (how.w, how.g, how.w)],
            }
            if target.backend == "cuda":
                row |= described(binary)
            rows.append(row)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
