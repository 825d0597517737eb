"""The static gate: every kernel, compiled for GPUs that need not be there, must look right.

    python -m pdarts_fast.kernels.triton.gate                  check, and write the table
    python -m pdarts_fast.kernels.triton.gate --only fan_out   one kernel, without the table

Rules for sm_80, sm_90 and sm_100: no stack (so no spills), at most 128 registers, shared memory
within the target's, global memory accessed 16 bytes at a time, tensor-core instructions wherever
there is a product. gfx942 is compiled and reported.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from pathlib import Path

import triton

from .machine_code import AMD, NVIDIA, SHARED, Code, measure_all
from .registry import Kernel, Specialisation, kernels

MAX_REGISTERS = 128
# Tables, coefficients and partial sums are small: of what the code can move, this share at least
# must go 16 bytes at a time, and nothing less than 4.
WIDE_SHARE = 0.7
TENSOR_CORE = r"(HMMA|HGMMA|WGMMA|UTC\w*MMA|QGMMA|OMMA)"
TABLE = "docs/triton-kernels.csv"
HEADER = (
    "kernel", "variant", "target", "registers", "stack", "shared", "wide", "tensor_core",
    "instructions", "warps", "verdict", "triton",
)  # fmt: skip

Measured = tuple[Kernel, Specialisation, str, Code]


def wide_share(code: Code) -> tuple[float, int]:
    """Share of bytes in the listing's global accesses that go 16 at a time; narrow accesses.

    Narrow are those of 1 or 2 bytes: arrays of half precision that lost their alignment.
    """
    sizes = {"128": 16, "64": 8}
    moved = wide = narrow = 0
    for opcode, count in (code.instructions or {}).items():
        parts = opcode.split(".")
        if parts[0] not in ("LDG", "STG"):
            continue
        if {"U8", "S8", "U16", "S16"} & set(parts):
            narrow += count
            continue
        size = next((sizes[part] for part in parts if part in sizes), 4)
        moved += size * count
        wide += size * count if size == 16 else 0
    return (wide / moved if moved else 1.0), narrow


def faults(specialisation: Specialisation, target: str, code: Code) -> list[str]:
    """What the gate objects to; empty if nothing."""
    if code.failure:
        return [f"does not compile: {code.failure}"]
    if target in AMD:
        return []
    found = []
    if code.stack or code.count("(STL|LDL)"):
        found.append(f"{code.stack} bytes of stack")
    if code.registers > MAX_REGISTERS:
        found.append(f"{code.registers} registers")
    if code.shared > SHARED[target]:
        found.append(f"{code.shared} bytes of shared memory")
    share, narrow = wide_share(code)
    if not specialisation.gathers and (share < WIDE_SHARE or narrow):
        found.append(f"{share:.0%} of accesses are 16 bytes wide, {narrow} under 4")
    if specialisation.product and not code.count(TENSOR_CORE):
        found.append("no tensor-core instruction")
    return found


def chosen(only: str | None = None) -> list[tuple[Kernel, Specialisation]]:
    """Every kernel with each of its specialisations."""
    return [
        (kernel, specialisation)
        for kernel in kernels().values()
        if only is None or kernel.name == only
        for specialisation in kernel.specialisations()
    ]


def run(
    wanted: list[tuple[Kernel, Specialisation]],
    targets: tuple[str, ...] = NVIDIA + AMD,
    processes: int = 2,
) -> list[Measured]:
    """Compiles and measures; one result a specialisation and target, in order."""
    codes = measure_all(wanted, targets, processes)
    return [
        (kernel, one, target, codes[kernel.name, one.variant, target])
        for kernel, one in wanted
        for target in targets
        if one.is_for(target)
    ]


def row(measured: Measured) -> list[str]:
    """A line of the table."""
    kernel, one, target, code = measured
    share, _ = wide_share(code)
    total = sum((code.instructions or {}).values())
    products = code.count(TENSOR_CORE if target not in AMD else "v_mfma")
    verdict = "; ".join(faults(one, target, code)) or ("reported" if target in AMD else "passed")
    numbers = [code.registers, code.stack, code.shared]
    wide = "" if target in AMD else f"{share:.2f}"
    return [
        kernel.name, one.label, target, *map(str, numbers), wide, str(products), str(total),
        str(one.num_warps), verdict, triton.__version__,
    ]  # fmt: skip


def write_table(path: Path, results: list[Measured]) -> None:
    """The table that docs/triton-kernels.md refers to."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(row(measured) for measured in results)


def main() -> int:
    """The command; 1 if a kernel fails the gate."""
    parser = argparse.ArgumentParser(prog="python -m pdarts_fast.kernels.triton.gate")
    parser.add_argument("--only", help="name of one kernel; no table is written")
    parser.add_argument("--targets", nargs="+", default=NVIDIA + AMD, choices=NVIDIA + AMD)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=Path(TABLE), help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.only is not None and arguments.only not in kernels():
        parser.error(f"--only {arguments.only}: the kernels are {', '.join(kernels())}")
    began = time.perf_counter()
    wanted = chosen(arguments.only)
    results = run(wanted, tuple(arguments.targets), arguments.processes)
    failed = 0
    for measured in results:
        _, one, target, code = measured
        found = faults(one, target, code)
        failed += bool(found) and target not in AMD
        if found or arguments.only:
            print(" ".join(row(measured)))
    if arguments.only is None:
        write_table(arguments.output, results)
    seconds = time.perf_counter() - began
    print(f"{len(results)} checked in {seconds:.0f} s with triton {triton.__version__}; "
          f"{failed} failed")  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
