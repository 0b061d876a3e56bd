"""A model to optimize: its graph, what can be decided about it, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from fxopt import _storage, targets
from fxopt._arguments import check_weights
from fxopt._precision import Quickest, not_slower, without_slow_integers
from fxopt._reporting import metrics_of
from fxopt._selecting import Selector
from fxopt.data import Loader
from fxopt.decisions import Budget, Constraint, Policy, SearchSpace
from fxopt.errors import InfeasibleError, PassError
from fxopt.evaluate import Evaluator
from fxopt.lowering import ParametricWorkload, lower
from fxopt.passes import FoldBatchNorm, PruneChannels, Quantize, TunablePass
from fxopt.passes._fork import own_copy
from fxopt.progress import Progress
from fxopt.report import Metrics, PassLine
from fxopt.search import SearchResult, engines, run_search
from fxopt.sensitivity import sensitivities

__all__ = ["Job"]

_EXACT = "exact"
_MEASURING = "measuring what layers lose"
_MEASURED_ON = 64
"""Samples."""


class Job:
    """The traced model, what it costs, and what can be decided about it."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object,
        target: targets.Target,
        passes: tuple[TunablePass, ...],
        budgets: tuple[Budget, ...],
        folder: Path | None,
        show: Progress,
        selector: Selector | None = None,
    ) -> None:
        self.target = target
        self.budgets = budgets
        self._passes = passes
        self._attention = next((one.attention for one in passes if isinstance(one, PruneChannels)), "heads")
        # Tensors of its own: whatever a judge or a loss does to the graph, the model stays as it was.
        self.graph: fx.GraphModule = own_copy(_storage.traced(model, example_inputs)).eval()
        self.state = _storage.shapes_of(model)
        check_weights(self.graph)
        self.source, self.selected = self.graph, Policy({})
        self.notes: tuple[str, ...] = ()
        self.original, self.limits = self._costs_of_original()
        if selector is not None:
            self._select(selector, folder, show)
        self.digest = _storage.digest_of(self.graph)
        self.workload: ParametricWorkload = self.lowered(self.graph)
        decisions = [d for one in passes for d in one.search_space(self.graph, target.capabilities)]
        self.space = SearchSpace(decisions)
        if any(isinstance(one, Quantize) for one in passes) and not any(one.kind == "bits" for one in self.space):
            self.notes += (f"Nothing is quantized: {target.name} offers no bits, 1 to 8, for any layer of this model.",)
        if target.name == targets.HOST:
            record = None if folder is None else folder / f"fastest-bits-{self.digest}.json"
            for one in passes:
                if isinstance(one, Quantize):
                    self.space = without_slow_integers(self.space, self.graph, example_inputs, one, record, show)
        self._prepare()
        self.constraint = self._constraint()

    def _costs_of_original(self) -> tuple[targets.Estimate, npt.NDArray[np.float64]]:
        """What the original costs, and the limits of the budgets that this gives."""
        workload = self.lowered(self.source).bind()
        self.target.prepare(workload)
        found = self.target.estimate(workload)
        limits = [budget.absolute(float(found.metric(budget.metric)[0])) for budget in self.budgets]
        return found, np.array(limits)

    def _select(self, selector: Selector, folder: Path | None, show: Progress) -> None:
        """Choose operators first: all that follows starts from the network they make."""
        metrics = [budget.metric for budget in self.budgets]
        limits = dict(zip(metrics, self.limits.tolist(), strict=True))
        before = {metric: float(self.original.metric(metric)[0]) for metric in metrics}
        found = selector.select(self.source, self.target, limits, before, folder, show)
        self.graph, self.selected, self.notes = found.graph, found.policy, found.notes

    def _prepare(self) -> None:
        """Let a measured target see the operators at full and half width, in every bit-width on offer."""
        widths = [self.space.default(), self.space.uniform(0.5)] if len(self.space) else [Policy({})]
        offered = {choice for decision in self.space if decision.kind == "bits" for choice in decision.choices}
        for policy in widths:
            self.target.prepare(self.workload.bind(policy))
            for bits in sorted(offered):
                changed = {
                    decision.key: bits
                    for decision in self.space
                    if decision.kind == "bits" and bits in decision.choices
                }
                self.target.prepare(self.workload.bind(policy.merged(Policy(changed))))

    def _constraint(self) -> Constraint | None:
        if not self.budgets:
            return None
        if not len(self.space):
            self._check_nothing_to_decide()
            return None
        metrics = [budget.metric for budget in self.budgets]
        costs = self.workload.index_costs(self.target, self.space, metrics)
        return Constraint(self.space, costs, self.limits, metrics, by_index=costs.at)

    def _check_nothing_to_decide(self) -> None:
        for budget, limit, cost in zip(self.budgets, self.limits, self.achieved(self.graph), strict=True):
            least = float(cost)
            if least > limit * (1 + 1e-9):
                raise InfeasibleError(
                    f"The passes find nothing to decide in this model, and its {budget.metric} is over the budget "
                    f"{budget}. Add passes, or see fxopt.trace and the report's barriers.",
                    metric=budget.metric,
                    limit=float(limit),
                    least=least,
                )

    def search(
        self,
        judge: Evaluator,
        engine: str,
        trials: int,
        seed: int,
        folder: Path | None,
        executor: Executor | None,
        parallel: int,
        show: Progress,
        terms: Mapping[str, str],
    ) -> SearchResult | None:
        """Search the space; None if there is nothing to decide. ``terms`` are what else the scores depend on."""
        if not len(self.space):
            return None
        searcher = engines.create(engine, self.space, self.constraint, seed, **self.told(engine, judge, folder, show))
        show.start("search", trials)
        found = run_search(
            searcher,
            judge,
            trials,
            journal=folder / "journal.jsonl" if folder else None,
            executor=executor,
            parallel=parallel,
            context=self.context(judge, terms),
            progress=lambda state: show.advance(
                "search", 1, f"best {state.best.score:.4f}" if state.best and state.best.score is not None else ""
            ),
        )
        show.finish("search")
        return found

    def told(self, engine: str, judge: Evaluator, folder: Path | None, show: Progress) -> dict[str, Any]:
        """Options of an engine: where bits alone are decided, exact is told what each layer loses at each choice."""
        quantize = next((one for one in self._passes if isinstance(one, Quantize)), None)
        if engine != _EXACT or quantize is None or {one.kind for one in self.space} != set(quantize.kinds):
            return {}
        show.start(_MEASURING, 1)
        losses = sensitivities(
            FoldBatchNorm()(self.graph).graph_module,
            self.space,
            judge.sample(_MEASURED_ON),
            method="gradient",
            rounding=quantize.rounding,
            weights=quantize.weights,
            activations=quantize.activations,
            cache=None if folder is None else folder / f"losses-{self.digest}.json",
        )
        show.finish(_MEASURING)
        return {"losses": losses}

    def context(self, judge: Evaluator, terms: Mapping[str, str]) -> dict[str, str]:
        """What scores depend on besides the policy, for journals."""
        return {"model": self.digest, "target": self.target.name, "judge": judge.score_name, **terms}

    def digest_with(self, policy: Policy) -> str:
        """A short name for what the policy makes of the model."""
        return _storage.digest(self.digest, policy.to_json())

    def lowered(self, graph: fx.GraphModule) -> ParametricWorkload:
        """A graph's rows, at the target's batch size."""
        return lower(graph, batch=self.target.capabilities.batch, attention=self._attention)

    def metrics(self, graph: fx.GraphModule, score: float | None) -> Metrics:
        """Metrics of a graph as it is, with the score it was given."""
        estimate = self.target.estimate(self.lowered(graph).bind())
        return metrics_of(graph, estimate, score)

    def step(self, name: str, detail: str, graph: fx.GraphModule, judge: Evaluator) -> PassLine:
        """What a graph is worth and costs after a step."""
        metrics = self.metrics(graph, judge.judge(graph))
        return PassLine(name, detail, metrics.accuracy, metrics)

    def achieved(self, final: fx.GraphModule) -> npt.NDArray[np.float64]:
        """Cost of the final graph in every budgeted metric."""
        estimate = self.target.estimate(self.lowered(final).bind())
        return np.array([float(estimate.metric(budget.metric)[0]) for budget in self.budgets])

    def not_slower(
        self,
        final: fx.GraphModule,
        floats: fx.GraphModule,
        policy: Policy,
        passes: tuple[TunablePass, ...],
        train: Loader | None,
        example_inputs: object,
        folder: Path | None,
        show: Progress,
    ) -> Quickest:
        """On the machine that is measured, a result that is no slower than the same graph in floats.

        Args:
            final: What the policy makes.
            floats: The same before it was quantized.
            policy: The policy.
            passes: All passes.
            train: What to calibrate other bits with.
            example_inputs: What to measure with.
            folder: Where the record is kept; None for nowhere.
            show: Where to tell that it takes a while.
        """
        if self.target.name != targets.HOST:
            return Quickest(final, policy, "")
        return not_slower(
            final,
            floats,
            policy,
            space=self.space,
            passes=passes,
            example_inputs=example_inputs,
            calibration=train,
            allowed=self._within,
            record=None if folder is None else folder / f"measured-bits-{self.digest_with(policy)}.json",
            show=show,
        )

    def _within(self, graph: fx.GraphModule) -> bool:
        return bool((self.achieved(graph) <= self.limits * (1 + 1e-9)).all())

    def check_budget(self, final: fx.GraphModule) -> None:
        """The graph that was built is within the budget, not only the policy that was searched.

        Raises:
            PassError: If it is not; a pass then does something else than its decisions say.
        """
        for budget, limit, cost in zip(self.budgets, self.limits, self.achieved(final), strict=True):
            if cost > limit * (1 + 1e-9):
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
