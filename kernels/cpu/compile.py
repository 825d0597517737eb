"""Compiles the library: used by setup.py and by tests; imports neither torch nor the package.

Run as a script it builds beside the sources:

    python kernels/cpu/compile.py [--sanitize] [--only avx2] [--force-width 16] [--emulate-amx] \\
        [--output FILE]
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
OUTPUT = Path(__file__).resolve().parent / "_kernels.so"
BASE = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-g0")
SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
WITH_PRODUCTS = ("fan_in", "mid_backward", "fan_out", "variant")
PRIMITIVES = (*WITH_PRODUCTS, "stencils", "reduce", "mix", "draw")
SCALAR = ("cell_backward", "cell_forward", "team", "dispatch", "emulate_amx")
LONGEST_FIRST = ("fan_in", "stencils", "mid_backward", "fan_out", "reduce", "mix", "draw")


@dataclass(frozen=True)
class Variant:
    """Compiler flags of one set of processors."""

    name: str
    width: int
    flags: tuple[str, ...]


AVX2 = ("-mavx2", "-mfma")
WIDE = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
AVX512 = (*AVX2, "-mbmi2", *WIDE)
BF16 = (*AVX512, "-mavx512bf16")
AMX = (*BF16, "-mamx-tile", "-mamx-bf16")
# Beside the others only processors without AVX2 run `generic`; -O1 takes a third less to compile.
OLD = ("-O1",)
# Whom a variant leaves work to: avx512bf16 calls avx512 for float32, and amx has nothing but the
# kernels with products.
EXTENDS = {"amx": "avx512bf16", "avx512bf16": "avx512"}


def variants() -> list[Variant]:
    """What to build for this machine's architecture, best first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return [Variant("generic", 4, ())]
    return [
        Variant("amx", 16, AMX),
        Variant("avx512bf16", 16, BF16),
        Variant("avx512", 16, AVX512),
        Variant("avx2", 8, AVX2),
        Variant("generic", 4, OLD),
    ]


def find_compiler() -> list[str] | None:
    """The command of a C++17 compiler with OpenMP: ``CXX``, g++, c++ or clang++; None if none."""
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "c++", "clang++"]:
        words = shlex.split(command)
        if _compiles(words, ()):
            return words
    return None


def _compiles(compiler: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether a command is a compiler with OpenMP that knows these flags."""
    probe = [*compiler, *BASE, *flags, "-shared", "-x", "c++", "-", "-o", os.devnull]
    try:
        result = subprocess.run(probe, input=b"#include <omp.h>\nint x;", capture_output=True)
    except OSError:
        return False
    return result.returncode == 0


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


def build(
    output: Path = OUTPUT,
    *,
    sanitize: bool = False,
    force_width: int | None = None,
    emulate_amx: bool = False,
    only: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> Path:
    """Compiles and links the library.

    Args:
        output: File to write.
        sanitize: With address and undefined-behaviour sanitizers.
        force_width: Vector width of the avx2 variant, to try the 16-wide code on any processor.
        emulate_amx: Execute AMX instructions in software, to test them on a processor that has
            AVX512-BF16 alone.
        only: Names of the variants to build beside `generic`; all if empty.
        extra: More compiler flags.

    Returns:
        ``output``.

    Raises:
        RuntimeError: There is no compiler, or it fails; has its message.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++17 compiler with OpenMP found; install g++ or set CXX")
    flags = [*BASE, *(SANITIZE if sanitize else ()), *extra]
    with tempfile.TemporaryDirectory() as folder:
        wanted = {*only, "generic"}
        for name, extended in EXTENDS.items():
            wanted |= {extended} if name in wanted else set()
        chosen = [v for v in variants() if not only or v.name in wanted]
        # A compiler may be older than products of bfloat16.
        chosen = [v for v in chosen if v.name not in EXTENDS or _compiles(compiler, v.flags)]
        listed = [f"-DPDARTS_HAS_{v.name.upper()}" for v in chosen]
        if emulate_amx:
            listed.append("-DPDARTS_EMULATE_AMX")
        scalar = [name for name in SCALAR if emulate_amx or name != "emulate_amx"]
        jobs = [[str(SOURCES / f"{x}.cpp"), *listed, "-o", f"{folder}/{x}.o"] for x in scalar]
        for variant in chosen:
            width = variant.width
            if force_width and variant.name == "avx2":
                width = force_width
            names = [f"-DPDARTS_VARIANT={variant.name}", f"-DPDARTS_WIDTH={width}"]
            for source in WITH_PRODUCTS if variant.flags == AMX else PRIMITIVES:
                target = f"{folder}/{variant.name}_{source}.o"
                jobs.append([str(SOURCES / f"{source}.cpp"), *variant.flags, *names, "-o", target])
        # So that no processor idles at the end.
        order = (*LONGEST_FIRST, *SCALAR, "variant")
        jobs.sort(key=lambda job: order.index(Path(job[0]).stem))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: _run([*compiler, *flags, "-c", *job]), jobs))
        objects = [job[-1] for job in jobs]
        temporary = output.with_name(f"{output.name}.{os.getpid()}")
        _run([*compiler, *flags, "-shared", *objects, "-o", str(temporary)])
        temporary.replace(output)
    return output


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description="Compile the C++ kernels.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--force-width", type=int)
    parser.add_argument("--emulate-amx", action="store_true")
    parser.add_argument("--only", nargs="*", default=())
    options = parser.parse_args()
    path = build(
        options.output,
        sanitize=options.sanitize,
        force_width=options.force_width,
        emulate_amx=options.emulate_amx,
        only=options.only,
    )
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
