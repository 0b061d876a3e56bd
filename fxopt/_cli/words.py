"""The options that several commands share, and what a shell completes them with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Optional

import typer

__all__ = [
    "Evaluate",
    "Inputs",
    "Json",
    "MaybeModel",
    "MaybeTarget",
    "Model",
    "Objective",
    "Passes",
    "Quiet",
    "Reconstruct",
    "Train",
    "Val",
    "complete_engine",
    "complete_pass",
    "complete_target",
]

_MODEL = (
    "package.module:function or path/file.py:function, which returns a model or (model, example_inputs); "
    "or a file.pt2 of torch.export.save."
)


def _starting(names: Iterable[str], typed: str) -> list[str]:
    return [name for name in names if name.startswith(typed)]


def complete_target(incomplete: str) -> list[str]:
    """Names of targets that begin so."""
    from fxopt import targets

    return _starting(targets.names(), incomplete)


def complete_engine(incomplete: str) -> list[str]:
    """Names of search engines that begin so."""
    from fxopt.search import engines

    return _starting(engines.names(), incomplete)


def complete_pass(incomplete: str) -> list[str]:
    """Lists of passes, separated by commas, that begin so."""
    from fxopt import passes

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _starting(passes.names(), last)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result and errors, and nothing else.")]
Inputs = Annotated[
    Optional[list[str]],  # noqa: UP045 (read at run time, by typer)
    typer.Option("--input", help="Shape of an example input, such as 1,3,224,224 or 1,128:int64; once per input."),
]
Model = Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help=_MODEL)]
MaybeModel = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(metavar="MODULE:FUNCTION", help=_MODEL, show_default=False),
]
MaybeTarget = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Name of a target or a TOML file; by default host, this machine.",
        show_default=False,
        autocompletion=complete_target,
    ),
]
Passes = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Passes, separated by commas; by default prune-channels,quantize.",
        show_default=False,
        autocompletion=complete_pass,
    ),
]
Train = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="MODULE:FUNCTION", help="Returns the loader to fine-tune and calibrate on."),
]
Val = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="MODULE:FUNCTION", help="Returns the loader of (input, label) to judge by."),
]
Evaluate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="MODULE:FUNCTION", help="Takes a module, gives a score; in place of --val."),
]
Objective = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="score, the default, or METRIC@SCORE: macs@0.97 for the smallest MACs at a score of 0.97."),
]
Reconstruct = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Weights behind cut channels: sequential (the default), moments, which is quicker, or none."),
]
