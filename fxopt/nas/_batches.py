"""Batches for weights and for the architecture: parting a loader in two, and reading it by number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxopt.data import Loader, TensorLoader, read
from fxopt.errors import DataError

__all__ = ["Numbered", "split"]


def split(loader: Loader, share: float = 0.2, seed: int = 0) -> tuple[Loader, Loader]:
    """Part a loader in two: for weights, and for the architecture.

    Args:
        loader: Batches of (input, label). Of a :class:`TensorLoader` samples are parted, of any other loader batches,
            by their number; it then has to give them in one order.
        share: The part that the architecture gets.
        seed: Seed of who goes where.

    Raises:
        DataError: If a part would have no batch of at least two samples.
    """
    samples = isinstance(loader, TensorLoader)
    count = len(loader.inputs) if isinstance(loader, TensorLoader) else _count(loader, "train")
    held, least = round(count * share), 2 if samples else 1
    if not 0.0 < share < 1.0 or min(held, count - held) < least:
        raise DataError(
            f"{count} {'samples' if samples else 'batches'} cannot be split into {count - held} for weights and {held} "
            f"for the architecture: each needs {least} or more. Give more of them, another share, or two loaders."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    rest, own = order[held:], order[:held]
    if not isinstance(loader, TensorLoader):
        return _Batches(loader, frozenset(rest.tolist())), _Batches(loader, frozenset(own.tolist()))
    source = loader

    def part(chosen: torch.Tensor) -> TensorLoader:
        inputs, labels = source.inputs[chosen], source.labels[chosen]
        return TensorLoader(inputs, labels, source.batch_size, shuffle=True, seed=source.seed)

    return part(rest), part(own)


@dataclass(frozen=True)
class _Batches:
    """Those batches of a loader that have certain numbers."""

    loader: Loader
    numbers: frozenset[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        return (batch for number, batch in enumerate(self.loader) if number in self.numbers)


class Numbered:
    """The batches of a loader by number, pass after pass.

    Reading goes on where it was while numbers follow each other; to begin at another one, the batches of its pass
    before it are read and left. Torch's global generator is seeded for every batch, so that order and augmentation
    depend on the number alone, wherever reading began and whatever else used the generator.

    Args:
        loader: The loader.
        what: What it is called, for messages.
        seed: A seed.

    Attributes:
        steps: Batches of a pass.
        what: What it is called.
    """

    def __init__(self, loader: Loader, what: str, seed: int) -> None:
        self.steps = _count(loader, what)
        self.what = what
        self._loader = loader
        self._seeds = (seed, *what.encode())
        self._reading: Iterator[Any] = iter(())
        self._next = -1

    def at(self, number: int) -> Any:
        """The batch of a number.

        Raises:
            DataError: If the loader fails, or yields fewer batches than it did at first.
        """
        if number != self._next or number % self.steps == 0:
            epoch, place = divmod(number, self.steps)
            batches = self._loader.at_epoch(epoch) if isinstance(self._loader, TensorLoader) else self._loader
            self._reading = read(batches, self.what)
            for skipped in range(number - place, number):
                self._read(skipped)
        batch = self._read(number)
        self._next = number + 1
        return batch

    def _read(self, number: int) -> Any:
        torch.manual_seed(int(np.random.SeedSequence((*self._seeds, number)).generate_state(1)[0]))
        for batch in self._reading:
            return batch
        raise DataError(f"{self.what} yields fewer batches than at first; give a loader that can be read again.")


def _count(loader: Loader, what: str) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in read(loader, what))
