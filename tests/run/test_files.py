"""Files that are whole or absent, JSON lines, and errors of the disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from pdarts_fast.errors import RunError
from pdarts_fast.run.files import JsonLines, disk_errors, write_atomically, write_json


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["ENOSPC", "EROFS"])
def test_a_failed_write_keeps_the_old_file_and_no_rest(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, place, refuse)
    with pytest.raises(RunError, match=rf"cannot write {path}: {os.strerror(number)}; "):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_content_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    write_atomically(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_device_under_json_lines() -> None:
    log = JsonLines(Path("/dev/full"))
    with pytest.raises(RunError, match="cannot write /dev/full: No space left on device; free"):
        log.write({"a": 1})
    with pytest.raises(RunError, match="No space left"):
        log.close()


def test_json_is_readable_text(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, None]}
    assert (tmp_path / "x.json").read_text().endswith("}\n")


def test_lines_can_be_cut_back_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    log = JsonLines(path)
    log.write({"n": 1})
    length = log.sync()
    assert length == path.stat().st_size == 9
    log.write({"n": 2})
    log.truncate(length)
    log.write({"n": 3})
    log.close()
    log = JsonLines(path)
    log.write({"n": 4})
    log.close()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 3, 4]


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n"')
    log = JsonLines(path)
    log.truncate(9)
    log.write({"n": 2})
    log.close()
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'


def test_lost_lines_are_an_error(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "lines.jsonl")
    log.write({"n": 1})
    with pytest.raises(RunError, match=r"is shorter than its checkpoint says \(100 bytes\)"):
        log.truncate(100)
    log.close()


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "lines.jsonl")
    log.write({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}, "e": True})
    log.close()
    text = (tmp_path / "lines.jsonl").read_text()
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": True}
    assert "NaN" not in text


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EACCES, "choose a folder that can be written to"),
        (errno.ENOTDIR, "choose a folder that can be written to"),
        (errno.EIO, "check the disk"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_advice_fits_the_error(number: int, advice: str) -> None:
    with pytest.raises(RunError) as caught, disk_errors(Path("x")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"cannot write x: {os.strerror(number)}; {advice}")
    assert "\n" not in str(caught.value)


def test_other_errors_pass_through() -> None:
    with pytest.raises(KeyError), disk_errors(Path("x")):
        raise KeyError("x")
