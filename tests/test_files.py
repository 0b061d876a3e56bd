"""Files are written whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fxopt._files import occupied, replacing, write_bytes, write_text
from fxopt.errors import ExportError, FxoptError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fail_halfway(path: Path, failure: BaseException) -> None:
    with replacing(path, ExportError) as scratch:
        scratch.write_text("half")
        raise failure


def test_it_writes_and_makes_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "text.txt", "größe\n")
    assert (tmp_path / "a" / "b" / "text.txt").read_bytes() == "größe\n".encode()
    write_bytes(str(tmp_path / "data.bin"), b"\x00\xff")
    assert (tmp_path / "data.bin").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a", "data.bin"]


def test_it_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("a longer text than the new one")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_the_scratch_file_lies_beside_and_has_the_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "model.onnx") as scratch:
        assert scratch.parent.parent == tmp_path
        assert scratch.parent.name.startswith(".model.onnx-")
        assert scratch.name == "model.onnx"
        assert not (tmp_path / "model.onnx").exists()
        scratch.write_bytes(b"graph")
    assert not scratch.exists()
    assert (tmp_path / "model.onnx").read_bytes() == b"graph"


_LEFT = ("file.txt-abcd.partial", "file.txt-efgh.partial", "other.txt-abcd.partial", "file.txt-cache")


def test_what_a_killed_writer_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Not what a living one is at, nor what has just been made and may not be locked yet, nor other names."""
    path = tmp_path / "file.txt"
    left, young, other, users = (tmp_path / f".{name}" for name in _LEFT)
    for folder in (left, young, other, users):
        folder.mkdir()
        (folder / "file.txt").write_text("half")
    with replacing(path) as scratch:
        for folder in (left, other, users, scratch.parent):
            os.utime(folder, (0, 0))
        write_text(path, "meanwhile")
        assert scratch.parent.is_dir()
        scratch.write_text("whole")
    assert path.read_text() == "whole"
    assert names(tmp_path) == [users.name, young.name, other.name, "file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error):
        fail_halfway(path, error())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_an_os_error_in_the_block_is_translated(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Cannot write .*file\.txt: No space left on device") as failure:
        fail_halfway(tmp_path / "file.txt", OSError(28, "No space left on device"))
    assert isinstance(failure.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error_of_the_given_type(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ExportError, match=r"Cannot write .*Choose a folder that is writable"):
        write_text(tmp_path / "file" / "inner.txt", "new", ExportError)
    with pytest.raises(FxoptError):
        write_text(tmp_path / "file" / "inner.txt", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FxoptError, match="Cannot write"):
        write_text(tmp_path / "taken", "new")
    assert names(tmp_path) == ["taken"]


def test_the_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file.txt", "new")
        assert os.umask(0o027) == 0o027, "the process's umask is left as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


_HOLDER = """
import os, sys, time
from pathlib import Path
from fxopt._files import occupied
with occupied(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_a_folder_is_free_again_when_its_run_ends_or_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "work"
    with occupied(folder), pytest.raises(FxoptError, match=r"work is in use by another run; wait"), occupied(folder):
        pass
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(FxoptError, match="in use"), occupied(folder):
            pass
        holder.kill()
    try:
        # Its worker, which nobody told to end, holds nothing.
        with occupied(folder):
            assert names(folder) == []
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(FxoptError, match=r"Cannot write .*work"), occupied(tmp_path / "work"):
        pass
