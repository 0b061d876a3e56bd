"""How long a model takes in onnxruntime on this machine.

Spinning is off, the batch is fixed and the threads are few. With one thread the clock is the processor time of the
calling thread, which other load on the machine disturbs little; with more it is wall time. Models that are compared
run in turn, round by round, each once untimed to warm the caches, and the ratio is taken within each round, for times
drift together.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fxopt.errors import DataError, ExportError
from fxopt.export._clock import interleave, runner
from fxopt.export._export import export_onnx

__all__ = ["Measurement", "Timing", "measure"]

Model: TypeAlias = str | os.PathLike[str] | nn.Module
"""A file, or a module or graph that is exported first."""


@dataclass(frozen=True)
class Timing:
    """Time of one inference of a batch.

    Attributes:
        name: The file's name, or the class of the module.
        median_s: Median over the rounds.
        q25_s: First quartile.
        q75_s: Third quartile.
        ratio: Median over the rounds of this model's time by that of the model measured: 2 means twice as slow.
        ratio_q25: First quartile of that ratio.
        ratio_q75: Third quartile of that ratio.
    """

    name: str
    median_s: float
    q25_s: float
    q75_s: float
    ratio: float
    ratio_q25: float
    ratio_q75: float


@dataclass(frozen=True)
class Measurement:
    """Measured time of a model, and of others beside it.

    Attributes:
        median_s: Median time of one inference of a batch.
        q25_s: First quartile.
        q75_s: Third quartile.
        peers: The other models, in the order given.
        batch: Samples in a batch.
        threads: Threads inside an operator.
        runs: Rounds.
        clock: "thread" (processor time of the calling thread) or "wall".
    """

    median_s: float
    q25_s: float
    q75_s: float
    peers: tuple[Timing, ...]
    batch: int
    threads: int
    runs: int
    clock: str


def measure(
    model: Model,
    example_inputs: object = None,
    *,
    batch: int = 1,
    runs: int = 25,
    threads: int = 1,
    peers: Sequence[Model] = (),
) -> Measurement:
    """Measure a model in onnxruntime, alone or against others.

    Args:
        model: An ONNX file, or a module or graph, which is exported to a temporary file.
        example_inputs: As for ``fxopt.trace``. May be left out for a file whose inputs have fixed sizes but for the
            batch; it then gets random numbers.
        batch: Samples in a batch. A model with a fixed batch keeps its own.
        runs: Rounds; each runs every model once.
        threads: Threads inside an operator.
        peers: Models to measure in the same rounds.

    Raises:
        ExportError: If a file cannot be loaded or run, or an option is out of range.
        DataError: If a module comes without example inputs, or a file whose input sizes are open.
    """
    if min(batch, runs, threads) < 1:
        raise ExportError(f"batch, runs and threads have to be at least 1, got {batch}, {runs} and {threads}.")
    with tempfile.TemporaryDirectory(prefix="fxopt-") as folder:
        models = [model, *peers]
        files = [_as_file(one, example_inputs, Path(folder, f"{index}.onnx")) for index, one in enumerate(models)]
        runners = [runner(file, example_inputs, batch, threads) for file in files]
    clock = "thread" if threads == 1 else "wall"
    samples = interleave(runners, runs, time.thread_time if clock == "thread" else time.perf_counter)
    names = [one.__class__.__name__ if isinstance(one, nn.Module) else Path(one).name for one in models]
    timings = [_timing(name, times, samples[0]) for name, times in zip(names, samples, strict=True)]
    own = timings[0]
    return Measurement(own.median_s, own.q25_s, own.q75_s, tuple(timings[1:]), batch, threads, runs, clock)


def _as_file(model: Model, example_inputs: object, scratch: Path) -> Path:
    if not isinstance(model, nn.Module):
        return Path(model)
    if example_inputs is None:
        raise DataError(f"example_inputs is missing; a {type(model).__name__} is exported before it is measured.")
    return export_onnx(model, scratch, example_inputs, check=False).path


def _timing(name: str, times: NDArray[np.float64], reference: NDArray[np.float64]) -> Timing:
    q25, median, q75 = (float(value) for value in np.quantile(times, (0.25, 0.5, 0.75)))
    low, middle, high = (float(value) for value in np.quantile(times / reference, (0.25, 0.5, 0.75)))
    return Timing(name, median, q25, q75, middle, low, high)
