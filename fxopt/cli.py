"""The command ``fxopt``.

Exit codes: 0 for success, 1 for an error that fxopt explains on stderr, 2 for wrong usage, 130 for Ctrl-C. Whatever
is heavy is imported by the command that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import fxopt
from fxopt._cli import looking
from fxopt._cli.output import INTERRUPTED, emit_json, guarded, session, show
from fxopt._cli.words import (
    Evaluate,
    Inputs,
    Json,
    MaybeModel,
    MaybeTarget,
    Model,
    Objective,
    Passes,
    Quiet,
    Reconstruct,
    Train,
    Val,
    complete_engine,
)

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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show it all: train a digit classifier, optimize, export. Takes a few minutes at most."""
    with session(as_json, quiet) as progress:
        from fxopt import demo as demonstration
        from fxopt._cli.optimizing import tell

        outcome = demonstration.run(out, quick=quick, seed=seed, progress=progress)
    tell(outcome.result, outcome.export, out, as_json=as_json, onnx_accuracy=outcome.onnx_accuracy)
    if not as_json:
        show(f"Accuracy of the ONNX file in onnxruntime: {outcome.onnx_accuracy:.2%}")


app.command()(looking.trace)
app.command()(looking.profile)


@app.command()
@guarded(resumes=True)
def optimize(
    model: MaybeModel = None,
    target: MaybeTarget = None,
    budget: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="metric=limit, such as latency=60%, size=2MB or macs=300M; may be repeated."),
    ] = None,
    passes: Passes = None,
    share: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="pass=part of the way to the budgets, such as quantize=50%; may be repeated."),
    ] = None,
    engine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Search engine; by default evolution.", show_default=False, autocompletion=complete_engine),
    ] = None,
    trials: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Policies to try; by default 48.", show_default=False),
    ] = None,
    epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Epochs of fine-tuning; by default 2.", show_default=False),
    ] = None,
    train: Train = None,
    val: Val = None,
    evaluate: Evaluate = None,
    loss: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODULE:FUNCTION", help="Takes output and label, gives a loss; by default cross entropy."),
    ] = None,
    learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Highest learning rate of the fine-tuning; by default 0.02.", show_default=False),
    ] = None,
    optimizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Optimizer of the fine-tuning: sgd, the default, or adamw.", show_default=False),
    ] = None,
    schedule: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Its learning rate: cosine, the default, step, one-cycle or constant.", show_default=False),
    ] = None,
    patience: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Epochs without a better score before it ends; by default never.", show_default=False),
    ] = None,
    distill: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What it learns from the original: none, or such as logits=0.5,features=1,attention=1."),
    ] = None,
    scales: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Scales of quantizers in training: lsq, the default, pact or fixed.", show_default=False),
    ] = None,
    trial_epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Epochs of fine-tuning in every trial; by default 0.", show_default=False),
    ] = None,
    objective: Objective = None,
    reconstruct: Reconstruct = None,
    inputs: Inputs = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="TOML file with the same options; those given here come first.", show_default=False),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for results and journal; by default fxopt-out.", show_default=False),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Seed of everything random; by default 0.", show_default=False),
    ] = None,
    parallel: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Trials at a time; by default 1.", show_default=False),
    ] = None,
    verify_on_host: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Measure before and after in onnxruntime here; by default so.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Optimize a model within budgets, to a proved ONNX file. Run again to resume."""
    from fxopt._cli.recipe import Options, parse_budgets, parse_shares, read_recipe, split_passes

    given: dict[str, Any] = {
        "model": model,
        "target": target,
        "budget": parse_budgets(budget or ()),
        "passes": split_passes(passes) if passes is not None else None,
        "shares": parse_shares(share or ()),
        "engine": engine,
        "trials": trials,
        "epochs": epochs,
        "train": train,
        "val": val,
        "evaluate": evaluate,
        "loss": loss,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "schedule": schedule,
        "patience": patience,
        "distill": distill,
        "scales": scales,
        "trial_epochs": trial_epochs,
        "objective": objective,
        "reconstruct": reconstruct,
        "input": tuple(inputs or ()),
        "out": str(out) if out is not None else None,
        "seed": seed,
        "parallel": parallel,
        "verify_on_host": verify_on_host,
    }
    options = (read_recipe(recipe) if recipe is not None else Options()).changed(given)
    with session(as_json, quiet) as progress:
        from fxopt._cli.optimizing import optimize as run
        from fxopt._cli.optimizing import tell

        result, export = run(options, progress)
    tell(result, export, Path(options.out), as_json=as_json)


app.command()(looking.explain)


@app.command("compare-engines")
@guarded(resumes=True)
def compare_engines(
    model: MaybeModel = None,
    engine: Annotated[
        Optional[list[str]],  # noqa: UP045 (read at run time, by typer)
        typer.Option(
            help="A search engine; may be repeated; by default all that are installed.",
            show_default=False,
            autocompletion=complete_engine,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Under how many seeds each engine runs.")] = 1,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="TOML file with the options of optimize; those given here come first.", show_default=False),
    ] = None,
    target: MaybeTarget = None,
    budget: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="metric=limit, such as latency=60%; may be repeated."),
    ] = None,
    passes: Passes = None,
    trials: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Policies that each engine may try; by default 48.", show_default=False),
    ] = None,
    train: Train = None,
    val: Val = None,
    evaluate: Evaluate = None,
    objective: Objective = None,
    reconstruct: Reconstruct = None,
    inputs: Inputs = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the journals; by default fxopt-out.", show_default=False),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="The first of the seeds; by default 0.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare search engines on a model. Run again to resume."""
    from fxopt._cli.recipe import Options, parse_budgets, read_recipe, split_passes

    given: dict[str, Any] = {
        "model": model,
        "target": target,
        "budget": parse_budgets(budget or ()),
        "passes": split_passes(passes) if passes is not None else None,
        "trials": trials,
        "train": train,
        "val": val,
        "evaluate": evaluate,
        "objective": objective,
        "reconstruct": reconstruct,
        "input": tuple(inputs or ()),
        "out": str(out) if out is not None else None,
        "seed": seed,
    }
    options = (read_recipe(recipe) if recipe is not None else Options()).changed(given)
    with session(as_json, quiet) as progress:
        from fxopt._cli.comparing import compare, comparison_table

        found = compare(options, list(dict.fromkeys(engine or ())), seeds, progress)
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
    as_json: Json = False,
    quiet: Quiet = False,
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the report of a saved result. Writes it anew, with what compare-engines searched in the same folder."""
    with session(as_json, quiet):
        from fxopt.report import load

        found = load(folder)
        written = found.save(out if out is not None else folder / "report.html")
    if as_json:
        emit_json({"report": found.to_data(), "out": str(written)})
        return
    show(found, f"Report: {written}")


@app.command()
@guarded()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.onnx"),
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
    train: Train = None,
    inputs: Inputs = None,
    as_json: Json = False,
    quiet: Quiet = False,
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
