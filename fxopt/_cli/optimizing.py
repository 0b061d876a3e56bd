"""``fxopt optimize`` and ``fxopt demo``: running them and telling what came of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt._cli.checking import check_names
from fxopt._cli.choosing import fine_tuning_of, objective_of, reconstruction_of
from fxopt._cli.loading import call, load_function, load_model
from fxopt._cli.output import emit_json, show
from fxopt._files import MODEL, PAGE, write_text
from fxopt.errors import FxoptError
from fxopt.progress import Progress

if TYPE_CHECKING:
    from fxopt._cli.options import Options
    from fxopt.api import OptimizationResult
    from fxopt.export import ExportReport

__all__ = ["optimize", "tell"]

_OPTIONS_FILE = "options.json"


def optimize(options: Options, progress: Progress) -> tuple[OptimizationResult, ExportReport]:
    """Optimize, save and export to the folder ``options.out``.

    The result is saved before it is exported: it is not lost if the export is refused. The options are written with it,
    never by a run that was refused: they always are those of the result that lies there.

    Raises:
        FxoptError: On bad input; the message says what to do.
    """
    if options.model is None:
        raise FxoptError("There is no model to optimize; give MODULE:FUNCTION, or model = ... in the recipe.")
    check_names(options)
    out = Path(options.out)
    from fxopt import api
    from fxopt.export._export import check_types

    model, example = load_model(options.model, options.input)
    check_types(model)
    val = _made(options.val)
    result = api.optimize(
        model,
        example,
        target=options.target,
        budget=options.budget,
        passes=options.passes,
        shares=options.shares or None,
        engine=options.engine,
        trials=options.trials,
        train=_made(options.train),
        val=val,
        evaluate=load_function(options.evaluate) if options.evaluate is not None else None,
        loss=load_function(options.loss) if options.loss is not None else None,
        epochs=options.epochs,
        final_epochs=options.final_epochs,
        trial_epochs=options.trial_epochs,
        learning_rate=options.learning_rate,
        objective=objective_of(options.objective),
        reconstruct=reconstruction_of(options.reconstruct),
        fine_tune=fine_tuning_of(options),
        seed=options.seed,
        parallel=options.parallel,
        verify_on_host=options.verify_on_host,
        workdir=out,
        progress=progress,
    )
    result.save(out)
    write_text(out / _OPTIONS_FILE, json.dumps(dataclasses.asdict(options), indent=1))
    export = result.export(out / MODEL, val=val, progress=progress)
    result.save_report(out)
    return result, export


def tell(result: OptimizationResult, export: ExportReport, out: Path, *, as_json: bool) -> None:
    """Print what came of it.

    Args:
        result: The optimization's result.
        export: What was exported.
        out: The folder with everything.
        as_json: Whether to print JSON only.
    """
    report = result.report
    if as_json:
        emit_json({"report": json.loads(report.to_json()), "out": str(out), "onnx": str(export.path)})
        return
    show(report.table(), report.steps_table(), report.slow_table(), report.verdict, "")
    trust = f"{report.target.name} is {report.target.status}: {report.target.error}"
    show(trust, *report.target.caveats, *report.notes, *export.notes)
    show(f"ONNX: {export}.", f"Report: {out / PAGE}")


def _made(reference: str | None) -> Any:
    return None if reference is None else call(reference)
