"""``fxopt compare-engines``: several engines on one model, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt._cli.checking import check_names
from fxopt._cli.choosing import fine_tuning_of, objective_of, reconstruction_of
from fxopt._cli.loading import call, load_function, load_model
from fxopt._cli.output import table
from fxopt.errors import FxoptError, SearchError
from fxopt.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from fxopt._cli.options import Options
    from fxopt.search import Comparison

__all__ = ["compare", "comparison_table"]


def compare(options: Options, names: Sequence[str], seeds: int, progress: Progress) -> Comparison:
    """Compare engines on a model, each with ``options.trials`` trials under each of so many seeds.

    Raises:
        FxoptError: On bad input; the message says what to do.
    """
    if options.model is None:
        raise FxoptError("There is no model to search; give MODULE:FUNCTION, or model = ... in the recipe.")
    check_names(options)
    from fxopt import search
    from fxopt._arguments import careful, check_data, resolve_passes, terms_of, wanted_objective, wanted_shares
    from fxopt._course import Judging, rehearsed
    from fxopt._host import load_target
    from fxopt._job import Job
    from fxopt._selecting import Selector, parted
    from fxopt._tuning import Tuning
    from fxopt.decisions import Budget

    for name in names:
        search.engines.load(name)
    model, example = load_model(options.model, options.input)
    folder = Path(options.out)
    target = load_target(options.target, progress)
    everything = careful(resolve_passes(options.passes), options.passes, target)
    train, val, evaluate = _data(options)
    check_data(train, val, evaluate)
    loss = None if options.loss is None else load_function(options.loss)
    how = fine_tuning_of(options)
    tuning = Tuning(train, options.epochs, loss, options.learning_rate, options.seed, how, options.final_epochs)
    selecting, passes = parted(everything)
    selector = None if selecting is None else Selector(selecting, tuning, passes, folder, progress)
    budgets = Budget.parse_all(options.budget)
    shares = wanted_shares(options.shares or None, everything, budgets)
    job = Job(model, example, target, passes, budgets, folder, progress, shares)
    wanted = wanted_objective(objective_of(options.objective))
    reconstruct = reconstruction_of(options.reconstruct)
    judging = Judging(val, evaluate, wanted, reconstruct, options.trial_epochs, (model, example))
    judge, _, _ = rehearsed(job, passes, judging, tuning, selector)
    if not len(job.space):
        raise SearchError("The passes find nothing to decide in this model; name others with --passes.")
    chosen = list(names) or search.installed()
    told = {name: job.told(name, judge) for name in chosen}
    task = "comparing"
    progress.start(task, len(chosen) * seeds * options.trials)
    found = search.compare(
        job.space,
        judge,
        options.trials,
        constraint=job.constraint,
        names=chosen,
        seeds=range(options.seed, options.seed + seeds),
        options={name: known for name, known in told.items() if known},
        folder=folder,
        context=job.context(
            judge, terms_of(objective=wanted, reconstruct=reconstruct, trial_epochs=options.trial_epochs)
        ),
        progress=lambda name, seed, _: progress.advance(task, 1, f"{name}, seed {seed}"),
    )
    progress.finish(task)
    return found


def _data(options: Options) -> tuple[Any, Any, Any]:
    """The loaders and the function that options name; None for what they do not."""
    train, val = (None if one is None else call(one) for one in (options.train, options.val))
    return train, val, None if options.evaluate is None else load_function(options.evaluate)


def comparison_table(found: Comparison) -> Table:
    """The engines side by side, the best first."""
    rows = [
        [
            row["engine"],
            f"{row['score']:.5g}",
            f"{row['spread']:.2g}",
            "yes" if row["feasible"] else "no",
            f"{row['evaluations']:.0f}",
            f"{row['engine_cpu_s']:.2f}",
        ]
        for row in found.rows
    ]
    columns = ["engine", "best score", "spread", "within budget", "evaluations", "engine CPU s"]
    seeds = len({run.seed for run in found.runs})
    return table(f"{found.trials} trials each, mean of {seeds} seed{'s' if seeds > 1 else ''}", columns, rows)
