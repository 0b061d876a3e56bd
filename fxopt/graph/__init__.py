"""The canonical graph: trace, verify, edit, and what every operator means."""

from __future__ import annotations

from fxopt.graph import edit, ops
from fxopt.graph._inputs import ExampleInputs, as_args, normalize
from fxopt.graph._program import load_program, save_program
from fxopt.graph._trace import trace
from fxopt.graph.shapes import eval_mode, propagate, shape, values_at_batch
from fxopt.graph.verify import verify

__all__ = [
    "ExampleInputs",
    "as_args",
    "edit",
    "eval_mode",
    "load_program",
    "normalize",
    "ops",
    "propagate",
    "save_program",
    "shape",
    "trace",
    "values_at_batch",
    "verify",
]
