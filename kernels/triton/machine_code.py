"""Compiles registered kernels for GPUs that need not be there, and reads the machine code.

``measure`` is cached by the kernel's source, the variant, the target and triton's version, in
``~/.cache/pdarts-fast`` (``XDG_CACHE_HOME``), so that a second run costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from .registry import Kernel, Specialisation, kernels

# Registers, stack and instructions are gated for these, reported for AMD.
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)
# Shared memory that a block may have, bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", re.M)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BACK = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
_VERSION = 2


@dataclass(frozen=True)
class Code:
    """What a compiled variant looks like.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread, spills included.
        shared: Bytes of a block.
        instructions: How often each opcode with its modifiers stands in the code.
        loops: Of every innermost loop its instructions, and how many are float32 multiply-adds.
        failure: First line of what the compiler said if it did not compile, else empty.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    instructions: dict[str, int] | None = None
    loops: list[tuple[int, int]] | None = None
    failure: str = ""

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches a regular expression from its start."""
        found = (self.instructions or {}).items()
        return sum(n for opcode, n in found if re.match(pattern, opcode))


def measure(kernel: Kernel, specialisation: Specialisation, target: str) -> Code:
    """Compiles one variant for ``sm_80``, ``gfx942``, ... and reads its code; cached."""
    path = _cache_file(kernel, specialisation, target)
    if path.is_file():
        return Code(**json.loads(path.read_text()))
    code = _measure(kernel, specialisation, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(code)))
    unfinished.replace(path)
    return code


def _cache_file(kernel: Kernel, specialisation: Specialisation, target: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parts = [kernel.function.cache_key, specialisation.variant, target, triton.__version__]
    name = hashlib.sha256(repr([_VERSION, *parts]).encode()).hexdigest()[:32]
    return base / "pdarts-fast" / "machine-code" / f"{name}.json"


def _measure(kernel: Kernel, specialisation: Specialisation, target: str) -> Code:
    try:
        compiled = _compile(kernel.function, specialisation, target)
    # Whatever a compiler pass raises is a finding to report, not a fault of the gate.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Code(failure=lines[0][:200])
    if target.startswith("gfx"):
        return _read_amd(compiled)
    return _read_nvidia(compiled)


def _compile(function: Any, specialisation: Specialisation, target: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    constants = dict(specialisation.constants)
    options: dict[str, Any] = {
        "num_warps": specialisation.num_warps,
        "num_stages": specialisation.num_stages,
    }
    if target.startswith("gfx"):
        place = GPUTarget("hip", target, 64)
        constants.update((name, "ieee") for name in constants if name == "PRECISION")
    else:
        place = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        options["maxnreg"] = specialisation.max_registers
    signature = {name: specialisation.signature.get(name, "constexpr") for name in names}
    missing = [n for n in names if n not in constants and n not in specialisation.signature]
    if missing:
        raise ValueError(f"the specialisation lacks the arguments {', '.join(missing)}")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in specialisation.divisible
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=place, options=options)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def innermost_loops(listing: str) -> list[tuple[int, int]]:
    """``Code.loops`` of what nvdisasm prints: a branch back to a label ends a loop."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    found: list[tuple[int, int]] = []
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(opcodes)
        instruction = _INSTRUCTION.match(line)
        if instruction:
            opcodes.append(instruction[1])
            back = _BACK.search(line)
            # A branch to itself pads the end of the code.
            if back and back[1] in labels and labels[back[1]] < len(opcodes) - 1:
                found.append((labels[back[1]], len(opcodes)))
    inner = [
        one for one in found
        if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in found)
    ]  # fmt: skip
    return [
        (end - begin, sum(opcode.startswith("FFMA") for opcode in opcodes[begin:end]))
        for begin, end in inner
    ]


def _read_nvidia(compiled: Any) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = _tool("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        return Code(failure="cuobjdump reports no resource usage")
    return Code(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        instructions=dict(Counter(_INSTRUCTION.findall(listing))),
        loops=innermost_loops(listing),
    )


def _read_amd(compiled: Any) -> Code:
    listing = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", listing)
        return int(found[1]) if found else 0

    opcodes = re.findall(r"^\t([a-z][a-z0-9_]+)", listing, re.M)
    return Code(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        instructions=dict(Counter(opcodes)),
    )


def _job(job: tuple[str, int, str]) -> Code:
    name, index, target = job
    kernel = kernels()[name]
    return measure(kernel, kernel.specialisations()[index], target)


def measure_all(
    wanted: list[tuple[Kernel, Specialisation]], targets: tuple[str, ...], processes: int = 2
) -> dict[tuple[str, str, str], Code]:
    """Compiles every distinct variant once, in several processes.

    Args:
        wanted: Kernels with one of their own specialisations each.

    Returns:
        By (kernel name, ``Specialisation.variant``, target).
    """
    jobs: dict[tuple[str, str, str], tuple[str, int, str]] = {}
    positions: dict[str, dict[str, int]] = {}
    for kernel, specialisation in wanted:
        if kernel.name not in positions:
            everything = kernel.specialisations()
            positions[kernel.name] = {s.variant: i for i, s in enumerate(everything)}
        index = positions[kernel.name][specialisation.variant]
        for target in filter(specialisation.is_for, targets):
            key = (kernel.name, specialisation.variant, target)
            jobs.setdefault(key, (kernel.name, index, target))
    # Children of a process that has used threads must not be forked from it.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(_job, jobs.values(), chunksize=4), strict=True))
