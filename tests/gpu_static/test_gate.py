"""The static gate over every Triton kernel, and what the gate itself objects to."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from pdarts_fast.kernels.triton import gate
from pdarts_fast.kernels.triton.machine_code import NVIDIA, Code
from pdarts_fast.kernels.triton.registry import Specialisation, kernels

ROOT = Path(__file__).parents[2]
GOOD = Code(90, 0, 8192, {"LDG.E.128": 9, "STG.E.128": 3, "LDG.E": 4, "HMMA.16816.F32": 8})
ONE = Specialisation(
    (96, 32, 32, 16), "bf16", {"x_ptr": "*bf16"}, {}, programs=1, bytes=1, product=True
)


@pytest.fixture(scope="module")
def results() -> list[gate.Measured]:
    """Every specialisation of every kernel, compiled for the three GPUs."""
    return gate.run(gate.chosen(), NVIDIA)


def test_every_kernel_passes(results: list[gate.Measured]) -> None:
    found = [(*gate.row(one)[:3], *gate.faults(one[1], one[2], one[3])) for one in results]
    assert [one for one in found if len(one) > 3] == []


def test_every_kernel_covers_every_stage(results: list[gate.Measured]) -> None:
    stages = {(96, 32, 32, 16), (96, 16, 16, 32), (96, 8, 8, 64)}
    covered: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for kernel, one, _, _ in results:
        if one.storage in ("fp32", "bf16"):
            covered.setdefault((kernel.name, one.storage), set()).add(one.shape)
    missing = {name: stages - shapes for name, shapes in covered.items() if stages - shapes}
    assert missing == {}
    assert {name for name, _ in covered} == set(kernels())


def test_the_table_is_that_of_the_kernels(results: list[gate.Measured]) -> None:
    with (ROOT / gate.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    kept = {(row["kernel"], row["variant"], row["target"]): row for row in rows}
    wanted = {(kernel.name, one.label, target) for kernel, one, target, _ in results}
    assert wanted <= kept.keys(), (
        f"run python -m pdarts_fast.kernels.triton.gate: {wanted - kept.keys()}"
    )
    if triton.__version__ != rows[0]["triton"]:
        pytest.skip(f"the table was made with triton {rows[0]['triton']}; numbers may differ")
    for measured in results:
        row = gate.row(measured)
        assert list(kept[row[0], row[1], row[2]].values())[: len(row)] == row


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (GOOD, None),
        (replace(GOOD, registers=129), "129 registers"),
        (replace(GOOD, stack=8), "8 bytes of stack"),
        (replace(GOOD, instructions={**(GOOD.instructions or {}), "STL": 1}), "of stack"),
        (replace(GOOD, shared=228 * 1024), "shared memory"),
        (replace(GOOD, instructions={**(GOOD.instructions or {}), "LDG.E.U16": 1}), "1 under 4"),
        (replace(GOOD, instructions={"LDG.E.64": 9, "HMMA.16816.F32": 1}), "0% of accesses"),
        (replace(GOOD, instructions={"LDG.E.128": 9}), "no tensor-core instruction"),
        (Code(failure="cannot lower"), "does not compile: cannot lower"),
    ],
    ids=["good", "registers", "stack", "spill", "shared", "narrow", "64-bit", "no-mma", "failure"],
)
def test_what_the_gate_objects_to(code: Code, complaint: str | None) -> None:
    found = gate.faults(ONE, "sm_90", code)
    assert found == [] if complaint is None else complaint in found[0]


@pytest.mark.parametrize("opcode", ["HMMA.1688.F32.TF32", "HGMMA.64x16x16", "UTCHMMA", "UTCQMMA"])
def test_tensor_cores_of_every_generation_count(opcode: str) -> None:
    assert Code(instructions={opcode: 3}).count(gate.TENSOR_CORE) == 3
