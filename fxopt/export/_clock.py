"""The clock of all measurements: files with their inputs, run in turn, round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fxopt.errors import DataError, ExportError
from fxopt.export._runtime import make_session
from fxopt.graph import normalize

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["feed_for", "interleave", "runner"]

_WARM_UP = 3
_SHORTEST_SAMPLE_S = 1e-3
_MOST_REPEATS = 200


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


def runner(
    file: Path, example_inputs: object, batch: int, threads: int, settings: Mapping[str, str] | None = None
) -> Callable[[], Any]:
    """A file to run, with its inputs; it has run once.

    Raises:
        ExportError: If onnxruntime cannot load or run it.
        DataError: If the example inputs do not fit the file.
    """
    session = make_session(file, threads=threads, settings=settings)
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


def interleave(runners: Sequence[Callable[[], Any]], runs: int, clock: Callable[[], float]) -> NDArray[np.float64]:
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
