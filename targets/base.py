"""Targets and their estimates."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from fxopt.decisions import Capabilities
from fxopt.errors import TargetError, UnknownNameError, UnsupportedError
from fxopt.targets._core import CostModel
from fxopt.targets.rows import Floats, Rows, Workload, compute_bits, macs, stored_bytes

__all__ = ["METRICS", "Estimate", "RowCosts", "Status", "Target", "TargetInfo"]

Status = Literal["calibrated", "uncalibrated", "measured"]

METRICS: Mapping[str, str] = {
    "latency": "latency_s",
    "energy": "energy_j",
    "size": "weight_bytes",
    "macs": "macs",
    "memory": "peak_activation_bytes",
}
"""Metrics that budgets are given in, and the attribute of :class:`Estimate` that holds each."""


@dataclass(frozen=True)
class TargetInfo:
    """What a target says of itself.

    Attributes:
        name: The name that :func:`fxopt.targets.load` knows it by, or that its file gives it.
        title: The device and runtime in words.
        family: The family of cost models.
        fuses: Whether the runtime merges rows marked ``fused`` into their producer.
        status: "calibrated" (fitted to measurements of this device), "uncalibrated" or "measured" (on this device).
        error: How far estimates are from measurements, against which points; or why that is not known.
        calibrated_bits: Operand widths that the status holds for; others are uncalibrated.
        capabilities: What the target can run.
        energy_reason: Why there is no energy, or "" if there is.
        sources: Where the figures come from, by the key that a preset refers to them with.
    """

    name: str
    title: str
    family: str
    fuses: bool
    status: Status
    error: str
    calibrated_bits: tuple[int, ...]
    capabilities: Capabilities
    energy_reason: str
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowCosts:
    """Costs by operator, each of shape (policies, rows).

    Attributes:
        latency_s: Seconds.
        energy_j: Joules, or None where the target has no energy figures.
        dram_bytes: Bytes moved to and from memory.
        weight_bytes: Bytes of the parameters that the operator adds to the model's.
        activation_bytes: Bytes of all activations alive while it runs.
        macs: Multiply-accumulates.
    """

    latency_s: Floats
    energy_j: Floats | None
    dram_bytes: Floats
    weight_bytes: Floats
    activation_bytes: Floats
    macs: Floats


@dataclass(frozen=True)
class Estimate:
    """Costs of a workload, each of shape (policies,).

    Attributes:
        target: Name of the target.
        latency_s: Seconds for one run at the workload's batch size.
        energy_j: Joules for one run, or None; ``energy_reason`` then says why.
        weight_bytes: Bytes of all parameters as stored.
        peak_activation_bytes: Most bytes of activations alive at one time.
        macs: Multiply-accumulates.
        uncosted: Names of the rows that the target has no model for: they are in no latency or energy above.
        uncosted_macs_share: Their largest share of a policy's MACs.
        energy_reason: Why there is no energy, or "".
    """

    target: str
    latency_s: Floats
    energy_j: Floats | None
    weight_bytes: Floats
    peak_activation_bytes: Floats
    macs: Floats
    uncosted: tuple[str, ...]
    uncosted_macs_share: float
    energy_reason: str
    _per_row: Callable[[], RowCosts] = field(repr=False, compare=False)

    @cached_property
    def rows(self) -> RowCosts:
        """Costs by operator, computed from the workload's rows on first use."""
        return self._per_row()

    @property
    def dram_bytes(self) -> Floats:
        """Bytes moved to and from memory in one run, shape (policies,)."""
        total: Floats = self.rows.dram_bytes.sum(axis=1)
        return total

    def metric(self, name: str) -> Floats:
        """The costs under the name that budgets use: latency, energy, size, macs or memory.

        Raises:
            UnknownNameError: If there is no such metric.
            UnsupportedError: If the target has no figures for it; the message gives the reason.
        """
        if name not in METRICS:
            raise UnknownNameError("metric", name, METRICS)
        value: Floats | None = getattr(self, METRICS[name])
        if value is None:
            raise UnsupportedError(f"Target {self.target!r} cannot estimate {name}: {self.energy_reason}")
        return value


class Target(abc.ABC):
    """A piece of hardware with a runtime on it, as far as its costs go.

    A target is loaded; :meth:`prepare` is called once with the workload of interest, where measured targets measure
    what they still miss and others do nothing; then :meth:`estimate` is called as often as a search likes.
    Subclasses provide :attr:`info` and :attr:`model`.
    """

    @property
    @abc.abstractmethod
    def info(self) -> TargetInfo:
        """What the target says of itself."""

    @property
    @abc.abstractmethod
    def model(self) -> CostModel:
        """The compiled cost model.

        Raises:
            TargetError: If a measured target has nothing measured and no means to.
        """

    @property
    def name(self) -> str:
        """Short name."""
        return self.info.name

    @property
    def title(self) -> str:
        """The device and runtime in words."""
        return self.info.title

    @property
    def capabilities(self) -> Capabilities:
        """What the target can run."""
        return self.info.capabilities

    @property
    def status(self) -> Status:
        """Whether the figures are calibrated, uncalibrated or measured."""
        return self.info.status

    @property
    def error(self) -> str:
        """How far estimates are from measurements, and against which."""
        return self.info.error

    @property
    def provenance(self) -> str:
        """Status, error and sources, in words."""
        lines = [f"{self.title}: {self.status}. {self.error}"]
        lines += [f"{key}: {text}" for key, text in self.info.sources.items()]
        return "\n".join(lines)

    def prepare(self, workload: Workload) -> None:  # noqa: B027 (most targets have nothing to prepare)
        """Measure what ``workload`` needs and the target does not know yet; most targets know all they ever will."""

    def caveats(self, workload: Workload) -> tuple[str, ...]:
        """Why estimates of ``workload`` deserve less trust than :attr:`status` says; empty if they do not."""
        widths = compute_bits(workload.rows)[macs(workload.rows) > 0.0]
        foreign = sorted({int(bits) for bits in np.unique(widths)} - set(self.info.calibrated_bits))
        if self.status == "uncalibrated" or not foreign:
            return ()
        share = float(np.isin(widths, foreign).mean())
        known = ", ".join(map(str, self.info.calibrated_bits))
        return (
            f"{share:.0%} of the operators with MACs run at {', '.join(map(str, foreign))} bits, for which "
            f"{self.name} is uncalibrated (it is {self.status} at {known} bits).",
        )

    def estimate(self, workload: Workload, *, threads: int = 1) -> Estimate:
        """Cost every policy of ``workload``.

        Args:
            workload: One policy or many.
            threads: Threads that share the policies; the result does not depend on it, nor on which policies are
                estimated together.

        Raises:
            TargetError: If ``threads`` is below 1, the target has to be measured first, or its figures overflow.
        """
        if threads < 1:
            raise TargetError(f"threads has to be at least 1, got {threads}.")
        model = self.model
        totals = np.empty((5, workload.policies), np.float64)
        flags = np.zeros((threads, len(workload)), np.uint8)
        _total(model, workload.rows, totals, flags, threads)
        if not np.isfinite(totals[0]).all() or (model.has_energy and not np.isfinite(totals[1]).all()):
            raise TargetError(f"Target {self.name!r} gives a cost that is not finite; check its figures.")
        uncosted = np.flatnonzero(flags.any(axis=0))
        return Estimate(
            target=self.name,
            latency_s=totals[0],
            energy_j=totals[1] if model.has_energy else None,
            weight_bytes=totals[2],
            peak_activation_bytes=totals[3],
            macs=totals[4],
            uncosted=tuple(workload.names[i] for i in uncosted),
            uncosted_macs_share=_macs_share(workload.rows[:, uncosted], totals[4]) if uncosted.size else 0.0,
            energy_reason=self.info.energy_reason,
            _per_row=lambda: _per_row(model, workload.rows),
        )


def _total(
    model: CostModel, rows: Rows, totals: Floats, flags: np.ndarray[tuple[int, int], np.dtype[np.uint8]], threads: int
) -> None:
    """Fill ``totals`` (5, policies) and a line of ``flags`` for each thread, each thread its own block of policies."""
    if threads == 1:
        model.totals(rows, totals[0], totals[1], totals[2], totals[3], totals[4], flags[0])
        return
    edges = np.linspace(0, len(rows), threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        blocks = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        jobs = [
            pool.submit(_total, model, rows[block], totals[:, block], flags[i : i + 1], 1)
            for i, block in enumerate(blocks)
        ]
        for job in jobs:
            job.result()


def _macs_share(rows: Rows, whole: Floats) -> float:
    part = macs(rows).sum(axis=1)
    return float(np.max(np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0.0)))


def _per_row(model: CostModel, rows: Rows) -> RowCosts:
    latency_s = np.empty(rows.shape, np.float64)
    energy_j = np.empty(rows.shape, np.float64)
    dram_bytes = np.empty(rows.shape, np.float64)
    model.per_row(rows, latency_s, energy_j, dram_bytes)
    energy = energy_j if model.has_energy else None
    alive: Floats = rows["live_bytes"]
    return RowCosts(latency_s, energy, dram_bytes, stored_bytes(rows), alive, macs(rows))
