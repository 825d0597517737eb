"""Files that are either whole or absent, and errors of the disk as one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdarts_fast.errors import RunError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space and run again (a run goes on with --resume)",
            errno.EDQUOT: "free some of your quota and run again (a run goes on with --resume)",
            errno.EROFS: "choose a folder that can be written to",
            errno.EACCES: "choose a folder that can be written to",
            errno.EPERM: "choose a folder that can be written to",
            errno.ENOTDIR: "choose a folder that can be written to",
            errno.EEXIST: "choose a folder that can be written to",
        }.get(error.errno or 0, "check the disk and run again (a run goes on with --resume)")
        raise RunError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old or the new one.

    Raises:
        RunError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system supports it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonLines:
    """A file of one JSON object a line that can be cut back to an earlier length."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            self._file = open(path, "ab")  # noqa: SIM115 (closed by close)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; NaN and infinity are written as null."""
        with disk_errors(self.path):
            self._file.write((json.dumps(_finite(record)) + "\n").encode())
            self._file.flush()

    def sync(self) -> int:
        """Force all records to the disk; return the length of the file in bytes."""
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.seek(0, os.SEEK_END)

    def truncate(self, length: int) -> None:
        """Drop everything after the first `length` bytes.

        Raises:
            RunError: The file is shorter than that: lines were lost after they were written.
        """
        with disk_errors(self.path):
            if self._file.seek(0, os.SEEK_END) < length:
                raise RunError(
                    f"{self.path} is shorter than its checkpoint says ({length} bytes): restore "
                    "the file, or start again with --overwrite"
                )
            self._file.truncate(length)

    def close(self) -> None:
        """Close the file."""
        with disk_errors(self.path):
            self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    return None if isinstance(value, float) else value
