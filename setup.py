"""Maps ``kernels/`` to the package ``pdarts_fast.kernels`` and compiles its C++ part.

``pyproject.toml`` holds everything else: setuptools takes a mapped package folder and a build
step of one's own only from here. Compiling needs neither torch nor Python headers. Without a
compiler the installation succeeds and the search runs on the ``reference`` backend.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

LIBRARY = "pdarts_fast.kernels.cpu._kernels"
CPU = Path("kernels") / "cpu"


def _compile_module() -> ModuleType:
    """``kernels/cpu/compile.py``, loaded by its path: the package cannot be imported yet."""
    spec = importlib.util.spec_from_file_location("pdarts_compile", CPU / "compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Builds the kernels as a plain shared library; a failure is reported, not raised."""

    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            _compile_module().build(output)
        except RuntimeError as error:
            self.warn(f"the C++ kernels are not built, searches will use plain torch: {error}")


subpackages = find_packages("kernels")
setup(
    packages=[
        *find_packages(include=["pdarts_fast", "pdarts_fast.*"]),
        "pdarts_fast.kernels",
        *(f"pdarts_fast.kernels.{name}" for name in subpackages),
    ],
    package_dir={"pdarts_fast.kernels": "kernels"},
    ext_modules=[
        Extension(
            LIBRARY,
            sources=sorted(str(path) for path in (CPU / "csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in (CPU / "csrc").glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
