"""The commands that look at models and targets and change nothing: ``trace``, ``profile``, ``explain`` and others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from fxopt._cli.output import emit_json, guarded, session, show
from fxopt._cli.words import Inputs, Json, Model, Quiet, complete_target

__all__ = ["explain", "measure", "profile", "targets", "trace"]


@guarded()
def trace(
    model: Model,
    inputs: Inputs = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045 (read at run time, by typer)
        typer.Option(help="Write the graph: .pt2 with weights, .py or .txt its code.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the graph of a model. Says whether it computes what the model does."""
    with session(as_json, quiet):
        from fxopt._cli import tracing

        found = tracing.trace(model, inputs or (), out)
    emit_json(found) if as_json else show(*tracing.told(found))


@guarded()
def profile(
    model: Model,
    target: Annotated[
        list[str],
        typer.Option(help="Name of a target or a TOML file; may be repeated.", autocompletion=complete_target),
    ],
    inputs: Inputs = None,
    roofline: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw a roofline of each target into an .svg or .png file.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a model costs, layer by layer."""
    with session(as_json, quiet) as progress:
        from fxopt._cli.costs import profile as cost

        found = cost(model, list(dict.fromkeys(target)), inputs or (), progress)
        if roofline is not None:
            found.draw(roofline)
    if as_json:
        emit_json(found.to_data())
        return
    show(*found.tables(), *(f"{one['target']} is {one['status']}: {one['error']}" for one in found.totals))
    show(*found.caveats)
    if roofline is not None:
        show(f"Drawn: {roofline}")


@guarded()
def explain(
    model: Model,
    keep: Annotated[float, typer.Option(help="Fraction of the channels of every group to keep.")] = 1.0,
    residual_stream: Annotated[
        bool, typer.Option("--residual-stream", help="Let the width of a transformer be cut.")
    ] = False,
    attention: Annotated[str, typer.Option(help="Cut attention by whole heads, or by the width of each.")] = "heads",
    inputs: Inputs = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which channels can be cut, and what keeps others."""
    with session(as_json, quiet):
        from fxopt._cli.pruning import explain as tell_groups
        from fxopt.passes import PruneChannels

        step = PruneChannels(residual_stream=residual_stream, attention=attention)
        found, tables = tell_groups(model, keep, step, inputs or ())
    emit_json(found) if as_json else show(*tables)


@guarded()
def measure(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="An .onnx file, a folder that optimize wrote, or a model as MODULE:FUNCTION or file.pt2; "
            "several are measured in turn and compared with the first.",
        ),
    ],
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Show what a target predicts, too; may be repeated.", autocompletion=complete_target),
    ] = None,
    inputs: Inputs = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Rounds; each runs every model.")] = 25,
    threads: Annotated[int, typer.Option(min=1, help="Threads inside an operator.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models in onnxruntime, and show predictions."""
    with session(as_json, quiet) as progress:
        from fxopt._cli import measuring

        wanted = list(dict.fromkeys(target or ()))
        found = measuring.measure(models, wanted, inputs or (), progress, batch=batch, runs=runs, threads=threads)
    emit_json(found) if as_json else show(*measuring.told(found))


@guarded()
def targets(
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            help="A target or a TOML file, to be told everything about it.",
            show_default=False,
            autocompletion=complete_target,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the targets, or tell everything about one."""
    from fxopt import targets as known
    from fxopt._cli.costs import list_targets, targets_table

    if name is not None:
        text = known.describe(name)
        emit_json({"name": name, "description": text}) if as_json else show(text)
        return
    found = list_targets()
    emit_json(found) if as_json else show(targets_table(found))
