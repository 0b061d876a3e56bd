"""The demonstration: a real network on real data, from training to a proven ONNX file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

from fxopt._files import MODEL
from fxopt.api import OptimizationResult, optimize
from fxopt.data import digits
from fxopt.decisions import Capabilities, SearchSpace
from fxopt.errors import FxoptError
from fxopt.export import ExportReport
from fxopt.models import small_mobilenet_v2
from fxopt.passes import Quantize
from fxopt.passes.quantize import FLOAT
from fxopt.progress import Progress, reporter
from fxopt.training import fit

__all__ = ["DemoOutcome", "IntegersOnly", "run"]


@dataclass(frozen=True)
class IntegersOnly(Quantize):
    """:class:`Quantize` that leaves no layer in floating point for which the target has integers."""

    def search_space(self, graph_module: fx.GraphModule, capabilities: Capabilities | None = None) -> SearchSpace:
        """As for Quantize, without the choice of floating point."""
        able = capabilities if capabilities is not None else Capabilities({"*": ((8, 8),)})
        integers = {kind: tuple(pair for pair in pairs if pair != FLOAT) for kind, pairs in able.bits.items()}
        return super().search_space(graph_module, replace(able, bits=integers))


@dataclass(frozen=True)
class DemoOutcome:
    """What the demonstration made.

    Attributes:
        result: The optimization's result.
        export: What was written to ONNX and how it was checked.
        folder: Where ``model.onnx``, ``report.html`` and the saved result are.
    """

    result: OptimizationResult
    export: ExportReport
    folder: Path


def run(out: Path, *, quick: bool = False, seed: int = 0, progress: bool | Progress | None = True) -> DemoOutcome:
    """Train a small MobileNetV2 on scikit-learn's digits, optimize it for ``pixel1``, export and check it.

    Args:
        out: Folder for the results.
        quick: Train and search less: shows the way, not the accuracy.
        seed: Seed of everything random.
        progress: As for :func:`fxopt.optimize`.

    Returns:
        The outcome; half the MACs, all layers in 8 bits.

    Raises:
        FxoptError: If the folder cannot be written, before anything is trained; or scikit-learn is missing.
    """
    _check_writable(out)
    with _one_thread():
        return _run(out, _QUICK if quick else _FULL, seed, reporter(progress))


@dataclass(frozen=True)
class _Effort:
    epochs: int
    trials: int
    fine_tuning_epochs: int


_FULL = _Effort(epochs=10, trials=24, fine_tuning_epochs=12)
_QUICK = _Effort(epochs=2, trials=4, fine_tuning_epochs=1)
_WIDTH = 24


def _run(out: Path, effort: _Effort, seed: int, show: Progress) -> DemoOutcome:
    train, val = digits(seed=seed)
    model = small_mobilenet_v2(seed, width=_WIDTH)
    show.start("training", effort.epochs)
    fit(
        model,
        train,
        epochs=effort.epochs,
        learning_rate=0.05,
        seed=seed,
        progress=lambda epoch, _, loss: show.advance("training", 1, f"loss {loss:.3f}"),
    )
    show.finish("training")
    result = optimize(
        model,
        next(iter(val))[0][:2],
        target="pixel1",
        budget={"macs": "50%"},
        passes=("prune-channels", IntegersOnly()),
        trials=effort.trials,
        train=train,
        val=val,
        epochs=effort.fine_tuning_epochs,
        learning_rate=0.03,
        seed=seed,
        progress=show,
    )
    # Saved first: a refused export loses no result.
    result.save(out)
    export = result.export(out / MODEL, val=val, progress=show)
    result.save_report(out)
    return DemoOutcome(result, export, out)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The layers are so small that threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as failure:
        raise FxoptError(
            f"Cannot write to {folder}: {failure.strerror}. Choose another folder with --out."
        ) from failure
