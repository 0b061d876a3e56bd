"""The options of ``fxopt optimize``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """What to optimize and how; the fields are also the names in a recipe.

    Attributes:
        model: MODULE:FUNCTION of the model.
        input: Shapes of example inputs.
        target: Name of the target, or a TOML file.
        budget: Limits by metric.
        passes: Names of passes.
        shares: Parts of the way to the budgets by name of pass.
        engine: Name of the search engine.
        trials: Policies to try.
        epochs: Epochs of fine-tuning.
        train: MODULE:FUNCTION of the training loader.
        val: MODULE:FUNCTION of the validation loader.
        evaluate: MODULE:FUNCTION of a function from module to score.
        loss: MODULE:FUNCTION of a function from output and label to a loss.
        learning_rate: Highest learning rate of the fine-tuning.
        optimizer: Its optimizer.
        schedule: How its learning rate goes.
        patience: Epochs without a better score before it ends.
        distill: What it learns from the original model, such as ``logits=0.5,attention=1``.
        scales: What becomes of quantizers' scales in training: lsq, pact or fixed.
        final_epochs: Epochs of the last training in floats.
        trial_epochs: Epochs of fine-tuning in every trial.
        objective: What to search for, such as ``macs@0.97``.
        reconstruct: How weights behind cut channels are found anew.
        out: Folder for results.
        seed: Seed of everything random.
        parallel: Trials at a time.
        verify_on_host: Whether to measure before and after in onnxruntime on this machine.
    """

    model: str | None = None
    input: tuple[str, ...] = ()
    target: str = "host"
    budget: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    passes: tuple[str, ...] = ("prune-channels", "quantize")
    shares: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    engine: str = "evolution"
    trials: int = 48
    epochs: int = 2
    final_epochs: int | None = None
    train: str | None = None
    val: str | None = None
    evaluate: str | None = None
    loss: str | None = None
    learning_rate: float = 0.02
    optimizer: str | None = None
    schedule: str | None = None
    patience: int | None = None
    distill: str | None = None
    scales: str | None = None
    trial_epochs: int = 0
    objective: str | None = None
    reconstruct: str | None = None
    out: str = "fxopt-out"
    seed: int = 0
    parallel: int = 1
    verify_on_host: bool = True

    def changed(self, options: Mapping[str, Any]) -> Options:
        """These options with those replaced that are given, that is neither None nor empty."""
        given = {name: value for name, value in options.items() if value is not None and value not in ((), {})}
        return dataclasses.replace(self, **given)
