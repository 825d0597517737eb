"""Imports of the package: installed or editable, from the checkout's root or from elsewhere."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, pdarts_fast, pdarts_fast.kernels.backends as backends
from pdarts_fast.kernels.plan import STREAMS_PER_CELL
from importlib import resources
templates = resources.files("pdarts_fast.run") / "templates"
print(json.dumps([pdarts_fast.__file__, backends.__file__, (templates / "report.html").is_file()]))
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="no setup.py beside tests/: run from a checkout"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built offline from a copy of it, without a compiler."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building a wheel needs setuptools: pip install setuptools")
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building a wheel needs setuptools >= 77: pip install -U setuptools")
    if importlib.util.find_spec("pip") is None:
        pytest.skip("building a wheel needs pip: python -m ensurepip")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("pdarts_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # Compiling takes a minute and is tested with the kernels; without it a wheel is still whole.
    environment = {**os.environ, "CXX": str(folder / "no-compiler"), "PATH": str(folder)}
    subprocess.run([*build, "-w", str(folder), str(folder / "source")], check=True, env=environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's packages, as an installation does."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def imported(folder: Path, path: Path | None) -> tuple[Path, Path]:
    """Where the package and its kernels come from in a Python started in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    package, kernels, has_templates = json.loads(answer.stdout)
    assert has_templates
    return Path(package).resolve(), Path(kernels).resolve()


def test_installed_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    package, kernels = imported(tmp_path, installed)
    assert package == installed / "pdarts_fast" / "__init__.py"
    assert kernels == installed / "pdarts_fast" / "kernels" / "backends.py"


def test_installed_from_the_root_of_the_checkout(installed: Path) -> None:
    package, kernels = imported(ROOT, installed)
    # Python looks into the current folder first: the checkout has to be whole.
    assert package == ROOT / "pdarts_fast" / "__init__.py"
    assert kernels == ROOT / "kernels" / "backends.py"


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_editable(place: str, tmp_path: Path) -> None:
    try:
        origin = importlib.metadata.distribution("pdarts-fast").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        origin = None
    if not origin or not json.loads(origin).get("dir_info", {}).get("editable"):
        pytest.skip("pdarts-fast is not installed editable here: pip install -e .")
    package, kernels = imported(ROOT if place == "root" else tmp_path, None)
    assert package == ROOT / "pdarts_fast" / "__init__.py"
    assert kernels == ROOT / "kernels" / "backends.py"


def test_the_wheel_holds_all_modules_and_templates(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = (
        {str(path.relative_to(ROOT)) for path in (ROOT / "pdarts_fast").rglob("*.py")}
        | {f"pdarts_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
        | {
            str(path.relative_to(ROOT))
            for path in (ROOT / "pdarts_fast" / "run" / "templates").iterdir()
        }
    )
    assert wanted <= held, sorted(wanted - held)
    assert not [name for name in held if name.startswith(("tests", "kernels", "benchmarks"))]
