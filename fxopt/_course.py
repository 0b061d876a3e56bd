"""The way of a network from what can be decided to what was made of it: judge, search, build, train."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx, nn

from fxopt._applying import Stages
from fxopt._files import JOURNAL
from fxopt._job import Job
from fxopt._precision import Quickest
from fxopt._selecting import Selector, bits_are_left
from fxopt._tuning import Tuning
from fxopt.data import Loader
from fxopt.decisions import Constraint, Policy, SearchSpace, format_score
from fxopt.errors import InfeasibleError
from fxopt.evaluate import Evaluator, Reconstruction, apply_policy
from fxopt.graph.edit import own_copy
from fxopt.nas._parallel import is_first_process
from fxopt.objectives import Objective
from fxopt.passes import Quantize, SelectOperators, TunablePass
from fxopt.passes.quantize import CALIBRATION_META
from fxopt.progress import Progress
from fxopt.report import Metrics, PassLine
from fxopt.search import SearchResult, engines, options_of_search, run_search

__all__ = ["Course", "Judging", "Outcome", "Searching", "rehearsed"]

_BEFORE = "The model before the search"
_POOR = 0.6
"""The part of the original's score below which a trained selected network has hardly learnt."""
_POORLY_SELECTED = (
    "What was selected has {} after its training, the original {}: training hardly worked, so the selection means "
    "little. Lower the learning rate (networks without batch norm may need a tenth), train for more epochs, or raise "
    "the budget."
)
_AGAIN = (
    "{} was searched twice: the first policy left too little to {} behind it. The second keeps the budget by itself."
)
_UNTRAINED = "What was selected has {}, the original {}: it was not trained. Give epochs, or train what comes out."


@dataclass(frozen=True)
class Judging:
    """How networks are judged.

    Attributes:
        val: Batches to judge by, or None.
        evaluate: A function of a module in place of them, or None.
        wanted: What is searched for.
        reconstruct: How weights behind cut channels are found anew.
        trial_epochs: Epochs of training in every trial.
        source: The model and its example inputs, for trials in other processes.
    """

    val: Loader | None
    evaluate: Callable[[nn.Module], float] | None
    wanted: Objective
    reconstruct: bool | Reconstruction
    trial_epochs: int
    source: tuple[nn.Module, object]

    @property
    def by_data(self) -> bool:
        """Whether scores say how good a network is; without data they say how like the original it is."""
        return self.val is not None or self.evaluate is not None

    def of(self, job: Job, passes: tuple[TunablePass, ...], tuning: Tuning) -> Evaluator:
        """What scores the policies of some passes about a job's graph."""
        return Evaluator(
            job.graph,
            passes,
            train=tuning.train,
            val=self.val,
            evaluate=self.evaluate,
            reward=self.wanted.reward(job.target, job.workload, job.original),
            seed=tuning.seed,
            source=self.source,
            made_by=job.made_by,
            reconstruct=self.reconstruct,
            training=tuning.for_trials(self.trial_epochs),
        )


def rehearsed(
    job: Job, passes: tuple[TunablePass, ...], judging: Judging, tuning: Tuning, selector: Selector | None
) -> tuple[Evaluator, float, float | None]:
    """Find what can be decided, and see that it can be judged; before anything is trained, that the model can.

    Returns:
        The judge of these passes, the score of the network that they start from, and that of the model; None without a
        selector, where these are one.

    Raises:
        FxoptError: If judge, data or loss do not fit, the network is not what the objective starts from, or there is
            nothing to select.
    """
    original = None
    if selector is not None:
        model = Evaluator(job.source, (), val=judging.val, evaluate=judging.evaluate, seed=tuning.seed)
        original = model.rehearse()
        judging.wanted.check(original, _BEFORE)
        tuning.rehearse(job.source)
    job.decide(selector)
    judge = judging.of(job, passes, tuning)
    first = judge.rehearse()
    judging.wanted.check(first, _BEFORE if original is None else "What was selected")
    return judge, first, original


@dataclass(frozen=True)
class Searching:
    """How policies are searched for.

    Attributes:
        engine: Name of the engine.
        trials: Policies to try.
        seed: The engine's seed.
        executor: Where trials run, or None.
        parallel: Trials at a time.
        terms: What scores depend on besides policy, model and judge.
    """

    engine: str
    trials: int
    seed: int
    executor: Executor | None
    parallel: int
    terms: Mapping[str, str]

    def run(
        self,
        job: Job,
        judge: Evaluator,
        space: SearchSpace,
        constraint: Constraint | None,
        journal: Path | None,
        show: Progress,
    ) -> SearchResult | None:
        """The search; None if there is nothing to decide."""
        if not len(space):
            return None
        task = "search"
        options = options_of_search(self.engine, space, self.trials, journal) | job.told(self.engine, judge)
        engine = engines.create(self.engine, space, constraint, self.seed, **options)
        show.start(task, self.trials)
        found = run_search(
            engine,
            judge,
            self.trials,
            journal=journal,
            executor=self.executor,
            parallel=self.parallel,
            context=job.context(judge, self.terms),
            progress=lambda state: show.advance(
                task, 1, f"best {state.best.score:.4f}" if state.best and state.best.score is not None else ""
            ),
        )
        show.finish(task)
        return found


@dataclass
class Outcome:
    """What came of a course.

    Attributes:
        graph: The last network.
        policy: All decisions of the course.
        score: The score of the last network.
        score_name: What judged it.
        found: The searches, in order; their policies hold what earlier ones have decided, too.
        note: What to know of the last network, or nothing.
    """

    graph: fx.GraphModule
    policy: Policy
    score: float
    score_name: str
    found: tuple[SearchResult, ...]
    note: str

    @property
    def search(self) -> SearchResult | None:
        """The last search, if there was one."""
        return self.found[-1] if self.found else None


@dataclass
class Course:
    """From what can be decided to the network that was decided for.

    Attributes:
        judging: How networks are judged.
        searching: How policies are searched for.
        tuning: How networks are trained.
        folder: Where journals and checkpoints are; None for nowhere.
        show: Told how far everything is.
        steps: What was done, and what came of it.
        notes: What a reader should know of it.
        original: The score of the given model, once it was rehearsed; None before, or where nothing judges it.
    """

    judging: Judging
    searching: Searching
    tuning: Tuning
    folder: Path | None
    show: Progress
    steps: list[PassLine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    original: float | None = field(default=None, init=False)

    def rehearse(
        self, job: Job, passes: tuple[TunablePass, ...], selector: Selector | None
    ) -> tuple[Evaluator, Metrics]:
        """See that the model can be judged and trained, before anything is searched.

        Args:
            job: What is found here to decide about.
            passes: Those that are searched first.
            selector: Chooses operators before them; None if nothing does.

        Returns:
            The judge of these passes, and what the given model is worth and costs.

        Raises:
            FxoptError: If judge, data or loss do not fit, or the model is not what the objective starts from.
        """
        judge, first, original = rehearsed(job, passes, self.judging, self.tuning, selector)
        before = job.metrics(job.source, first if original is None else original)
        self.original = before.accuracy
        if job.supernet is not None:
            job.learn_from_better(before.accuracy, first, known=self.judging.by_data)
            line = f"operators: {len(job.selected)} blocks, entropy {job.supernet.epochs[-1].entropy:.2f}"
            self.steps.append(PassLine(SelectOperators.name, line, first, job.metrics(job.graph, first)))
            # Alone it is trained later.
            if job.passes:
                self._tell_if_poor(judge.score_name, first, before.accuracy)
        self.tuning.rehearse(job.graph)
        return judge, before

    def run(self, job: Job, groups: tuple[tuple[TunablePass, ...], ...], judge: Evaluator) -> Outcome:
        """Decide group after group: search, build and train, and go on from the network that this gives.

        Args:
            job: What can be decided.
            groups: Passes that are searched together, in order; all of the job's.
            judge: Judges the first of them.
        """
        found: list[SearchResult] = []
        # What was selected is trained already where other passes follow.
        made = [Quickest(job.graph, Policy({}), "")] if len(job.operators) and job.passes else []
        policy = Policy({})
        for number, group in enumerate(groups):
            rest = tuple(one for later in groups[number + 1 :] for one in later)
            space, constraint = job.part(group[0]) if rest else (job.space, job.constraint)
            if not len(space) and (made or rest):
                continue
            if number:
                judge = self.judging.of(job, group, self.tuning)
                judge.rehearse()
            # Which network a later search is about depends on what an earlier one found.
            journal = self._journal(f"journal-{group[0].name}-{job.digest}.jsonl" if number else JOURNAL)
            search = self.searching.run(job, judge, space, constraint, journal, self.show)
            if search is not None and rest:
                search = self._enough(job, judge, group[0], rest, search)
            found += [] if search is None else [_completed(search, policy)]
            own = space.default() if search is None else search.policy
            if search is not None:
                self.judging.wanted.check(judge.score(own), "The best policy found")
            built = self._built(job, group, own, judge, final=bits_are_left(job.space, group), trained=bool(made))
            made.append(built)
            policy = policy.merged(built.policy)
            if rest:
                job = job.after(built.graph, group[0].with_policy(built.policy), rest)
        known = self.steps[-1].accuracy if self.steps else None
        end = made[-1]
        score = judge.judge(end.graph) if known is None else known
        if len(job.operators) and not job.passes:
            self._tell_if_poor(judge.score_name, score, self.original)
        return Outcome(end.graph, policy, score, judge.score_name, tuple(found), end.note)

    def _enough(
        self, job: Job, judge: Evaluator, one: TunablePass, rest: tuple[TunablePass, ...], search: SearchResult
    ) -> SearchResult:
        """A search behind which the other passes can do the rest: the one given, or a second that leaves them nothing.

        Raises:
            InfeasibleError: If they cannot, and the pass cannot keep the limits by itself.
        """
        short = job.short_behind(search.policy, one, rest)
        if short is None:
            return search
        try:
            alone = job.alone(one)
        except InfeasibleError:
            raise short from None
        journal = self._journal(f"journal-{one.name}-alone-{job.digest}.jsonl")
        again = self.searching.run(job, judge, alone.space, alone, journal, self.show) or search
        short = job.short_behind(again.policy, one, rest)
        if short is not None:
            raise short
        self.notes.append(_AGAIN.format(one.name, " and ".join(later.name for later in rest)))
        return again

    def _tell_if_poor(self, name: str, selected: float, original: float | None) -> None:
        """Note where what was selected is far from as good as the original."""
        if self.judging.by_data and original is not None and original > 0.0 and selected < _POOR * original:
            told = _POORLY_SELECTED if self.tuning.epochs else _UNTRAINED
            self.notes.append(told.format(format_score(name, selected), format_score(name, original)))

    def _journal(self, name: str) -> Path | None:
        """Where a search's journal is; of several processes that search alike the first keeps it."""
        return None if self.folder is None or not is_first_process() else self.folder / name

    def _built(
        self,
        job: Job,
        passes: tuple[TunablePass, ...],
        policy: Policy,
        judge: Evaluator,
        *,
        final: bool,
        trained: bool,
    ) -> Quickest:
        """The graph that a policy makes, fine-tuned and quantized; in floats only if that is not as it was trained."""
        floats: list[fx.GraphModule] = []
        train = self.tuning.train

        def between(graph: fx.GraphModule) -> None:
            cut = [one.name for one in passes if not isinstance(one, Quantize)]
            line = job.step(", ".join(cut), _changes_in(job.space, policy), graph, judge) if cut else None
            if line is not None:
                self.steps.append(line)
            if Stages.of(policy).in_floats and (cut or not trained):
                self._tune(job, graph, policy, judge, line, on_grids=False, final=final)
            floats.append(graph)

        made = apply_policy(
            own_copy(job.graph),
            passes,
            policy,
            calibration=train,
            reconstruct=self.judging.reconstruct,
            between=between,
        ).eval()
        found = job.not_slower(made, floats[0], policy, train)
        source = found.graph.meta.get(CALIBRATION_META, {}).get("source")
        layers, line = len(found.policy.of_kind("bits")), None
        if source is None and layers:
            line = job.step("quantize", f"0 of {layers} layers: floats were found better", found.graph, judge)
        elif source is not None and CALIBRATION_META not in job.graph.meta:
            line = job.step("quantize", f"calibrated on: {source}", found.graph, judge)
        if line is not None:
            self.steps.append(line)
        if Stages.of(found.policy).on_grids:
            self._tune(job, found.graph, found.policy, judge, line, on_grids=True, final=final)
        return found

    def _tune(
        self,
        job: Job,
        graph: fx.GraphModule,
        policy: Policy,
        judge: Evaluator,
        before: PassLine | None,
        *,
        on_grids: bool,
        final: bool,
    ) -> None:
        """Train a graph; take that back if its loss has diverged, or it ends below its start where something judges.

        ``before`` tells of the graph as it is; None if it was not judged yet.
        """
        step = "fine-tune quantized" if on_grids else "fine-tune"
        name = f"fine-tune-{'bits-' if on_grids else ''}{job.digest_with(policy)}"
        kept: dict[str, torch.Tensor] = {}
        if self.tuning.epochs_of(on_grids=on_grids, final=final):
            if self.judging.by_data:
                before = before or job.step(step, "", graph, judge)
            kept = {key: value.clone() for key, value in graph.state_dict().items()}
        history = self.tuning(
            graph,
            job.teacher,
            on_grids=on_grids,
            final=final,
            judge=judge.judge,
            checkpoint=None if self.folder is None else self.folder / name,
            show=self.show,
        )
        if history is None:
            return
        line = job.step(step, self.tuning.told(history, on_grids=on_grids), graph, judge)
        told = ""
        if history.diverged:
            told = f"its loss went from {history.first_loss:.3g} to {history.loss[-1]:.3g}; lower the learning rate"
        elif self.judging.by_data and before is not None and line.accuracy is not None and _below(line, before):
            told = f"it ended at {format_score(judge.score_name, line.accuracy)}"
        if told:
            graph.load_state_dict(kept)
            found = f"{line.detail}; taken back, {told}"
            line = dataclasses.replace(before or job.step(step, "", graph, judge), name=step, detail=found)
        self.steps.append(line)


def _below(line: PassLine, before: PassLine) -> bool:
    """Whether a score is no number, or less than it was."""
    now, then = line.accuracy, before.accuracy
    return now is not None and then is not None and (math.isnan(now) or now < then)


def _completed(search: SearchResult, decided: Policy) -> SearchResult:
    """A search with policies that hold what was decided before it."""
    trials = tuple(dataclasses.replace(trial, policy=decided.merged(trial.policy)) for trial in search.trials)
    return dataclasses.replace(search, trials=trials, best=trials[search.trials.index(search.best)])


def _changes_in(space: SearchSpace, policy: Policy) -> str:
    """How many of the decisions that are not about bits differ from the original."""
    others = [decision for decision in space if decision.kind != "bits"]
    changed = sum(policy.get(decision.key, decision.default) != decision.default for decision in others)
    return f"{changed} of {len(others)} decisions"
