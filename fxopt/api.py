"""The one call, and what comes of it. The only place that wires everything together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxopt import _storage, targets
from fxopt._applying import Stages
from fxopt._arguments import (
    PassLike,
    careful,
    check_data,
    check_executor,
    check_whole,
    load_target,
    resolve_passes,
    terms_of,
    wanted_objective,
)
from fxopt._job import Job
from fxopt._precision import Quickest
from fxopt._reporting import build_report, changes_in, export_data, notes_on, operator_lines
from fxopt._selecting import Selector, parted
from fxopt._tuning import Tuning
from fxopt.data import Loader
from fxopt.decisions import Budget, Policy
from fxopt.evaluate import Evaluator, Reconstruction, apply_policy
from fxopt.export import ExportReport, Format, export_onnx, measure
from fxopt.lowering import lower
from fxopt.objectives import Objective
from fxopt.passes import Quantize, TunablePass
from fxopt.passes._fork import own_copy
from fxopt.passes.quantize import CALIBRATION_META
from fxopt.progress import Progress, reporter
from fxopt.report import PassLine, Report, curves_beside
from fxopt.search import SearchResult, engines
from fxopt.training import FineTuning

__all__ = ["OptimizationResult", "load", "optimize"]


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
    objective: Objective | None = None,
    train: Loader | None = None,
    val: Loader | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    epochs: int = 2,
    learning_rate: float = 0.02,
    fine_tune: FineTuning | None = None,
    trial_epochs: int = 0,
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

    Of two policies of equal score the cheaper one wins; see ``fxopt.objectives.BestScore``. For the target ``host`` no
    layer is quantized that is slower so in onnxruntime on this machine (see ``fxopt.export.fastest_bits``), and what
    comes out is measured against the same graph in floats: if it is slower, the fastest of it, all those layers in 8
    bits, and floats is taken that the budgets allow, and the report's notes say so.

    Args:
        model: The model. It is not changed.
        example_inputs: One input of the model: a tensor, a tuple, a dict, or ``(args, kwargs)``.
        target: A name from ``fxopt.targets.names()``, a TOML file, or a target.
        budget: Upper limits by metric (latency, energy, size, macs, memory): a fraction of the original (0.6, "60%")
            or an absolute value ("5ms", "2MB", "300M"). None for no limit.
        passes: Names of passes or configured passes, in order. If the target has fewer than 8 bits on offer, "quantize"
            by name chooses ranges of least error and rounds weights by ``RoundWeights``. With "select-operators", which
            comes first, a supernet is trained on ``train`` (``epochs`` of warm-up, twice as many of search); of k
            passes it takes the k-th root of the reduction that a budget asks for, and the others take the rest.
        engine: Name of a search engine. Where bits alone are decided, "exact" is told what each layer loses at each of
            its choices (``fxopt.sensitivity``, by gradients on a few samples); its first policy has the least sum.
        trials: Policies to try.
        objective: What to search for: None for the best score within the budget, or
            ``fxopt.objectives.SmallestCost(0.97, "macs")`` for the smallest cost that keeps a score.
        train: Loader of (input, label) to fine-tune and calibrate on.
        val: Loader of (input, label) to judge a classifier by.
        evaluate: A function of a module, higher is better, in place of ``val``.
        loss: ``loss(output, label)`` for fine-tuning; cross entropy by default.
        epochs: Epochs of fine-tuning after the search: of the network that was cut, in floats; and of the quantized
            one, through its quantizers, where something has fewer than 8 bits or nothing but bits was decided.
        learning_rate: Its highest learning rate.
        fine_tune: Its optimizer and schedule, what it learns from the model as it was (class scores, feature maps,
            attention maps), and when it ends early. None for SGD under a cosine that learns class scores, or nothing
            where there is a ``loss`` of your own.
        trial_epochs: Epochs of fine-tuning in every trial, before it is judged; 0 for none.
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
    everything = resolve_passes(passes)
    budgets = Budget.parse_all(budget or {})
    engines.load(engine)
    check_whole(1, trials=trials, parallel=parallel)
    check_whole(0, epochs=epochs, trial_epochs=trial_epochs, seed=seed)
    show = reporter(progress)
    device = load_target(target, show)
    check_data(train, val, evaluate)
    check_executor(executor)
    everything = careful(everything, passes, device)
    folder = Path(workdir) if workdir is not None else None
    tuning = Tuning(train, epochs, loss, learning_rate, seed, fine_tune)
    selecting, chosen = parted(everything)
    selector = None
    if selecting is not None:
        selector = Selector(selecting, train, epochs, learning_rate, seed, 1.0 / len(everything))
    wanted = wanted_objective(objective)
    job = Job(model, example_inputs, device, chosen, budgets, folder, show, selector)
    judge = Evaluator(
        job.graph,
        chosen,
        train=train,
        val=val,
        evaluate=evaluate,
        reward=wanted.reward(device, job.workload, job.original),
        seed=seed,
        source=(model, example_inputs),
        made_by=None if selecting is None else selecting.with_policy(job.selected),
        reconstruct=reconstruct,
        training=tuning.for_trials(trial_epochs),
    )
    first = judge.rehearse()
    wanted.check(first, "The model before the search")
    after_selection = job.metrics(job.graph, first)
    before = after_selection if selector is None else job.metrics(job.source, judge.judge(job.source))
    tuning.rehearse(job.graph)
    found = job.search(
        judge,
        engine,
        trials,
        seed,
        folder,
        executor,
        parallel,
        show,
        terms_of(objective=wanted, reconstruct=reconstruct, trial_epochs=trial_epochs),
    )
    policy = found.policy if found is not None else job.space.default()
    if found is not None:
        wanted.check(judge.score(policy), "The best policy found")
    steps: list[PassLine] = []
    if selecting is not None:
        detail = f"operators: {len(job.selected)} blocks"
        steps.append(PassLine(selecting.name, detail, after_selection.accuracy, after_selection))

    quickest = _built(job, chosen, policy, tuning, judge, reconstruct, example_inputs, steps, folder, show)
    final, policy = quickest.graph, quickest.policy
    job.check_budget(final)
    after = job.metrics(final, steps[-1].accuracy if steps else judge.judge(final))
    timed = _measured(job.source, final, example_inputs) if verify_on_host else (None, None)
    report = build_report(
        title=f"{type(model).__name__} for {device.name}",
        target=device,
        source=job.lowered(job.source),
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
        notes=(*notes_on(train, val, evaluate, found), *job.notes, *filter(None, (quickest.note,))),
        seed=seed,
        operators=() if selecting is None else operator_lines(selecting.search_space(job.source), job.selected),
        curves=() if folder is None else curves_beside(folder),
    )
    _storage.explain_other_weights(final)
    return OptimizationResult(final, job.selected.merged(policy), report, found, everything, example_inputs, job.state)


def _built(
    job: Job,
    passes: tuple[TunablePass, ...],
    policy: Policy,
    tuning: Tuning,
    judge: Evaluator,
    reconstruct: bool | Reconstruction,
    example_inputs: object,
    steps: list[PassLine],
    folder: Path | None,
    show: Progress,
) -> Quickest:
    """The graph that a policy makes, fine-tuned and quantized; what was done on the way goes to ``steps``."""
    floats: list[fx.GraphModule] = []
    train = tuning.train

    def tune(graph: fx.GraphModule, *, on_grids: bool) -> None:
        name = f"fine-tune-{'bits-' if on_grids else ''}{job.digest_with(policy)}"
        place = None if folder is None else folder / name
        history = tuning(graph, job.source, on_grids=on_grids, judge=judge.judge, checkpoint=place, show=show)
        if history is not None:
            step = "fine-tune quantized" if on_grids else "fine-tune"
            steps.append(job.step(step, tuning.told(history, on_grids=on_grids), graph, judge))

    def between(graph: fx.GraphModule) -> None:
        cut = [one.name for one in passes if not isinstance(one, Quantize)]
        if cut:
            steps.append(job.step(", ".join(cut), changes_in(job.space, policy), graph, judge))
        if stages(policy).in_floats:
            tune(graph, on_grids=False)
        floats.append(graph)

    def stages(policy: Policy) -> Stages:
        return Stages.of(policy, changed=len(job.selected) > 0)

    copy = own_copy(job.graph)
    final = apply_policy(copy, passes, policy, calibration=train, reconstruct=reconstruct, between=between).eval()
    found = job.not_slower(final, floats[0], policy, passes, train, example_inputs, folder, show)
    source = found.graph.meta.get(CALIBRATION_META, {}).get("source")
    if source is not None and CALIBRATION_META not in job.graph.meta:
        steps.append(job.step("quantize", f"calibrated on: {source}", found.graph, judge))
    if stages(found.policy).on_grids:
        tune(found.graph, on_grids=True)
    return found


def _measured(before: fx.GraphModule, after: fx.GraphModule, inputs: object) -> tuple[float | None, float | None]:
    found = measure(before, inputs, runs=15, peers=(after,))
    return found.median_s, found.peers[0].median_s
