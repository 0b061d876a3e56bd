"""Targets and their estimates."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fxopt.decisions import Capabilities
from fxopt.errors import TargetError, UnknownNameError, UnsupportedError
from fxopt.targets._core import CostModel
from fxopt.targets.rows import ROW_DTYPE, ColumnWorkload, Floats, Rows, Workload, compute_bits, macs

__all__ = ["METRICS", "Estimate", "RowCosts", "Status", "Target", "TargetInfo", "join_estimates"]

Status = Literal["calibrated", "uncalibrated", "measured"]

_FIELDS: Mapping[str, Any] = ROW_DTYPE.fields or {}
_OFFSETS = {name: int(field[1]) for name, field in _FIELDS.items()}

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
        ranks_only_bits: Operand widths at which estimates put networks in the order of measurements, but are too far
            from them to be taken as times.
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
    ranks_only_bits: tuple[int, ...] = ()


@dataclass(frozen=True)
class RowCosts:
    """Costs by operator, each of shape (policies, rows).

    Attributes:
        latency_s: Seconds, without what a run takes whatever its operators (the model's ``fixed_s``).
        energy_j: Joules, or None where the target has no energy figures.
        dram_bytes: Bytes moved to and from memory.
        weight_bytes: Bytes of the parameters that the operator adds to the model's.
        activation_bytes: Bytes of all activations held while it runs.
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
        peak_activation_bytes: Most bytes of activations held at one time.
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

    def without_rows(self) -> Estimate:
        """The totals alone, which take little memory: for costs by operator an estimate holds on to its workload."""
        return replace(self, _per_row=_no_rows)

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
        if self.status == "uncalibrated":
            return ()
        present = set(widths.tolist()) - set(self.info.calibrated_bits)
        ranked = present & set(self.info.ranks_only_bits)
        known = ", ".join(map(str, self.info.calibrated_bits))
        reasons = (
            (present - ranked, f"for which {self.name} is uncalibrated (it is {self.status} at {known} bits)."),
            (ranked, f"at which {self.name} only ranks networks (it is {self.status} at {known} bits)."),
        )
        return tuple(
            f"{np.isin(widths, list(bits)).mean():.0%} of the operators with MACs run at "
            f"{', '.join(map(str, sorted(bits)))} bits, {reason}"
            for bits, reason in reasons
            if bits
        )

    def estimate(self, workload: Workload | ColumnWorkload, *, threads: int = 1) -> Estimate:
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
        totals = np.zeros((5, workload.policies), np.float64)
        flags = np.zeros((threads, len(workload)), np.uint8)
        _total(model, workload, totals, flags)
        if not np.isfinite(totals[0]).all() or (model.has_energy and not np.isfinite(totals[1]).all()):
            raise TargetError(f"Target {self.name!r} gives a cost that is not finite; check its figures.")
        uncosted = np.flatnonzero(flags.any(axis=0))
        share = _uncosted_share(workload, uncosted, totals[4])
        return Estimate(
            target=self.name,
            latency_s=totals[0],
            energy_j=totals[1] if model.has_energy else None,
            weight_bytes=totals[2],
            peak_activation_bytes=totals[3],
            macs=totals[4],
            uncosted=tuple(workload.names[i] for i in uncosted),
            uncosted_macs_share=share,
            energy_reason=self.info.energy_reason,
            _per_row=lambda: _per_row(model, _expanded(workload)),
        )


def _no_rows() -> RowCosts:
    raise TargetError("Costs by operator are not kept for policies that were streamed; estimate one of them alone.")


def join_estimates(parts: Sequence[Estimate]) -> Estimate:
    """The estimates of one target as one, policies in order; costs by operator are those of none."""

    def joined(name: str) -> Floats:
        whole: Floats = np.concatenate([getattr(part, name) for part in parts])
        return whole

    first = parts[0]
    return Estimate(
        target=first.target,
        latency_s=joined("latency_s"),
        energy_j=None if first.energy_j is None else joined("energy_j"),
        weight_bytes=joined("weight_bytes"),
        peak_activation_bytes=joined("peak_activation_bytes"),
        macs=joined("macs"),
        uncosted=tuple(dict.fromkeys(name for part in parts for name in part.uncosted)),
        uncosted_macs_share=max(part.uncosted_macs_share for part in parts),
        energy_reason=first.energy_reason,
        _per_row=first._per_row if len(parts) == 1 else _no_rows,
    )


def _total(
    model: CostModel,
    workload: Workload | ColumnWorkload,
    totals: Floats,
    flags: np.ndarray[tuple[int, int], np.dtype[np.uint8]],
) -> None:
    """Add to ``totals`` (5, policies) and mark a line of ``flags`` for each thread, each its own block of policies."""
    count = totals.shape[1]
    edges = np.linspace(0, count, len(flags) + 1).astype(int).tolist()
    blocks = [(slice(*edge), flags[i]) for i, edge in enumerate(itertools.pairwise(edges)) if edge[0] < edge[1]]
    if len(blocks) == 1:
        _total_block(model, workload, totals, *blocks[0])
        return
    with ThreadPoolExecutor(len(blocks)) as pool:
        for job in [pool.submit(_total_block, model, workload, totals, *block) for block in blocks]:
            job.result()


def _total_block(
    model: CostModel,
    workload: Workload | ColumnWorkload,
    totals: Floats,
    block: slice,
    flags: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> None:
    latency_s, energy_j, stored, peak, work = totals[:, block]
    columns = workload.columns if isinstance(workload, Workload) else workload
    if columns is not None:
        values = columns.template, columns.columns, _OFFSETS, block.start
        model.column_totals(*values, latency_s, energy_j, stored, peak, work, flags)
    elif isinstance(workload, Workload):
        model.totals(workload.rows[block], latency_s, energy_j, stored, peak, work, flags)


def _expanded(workload: Workload | ColumnWorkload) -> Rows:
    return workload.rows if isinstance(workload, Workload) else workload.expand().rows


def _uncosted_share(workload: Workload | ColumnWorkload, uncosted: np.ndarray[Any, Any], whole: Floats) -> float:
    """The largest share of a policy's MACs that rows without a model have."""
    if not uncosted.size:
        return 0.0
    columns = workload.columns if isinstance(workload, Workload) else workload
    if columns is not None:
        uncosted = np.array([index for index in uncosted.tolist() if columns.may_have_macs(index)], dtype=np.intp)
    if not uncosted.size:
        return 0.0
    part = macs(_expanded(workload)[:, uncosted]).sum(axis=1)
    return float(np.max(np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0.0)))


def _per_row(model: CostModel, rows: Rows) -> RowCosts:
    latency_s = np.empty(rows.shape, np.float64)
    energy_j = np.empty(rows.shape, np.float64)
    dram_bytes = np.empty(rows.shape, np.float64)
    model.per_row(rows, latency_s, energy_j, dram_bytes)
    energy = energy_j if model.has_energy else None
    held_bytes = np.empty(rows.shape, np.float64)
    model.held_bytes(rows, held_bytes)
    sizes = np.empty(rows.shape, np.float64)
    model.sizes(rows, sizes)
    return RowCosts(latency_s, energy, dram_bytes, sizes, held_bytes, macs(rows))
