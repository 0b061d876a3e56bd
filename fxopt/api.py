"""The one call, and what comes of it: here everything is wired together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxopt import _storage, targets
from fxopt._arguments import (
    PassLike,
    careful,
    check_data,
    check_executor,
    check_objective_of_operators,
    resolve_passes,
    terms_of,
    wanted_objective,
    wanted_shares,
)
from fxopt._course import Course, Judging, Searching
from fxopt._files import PAGE, REPORT, occupied, path_of
from fxopt._host import load_target
from fxopt._job import Job
from fxopt._numbers import check_whole
from fxopt._reporting import build_report, export_data
from fxopt._seeding import seeded
from fxopt._selecting import Selector, parted
from fxopt._tuning import Tuning
from fxopt.data import Loader
from fxopt.decisions import Budget, Policy
from fxopt.errors import ExportError, JournalError, SearchError
from fxopt.evaluate import Reconstruction, accuracy
from fxopt.export import ExportReport, Format, OnnxModule, export_onnx, measure
from fxopt.nas._parallel import is_first_process
from fxopt.objectives import Objective
from fxopt.passes import TunablePass
from fxopt.progress import Progress, during, reporter, tracked
from fxopt.report import Report
from fxopt.search import SearchResult, engines
from fxopt.training import FineTuning

__all__ = ["OptimizationResult", "load", "optimize"]

_MEASURING = "measuring in onnxruntime"


@dataclass
class OptimizationResult:
    """What :func:`optimize` gives.

    Attributes:
        model: The optimized graph; trains, and runs under torch.compile.
        policy: The decisions made. Replayed on the original model they rebuild the same graph.
        report: Metrics before and after, budgets, passes, layers.
        search: The search's trials, those of the last search if each pass had its own; None if there was nothing to
            search.
        passes: The passes that were searched, as they were resolved and before any policy.
        example_inputs: What the model was traced with.
        original_state: The shapes of the original's state, by state-dict key; :func:`load` holds a model against them.
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
        val: Loader | None = None,
        progress: bool | Progress | None = None,
    ) -> ExportReport:
        """Write the model to an ONNX file that was proved in onnxruntime; see :func:`fxopt.export_onnx`.

        ``report`` tells of it from then on.

        Args:
            path: The file.
            format: As for :func:`fxopt.export_onnx`.
            check: As for :func:`fxopt.export_onnx`.
            val: Loader of (input, label) to judge the file by as well, in onnxruntime: all of it.
            progress: How that is shown, as for :func:`optimize`.

        Raises:
            ExportError: As for :func:`fxopt.export_onnx`; or ``val`` is given with ``"qonnx"``, which does not run in
                onnxruntime.
            DataError: If ``val`` does not fit; the file is there then.
        """
        if val is not None and format == "qonnx":
            raise ExportError("onnxruntime does not run qonnx files; leave out val, or choose another format.")
        made = export_onnx(self.model, path, self.example_inputs, format=format, check=check)
        self.report = dataclasses.replace(self.report, export=export_data(made))
        if val is not None:
            judged = tracked(val, reporter(progress), "judging the file")
            made = dataclasses.replace(made, accuracy=accuracy(OnnxModule(made.path, torch.get_num_threads()), judged))
            self.report = dataclasses.replace(self.report, export=export_data(made))
        return made

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write policy, weights, recipe and report to a folder that :func:`load` reads.

        The recipe is written last and tells the others' digests, so that files of two saves are not taken for one.
        Named tuples among the example inputs are kept by where their types are defined. Any other type that was made
        known to torch (``register_pytree_node``) has to have a ``serialized_type_name`` there, here and for ``load``.

        Returns:
            The folder.

        Raises:
            FxoptError: If the folder cannot be written; files there are whole or untouched. Or the example inputs
                cannot be, for want of that name; nothing is written then.
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
        for name in (REPORT, PAGE):
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
    shares: Mapping[str, float | str] | None = None,
    engine: str = "evolution",
    trials: int = 48,
    objective: Objective | None = None,
    train: Loader | None = None,
    val: Loader | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    epochs: int = 2,
    final_epochs: int | None = None,
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
            or an absolute value ("5ms", "2MB", "300M"). All but size are of one run on the target, of as many samples
            as it takes at a time: "2400M" on ``v100``, which takes 8, are 300M each. None for no limit.
        passes: Names of passes or configured passes, in order. If the target has fewer than 8 bits on offer, "quantize"
            by name chooses ranges of least error and rounds weights by ``RoundWeights``. With "select-operators", which
            comes first, a supernet is trained on ``train`` (``epochs`` of warm-up, twice as many of search; one of each
            where ``epochs`` is 0), and what was selected for ``epochs`` more, the supernet as its teacher.
        shares: The part of the way to the budget that passes go, by name, from 0 to 1; those that are not named divide
            equally what is left. Where the shares up to a pass are s and the budget is the part r of the original, the
            network behind that pass costs at most r ** s of the original. Each pass is then searched on its own, with
            ``trials`` of its own, on the network that those before it made and that was fine-tuned. A pass that cannot
            go so far goes as far as it can, and one that leaves too much for the others goes further; so does one that
            leaves more than 4 bits everywhere can do, if it can, unless the share of "quantize" is given. None for
            equal shares with "select-operators", and for one search of all passes together without.
        engine: Name of a search engine. Where bits alone are decided, "exact" is told what each layer loses at each of
            its choices (``fxopt.sensitivity``, by gradients on a few samples); its first policy has the least sum.
        trials: Policies to try. The engine's options fit their number (``fxopt.search.fitting_options``); where more
            are asked for in the same ``workdir``, the search goes on with those that it began with.
        objective: What to search for: None for the best score within the budget, or
            ``fxopt.objectives.SmallestCost(0.97, "macs")`` for the smallest cost that keeps a score.
        train: Loader of (input, label) to fine-tune and calibrate on.
        val: Loader of (input, label) to judge a classifier by.
        evaluate: A function of a module, higher is better, in place of ``val``.
        loss: ``loss(output, label)`` for fine-tuning; cross entropy by default.
        epochs: Epochs of fine-tuning after a search: of the network that was cut, in floats; and of the quantized
            one, through its quantizers, where something has fewer than 8 bits or nothing but bits was decided. With
            ``val`` or ``evaluate``, training that ends below the score it started from is taken back: the weights of
            before go on, and the report's line says "taken back" and where it ended. So is training whose loss ends a
            thousand times as high as it began, whatever the score.
        final_epochs: Epochs of the last of these trainings in floats, behind which bits alone are decided; None for
            ``epochs``. With several passes one after the other it pays to train what comes out for longer than what is
            on the way to it.
        learning_rate: Its highest learning rate.
        fine_tune: Its optimizer and schedule, what it learns from the model as it was, or from the network of selected
            operators where that is the better one (class scores, feature maps, attention maps), and when it ends early.
            None for SGD under a cosine that learns class scores, or nothing where there is a ``loss`` of your own.
        trial_epochs: Epochs of fine-tuning in every trial, before it is judged; 0 for none.
        reconstruct: Whether weights behind cut channels are found anew by least squares on ``train``, without training,
            in every trial and at the end; or how.
        seed: Seed of everything random.
        workdir: Folder for the journal and checkpoints; the same call with the same folder resumes. With None nothing
            is kept on disk, and a call that was interrupted starts over. One call at a time works in a folder.
        executor: Where trials run: any of ``concurrent.futures``; None for here. Other processes trace the model anew,
            so model, data and ``evaluate`` have to be picklable; the result is the same as without.
        parallel: Trials at a time.
        verify_on_host: Whether to measure the model before and after in onnxruntime on this machine.
        progress: True shows progress on a terminal; or a reporter of one's own.

    Returns:
        The result.

    Raises:
        InfeasibleError: If no policy is within the budget, before anything is trained; says the least possible.
        JournalError: If another call works in ``workdir``, before anything there is touched; or it cannot be written
            to, or holds another search.
        FxoptError: On bad input; the message says what, where and what to do.
    """
    passes = tuple(passes) if isinstance(passes, Iterator) else passes
    everything = resolve_passes(passes)
    budgets = Budget.parse_all(budget or {})
    engines.load(engine)
    check_whole(1, SearchError, trials=trials, parallel=parallel)
    check_whole(0, SearchError, epochs=epochs, trial_epochs=trial_epochs, seed=seed)
    if final_epochs is not None:
        check_whole(0, SearchError, final_epochs=final_epochs)
    show = reporter(progress)
    device = load_target(target, show)
    check_data(train, val, evaluate)
    check_executor(executor)
    everything = careful(everything, passes, device)
    folder = path_of("workdir", workdir) if workdir is not None else None
    tuning = Tuning(train, epochs, loss, learning_rate, seed, fine_tune, final_epochs)
    wanted = wanted_objective(objective)
    terms = terms_of(objective=wanted, reconstruct=reconstruct, trial_epochs=trial_epochs)
    judging = Judging(val, evaluate, wanted, reconstruct, trial_epochs, (model, example_inputs))
    searching = Searching(engine, trials, seed, executor, parallel, terms)
    course = Course(judging, searching, tuning, folder, show)
    selecting, rest = parted(everything)
    selector = None if selecting is None else Selector(selecting, tuning, rest, folder, show)
    divided = wanted_shares(shares, everything, budgets)
    if selecting is not None:
        check_objective_of_operators(wanted, rest)
    with _kept(folder), seeded(seed):
        job = Job(model, example_inputs, device, rest, budgets, folder, show, divided)
        groups = tuple((one,) for one in rest) if divided is not None and rest else (rest,)
        judge, before = course.rehearse(job, groups[0], selector)
        made = course.run(job, groups, judge)
        job.check_budget(made.graph)
        timed = _measured(course, job, made.graph, example_inputs) if verify_on_host else (None, None)
        report = build_report(
            course,
            job,
            made,
            title=f"{type(model).__name__} for {device.name}",
            before=dataclasses.replace(before, measured_latency_s=timed[0]),
            after=dataclasses.replace(job.metrics(made.graph, made.score), measured_latency_s=timed[1]),
        )
    _storage.explain_other_weights(made.graph)
    policy = job.selected.merged(made.policy)
    return OptimizationResult(made.graph, policy, report, made.search, everything, example_inputs, job.state)


def _kept(folder: Path | None) -> AbstractContextManager[None]:
    """Keeps a folder from other runs; of several processes that train one network the first keeps it for all."""
    return nullcontext() if folder is None or not is_first_process() else occupied(folder, JournalError)


def _measured(course: Course, job: Job, after: fx.GraphModule, inputs: object) -> tuple[float | None, float | None]:
    """Seconds of the original and of the result; a note in their place where onnxruntime cannot compute them."""
    try:
        with during(course.show, _MEASURING):
            found = measure(job.source, inputs, runs=15, peers=(after,))
    except ExportError as failure:
        course.notes.append(f"Not measured in onnxruntime on this machine: {failure}")
        return None, None
    return found.median_s, found.peers[0].median_s
