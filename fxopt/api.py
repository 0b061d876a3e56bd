"""The one call, and what comes of it. The only place that wires everything together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fxopt import _storage, targets
from fxopt import passes as pass_registry
from fxopt._precision import without_slow_integers
from fxopt._reporting import build_report, changes_in, export_data, metrics_of, notes_on
from fxopt._selecting import Selector, parted
from fxopt.data import Loader, first_batch
from fxopt.decisions import Budget, Constraint, Policy, SearchSpace
from fxopt.errors import DataError, InfeasibleError, PassError, SearchError, TargetError
from fxopt.evaluate import Evaluator, Reconstruction, RelativeLatency, apply_policy
from fxopt.export import ExportReport, Format, export_onnx, host_fingerprint, measure, onnxruntime_profiler
from fxopt.lowering import ParametricWorkload, lower
from fxopt.passes import Quantize, TunablePass
from fxopt.passes._fork import own_copy
from fxopt.passes.quantize import CALIBRATION_META
from fxopt.progress import Progress, reporter
from fxopt.report import Metrics, PassLine, Report
from fxopt.search import SearchResult, engines, run_search
from fxopt.training import fit, rehearse

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
        format: Format = "qdq",  # noqa: A002
        check: bool = True,
    ) -> ExportReport:
        """Write the model to an ONNX file that was proved in onnxruntime; see :func:`fxopt.export_onnx`.

        ``report`` tells of it from then on.
        """
        made = export_onnx(self.model, path, self.example_inputs, format=format, check=check)
        self.report = dataclasses.replace(self.report, export=export_data(made))
        return made

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write policy, weights, recipe and report to a folder that :func:`load` reads.

        The recipe is written last and tells the others' digests, so that files of two saves are not taken for one.

        Returns:
            The folder.

        Raises:
            FxoptError: If the folder cannot be written; files there are whole or untouched.
        """
        place = Path(folder)
        _storage.save(place, self.model, self.policy, self.passes, self.example_inputs, self.original_state)
        self.save_report(place)
        return place

    def save_report(self, folder: str | os.PathLike[str]) -> None:
        """Write the report alone, as ``report.json`` and ``report.html``.

        Raises:
            FxoptError: If a file cannot be written.
        """
        for name in ("report.json", "report.html"):
            self.report.save(Path(folder) / name)


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
    reconstruct: bool | Reconstruction = True,
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
    off each score during the search. For the target ``host`` no layer is quantized that is slower so in onnxruntime on
    this machine; see ``fxopt.export.fastest_bits``.

    Args:
        model: The model. It is not changed.
        example_inputs: One input of the model: a tensor, a tuple, a dict, or ``(args, kwargs)``.
        target: A name from ``fxopt.targets.names()``, a TOML file, or a target.
        budget: Upper limits by metric (latency, energy, size, macs, memory): a fraction of the original (0.6, "60%")
            or an absolute value ("5ms", "2MB", "300M"). None for no limit.
        passes: Names of passes or configured passes, in order. With "select-operators", which comes first, a supernet
            is trained on ``train`` (``epochs`` of warm-up, twice as many of search); of k passes it takes the k-th root
            of the reduction that a budget asks for, and the others take the rest.
        engine: Name of a search engine.
        trials: Policies to try.
        train: Loader of (input, label) to fine-tune and calibrate on.
        val: Loader of (input, label) to judge a classifier by.
        evaluate: A function of a module, higher is better, in place of ``val``.
        loss: ``loss(output, label)`` for fine-tuning; cross entropy by default.
        epochs: Epochs of fine-tuning after the search.
        learning_rate: Its highest learning rate.
        reconstruct: Whether weights behind cut channels are found anew by least squares on ``train``, without training,
            in every trial and at the end; or how.
        seed: Seed of everything random.
        workdir: Folder for the journal and checkpoints; the same call with the same folder resumes.
        executor: Where trials run: any of ``concurrent.futures``; None for here. Other processes trace the model anew,
            so model, data and ``evaluate`` have to be picklable; the result is the same as without.
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
    _check_whole(1, trials=trials, parallel=parallel)
    _check_whole(0, epochs=epochs, seed=seed)
    show = reporter(progress)
    device = _load_target(target, show)
    _check_data(train, val, evaluate)
    _check_executor(executor)
    folder = Path(workdir) if workdir is not None else None
    everything = chosen
    selecting, chosen = parted(everything)
    selector = None
    if selecting is not None:
        selector = Selector(selecting, train, epochs, learning_rate, seed, 1.0 / len(everything))
    job = _Job(model, example_inputs, device, chosen, budgets, folder, show, selector)
    tuning = _Tuning(train, epochs, loss, learning_rate, seed, folder)
    judge = Evaluator(
        job.graph,
        chosen,
        train=train,
        val=val,
        evaluate=evaluate,
        preference=RelativeLatency(device, job.workload, float(job.original.latency_s[0])),
        weight=_CHEAPNESS,
        seed=seed,
        source=(model, example_inputs) if selector is None else None,
        reconstruct=reconstruct,
    )
    after_selection = job.metrics(job.graph, judge.rehearse())
    before = after_selection if selector is None else job.metrics(job.source, judge.judge(job.source))
    tuning.rehearse(job.graph)
    found = job.search(judge, engine, trials, seed, folder, executor, parallel, show)
    policy = found.policy if found is not None else job.space.default()
    steps: list[PassLine] = []
    if selecting is not None:
        detail = f"operators: {len(job.selected)} blocks"
        steps.append(PassLine(selecting.name, detail, after_selection.accuracy, after_selection))

    def between(graph: fx.GraphModule) -> None:
        cut = [one.name for one in chosen if not isinstance(one, Quantize)]
        if cut:
            steps.append(job.step(", ".join(cut), changes_in(job.space, policy), graph, judge))
        if tuning.run(graph, job, policy, show):
            steps.append(job.step("fine-tune", f"epochs: {epochs}", graph, judge))

    copy = own_copy(job.graph)
    final = apply_policy(copy, chosen, policy, calibration=train, reconstruct=reconstruct, between=between).eval()
    job.check_budget(final)
    source = final.meta.get(CALIBRATION_META, {}).get("source")
    if source is not None and CALIBRATION_META not in job.graph.meta:
        steps.append(job.step("quantize", f"calibrated on: {source}", final, judge))
    after = job.metrics(final, steps[-1].accuracy if steps else judge.judge(final))
    timed = _measured(job.source, final, example_inputs) if verify_on_host else (None, None)
    report = build_report(
        title=f"{type(model).__name__} for {device.name}",
        target=device,
        workload=job.workload,
        final=lower(final),
        policy=policy,
        budgets=job.budget_lines(final),
        before=dataclasses.replace(before, measured_latency_s=timed[0]),
        after=dataclasses.replace(after, measured_latency_s=timed[1]),
        steps=steps,
        graph=job.graph,
        search=found,
        score_name=judge.score_name,
        notes=(*notes_on(train, val, evaluate, found), *job.notes),
        seed=seed,
    )
    _storage.explain_other_weights(final)
    whole = job.selected.merged(policy)
    return OptimizationResult(final, whole, report, found, everything, example_inputs, job.state)


@dataclass(frozen=True)
class _Tuning:
    """How to fine-tune what the search has found."""

    train: Loader | None
    epochs: int
    loss: Callable[[Any, Any], torch.Tensor] | None
    learning_rate: float
    seed: int
    folder: Path | None

    def rehearse(self, original: fx.GraphModule) -> None:
        """Notice what is wrong with data or loss before anything is searched.

        Raises:
            FxoptError: If fine-tuning could not take a step.
        """
        if self.train is not None:
            rehearse(
                original,
                self.train,
                epochs=self.epochs,
                loss=self.loss,
                learning_rate=self.learning_rate,
                teacher=self._teacher(original),
            )

    def run(self, graph: fx.GraphModule, job: _Job, policy: Policy, show: Progress) -> bool:
        """Fine-tune ``graph`` in place, if there is something to train on; whether it was done."""
        if self.train is None or self.epochs < 1:
            return False
        show.start("fine-tuning", self.epochs)
        fit(
            graph,
            self.train,
            epochs=self.epochs,
            loss=self.loss,
            learning_rate=self.learning_rate,
            teacher=self._teacher(job.source),
            checkpoint=None if self.folder is None else self.folder / f"fine-tune-{job.digest_with(policy)}",
            seed=self.seed,
            progress=lambda epoch, _, value: show.advance("fine-tuning", 1, f"loss {value:.4f}"),
        )
        show.finish("fine-tuning")
        return True

    def _teacher(self, original: fx.GraphModule) -> fx.GraphModule | None:
        return original if self.loss is None else None


class _Job:
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
        # Tensors of its own: whatever a judge or a loss does to the graph, the model stays as it was.
        self.graph: fx.GraphModule = own_copy(_storage.traced(model, example_inputs)).eval()
        self.state = _storage.shapes_of(model)
        _check_weights(self.graph)
        self.source, self.selected = self.graph, Policy({})
        self.notes: tuple[str, ...] = ()
        self.original, self.limits = self._costs_of_original()
        if selector is not None:
            self._select(selector, folder, show)
        self.digest = _storage.digest_of(self.graph)
        self.workload: ParametricWorkload = lower(self.graph, batch=target.capabilities.batch)
        decisions = [d for one in passes for d in one.search_space(self.graph, target.capabilities)]
        self.space = SearchSpace(decisions)
        if target.name == targets.HOST:
            record = None if folder is None else folder / f"fastest-bits-{self.digest}.json"
            for one in passes:
                if isinstance(one, Quantize):
                    self.space = without_slow_integers(self.space, self.graph, example_inputs, one, record, show)
        self._prepare()
        self.constraint = self._constraint()

    def _costs_of_original(self) -> tuple[targets.Estimate, npt.NDArray[np.float64]]:
        """What the original costs, and the limits of the budgets that this gives."""
        workload = lower(self.source, batch=self.target.capabilities.batch).bind()
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
        return Constraint(self.space, self.costs, self.limits, [budget.metric for budget in self.budgets])

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

    def costs(self, policies: Sequence[Policy]) -> npt.NDArray[np.float64]:
        """Cost of every policy in every budgeted metric, shape (policies, metrics)."""
        estimate = self.workload.estimate(self.target, policies)
        return np.stack([estimate.metric(budget.metric) for budget in self.budgets], axis=1)

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
            context={"model": self.digest, "target": self.target.name, "judge": judge.score_name},
            progress=lambda state: show.advance(
                "search", 1, f"best {state.best.score:.4f}" if state.best and state.best.score is not None else ""
            ),
        )
        show.finish("search")
        return found

    def digest_with(self, policy: Policy) -> str:
        """A short name for what the policy makes of the model."""
        return _storage.digest(self.digest, policy.to_json())

    def metrics(self, graph: fx.GraphModule, score: float | None) -> Metrics:
        """Metrics of a graph as it is, with the score it was given."""
        estimate = self.target.estimate(lower(graph, batch=self.target.capabilities.batch).bind())
        return metrics_of(graph, estimate, score)

    def step(self, name: str, detail: str, graph: fx.GraphModule, judge: Evaluator) -> PassLine:
        """What a graph is worth and costs after a step."""
        metrics = self.metrics(graph, judge.judge(graph))
        return PassLine(name, detail, metrics.accuracy, metrics)

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
    listed = (passes,) if isinstance(passes, (str, TunablePass)) else passes
    if not isinstance(listed, Iterable):
        raise PassError(f"passes is a {type(passes).__name__}; give names of passes, such as ('prune-channels',).")
    found: list[TunablePass] = []
    for one in listed:
        made = pass_registry.create(one) if isinstance(one, str) else one
        if not isinstance(made, TunablePass):
            raise PassError(f"{one!r} decides nothing; optimize takes tunable passes, such as prune-channels.")
        if made.name in [other.name for other in found]:
            raise PassError(f"passes names {made.name!r} twice; a pass decides about a model once.")
        if any(isinstance(other, Quantize) for other in found):
            raise PassError(f"passes names {made.name!r} behind 'quantize', whose graph is final; put 'quantize' last.")
        found.append(made)
    if not found:
        raise PassError("passes is empty; name at least one, such as 'prune-channels'.")
    return tuple(found)


def _load_target(target: str | os.PathLike[str] | targets.Target, show: Progress) -> targets.Target:
    if not isinstance(target, (str, os.PathLike, targets.Target)):
        raise TargetError(f"target is a {type(target).__name__}; give a name, the path of a TOML file, or a target.")
    if str(target) != targets.HOST:
        return targets.load(target)

    def measured(done: int, total: int, what: str) -> None:
        if done == 1:
            show.start("measuring this machine", total)
        show.advance("measuring this machine", 1, what)
        if done == total:
            show.finish("measuring this machine")

    return targets.load(targets.HOST, profiler=onnxruntime_profiler, fingerprint=host_fingerprint(), progress=measured)


def _check_whole(least: int, **options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise SearchError(f"{name} has to be a whole number of at least {least}, got {value!r}.")


def _check_data(train: Loader | None, val: Loader | None, evaluate: object) -> None:
    if evaluate is not None and not callable(evaluate):
        raise DataError(f"evaluate is a {type(evaluate).__name__}; give a function of a module.")
    if evaluate is not None and val is not None:
        raise DataError("Both val and evaluate say how good a model is; give one of them.")
    for loader, name in ((train, "train"), (val, "val")):
        if loader is not None:
            first_batch(loader, name)


def _check_executor(executor: object) -> None:
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise SearchError(f"executor is a {type(executor).__name__}; give one of concurrent.futures, or None.")


def _check_weights(graph: fx.GraphModule) -> None:
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name!r} holds NaN or infinity; load weights that are finite.")


def _measured(before: fx.GraphModule, after: fx.GraphModule, inputs: object) -> tuple[float | None, float | None]:
    found = measure(before, inputs, runs=15, peers=(after,))
    return found.median_s, found.peers[0].median_s
