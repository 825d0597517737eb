"""What the tests of the drop-in share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def load_file(name: str, path: Path) -> ModuleType:
    """The module of a file, under a name, in ``sys.modules``."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """Cells of other people's programs."""
    return load_file("dropin_zoo", HERE / "zoo.py")


@pytest.fixture(scope="session")
def scripts() -> Path:
    """Folder of whole scripts."""
    return HERE / "scripts"


def load_model_search(folder: Path) -> ModuleType:
    """``model_search`` of a script's folder, with stock modules where the folder lacks them."""
    names = ("genotypes", "operations", "model_search")
    stock = Path(sys.modules["pdarts_fast"].__file__ or "").parent / "dropin"
    before = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            own = folder / f"{name}.py"
            module = load_file(name, own if own.is_file() else stock / f"{name}.py")
        return module
    finally:
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old


@pytest.fixture(scope="session")
def darts(scripts: Path) -> ModuleType:
    """``model_search`` in the style of DARTS."""
    import pdarts_fast  # noqa: F401

    return load_model_search(scripts / "second_order")


@pytest.fixture(scope="session")
def pdarts(scripts: Path) -> ModuleType:
    """``model_search`` in the style of P-DARTS."""
    import pdarts_fast  # noqa: F401

    return load_model_search(scripts / "first_order")


@pytest.fixture
def forget() -> Iterator[None]:
    """Forgets what was logged, so that a test sees every line."""
    from pdarts_fast.dropin import reporting

    reporting.said.clear()
    yield
    reporting.said.clear()


# Importable by the test files of this folder, which pytest does not put on the path.
load_file("dropin_checks", HERE / "checks.py")
