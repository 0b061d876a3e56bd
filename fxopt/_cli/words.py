"""The options that several commands share, and what a shell completes them with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Optional

import typer

__all__ = [
    "Budgets",
    "Distill",
    "Engine",
    "Engines",
    "Epochs",
    "Evaluate",
    "FinalEpochs",
    "Inputs",
    "Json",
    "LearningRate",
    "Loss",
    "MaybeModel",
    "MaybeTarget",
    "Model",
    "Objective",
    "Optimizer",
    "Out",
    "Parallel",
    "Passes",
    "Patience",
    "Quiet",
    "Recipe",
    "Reconstruct",
    "Scales",
    "Schedule",
    "Seed",
    "Shares",
    "Train",
    "TrialEpochs",
    "Trials",
    "Val",
    "VerifyOnHost",
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
Budgets = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--budget", help="metric=limit, such as latency=60%, size=2MB or macs=300M; may be repeated."),
]
Shares = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--share", help="pass=part of the way to the budgets, such as quantize=50%; may be repeated."),
]
Engine = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Search engine; by default evolution.", show_default=False, autocompletion=complete_engine),
]
Engines = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--engine",
        help="A search engine; may be repeated; by default all that are installed.",
        show_default=False,
        autocompletion=complete_engine,
    ),
]
Trials = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Policies to try, with each engine; by default 48.", show_default=False),
]
Epochs = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=0, help="Epochs of fine-tuning; by default 2.", show_default=False),
]
FinalEpochs = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=0, help="Epochs of the last training in floats; by default as --epochs.", show_default=False),
]
Loss = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="MODULE:FUNCTION", help="Takes output and label, gives a loss; by default cross entropy."),
]
LearningRate = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Highest learning rate of the fine-tuning; by default 0.02.", show_default=False),
]
Optimizer = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Optimizer of the fine-tuning: sgd, the default, or adamw.", show_default=False),
]
Schedule = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Its learning rate: cosine, the default, step, one-cycle or constant.", show_default=False),
]
Patience = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Epochs without a better score before it ends; by default never.", show_default=False),
]
Distill = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="What it learns from the original: none, or such as logits=0.5,features=1,attention=1."),
]
Scales = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Scales of quantizers in training: lsq, the default, pact or fixed.", show_default=False),
]
TrialEpochs = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=0, help="Epochs of fine-tuning in every trial; by default 0.", show_default=False),
]
Recipe = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="TOML file with the options of optimize; those given here come first.", show_default=False),
]
Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder for results and journals; by default fxopt-out.", show_default=False),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=0, help="Seed of everything random, or the first of them; by default 0.", show_default=False),
]
Parallel = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Trials at a time; by default 1.", show_default=False),
]
VerifyOnHost = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(help="Measure before and after in onnxruntime here; by default so.", show_default=False),
]
