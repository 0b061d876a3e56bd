"""Writing files so that a reader never sees half of one, and what the files of a run are called."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fxopt.errors import FxoptError

if sys.platform != "win32":
    import fcntl

__all__ = [
    "JOURNAL",
    "MODEL",
    "PAGE",
    "REPORT",
    "locked",
    "occupied",
    "path_of",
    "replacing",
    "write_bytes",
    "write_text",
]

JOURNAL, MODEL, PAGE, REPORT = "journal.jsonl", "model.onnx", "report.html", "report.json"
"""Files in the folder of a run: of its first search, what was exported, and its report for people and as data."""


def path_of(name: str, given: object) -> Path:
    """What an option gives as a path.

    Raises:
        FxoptError: If it is none.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise FxoptError(f"{name} is a {type(given).__name__}; give a path, or None.")
    return Path(given)


_HELD: dict[int, tuple[int, int]] = {}
"""Device and inode of what is locked, by descriptor; a descriptor may be closed meanwhile, or be another file's."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_SCRATCH = ".partial"
_OLD_S = 600.0
"""By then a writer has locked its scratch folder, or has ended where locks do not reach."""


def locked(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed or the process ends; whether that is done.

    Returns:
        False if another process holds it, None where the platform or the file system has no locks.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as failure:
        if failure.errno in _NO_LOCKS:
            return None
        raise
    _HELD[descriptor] = _identity(descriptor)
    return True


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _let_go() -> None:
    """Leave locks to the parent: a forked child shares them, and one that outlives it would keep them."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor, file in _HELD.items():
        with contextlib.suppress(OSError):
            if _identity(descriptor) == file:
                os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)
    _HELD.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def occupied(folder: Path, error: type[FxoptError] = FxoptError) -> Iterator[None]:
    """Keep a folder, which is made if need be, from other runs until the block ends or the process does, however.

    Raises:
        FxoptError: As ``error``, if another run has it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as failure:
        raise error(_cannot_write(folder, failure)) from failure
    with _open(folder) as held:
        free: bool | None = None
        if held is not None:
            with contextlib.suppress(OSError):  # Some file systems lock no folders.
                free = locked(held)
        if free is False:
            raise error(f"{folder} is in use by another run; wait for it, or give another folder.")
        yield


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], error: type[FxoptError] = FxoptError) -> Iterator[Path]:
    """Give a scratch path in a hidden folder beside ``path``; rename it over ``path`` when the block ends well.

    The parent folder is created. On any failure the scratch folder is removed and whatever stood under ``path`` before
    is untouched. Scratch folders of writers that were killed are removed by one that comes ten minutes later.

    Args:
        path: The final path.
        error: The error type that an operating system failure (read-only folder, full disk) is raised as.

    Yields:
        The scratch path, of the same name and on the same file system.
    """
    final = Path(path)
    prefix = f".{final.name}-"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(final.parent, prefix)
        folder = Path(tempfile.mkdtemp(_SCRATCH, prefix, final.parent))
    except OSError as failure:
        raise error(_cannot_write(final, failure)) from failure
    scratch = folder / final.name
    try:
        with _open(folder) as held:
            if held is not None:
                with contextlib.suppress(OSError):
                    locked(held)
            yield scratch
            _sync(scratch)
            scratch.chmod(0o666 & ~_umask())
            scratch.replace(final)
    except OSError as failure:
        raise error(_cannot_write(final, failure)) from failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left(parent: Path, prefix: str) -> None:
    """Remove scratch folders that no process holds: their writers were killed."""
    for entry in os.scandir(parent):
        own = entry.name.startswith(prefix) and entry.name.endswith(_SCRATCH)
        if not own or not entry.is_dir(follow_symlinks=False):
            continue
        # Another process may remove it meanwhile.
        with contextlib.suppress(OSError):
            left = Path(entry.path)
            if time.time() - left.stat().st_mtime > _OLD_S:
                with _open(left) as held:
                    if held is not None and locked(held):
                        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[int | None]:
    """A folder's descriptor; None where folders cannot be opened."""
    if sys.platform == "win32":
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str, error: type[FxoptError] = FxoptError) -> None:
    """Write ``text`` (UTF-8) to ``path`` whole or not at all."""
    write_bytes(path, text.encode(), error)


def write_bytes(path: str | os.PathLike[str], data: bytes, error: type[FxoptError] = FxoptError) -> None:
    """Write ``data`` to ``path`` whole or not at all."""
    with replacing(path, error) as scratch:
        scratch.write_bytes(data)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _cannot_write(path: Path, failure: OSError) -> str:
    reason = failure.strerror or str(failure)
    return f"Cannot write {path}: {reason}. Choose a folder that is writable and has space; nothing was changed."
