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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fxopt.errors import DataError, ExportError
from fxopt.export._export import export_onnx
from fxopt.export._runtime import make_session
from fxopt.graph import normalize

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Measurement", "Timing", "feed_for", "measure"]

Model: TypeAlias = str | os.PathLike[str] | nn.Module
"""A file, or a module or graph that is exported first."""

_WARM_UP = 3
_SHORTEST_SAMPLE_S = 1e-3
_MOST_REPEATS = 200


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
        runners = [_runner(file, example_inputs, batch, threads) for file in files]
    clock = "thread" if threads == 1 else "wall"
    samples = _interleave(runners, runs, time.thread_time if clock == "thread" else time.perf_counter)
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


def feed_for(
    session: onnxruntime.InferenceSession, file: Path, example_inputs: object, batch: int
) -> dict[str, NDArray[Any]]:
    """What to run a session with: the example inputs at a batch, or random numbers if there are none.

    Raises:
        DataError: If the example inputs do not fit the file, or there are none and the file leaves sizes open.
    """
    wanted = session.get_inputs()
    if example_inputs is None:
        return {value.name: _random_input(value, batch, file) for value in wanted}
    fixed = next((value.shape[0] for value in wanted if value.shape and isinstance(value.shape[0], int)), batch)
    leaves = normalize(example_inputs).with_batch(fixed).leaves()
    arrays = [leaf.detach().cpu().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len(arrays) != len(wanted):
        raise DataError(f"{file} takes {len(wanted)} inputs and example_inputs holds {len(arrays)} tensors.")
    return {value.name: array for value, array in zip(wanted, arrays, strict=True)}


def _runner(file: Path, example_inputs: object, batch: int, threads: int) -> Callable[[], Any]:
    session = make_session(file, threads=threads)
    feed = feed_for(session, file, example_inputs, batch)
    try:
        session.run(None, feed)
    except Exception as failure:
        raise ExportError(f"onnxruntime cannot run {file} at batch {batch}: {failure}") from failure
    return lambda: session.run(None, feed)


_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


def _random_input(value: Any, batch: int, file: Path) -> NDArray[Any]:
    size = [batch if index == 0 and not isinstance(extent, int) else extent for index, extent in enumerate(value.shape)]
    dtype = _NUMPY_TYPES.get(value.type)
    if dtype is None or not all(isinstance(extent, int) for extent in size):
        raise DataError(f"Input {value.name!r} of {file} is {value.type}{value.shape}; give example_inputs.")
    if not np.issubdtype(dtype, np.floating):
        return np.zeros(size, dtype)
    return np.random.default_rng(0).standard_normal(size).astype(dtype)


def _interleave(runners: Sequence[Callable[[], Any]], runs: int, clock: Callable[[], float]) -> NDArray[np.float64]:
    """Seconds of one run, shape (models, runs)."""
    repeats = [_repeats(run, clock) for run in runners]
    samples = np.zeros((len(runners), runs))
    for round_ in range(runs):
        for turn in range(len(runners)):
            index = (round_ + turn) % len(runners)
            if len(runners) > 1:
                # The model before has filled the caches; in use a model follows itself.
                runners[index]()
            samples[index, round_] = _time(runners[index], repeats[index], clock)
    return samples


def _repeats(run: Callable[[], Any], clock: Callable[[], float]) -> int:
    """How many runs make up one sample that the clock resolves well."""
    for _ in range(_WARM_UP):
        run()
    once = min(_time(run, 1, clock) for _ in range(_WARM_UP))
    return int(np.clip(np.ceil(_SHORTEST_SAMPLE_S / max(once, 1e-9)), 1, _MOST_REPEATS))


def _time(run: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _timing(name: str, times: NDArray[np.float64], reference: NDArray[np.float64]) -> Timing:
    q25, median, q75 = (float(value) for value in np.quantile(times, (0.25, 0.5, 0.75)))
    low, middle, high = (float(value) for value in np.quantile(times / reference, (0.25, 0.5, 0.75)))
    return Timing(name, median, q25, q75, middle, low, high)
