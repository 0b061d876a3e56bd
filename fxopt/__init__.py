"""fxopt optimizes PyTorch models for the hardware they will run on.

The public names are imported lazily: ``import fxopt`` loads neither torch nor onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxopt._named import lazily

if TYPE_CHECKING:
    from fxopt.api import OptimizationResult as OptimizationResult
    from fxopt.api import load as load
    from fxopt.api import optimize as optimize
    from fxopt.decisions import Budget as Budget
    from fxopt.decisions import Decision as Decision
    from fxopt.decisions import Policy as Policy
    from fxopt.decisions import SearchSpace as SearchSpace
    from fxopt.errors import FxoptError as FxoptError
    from fxopt.export import ExportReport as ExportReport
    from fxopt.export import export_onnx as export_onnx
    from fxopt.export import measure as measure
    from fxopt.graph import trace as trace
    from fxopt.lowering import lower as lower

__version__ = "0.1.0"

_LAZY = {
    "Budget": "fxopt.decisions",
    "Decision": "fxopt.decisions",
    "ExportReport": "fxopt.export",
    "FxoptError": "fxopt.errors",
    "OptimizationResult": "fxopt.api",
    "Policy": "fxopt.decisions",
    "SearchSpace": "fxopt.decisions",
    "export_onnx": "fxopt.export",
    "load": "fxopt.api",
    "lower": "fxopt.lowering",
    "measure": "fxopt.export",
    "optimize": "fxopt.api",
    "trace": "fxopt.graph",
}

__all__ = ["__version__", *_LAZY]

__getattr__, __dir__ = lazily(__name__, _LAZY, __all__)
