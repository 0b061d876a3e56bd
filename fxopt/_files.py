"""Writing files so that a reader never sees half of one, and what the files of a run are called."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxopt.errors import FxoptError

__all__ = ["JOURNAL", "MODEL", "PAGE", "REPORT", "path_of", "replacing", "write_bytes", "write_text"]

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


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], error: type[FxoptError] = FxoptError) -> Iterator[Path]:
    """Give a scratch path beside ``path``; rename it over ``path`` when the block ends well.

    The parent folder is created. On any failure the scratch file is removed and whatever stood under
    ``path`` before is untouched.

    Args:
        path: The final path.
        error: The error type that an operating system failure (read-only folder, full disk) is raised as.

    Yields:
        The scratch path, in the same folder and with the same suffix.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{final.stem}-", suffix=final.suffix, dir=final.parent)
        os.close(handle)
    except OSError as failure:
        raise error(_cannot_write(final, failure)) from failure
    scratch = Path(name)
    try:
        yield scratch
        _sync(scratch)
        scratch.chmod(0o666 & ~_umask())
        scratch.replace(final)
    except OSError as failure:
        raise error(_cannot_write(final, failure)) from failure
    finally:
        scratch.unlink(missing_ok=True)


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
