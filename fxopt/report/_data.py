"""The report as data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fxopt._files import write_text
from fxopt.decisions._budget import within
from fxopt.errors import FxoptError
from fxopt.report._roofline import Roofline

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = [
    "BOUNDS",
    "Bound",
    "BudgetLine",
    "CandidateLine",
    "CurveLine",
    "EpochLine",
    "LayerLine",
    "Metrics",
    "OperatorLine",
    "PassLine",
    "Report",
    "SlowLine",
    "SupernetLine",
    "TargetLine",
    "TimeLine",
]

Bound: TypeAlias = Literal["compute", "memory", "launch", "layout", ""]
"""What an operator's time goes to; empty where it takes none, or the target has no model for it."""

BOUNDS: tuple[Bound, ...] = ("compute", "memory", "launch", "layout")


@dataclass(frozen=True)
class Metrics:
    """What a model is worth and what it costs, at the target's batch size.

    Attributes:
        accuracy: The score on the user's data (a fraction for classifiers), or None if there was none.
        macs: Multiply-accumulates.
        parameters: Number of parameters.
        size_bytes: Bytes of the stored weights.
        latency_s: Predicted latency on the target.
        energy_j: Predicted energy, or None where the target has no figures.
        memory_bytes: Peak bytes of live activations.
        measured_latency_s: Latency in onnxruntime on this machine, or None if not measured.
    """

    accuracy: float | None
    macs: float
    parameters: int
    size_bytes: float
    latency_s: float
    energy_j: float | None
    memory_bytes: float
    measured_latency_s: float | None = None


@dataclass(frozen=True)
class BudgetLine:
    """One budget and what came of it.

    Attributes:
        metric: "latency", "energy", "size", "macs" or "memory".
        asked: The budget in words.
        limit: The limit in the metric's SI unit; so for the next two.
        before: What the original costs.
        achieved: What the result costs.
    """

    metric: str
    asked: str
    limit: float
    before: float
    achieved: float

    @property
    def met(self) -> bool:
        """Whether the result is within the limit (up to the last bits of a float)."""
        return within(self.achieved, self.limit)


@dataclass(frozen=True)
class PassLine:
    """What one step did.

    Attributes:
        name: The step, such as "prune-channels" or "fine-tune".
        detail: What it did, in a few words.
        accuracy: The score after it, or None.
        metrics: Costs after it, or None.
    """

    name: str
    detail: str
    accuracy: float | None
    metrics: Metrics | None


@dataclass(frozen=True)
class LayerLine:
    """One layer, before and after.

    Attributes:
        site: Module path, or the node's name.
        kind: Operator kind, such as "conv".
        macs_before: Multiply-accumulates of the original layer.
        macs_after: Those of the result.
        channels_before: Output channels of the original layer or, where an operator was chosen for its block, of that
            operator before channels were cut.
        channels_after: Those of the result; 0 for a layer that is not in it.
        weight_bits: Bits of the result's weights; 32 is floating point.
        activation_bits: Bits of the result's input activations.
        latency_before_s: Predicted latency of the original layer.
        latency_after_s: That of the result.
        bound: What the time of the result's layer goes to.
        frozen_by: What keeps its channels from being cut, or "".
    """

    site: str
    kind: str
    macs_before: float
    macs_after: float
    channels_before: int
    channels_after: int
    weight_bits: int
    activation_bits: int
    latency_before_s: float
    latency_after_s: float
    bound: Bound = ""
    frozen_by: str = ""

    @property
    def gone(self) -> bool:
        """Whether the layer is not in the result."""
        return self.channels_after == 0


@dataclass(frozen=True)
class OperatorLine:
    """What was chosen for one block.

    Attributes:
        site: Module path of the block.
        before: What the original computes there.
        after: What the result computes there.
        choices: What was on offer.
    """

    site: str
    before: str
    after: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class EpochLine:
    """An epoch of the supernet that operators were selected by.

    Attributes:
        loss: Mean loss of the weights.
        architecture_loss: Mean loss of the architecture, without costs; None in the warm-up.
        entropy: How undecided the architecture is at the end, from 0 to 1.
        costs: What it costs in expectation then, in SI units, by budgeted metric.
    """

    loss: float
    architecture_loss: float | None
    entropy: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class SupernetLine:
    """How the search for operators went.

    Attributes:
        limits: What expected costs were to be kept within, in SI units, by budgeted metric.
        epochs: The epochs, those of the warm-up first.
    """

    limits: Mapping[str, float]
    epochs: tuple[EpochLine, ...]


@dataclass(frozen=True)
class TimeLine:
    """A part of the predicted latency.

    Attributes:
        part: What operators wait for ("compute", "memory", "launch", "layout"), or "every run" for what a run costs
            whatever its operators.
        before_s: Seconds of the original.
        after_s: Seconds of the result.
    """

    part: str
    before_s: float
    after_s: float


@dataclass(frozen=True)
class SlowLine:
    """One of the result's costliest operators, and why it takes so long.

    Attributes:
        site: Module path, or the node's name.
        kind: Operator kind, such as "conv".
        latency_s: Predicted latency.
        share: Its part of the whole.
        bound: What its time goes to.
        why: The figures that say so.
        frozen_by: What keeps its channels from being cut, or "".
        remedy: What would help.
    """

    site: str
    kind: str
    latency_s: float
    share: float
    bound: Bound
    why: str
    frozen_by: str
    remedy: str


@dataclass(frozen=True)
class CurveLine:
    """Another search of the same space, by its journal.

    Attributes:
        engine: The engine.
        seed: Its seed.
        curve: Best score after each trial; None while every trial had failed.
    """

    engine: str
    seed: int
    curve: tuple[float | None, ...]


@dataclass(frozen=True)
class CandidateLine:
    """A policy that was tried.

    Attributes:
        trial: Number of the trial, from 0.
        score: Its score.
        latency_s: Predicted latency.
        size_bytes: Bytes of the stored weights.
        macs: Multiply-accumulates.
        energy_j: Predicted energy, or None where the target has no figures.
        chosen: Whether the result was made of it.
    """

    trial: int
    score: float
    latency_s: float
    size_bytes: float
    macs: float
    energy_j: float | None
    chosen: bool = False


@dataclass(frozen=True)
class TargetLine:
    """The target and how far its figures can be trusted.

    Attributes:
        name: Short name.
        title: Device and runtime in words.
        status: "calibrated", "uncalibrated" or "measured".
        error: How far predictions are from measurements, or why that is not known.
        caveats: Why the figures of this very workload deserve less trust.
        batch: Samples of a run. All costs but sizes, and so the limits of all but sizes, are of one run.
    """

    name: str
    title: str
    status: str
    error: str
    caveats: tuple[str, ...]
    batch: int = 1

    @property
    def told(self) -> str:
        """The name, with the samples of a run where they are more than one."""
        return f"{self.name}, {self.batch} samples a run" if self.batch > 1 else self.name


@dataclass(frozen=True)
class Report:
    """Everything a reader wants to know of an optimization.

    Attributes:
        title: Model and target in words.
        target: The target.
        before: Metrics of the original model.
        after: Metrics of the result.
        budgets: Budgets asked and achieved.
        passes: What each step did, in order.
        layers: Layers with multiply-accumulates, in graph order.
        frozen: Channel groups that were left alone: (site, reason).
        barriers: Operators that fxopt does not know.
        uncosted: Operators without a cost model on the target, which every figure leaves out.
        engine: Name of the search engine, "none" if nothing was searched.
        trials: Number of trials.
        curve: Best score after each trial; None while every trial had failed.
        score_name: What judged the model: "accuracy", "evaluate" or "data-free: minus output error".
        notes: What a reader should know first, such as that no data was given.
        seed: Seed of everything random.
        versions: Versions of Python and packages.
        export: What was exported and how it was checked, or None.
        roofline: Layers under the roofs of the target, before and after, or None.
        operators: What was chosen for each block, where operators were chosen.
        times: What the predicted latency goes to.
        slow: The result's costliest operators, and why they take so long.
        curves: Other searches of the same space, as far as their journals lie beside that of this one.
        candidates: Every policy that was tried and scored, without repetitions.
        supernet: How the operators were searched for, where operators were chosen; None elsewhere.
    """

    title: str
    target: TargetLine
    before: Metrics
    after: Metrics
    budgets: tuple[BudgetLine, ...]
    passes: tuple[PassLine, ...]
    layers: tuple[LayerLine, ...]
    frozen: tuple[tuple[str, str], ...]
    barriers: tuple[str, ...]
    uncosted: tuple[str, ...]
    engine: str
    trials: int
    curve: tuple[float | None, ...]
    score_name: str
    notes: tuple[str, ...]
    seed: int
    versions: Mapping[str, str]
    export: Mapping[str, Any] | None
    roofline: Roofline | None = None
    operators: tuple[OperatorLine, ...] = ()
    times: tuple[TimeLine, ...] = ()
    slow: tuple[SlowLine, ...] = ()
    curves: tuple[CurveLine, ...] = ()
    candidates: tuple[CandidateLine, ...] = ()
    supernet: SupernetLine | None = None

    def __str__(self) -> str:
        """The report as plain text."""
        from fxopt.report._text import report_text

        return report_text(self)

    def __rich__(self) -> RenderableType:
        """What a terminal shows of the report."""
        from fxopt.report._text import view

        return view(self)

    @property
    def verdict(self) -> str:
        """What came of it, in one sentence."""
        from fxopt.report._summary import verdict

        return verdict(self)

    def table(self) -> Table:
        """Metrics before and after, for ``rich``."""
        from fxopt.report._text import metrics_table

        return metrics_table(self)

    def steps_table(self) -> Table:
        """Score and costs after each step, for ``rich``."""
        from fxopt.report._text import steps_table

        return steps_table(self)

    def slow_table(self, most: int = 5) -> Table:
        """The costliest operators of the result and what would help, for ``rich``.

        Args:
            most: How many of them.
        """
        from fxopt.report._text import slow_table

        return slow_table(self, most)

    def layer_table(self) -> Table:
        """Layers before and after, for ``rich``."""
        from fxopt.report._text import layer_table

        return layer_table(self)

    def to_json(self) -> str:
        """The report as JSON; :meth:`from_json` reads it."""
        from fxopt.report._json import to_json

        return to_json(self)

    def to_data(self) -> dict[str, Any]:
        """The report as plain data, as :meth:`to_json` writes it."""
        from fxopt.report._json import to_data

        return to_data(self)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            FxoptError: If the text is no report, or one of another schema version.
        """
        from fxopt.report._json import from_json

        return from_json(text)

    def to_html(self) -> str:
        """The report as one HTML page that needs nothing else."""
        from fxopt.report._html import to_html

        return to_html(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report, whole or not at all.

        Args:
            path: A file ending in ``.json`` or ``.html``.

        Returns:
            The path.

        Raises:
            FxoptError: If the suffix is another one, or the file cannot be written.
        """
        place = Path(path)
        writers = {".json": self.to_json, ".html": self.to_html}
        if place.suffix not in writers:
            raise FxoptError(f"A report is saved as .json or .html, not as {place.name!r}; change the suffix.")
        write_text(place, writers[place.suffix]())
        return place
