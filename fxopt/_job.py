"""A model to optimize: its graph, what can be decided about it, and what it costs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from fxopt import _storage, targets
from fxopt._arguments import check_weights
from fxopt._digests import digest, digest_of
from fxopt._parts import Parts
from fxopt._precision import Quickest, measured_bits, not_slower, without_slow_integers
from fxopt._selecting import Selection, Selector
from fxopt.data import Loader
from fxopt.decisions import Budget, Constraint, Policy, SearchSpace, Shares
from fxopt.decisions._budget import format_quantity, within
from fxopt.errors import InfeasibleError, PassError
from fxopt.evaluate import Evaluator, apply_policy
from fxopt.graph.edit import own_copy
from fxopt.graph.fake_quantize import ActivationQuantizer, CodebookQuantizer, WeightQuantizer
from fxopt.lowering import IndexCosts, ParametricWorkload, lower
from fxopt.passes import FoldBatchNorm, PruneChannels, Quantize, TunablePass
from fxopt.passes._sites import layers, other_types
from fxopt.progress import Progress, during
from fxopt.report import Metrics, PassLine, SupernetLine
from fxopt.sensitivity import sensitivities

__all__ = ["Job"]

_QUANTIZERS = (ActivationQuantizer, WeightQuantizer, CodebookQuantizer)
_EXACT = "exact"
_MEASURING = "measuring what layers lose"
_MEASURED_ON = 64
"""Samples."""
_ADD_PASSES = "Add passes, or see fxopt.trace and the report's barriers."
_LEFT_TOO_MUCH = (
    "The passes before left too much to the last, and cannot keep the budget by themselves. Raise it, or let operators "
    'go further where they are selected (shares={"quantize": 0} leaves nothing to bits).'
)
_RECOVERED = 4
"""Bits that a short training makes up for; how far bits are counted on to go where nobody says how far."""


class Job:
    """The traced model, what it costs, and, from :meth:`decide` on, what can be decided about it.

    Attributes:
        source: The graph of the model.
        graph: The graph that decisions are about.
        teacher: What it learns from when it is trained.
        operators: The operators that could be selected; none without a selector.
        selected: The operators that were selected.
        supernet: How that search went; None without a selector.
        made_by: The passes that made ``graph`` of ``source``.
        original: What ``source`` costs.
        limits: The limits of the final network, for each budget.
        space: What can be decided.
        constraint: Keeps policies within the limits; None without budgets.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object,
        target: targets.Target,
        passes: tuple[TunablePass, ...],
        budgets: tuple[Budget, ...],
        folder: Path | None,
        show: Progress,
        shares: Shares | None = None,
    ) -> None:
        self.budgets = budgets
        self._metrics = [budget.metric for budget in budgets]
        self._example, self._folder, self._show = example_inputs, folder, show
        self._fastest: dict[str, Policy] = {}
        record = self._record("measured.json")
        self.target = target.recorded(record) if record and isinstance(target, targets.HostTarget) else target
        self._attention = next((one.attention for one in passes if isinstance(one, PruneChannels)), "heads")
        # Tensors of its own: whatever a judge or a loss does to the graph, the model stays as it was.
        self.source: fx.GraphModule = own_copy(_storage.traced(model, example_inputs)).eval()
        self.state = _storage.shapes_of(model)
        check_weights(self.source)
        self.teacher, self.operators, self.selected = self.source, SearchSpace(()), Policy({})
        self.supernet: SupernetLine | None = None
        self.notes: tuple[str, ...] = ()
        self.shares, self.passes = shares, passes
        self.original, self.limits = self._costs_of_original()
        self.made_by: tuple[TunablePass, ...] = ()

    def decide(self, selector: Selector | None) -> None:
        """Find what can be decided. With a selector operators are chosen here, and the rest is about what they make.

        Raises:
            FxoptError: As the selector does.
            InfeasibleError: If the passes cannot keep the limits.
        """
        if selector is None:
            self._open(self.source, self.passes)
            return
        found = self._select(selector)
        self.operators = selector.step.search_space(self.source)
        self.selected, self.notes, self.supernet = found.policy, found.notes, found.supernet
        self.made_by = (selector.step.with_policy(found.policy),)
        self._open(found.graph, self.passes)

    def after(self, graph: fx.GraphModule, maker: TunablePass, passes: tuple[TunablePass, ...]) -> Job:
        """What is left to decide by ``passes`` about ``graph``, which ``maker`` made of this job's graph.

        Raises:
            InfeasibleError: If these passes cannot keep the limits.
        """
        found = copy.copy(self)
        found.made_by = (*self.made_by, maker)
        found._open(graph, passes)
        return found

    def learn_from_better(self, source: float | None, selected: float, *, known: bool) -> None:
        """Let the network of selected operators teach what is made of it, if its score is the better one.

        Args:
            source: The score of the original.
            selected: The score of the network of selected operators.
            known: Whether the scores say how good a network is; without data they say how like the original it is.
        """
        if known and source is not None and selected > source:
            self.teacher = self.graph

    def _select(self, selector: Selector) -> Selection:
        """Choose operators, under their share."""

        def completed(graph: fx.GraphModule, *, anyhow: bool = True) -> None:
            workload = self.lowered(graph)
            space = self._offered(graph, workload)
            self._constrained(graph, workload, space if anyhow else self._counted_on(space))

        def limits() -> dict[str, float]:
            # What candidates were measured for changes what is known of the original, on a target that is measured.
            self.original, self.limits = self._costs_of_original()
            return dict(zip(self._metrics, self._limits_behind(selector.step).tolist(), strict=True))

        return selector.select(self.source, self.target, limits, completed, self._decisions)

    def _counted_on(self, space: SearchSpace) -> SearchSpace:
        """What other passes are counted on for: bits that training makes up for, unless their share was given."""
        if self.shares is None or Quantize.name in self.shares.told:
            return space
        offered = self.target.capabilities
        kept = {kind: tuple(pair for pair in pairs if min(pair) >= _RECOVERED) for kind, pairs in offered.bits.items()}
        bits = {kind: some or offered.bits[kind] for kind, some in kept.items()}
        return space.restrict(replace(offered, bits=bits))

    def _limits_behind(self, one: TunablePass) -> npt.NDArray[np.float64]:
        """What the network behind a pass may cost in every budgeted metric, by the pass's share."""
        if self.shares is None:
            return self.limits
        before = [float(self.original.metric(metric)[0]) for metric in self._metrics]
        pairs = zip(before, self.limits.tolist(), strict=True)
        return np.array([self.shares.limit(one.name, *pair) for pair in pairs])

    def part(self, one: TunablePass) -> tuple[SearchSpace, Constraint | None]:
        """What one pass decides, within its share of the budgets and so that those behind it can do the rest.

        A pass that cannot go as far as its share goes as far as it can; the others go further for it. So they do where
        bits would go further than training makes up for, if nobody gave their share and the others can.
        """
        space = self._decided_by(one)
        if len(space) == len(self.space) or self.constraint is None or self.costs is None or not len(space):
            return space, self.constraint if len(space) else None
        others, counted_on = [self.constraint.cheapest()], self._counted_on(self.space)
        if counted_on != self.space:
            with contextlib.suppress(InfeasibleError):
                others.insert(0, Constraint(counted_on, self.costs, self.limits, self._metrics).cheapest())
        return space, self._parts(self.costs).shared(space, self._limits_behind(one), others)

    def short_behind(self, policy: Policy, one: TunablePass, passes: tuple[TunablePass, ...]) -> InfeasibleError | None:
        """Why ``passes`` cannot keep the limits behind a policy of one pass; None if they can.

        What a cut leaves to decide is known for sure only behind it: on a machine that is measured, layers that gained
        from integers may not do so any more. Nothing is trained to find out.
        """
        try:
            self.after(apply_policy(self.graph, (one,), policy, reconstruct=False), one.with_policy(policy), passes)
        except InfeasibleError as failure:
            return failure
        return None

    def alone(self, one: TunablePass) -> Constraint:
        """What keeps one pass's decisions within the limits where others change nothing.

        Raises:
            InfeasibleError: If nothing does.
        """
        # By what the target has learnt since.
        costs = self.workload.index_costs(self.target, self.space, self._metrics)
        return self._parts(costs).alone(self._decided_by(one))

    def _decided_by(self, one: TunablePass) -> SearchSpace:
        return SearchSpace(decision for decision in self.space if decision.kind in one.kinds)

    def _parts(self, costs: IndexCosts) -> Parts:
        return Parts(self.space, costs, self.limits, self._metrics)

    def _open(self, graph: fx.GraphModule, passes: tuple[TunablePass, ...]) -> None:
        self.graph, self.passes = graph, passes
        self.digest = digest_of(graph)
        self.workload: ParametricWorkload = self.lowered(graph)
        self.space = self._offered(graph, self.workload)
        if any(isinstance(one, Quantize) for one in passes):
            self._tell_if_unquantized(graph)
        self.costs, self.constraint = self._constrained(graph, self.workload, self.space)

    def _tell_if_unquantized(self, graph: fx.GraphModule) -> None:
        """Note why no layer of a graph has bits to decide."""
        if any(one.kind == "bits" for one in self._decisions(graph)):
            return
        types = " and ".join(other_types(graph))
        why = f"{self.target.name} offers no bits, 1 to 8, for any layer of this model."
        if types and not layers(graph):
            why = f"weights are in {types}, and only those in float32 are quantized; convert the model with .float()."
        note = f"Nothing is quantized: {why}"
        self.notes = (*(known for known in self.notes if known != note), note)

    def _offered(self, graph: fx.GraphModule, workload: ParametricWorkload) -> SearchSpace:
        """What can be decided about a graph, and costed; on the machine that is measured no bits slower than floats."""
        space = self._decisions(graph)
        if self.target.name == targets.HOST:
            # Speed is not a matter of weights.
            rows = workload.bind().rows
            shapes = digest(graph.code, *(rows[name].tobytes() for name in rows.dtype.names or ()))
            for one in self.passes:
                if isinstance(one, Quantize) and any(decision.kind in one.kinds for decision in space):
                    if shapes not in self._fastest:
                        record = self._record(f"fastest-bits-{shapes}.json")
                        self._fastest[shapes] = measured_bits(graph, self._example, one, record, self._show)
                    space = without_slow_integers(space, self._fastest[shapes])
        self._prepare(workload, space)
        return space

    def _decisions(self, graph: fx.GraphModule) -> SearchSpace:
        return SearchSpace(d for one in self.passes for d in one.search_space(graph, self.target.capabilities))

    def _record(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / name

    def _costs_of_original(self) -> tuple[targets.Estimate, npt.NDArray[np.float64]]:
        """What the original costs, and the limits of the budgets that this gives."""
        workload = self.lowered(self.source)
        self._prepare(workload, self._decisions(self.source))
        found = self.target.estimate(workload.bind())
        limits = [budget.absolute(float(found.metric(budget.metric)[0])) for budget in self.budgets]
        return found, np.array(limits)

    def _prepare(self, workload: ParametricWorkload, space: SearchSpace) -> None:
        """Let a measured target see the operators at full and half width, in every bit-width on offer."""
        if type(self.target).prepare is targets.Target.prepare:
            return
        widths = [space.default(), space.uniform(0.5)] if len(space) else [Policy({})]
        offered = {choice for decision in space if decision.kind == "bits" for choice in decision.choices}
        for policy in widths:
            self.target.prepare(workload.bind(policy))
            for bits in sorted(offered):
                changed = {
                    decision.key: bits for decision in space if decision.kind == "bits" and bits in decision.choices
                }
                self.target.prepare(workload.bind(policy.merged(Policy(changed))))

    def _constrained(
        self, graph: fx.GraphModule, workload: ParametricWorkload, space: SearchSpace
    ) -> tuple[IndexCosts | None, Constraint | None]:
        """What policies cost in the budgeted metrics, and what keeps them within the limits.

        Raises:
            InfeasibleError: If nothing does.
        """
        if not self.budgets:
            return None, None
        if not len(space):
            self._check_nothing_to_decide(graph)
            return None, None
        costs = workload.index_costs(self.target, space, self._metrics)
        return costs, Constraint(space, costs, self.limits, self._metrics, by_index=costs.at)

    def _check_nothing_to_decide(self, graph: fx.GraphModule) -> None:
        for budget, limit, cost in zip(self.budgets, self.limits, self.achieved(graph), strict=True):
            least = float(cost)
            if not within(least, limit):
                done = ", ".join(one.name for one in self.made_by)
                where = f"Nothing is left to decide behind {done}" if done else "The passes find nothing to decide"
                now, most = (format_quantity(budget.metric, value) for value in (least, float(limit)))
                raise InfeasibleError(
                    f"{where}, and the {budget.metric} of {now} is over the budget of {most}. "
                    f"{_LEFT_TOO_MUCH if done else _ADD_PASSES}",
                    metric=budget.metric,
                    limit=float(limit),
                    least=least,
                )

    def told(self, engine: str, judge: Evaluator) -> dict[str, Any]:
        """Options of an engine: where bits alone are decided, exact is told what each layer loses at each choice."""
        quantize = next((one for one in self.passes if isinstance(one, Quantize)), None)
        if engine != _EXACT or quantize is None or {one.kind for one in self.space} != set(quantize.kinds):
            return {}
        with during(self._show, _MEASURING):
            losses = sensitivities(
                FoldBatchNorm()(self.graph).graph_module,
                self.space,
                judge.sample(_MEASURED_ON),
                method="gradient",
                rounding=quantize.rounding,
                weights=quantize.weights,
                activations=quantize.activations,
                cache=self._record(f"losses-{self.digest}.json"),
            )
        return {"losses": losses}

    def context(self, judge: Evaluator, terms: Mapping[str, str]) -> dict[str, str]:
        """What scores depend on besides the policy, for journals."""
        return {"model": self.digest, "target": self.target.name, "judge": judge.score_name, **terms}

    def digest_with(self, policy: Policy) -> str:
        """A short name for what the policy makes of the model."""
        return digest(self.digest, policy.to_json())

    def lowered(self, graph: fx.GraphModule) -> ParametricWorkload:
        """A graph's rows, at the target's batch size."""
        return lower(graph, batch=self.target.capabilities.batch, attention=self._attention)

    def metrics(self, graph: fx.GraphModule, score: float | None) -> Metrics:
        """Metrics of a graph as it is, with the score it was given."""
        estimate = self.target.estimate(self.lowered(graph).bind())
        return Metrics(
            accuracy=score,
            macs=float(estimate.macs[0]),
            parameters=_parameters(graph),
            size_bytes=float(estimate.weight_bytes[0]),
            latency_s=float(estimate.latency_s[0]),
            energy_j=None if estimate.energy_j is None else float(estimate.energy_j[0]),
            memory_bytes=float(estimate.peak_activation_bytes[0]),
        )

    def step(self, name: str, detail: str, graph: fx.GraphModule, judge: Evaluator) -> PassLine:
        """What a graph is worth and costs after a step."""
        metrics = self.metrics(graph, judge.judge(graph))
        return PassLine(name, detail, metrics.accuracy, metrics)

    def achieved(self, final: fx.GraphModule) -> npt.NDArray[np.float64]:
        """Cost of the final graph in every budgeted metric."""
        estimate = self.target.estimate(self.lowered(final).bind())
        return np.array([float(estimate.metric(budget.metric)[0]) for budget in self.budgets])

    def not_slower(
        self, final: fx.GraphModule, floats: fx.GraphModule, policy: Policy, train: Loader | None
    ) -> Quickest:
        """On the machine that is measured, a result that is no slower than the same graph in floats.

        Args:
            final: What the policy makes.
            floats: The same before it was quantized.
            policy: The policy.
            train: What to calibrate other bits with.
        """
        if self.target.name != targets.HOST:
            return Quickest(final, policy, "")
        return not_slower(
            final,
            floats,
            policy,
            space=self.space,
            passes=self.passes,
            example_inputs=self._example,
            calibration=train,
            allowed=self._within,
            record=self._record(f"measured-bits-{self.digest_with(policy)}.json"),
            show=self._show,
        )

    def _within(self, graph: fx.GraphModule) -> bool:
        return all(map(within, self.achieved(graph), self.limits))

    def check_budget(self, final: fx.GraphModule) -> None:
        """The graph that was built is within the budget, not only the policy that was searched.

        Raises:
            PassError: If it is not; a pass then does something else than its decisions say.
        """
        for budget, limit, cost in zip(self.budgets, self.limits, self.achieved(final), strict=True):
            if not within(cost, limit):
                raise PassError(
                    f"The rewritten graph costs {cost:g} in {budget.metric}, over the limit of {limit:g} that its "
                    "policy keeps; report this with the model and the policy."
                )

    def budget_lines(self, final: fx.GraphModule) -> list[tuple[str, str, float, float, float]]:
        """Metric, asked, limit, before and achieved of every budget."""
        before = [float(self.original.metric(budget.metric)[0]) for budget in self.budgets]
        achieved = self.achieved(final)
        return [
            (budget.metric, str(budget), float(limit), first, float(last))
            for budget, limit, first, last in zip(self.budgets, self.limits, before, achieved, strict=True)
        ]


def _parameters(graph: fx.GraphModule) -> int:
    """How many parameters a graph has; what quantizers have learned is none of the network's."""
    quantizers = (module for module in graph.modules() if isinstance(module, _QUANTIZERS))
    learned = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    return sum(parameter.numel() for parameter in graph.parameters() if id(parameter) not in learned)
