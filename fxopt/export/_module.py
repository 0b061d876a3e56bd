"""An ONNX file as a module, so that what judges a model judges the file as well."""

from __future__ import annotations

import os
from collections import namedtuple
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.errors import ExportError
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
        self._outputs = namedtuple("Outputs", [one.name for one in self._session.get_outputs()], rename=True)  # type: ignore[misc]

    def forward(self, *inputs: Any, **named: torch.Tensor) -> Any:
        """Outputs for some inputs: a tensor, or a named tuple of several.

        Args:
            *inputs: Tensors in the file's order, or nested in what has them in that order; None stands for no input.
            **named: The file's other inputs, by name.

        Raises:
            ExportError: If these are not the file's inputs.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if leaf is not None]
        given = dict(zip(self._names, leaves, strict=False)) | named
        count = len(leaves) + len(named)
        if count != len(self._names) or set(given) != set(self._names):
            wanted = ", ".join(self._names)
            raise ExportError(f"The file has the inputs {wanted}; got {count}, which are not those one by one.")
        feed = {name: value.detach().cpu().numpy() for name, value in given.items()}
        found = [torch.from_numpy(value) for value in self._session.run(None, feed)]
        return found[0] if len(found) == 1 else self._outputs(*found)
