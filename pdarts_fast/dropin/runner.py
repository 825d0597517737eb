"""Runs an existing script with the stock modules at hand and its networks accelerated."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import site
import sys
import sysconfig
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdarts_fast.dropin import cuda_on_cpu, repairs
from pdarts_fast.dropin.acceleration import accelerate_quietly
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.kernels import backends

logger = logging.getLogger(__name__)

STOCK_MODULES = ("model_search", "operations", "genotypes", "model", "utils")


def _library_folders() -> tuple[str, ...]:
    """Folders of Python itself and of installed packages."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple({os.path.realpath(path) for path in paths if path})


_LIBRARIES = _library_folders()
_OURS = str(Path(__file__).resolve().parent.parent)


def _in_library(path: str) -> bool:
    real = os.path.realpath(path)
    return any(real == folder or real.startswith(folder + os.sep) for folder in _LIBRARIES)


def _is_users(path: str | None) -> bool:
    """Whether a file is the script's: neither a library's nor this package's."""
    if not path or not path.endswith(".py"):
        return False
    return not _in_library(path) and not os.path.realpath(path).startswith(_OURS + os.sep)


class _RepairingLoader(importlib.machinery.SourceFileLoader):
    """Loads a module of the script from its repaired source."""

    def get_code(self, fullname: str) -> types.CodeType:
        return _compile(Path(self.get_filename(fullname)))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the script's modules, and the stock ones that its folders lack."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        folders = list(path) if path is not None else list(sys.path)
        own = [folder for folder in folders if not _in_library(folder or os.getcwd())]
        spec = importlib.machinery.PathFinder.find_spec(fullname, own)
        if spec is not None:
            if _is_users(spec.origin):
                assert spec.origin is not None
                spec.loader = _RepairingLoader(fullname, spec.origin)
            return spec
        if fullname in STOCK_MODULES:
            stock = importlib.util.find_spec(f"pdarts_fast.dropin.{fullname}")
            assert stock is not None
            assert stock.origin is not None
            logger.info("the script's folder has no %s.py: this package's is used", fullname)
            return importlib.util.spec_from_file_location(fullname, stock.origin)
        return None


def _compile(path: Path) -> types.CodeType:
    try:
        source = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    tree, notes = repairs.repair(source, str(path))
    for line, what in notes:
        logger.info("%s:%d: repaired %s", path.name, line, what)
    return compile(tree, str(path), "exec", dont_inherit=True)


class _Builds:
    """Accelerates networks when the outermost constructor of the script's classes returns."""

    def __init__(self, backend: str, amp: bool) -> None:
        self._backend, self._amp = backend, amp
        self._depth = threading.local()

    def watch(self) -> None:
        """Wraps the constructor of every module class that is defined from now on."""
        builds = self

        def __init_subclass__(cls: type, **kwargs: Any) -> None:
            super(nn.Module, cls).__init_subclass__(**kwargs)  # type: ignore[misc]
            if "__init__" in vars(cls) and builds._concerns(cls):
                cls.__init__ = builds._wrap(cls.__init__)  # type: ignore[misc]

        nn.Module.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]

    def _concerns(self, cls: type) -> bool:
        if cls.__module__ in STOCK_MODULES:
            return True
        module = sys.modules.get(cls.__module__)
        return _is_users(getattr(module, "__file__", None))

    def _wrap(self, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def wrapped(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            depth = getattr(self._depth, "value", 0)
            self._depth.value = depth + 1
            try:
                init(module, *args, **kwargs)
            finally:
                self._depth.value = depth
            if depth == 0:
                accelerate_quietly(module, self._backend, self._amp)

        return wrapped


def _prepare_logging() -> None:
    """Our messages go to stderr; the root logger is the script's to configure."""
    root, ours = logging.getLogger(), logging.getLogger("pdarts_fast")
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("pdarts-fast: %(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _say_device(cpu: bool) -> None:
    if cpu:
        cuda_on_cpu.pretend()
        logger.warning("--cpu: everything that the script puts on CUDA stays on the CPU")
    elif not torch.cuda.is_available():
        logger.info("this machine has no CUDA device; --cpu lets scripts that ask for one run")


def run_script(
    script: Path, arguments: Sequence[str], *, backend: str, amp: bool, cpu: bool
) -> int:
    """Runs a script as ``__main__``; changes this process for good.

    Args:
        script: The Python file.
        arguments: Its command line.
        backend: What runs the cells: ``auto`` or a name of ``kernels.backends``.
        amp: Run networks under autocast to bfloat16.
        cpu: Run on the CPU what the script puts on CUDA.

    Returns:
        0, or 1 if the script ended with an exception, whose traceback is printed.

    Raises:
        UsageError: There is no such script.
        RunError: It cannot be read.
    """
    if not script.is_file():
        raise UsageError(f"{script}: no such script")
    backends.check(backend)
    _prepare_logging()
    _say_device(cpu)
    path = script.resolve()
    sys.path[:] = [str(path.parent), *(p for p in sys.path if p != str(path.parent))]
    sys.argv = [str(script), *arguments]
    for name in STOCK_MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder), _Finder())
    _Builds(backend, amp).watch()
    code = _compile(path)
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    try:
        exec(code, vars(main))
    except Exception as error:  # the script's own, to be shown as Python shows it
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, frames)
        return 1
    return 0
