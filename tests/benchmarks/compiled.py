"""G4, without a GPU: the fused sampler compiled ahead of time for sm_80 and sm_90, by the ptxas that Triton ships.

``python -m tests.benchmarks.compiled``. A table of registers, spills and shared memory; a spill ends with exit 1.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stage2_pretrain.kernels import fused

CASES = [(7, 1, False), (14, 1, False), (14, 3, False), (14, 3, True), (16, 1, False)]
CASES += [(22, 1, False), (28, 1, False), (32, 3, True), (45, 1, False), (64, 1, False)]
POINTERS = {
    "maps": "*u8", "windows": "*i32", "sample_keys": "*i64", "stratum_of": "*u8", "weight_of": "*i32",
    "region_weights": "*i64", "hidden_out": "*u8", "coverage_out": "*u8", "num_patches_out": "*i32",
    "num_hidden_out": "*i32", "clamped_out": "*u8", "absent_out": "*u8", "visible_out": "*i32",
    "cu_seqlens_out": "*i32", "published": "*i64",
}  # fmt: skip


def compile_for(capability: int, side: int, regions: int, weighted: bool) -> dict[str, Any]:
    """Compile for square grids over maps of 256 pixels; what the assembler says."""
    block = max(16, triton.next_power_of_2(side * side))
    shape = fused.shape_of(block)
    warps = shape.pop("num_warps")
    fixed = {
        "REGIONS": regions, "HEIGHT": 256, "WIDTH": 256, "ROWS": side, "COLUMNS": side, "BLOCK": block,
        "WEIGHTED": weighted, **shape,
    }  # fmt: skip
    names = fused._draw.arg_names
    source = ASTSource(
        fused._draw,
        signature={name: "constexpr" if name in fixed else POINTERS.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    said = assemble(made.asm["ptx"])
    stores, loads = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)[0]
    return {
        "sm": capability, "patches": side * side, "regions": regions, "weighted": weighted, "warps": warps,
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]), "spilled_bytes": int(stores) + int(loads),
        "shared_bytes": made.metadata.shared,
    }  # fmt: skip


def assemble(ptx: str) -> str:
    """What ptxas tells of a program; newer ones than the plain assembler knows go to the other that is shipped."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        for tool in ("ptxas", "ptxas-blackwell"):
            command = [str(tools / tool), "-v", f"-arch={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not done.returncode:
                return done.stdout + done.stderr
    raise RuntimeError(done.stderr)


def main() -> None:
    """Print the table; exit 1 if anything spills."""
    rows = [compile_for(capability, *case) for capability in (80, 90) for case in CASES]
    print(" ".join(f"{name:>13}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{value!s:>13}" for value in row.values()))
    sys.exit(any(row["spilled_bytes"] for row in rows))


if __name__ == "__main__":
    main()
