"""The command as a user in a folder of their own runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fxopt.cli import app

__all__ = ["run", "work_in"]


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> Path:
    """Make ``folder`` the working folder, with the user's modules in it: their code by name."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def run(*words: str) -> Result:
    """What the command does with these words, on a wide terminal without colours."""
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})
