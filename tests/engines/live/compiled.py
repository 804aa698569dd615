"""Compiles the kernels for several GPUs, none of which is needed, and says how.

Run by test_triton_compiled.py. Writes a JSON array.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from larskit.engines.triton import group, kernels

TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("hip", "gfx942", 64),
]
PLAIN = {
    "w": "float32",
    "g": "float32",
    "denominator": "paper",
    "placement": "inside",
    "nesterov": False,
    "clip": False,
    "adapt": True,
    "maximize": False,
    "zero_guard": True,
    "decays": True,
    "keeps": True,
    "scaled": False,
    "asks": False,
    "known": False,
    "carries": False,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"w": "bfloat16", "g": "bfloat16"},
    {"w": "float64", "g": "float64", "clip": True},
    {"w": "float16", "g": "float16", "keeps": False},
    {"w": "bfloat16", "g": "float32", "denominator": "momentum"}
    | {"placement": "outside", "nesterov": True, "maximize": True},
    {"scaled": True, "asks": True, "carries": True, "denominator": "decayed_gradient"},
]
TYPES = {
    "table": "*i64", "owners": "*i64", "layers": "i32", "blocks": "i32",
    "sums": "*fp64", "lengths": "*fp64", "rate": "*fp64", "numbers": "*fp64",
    "scale": "*fp32", "permitted": "*i1", "HOW": "constexpr", "GIVEN": "constexpr",
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
        "loads": Counter(re.findall(r"ld\.global\.[\w.]+", ptx)),
        "roundings": sorted({part for op in operations for part in op.split(".")}),
        "registers": int(numbers["REG"]),
        "local": int(numbers["LOCAL"]) + int(numbers["STACK"]),
    }


def main() -> None:
    rows = []
    for target in TARGETS:
        for variant in VARIANTS:
            given = PLAIN | variant
            how = group._variant(*given.values())
            for kernel in (kernels.measure, kernels.finish, kernels.move):
                binary = compiled(kernel, how, target)
                row: dict[str, Any] = {
                    "target": f"{target.backend} {target.arch}",
                    "kernel": kernel.__name__,
                    "keeps": how.keeps,
                    "denominator": how.denominator,
                    "bytes": [x.primitive_bitwidth // 8 for x in (how.w, how.g, how.w)],
                }
                if target.backend == "cuda":
                    row |= described(binary)
                rows.append(row)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
