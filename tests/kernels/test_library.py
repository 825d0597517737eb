"""Finding, choosing and building the compiled library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pdarts_fast.kernels.cpu import compile as compiler
from pdarts_fast.kernels.cpu import library, load

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_missing_library_is_a_reason_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "candidates", lambda: iter([Path("/nonexistent/_kernels.so")]))
    monkeypatch.delenv(library.PATH_VARIABLE, raising=False)
    with pytest.raises(library.LibraryError, match=r"not built: install a C\+\+17 compiler"):
        library.load()


def test_a_broken_library_is_a_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    code = "from pdarts_fast.kernels.cpu import load; print(load.availability())"
    found = python(code, **{library.PATH_VARIABLE: str(broken)})
    assert "usable=False" in found.stdout
    assert "does not load" in found.stdout


def test_the_installed_copy_is_found_behind_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(library.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    wanted = tmp_path / "pdarts_fast" / "kernels" / "cpu" / library.FILE_NAME
    assert wanted in list(library.candidates())


def test_variants_are_listed_best_first(compiled: str) -> None:
    found = library.load()
    names = [name for name, _, _ in library.variants(found.handle)]
    assert names[-1] == "generic"
    assert found.variant in names
    assert load.status().startswith(found.variant)


def test_an_unknown_variant_is_refused(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIANT_VARIABLE, "avx9000")
    with pytest.raises(library.LibraryError, match="PDARTS_FAST_CPU_VARIANT=avx9000"):
        library.load()


def test_no_compiler_is_a_clear_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    with pytest.raises(RuntimeError, match="no C\\+\\+17 compiler"):
        compiler.build(tmp_path / "library.so")


@pytest.mark.parametrize("variant", ["generic", "avx2", "avx512", "avx512bf16"])
def test_another_variant_passes_the_cell_tests(compiled: str, variant: str) -> None:
    in_use = library.load()
    runs = {name for name, can_run, _ in library.variants(in_use.handle) if can_run}
    if variant == in_use.variant or variant not in runs:
        pytest.skip(f"{variant} is in use or does not run here")
    chosen = "float32 or amp_is"
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_cell.py", "-k", chosen],
        cwd=ROOT,
        env={**os.environ, library.VARIANT_VARIABLE: variant},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout[-2000:]


@pytest.mark.slow
def test_amx_passes_the_cell_tests(amx_library: Path) -> None:
    chosen = "amp and (close or repeatable or bfloat16)"
    files = ["tests/kernels/test_cell.py", "tests/kernels/test_stem.py"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files, "-k", chosen],
        cwd=ROOT,
        env={
            **os.environ,
            library.PATH_VARIABLE: str(amx_library),
            library.VARIANT_VARIABLE: "amx",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler: install g++")
@pytest.mark.parametrize("width", [16], ids=lambda width: f"width-{width}")
def test_the_wide_code_passes_the_cell_tests(tmp_path: Path, width: int) -> None:
    """The code of the 16-wide variant, compiled for AVX2, so that any processor can run it."""
    built = compiler.build(tmp_path / "wide.so", force_width=width, only=("avx2",))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_cell.py", "-k", "float32"],
        cwd=ROOT,
        env={
            **os.environ,
            library.PATH_VARIABLE: str(built),
            library.VARIANT_VARIABLE: "avx2",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler: install g++")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm: install binutils")
@pytest.mark.parametrize("source", compiler.PRIMITIVES)
def test_no_code_of_a_variant_is_shared_with_another(source: str, tmp_path: Path) -> None:
    """Of functions of one name the linker keeps one, compiled for any processor."""
    variant = next((v for v in compiler.variants() if v.name == "avx2"), None)
    if variant is None:
        pytest.skip("needs x86-64")
    names = [f"-DPDARTS_VARIANT={variant.name}", f"-DPDARTS_WIDTH={variant.width}"]
    target = tmp_path / "object.o"
    command = [*compiler.find_compiler(), *compiler.BASE, *variant.flags, *names]
    subprocess.run([*command, "-c", compiler.SOURCES / f"{source}.cpp", "-o", target], check=True)
    listed = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout
    merged = [line for line in listed.splitlines() if re.match(r"[0-9a-f]+ W ", line)]
    assert all(f"pdarts::{variant.name}::" in line for line in merged), merged
