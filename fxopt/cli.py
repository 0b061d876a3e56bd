"""The command ``fxopt``.

Exit codes: 0 for success, 1 for an error that fxopt explains on stderr, 2 for wrong usage, 130 for Ctrl-C. Whatever
is heavy is imported by the command that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

import fxopt
from fxopt._cli import looking, words
from fxopt._cli.output import INTERRUPTED, emit_json, guarded, session, show
from fxopt._files import MODEL, PAGE

__all__ = ["app", "main"]

app = typer.Typer(
    name="fxopt",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Optimizes PyTorch models for the hardware they will run on, and proves the ONNX file that comes out.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fxopt {fxopt.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hold the options of the command as such."""


@app.command()
@guarded()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Train and search less: shows the way, not the figures.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    as_json: words.Json = False,
    quiet: words.Quiet = False,
) -> None:
    """Show it all: train a digit classifier, optimize, export. Takes a few minutes at most."""
    with session(as_json, quiet) as progress:
        from fxopt import demo as demonstration
        from fxopt._cli.optimizing import tell

        outcome = demonstration.run(out, quick=quick, seed=seed, progress=progress)
    tell(outcome.result, outcome.export, out, as_json=as_json)


app.command()(looking.trace)
app.command()(looking.profile)


@app.command()
@guarded(resumes=True)
def optimize(
    context: typer.Context,
    model: words.MaybeModel = None,
    target: words.MaybeTarget = None,
    budget: words.Budgets = None,
    passes: words.Passes = None,
    shares: words.Shares = None,
    engine: words.Engine = None,
    trials: words.Trials = None,
    epochs: words.Epochs = None,
    final_epochs: words.FinalEpochs = None,
    train: words.Train = None,
    val: words.Val = None,
    evaluate: words.Evaluate = None,
    loss: words.Loss = None,
    learning_rate: words.LearningRate = None,
    optimizer: words.Optimizer = None,
    schedule: words.Schedule = None,
    patience: words.Patience = None,
    distill: words.Distill = None,
    scales: words.Scales = None,
    trial_epochs: words.TrialEpochs = None,
    objective: words.Objective = None,
    reconstruct: words.Reconstruct = None,
    input: words.Inputs = None,  # noqa: A002 (the option's name)
    recipe: words.Recipe = None,
    out: words.Out = None,
    seed: words.Seed = None,
    parallel: words.Parallel = None,
    verify_on_host: words.VerifyOnHost = None,
    as_json: words.Json = False,
    quiet: words.Quiet = False,
) -> None:
    """Optimize a model within budgets, to a proved ONNX file. Run again to resume."""
    from fxopt._cli.recipe import options_of

    options = options_of(context.params)
    with session(as_json, quiet) as progress:
        from fxopt._cli.optimizing import optimize as run
        from fxopt._cli.optimizing import tell

        result, export = run(options, progress)
    tell(result, export, Path(options.out), as_json=as_json)


app.command()(looking.explain)


@app.command("compare-engines")
@guarded(resumes=True)
def compare_engines(
    context: typer.Context,
    model: words.MaybeModel = None,
    engines: words.Engines = None,
    seeds: Annotated[int, typer.Option(min=1, help="Under how many seeds each engine runs.")] = 1,
    recipe: words.Recipe = None,
    target: words.MaybeTarget = None,
    budget: words.Budgets = None,
    passes: words.Passes = None,
    trials: words.Trials = None,
    train: words.Train = None,
    val: words.Val = None,
    evaluate: words.Evaluate = None,
    objective: words.Objective = None,
    reconstruct: words.Reconstruct = None,
    input: words.Inputs = None,  # noqa: A002 (the option's name)
    out: words.Out = None,
    seed: words.Seed = None,
    as_json: words.Json = False,
    quiet: words.Quiet = False,
) -> None:
    """Compare search engines on a model. Run again to resume."""
    from fxopt._cli.recipe import options_of

    options = options_of(context.params)
    with session(as_json, quiet) as progress:
        from fxopt._cli.comparing import compare, comparison_table

        found = compare(options, list(dict.fromkeys(engines or ())), seeds, progress)
    emit_json({"trials": found.trials, "engines": found.rows}) if as_json else show(comparison_table(found))


@app.command()
@guarded(resumes=True)
def calibrate(
    out: Annotated[Path, typer.Option(help="Target file to write, such as my_board.toml.")],
    name: Annotated[
        Optional[str],  # noqa: UP045 (read at run time, by typer)
        typer.Option(help="Name of the target; by default that of the file.", show_default=False),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads inside an operator.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each operator; more take longer and err less.")] = 100,
    quick: Annotated[bool, typer.Option("--quick", help="Measure every second operator alone.")] = False,
    as_json: words.Json = False,
    quiet: words.Quiet = False,
) -> None:
    """Measure this machine and write it as a target file. Uses onnxruntime, no torch. Run again to resume."""
    from fxopt._cli.calibrating import calibrate as measure

    with session(as_json, quiet) as progress:
        made = measure(out, progress, name=name, threads=threads, runs=runs, quick=quick)
    if as_json:
        emit_json({"name": made.name, "path": str(out), "status": made.status, "error": made.error})
        return
    show(f"Wrote {out}: {made.name} is {made.status}. {made.error}")


app.command()(looking.targets)


@app.command()
@guarded()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that optimize wrote, or that was saved.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045 (read at run time, by typer)
        typer.Option(help="Page or data to write, .html or .json; by default report.html there.", show_default=False),
    ] = None,
    as_json: words.Json = False,
    quiet: words.Quiet = False,
) -> None:
    """Show the report of a saved result. Writes it anew, with what compare-engines searched in the same folder."""
    with session(as_json, quiet):
        from fxopt.report import load

        found = load(folder)
        written = found.save(out if out is not None else folder / PAGE)
    if as_json:
        emit_json({"report": found.to_data(), "out": str(written)})
        return
    show(found, f"Report: {written}")


@app.command()
@guarded()
def export(
    model: words.Model,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path(MODEL),
    form: Annotated[str, typer.Option("--format", help="qdq, qdq-native, qonnx or float.")] = "qdq",
    opset: Annotated[
        Optional[int],  # noqa: UP045 (read at run time, by typer)
        typer.Option(help="ONNX opset; by default what the format needs.", show_default=False),
    ] = None,
    saved: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder that optimize wrote for this model; by default none.", show_default=False),
    ] = None,
    bits: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Bits of weights and activations of all layers, such as 8,8 or 4,32.", show_default=False),
    ] = None,
    train: words.Train = None,
    inputs: words.Inputs = None,
    as_json: words.Json = False,
    quiet: words.Quiet = False,
) -> None:
    """Write a model to an ONNX file and prove it. Shows what runs it in onnxruntime."""
    from fxopt._cli.exporting import export as write
    from fxopt._cli.exporting import tell

    with session(as_json, quiet):
        made = write(model, out, form=form, opset=opset, saved=saved, bits=bits, train=train, inputs=inputs or ())
    tell(made, as_json=as_json)


app.command()(looking.measure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after ``fxopt``; those of this process by default.

    Returns:
        The exit code.
    """
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="fxopt")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
