"""Saved programs of torch.export: a canonical graph to a ``.pt2`` file, and any such file as a program."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import fx
from torch.export import ExportedProgram

from fxopt._files import replacing
from fxopt.errors import TraceError
from fxopt.graph._export import export_program
from fxopt.graph._inputs import normalize
from fxopt.graph._quiet import quiet_loggers

__all__ = ["load_program", "save_program"]

_SUFFIX = ".pt2"


def load_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """Read an ExportedProgram that ``torch.export.save`` or :func:`save_program` wrote; :func:`trace` takes it.

    Args:
        path: The file.

    Raises:
        TraceError: If there is no such file, or torch cannot read it: it is damaged, or of another release.
    """
    file = Path(path)
    if not file.is_file():
        raise TraceError(f"There is no file {file}; give one that torch.export.save wrote.")
    try:
        with quiet_loggers():
            return torch.export.load(file)
    except Exception as failure:
        raise TraceError(
            f"Cannot read {file} as an exported program: {_first_line(failure)} It is damaged, or no file of "
            f"torch.export.save, or of another torch than {torch.__version__}; export the model again."
        ) from failure


def save_program(gm: fx.GraphModule, path: str | os.PathLike[str], example_inputs: object) -> Path:
    """Write a canonical graph as an ExportedProgram, weights and example inputs in it, batch dynamic where it is.

    Args:
        gm: A graph from :func:`trace`, in eval mode or not; the program is that of eval mode.
        path: The file, whose name ends in ``.pt2``.
        example_inputs: As for :func:`trace`.

    Returns:
        The file.

    Raises:
        TraceError: If the name ends otherwise, or torch.export refuses the graph.
        FxoptError: If the file cannot be written; what stood there is whole.
    """
    file = Path(path)
    if file.suffix != _SUFFIX:
        raise TraceError(f"A program is saved to a file that ends in {_SUFFIX}, got {file}.")
    program, _ = export_program(gm, normalize(example_inputs))
    with replacing(file) as scratch, quiet_loggers():
        torch.export.save(program, scratch)
    return file


def _first_line(failure: Exception) -> str:
    text = str(failure).strip().partition("\n")[0].rstrip(".")
    return f"{text or type(failure).__name__}."
