"""Unpickling that can build plain containers and numeric numpy arrays, and nothing else."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np


def loads(content: bytes) -> Any:
    """Unpickles ``content`` with every callable refused but those that rebuild a numpy array.

    Byte strings of Python 2, in which CIFAR was written, decode as Latin-1.

    Raises:
        pickle.UnpicklingError: the pickle is damaged or asks for anything else.
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    # A damaged pickle can make the machine raise nearly anything: a wrong opcode pops an empty
    # stack, a flipped size asks for terabytes. All of it means the same to the caller.
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no data file needs: it may be malicious"
            )
        return allowed


def _reconstruct(subtype: type, shape: tuple[int, ...], code: Any) -> np.ndarray:
    """The empty array that pickle protocols 0 to 4 fill afterwards."""
    if subtype is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("it holds an array of an unexpected kind")
    return np.ndarray.__new__(np.ndarray, shape, np.dtype("int8"))


def _from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """The array of pickle protocol 5; ``frombuffer`` refuses object dtypes."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes at protocols 0 to 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it holds bytes in encoding {encoding!r}")
    return text.encode("latin-1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}
