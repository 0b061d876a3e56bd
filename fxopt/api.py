"""The one call, and what comes of it. The only place that wires everything together."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxopt import _storage, targets
from fxopt import passes as pass_registry
from fxopt._reporting import build_report, metrics_of
from fxopt.data import Loader, first_batch
from fxopt.decisions import Budget, Constraint, Policy, SearchSpace
from fxopt.errors import DataError, InfeasibleError, PassError, SearchError
from fxopt.evaluate import Evaluator, apply_policy
from fxopt.export import ExportReport, export_onnx, host_fingerprint, measure, onnxruntime_profiler
from fxopt.graph import trace
from fxopt.lowering import ParametricWorkload, lower
from fxopt.passes import Canonicalize, TunablePass
from fxopt.passes._fork import own_copy
from fxopt.progress import Progress, reporter
from fxopt.report import PassLine, Report
from fxopt.search import SearchResult, engines, run_search
from fxopt.training import fit

__all__ = ["OptimizationResult", "load", "optimize"]

PassLike: TypeAlias = str | TunablePass
_CHEAPNESS = 0.01


@dataclass
class OptimizationResult:
    """What :func:`optimize` gives.

    Attributes:
        model: The optimized graph; trains, and runs under torch.compile.
        policy: The decisions made. Replayed on the original model they rebuild the same graph.
        report: Metrics before and after, budgets, passes, layers.
        search: The search's trials, or None if there was nothing to search.
    """

    model: fx.GraphModule
    policy: Policy
    report: Report
    search: SearchResult | None
    passes: tuple[TunablePass, ...] = field(repr=False)
    example_inputs: object = field(repr=False)
    original_state: Mapping[str, tuple[int, ...]] = field(repr=False)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        format: Literal["qdq", "float"] = "qdq",  # noqa: A002
        check: bool = True,
    ) -> ExportReport:
        """Write the model to an ONNX file that was proved in onnxruntime; see :func:`fxopt.export_onnx`."""
        return export_onnx(self.model, path, self.example_inputs, format=format, check=check)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write policy, weights, recipe and report to a folder that :func:`load` reads.

        Returns:
            The folder.

        Raises:
            FxoptError: If the folder cannot be written; files there are whole or untouched.
        """
        place = Path(folder)
        _storage.save(place, self.model, self.policy, self.passes, self.example_inputs, self.original_state)
        self.report.save(place / "report.json")
        self.report.save(place / "report.html")
        return place


def load(folder: str | os.PathLike[str], model: nn.Module) -> fx.GraphModule:
    """Rebuild an optimized model from the original model's class and what :meth:`OptimizationResult.save` wrote.

    The model is traced, the saved policy is applied, and the saved weights are loaded; no pickle is read.

    Args:
        folder: The folder.
        model: The original model, with any weights; it is not changed.

    Returns:
        The optimized graph, in eval mode.

    Raises:
        FxoptError: If the folder is no saved result, or the model is another one; the message says which.
    """
    return _storage.load(Path(folder), model)


def optimize(
    model: nn.Module,
    example_inputs: object,
    *,
    target: str | os.PathLike[str] | targets.Target = "host",
    budget: Mapping[str, object] | None = None,
    passes: Sequence[PassLike] = ("prune-channels", "quantize"),
    engine: str = "evolution",
    trials: int = 48,
    train: Loader | None = None,
    val: Loader | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    epochs: int = 2,
    learning_rate: float = 0.02,
    seed: int = 0,
    workdir: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    parallel: int = 1,
    verify_on_host: bool = True,
    progress: bool | Progress | None = None,
) -> OptimizationResult:
    """Optimize a model for a target under a budget.

    The model is traced; the passes declare what can be decided; an engine searches policies that the target says
    are within the budget, judged on the data; the best one is applied, fine-tuned and quantized.

    Of two policies of equal score the cheaper one wins: a hundredth of the latency relative to the original is taken
    off each score during the search.

    Args:
        model: The model. It is not changed.
        example_inputs: One input of the model: a tensor, a tuple, a dict, or ``(args, kwargs)``.
        target: A name from ``fxopt.targets.names()``, a TOML file, or a target.
        budget: Upper limits by metric (latency, energy, size, macs, memory): a fraction of the original (0.6, "60%")
            or an absolute value ("5ms", "2MB", "300M"). None for no limit.
        passes: Names of passes or configured passes, in order.
        engine: Name of a search engine.
        trials: Policies to try.
        train: Loader of (input, label) to fine-tune and calibrate on.
        val: Loader of (input, label) to judge a classifier by.
        evaluate: A function of a module, higher is better, in place of ``val``.
        loss: ``loss(output, label)`` for fine-tuning; cross entropy by default.
        epochs: Epochs of fine-tuning after the search.
        learning_rate: Its highest learning rate.
        seed: Seed of everything random.
        workdir: Folder for the journal and checkpoints; the same call with the same folder resumes.
        executor: Where trials run; None for here.
        parallel: Trials at a time.
        verify_on_host: Whether to measure the model before and after in onnxruntime on this machine.
        progress: True shows progress on a terminal; or a reporter of one's own.

    Returns:
        The result.

    Raises:
        InfeasibleError: If no policy is within the budget, before anything is trained; says the least possible.
        FxoptError: On bad input; the message says what, where and what to do.
    """
    chosen = _resolve_passes(passes)
    budgets = Budget.parse_all(budget or {})
    engines.load(engine)
    if trials < 1:
        raise SearchError(f"trials has to be at least 1, got {trials}.")
    show = reporter(progress)
    device = _load_target(target, show)
    _check_data(train, val, evaluate)
    _check_weights(model)
    job = _Job(copy.deepcopy(model), example_inputs, device, chosen, budgets)
    folder = Path(workdir) if workdir is not None else None
    judge = Evaluator(
        job.graph,
        chosen,
        train=train,
        val=val,
        evaluate=evaluate,
        preference=job.relative_latency,
        weight=_CHEAPNESS,
        seed=seed,
    )
    found = job.search(judge, engine, trials, seed, folder, executor, parallel, show)
    policy = found.policy if found is not None else job.space.default()
    before = job.judged(judge, job.graph)
    steps: list[PassLine] = []

    def tune(graph: fx.GraphModule) -> None:
        steps.append(PassLine("prune-channels", "after the cut", job.accuracy(judge, graph), None))
        if train is None or epochs < 1:
            return
        show.start("fine-tuning", epochs)
        fit(
            graph,
            train,
            epochs=epochs,
            loss=loss,
            learning_rate=learning_rate,
            teacher=job.graph if loss is None else None,
            checkpoint=folder / "fine-tune" if folder else None,
            seed=seed,
            progress=lambda epoch, _, value: show.advance("fine-tuning", 1, f"loss {value:.4f}"),
        )
        show.finish("fine-tuning")
        steps.append(PassLine("fine-tune", f"{epochs} epochs", job.accuracy(judge, graph), None))

    final = apply_policy(own_copy(job.graph), chosen, policy, calibration=train, between=tune).eval()
    job.check_budget(final)
    after = job.judged(judge, final)
    if any(kind == "bits" for kind, _ in policy):
        steps.append(PassLine("quantize", "calibrated", after.accuracy, None))
    timed = _measured(job.graph, final, example_inputs) if verify_on_host else (None, None)
    report = build_report(
        title=f"{type(model).__name__} for {device.name}",
        target=device,
        workload=job.workload,
        final=lower(final),
        policy=policy,
        budgets=job.budget_lines(final),
        before=_with_time(before, timed[0]),
        after=_with_time(after, timed[1]),
        steps=steps,
        graph=job.graph,
        search=found,
        score_name=judge.score_name,
        notes=_notes(train, val, evaluate, judge),
        seed=seed,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return OptimizationResult(final, policy, report, found, chosen, example_inputs, shapes)


class _Job:
    """The traced model, what it costs, and what can be decided about it."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object,
        target: targets.Target,
        passes: tuple[TunablePass, ...],
        budgets: tuple[Budget, ...],
    ) -> None:
        self.target = target
        self.budgets = budgets
        training = model.training
        self.graph: fx.GraphModule = Canonicalize()(trace(model.eval(), example_inputs)).graph_module
        self.graph.train(training).eval()
        self.workload: ParametricWorkload = lower(self.graph, batch=target.capabilities.batch)
        decisions = [d for one in passes for d in one.search_space(self.graph, target.capabilities)]
        self.space = SearchSpace(decisions)
        self._prepare()
        self.original = target.estimate(self.workload.bind())
        self.limits = np.array([budget.absolute(float(self.original.metric(budget.metric)[0])) for budget in budgets])
        self.constraint = self._constraint()

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
        return Constraint(self.space, self.costs, self.limits, [budget.metric for budget in self.budgets])

    def _check_nothing_to_decide(self) -> None:
        for budget, limit in zip(self.budgets, self.limits, strict=True):
            least = float(self.original.metric(budget.metric)[0])
            if least > limit:
                raise InfeasibleError(
                    f"The passes find nothing to decide in this model, and its {budget.metric} is over the budget "
                    f"{budget}. Add passes, or see fxopt.trace and the report's barriers.",
                    metric=budget.metric,
                    limit=float(limit),
                    least=least,
                )

    def costs(self, policies: Sequence[Policy]) -> npt.NDArray[np.float64]:
        """Cost of every policy in every budgeted metric, shape (policies, metrics)."""
        estimate = self.target.estimate(self.workload.bind(policies))
        return np.stack([estimate.metric(budget.metric) for budget in self.budgets], axis=1)

    def relative_latency(self, policy: Policy) -> float:
        """Predicted latency over that of the original."""
        estimate = self.target.estimate(self.workload.bind(policy))
        return float(estimate.latency_s[0] / max(float(self.original.latency_s[0]), 1e-30))

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
    ) -> SearchResult | None:
        """Search the space; None if there is nothing to decide."""
        if not len(self.space):
            return None
        searcher = engines.create(engine, self.space, self.constraint, seed)
        show.start("search", trials)
        found = run_search(
            searcher,
            judge,
            trials,
            journal=folder / "journal.jsonl" if folder else None,
            executor=executor,
            parallel=parallel,
            progress=lambda state: show.advance(
                "search", 1, f"best {state.best.score:.4f}" if state.best and state.best.score is not None else ""
            ),
        )
        show.finish("search")
        return found

    def accuracy(self, judge: Evaluator, graph: fx.GraphModule) -> float | None:
        """The score of a graph, if it says something about accuracy."""
        return judge.judge(graph)

    def judged(self, judge: Evaluator, graph: fx.GraphModule) -> Any:
        """Metrics of a graph as it is."""
        estimate = self.target.estimate(lower(graph, batch=self.target.capabilities.batch).bind())
        return metrics_of(graph, estimate, judge.judge(graph))

    def achieved(self, final: fx.GraphModule) -> npt.NDArray[np.float64]:
        """Cost of the final graph in every budgeted metric."""
        estimate = self.target.estimate(lower(final, batch=self.target.capabilities.batch).bind())
        return np.array([float(estimate.metric(budget.metric)[0]) for budget in self.budgets])

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


def _resolve_passes(passes: Sequence[PassLike]) -> tuple[TunablePass, ...]:
    if isinstance(passes, (str, TunablePass)):
        passes = (passes,)
    found = []
    for one in passes:
        made = pass_registry.create(one) if isinstance(one, str) else one
        if not isinstance(made, TunablePass):
            raise PassError(f"{one!r} decides nothing; optimize takes tunable passes, such as prune-channels.")
        found.append(made)
    if not found:
        raise PassError("passes is empty; name at least one, such as 'prune-channels'.")
    return tuple(found)


def _load_target(target: str | os.PathLike[str] | targets.Target, show: Progress) -> targets.Target:
    if str(target) != "host":
        return targets.load(target)

    def measured(done: int, total: int, what: str) -> None:
        if done == 1:
            show.start("measuring this machine", total)
        show.advance("measuring this machine", 1, what)
        if done == total:
            show.finish("measuring this machine")

    return targets.load("host", profiler=onnxruntime_profiler, fingerprint=host_fingerprint(), progress=measured)


def _check_data(train: Loader | None, val: Loader | None, evaluate: object) -> None:
    if evaluate is not None and not callable(evaluate):
        raise DataError(f"evaluate is a {type(evaluate).__name__}; give a function of a module.")
    for loader, name in ((train, "train"), (val, "val")):
        if loader is not None:
            first_batch(loader, name)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name!r} holds NaN or infinity; load weights that are finite.")


def _measured(before: fx.GraphModule, after: fx.GraphModule, inputs: object) -> tuple[float | None, float | None]:
    found = measure(before, inputs, runs=15, peers=(after,))
    return found.median_s, found.peers[0].median_s


def _with_time(metrics: Any, seconds: float | None) -> Any:
    return dataclasses.replace(metrics, measured_latency_s=seconds)


def _notes(train: object, val: object, evaluate: object, judge: Evaluator) -> list[str]:
    notes = []
    if val is None and evaluate is None:
        notes.append(
            "No validation data was given: policies were judged by how little they change the outputs on random "
            "inputs, and no accuracy is known."
        )
    if train is None:
        notes.append("No training data was given: nothing was fine-tuned, and ranges come from random inputs.")
    return notes
