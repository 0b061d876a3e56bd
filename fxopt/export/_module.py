"""An ONNX file as a module, so that what judges a model judges the file as well."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from fxopt.export._runtime import make_session

__all__ = ["OnnxModule"]


class OnnxModule(nn.Module):
    """Runs an ONNX file in onnxruntime on the CPU.

    Args:
        path: The file.
        threads: Threads inside an operator.

    Raises:
        ExportError: If onnxruntime cannot load the file.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        super().__init__()
        self._session = make_session(path, threads=threads)
        self._names = [one.name for one in self._session.get_inputs()]

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Outputs for some inputs in the file's order: a tensor, or a tuple of several."""
        feed = {name: value.numpy() for name, value in zip(self._names, inputs, strict=True)}
        found = tuple(torch.from_numpy(value) for value in self._session.run(None, feed))
        return found[0] if len(found) == 1 else found
