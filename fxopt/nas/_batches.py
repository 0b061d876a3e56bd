"""Batches for weights and for the architecture: parting a loader in two, and reading it by number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from fxopt._numbers import check_below_one, check_whole
from fxopt._seeding import seeded
from fxopt.data import IGNORED_LABEL, Loader, TensorLoader, check_loader, count_batches, pass_of, read, split_batch
from fxopt.errors import DataError

__all__ = ["Numbered", "split"]


def split(loader: Loader, share: float = 0.2, seed: int = 0) -> tuple[Loader, Loader]:
    """Part a loader in two: for weights, and for the architecture.

    Args:
        loader: Batches of (input, label). Of a :class:`TensorLoader` samples are parted, and of a DataLoader that gives
            the samples of its data set in order or shuffled. Of any other loader batches are parted, by their number:
            it has to give them in one order, or in one that torch's global generator alone decides, which is seeded
            alike for every pass.
        share: The part that the architecture gets.
        seed: Seed of who goes where.

    Raises:
        DataError: If a part would have no batch of at least two samples; if the loader can be read only once, or
            ``share`` is not below 1.
    """
    check_loader(loader, "train")
    check_below_one(DataError, share=share)
    check_whole(0, DataError, seed=seed)
    samples = isinstance(loader, TensorLoader) or _is_plain(loader)
    count = _samples(loader) if samples else count_batches(loader, "train")
    held, least = round(count * share), 2 if samples else 1
    if min(held, count - held) < least:
        one, many, remedy = ("sample", "samples", "") if samples else ("batch", "batches", " or smaller batches")
        remedy += ", or split() another share" if count >= 2 * least else ""
        raise DataError(
            f"{count} {one if count == 1 else many} cannot be split into {count - held} for weights and {held} for the "
            f"architecture: each needs {least} or more. Give more data{remedy}."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    rest, own = order[held:], order[:held]
    return _part(loader, rest, seed), _part(loader, own, seed)


def _is_plain(loader: Loader) -> bool:
    """Whether a DataLoader takes each sample of a data set once, in order or shuffled."""
    if type(loader) is not DataLoader or loader.batch_size is None:
        return False
    sampler: Any = loader.sampler
    shuffled = type(sampler) is RandomSampler and not sampler.replacement
    return (shuffled or type(sampler) is SequentialSampler) and len(sampler) == _samples(loader)


def _samples(loader: Any) -> int:
    return len(loader.inputs if isinstance(loader, TensorLoader) else loader.dataset)


def _part(loader: Any, chosen: torch.Tensor, seed: int) -> Loader:
    """The samples of a loader that have certain numbers, or else its batches."""
    samples = isinstance(loader, TensorLoader) or _is_plain(loader)
    if samples and len(chosen) > 1 and len(chosen) % loader.batch_size == 1 < loader.batch_size:
        chosen = chosen[:-1]  # Batch norm can take no variance of a last batch of one sample.
    if isinstance(loader, TensorLoader):
        return replace(loader, inputs=loader.inputs[chosen], labels=loader.labels[chosen], shuffle=True)
    if not samples:
        if getattr(loader, "persistent_workers", False):
            raise DataError("The parts of train cannot share persistent workers; give persistent_workers=False.")
        return _Batches(loader, frozenset(chosen.tolist()), seed)
    same = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    return DataLoader(
        Subset(loader.dataset, chosen.sort().values.tolist()),
        loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last and len(chosen) >= loader.batch_size,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        **{name: getattr(loader, name) for name in same},
    )


@dataclass(frozen=True)
class _Batches:
    """Those batches of a loader that have certain numbers, in the order of the loader's first pass."""

    loader: Loader
    numbers: frozenset[int]
    seed: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        # A shuffling sampler draws its order when the first batch is asked for.
        with seeded(self.seed):
            batches = iter(pass_of(self.loader, 0, self.seed))
            first = next(batches, None)
        whole = () if first is None else itertools.chain((first,), batches)
        return (batch for number, batch in enumerate(whole) if number in self.numbers)


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
        self.steps = count_batches(loader, what)
        self.what = what
        self._loader = loader
        self._seeds = (seed, *what.encode())
        self._reading: Iterator[Any] = iter(())
        self._next = -1

    def at(self, number: int) -> Any:
        """The batch of a number.

        Raises:
            DataError: If the loader fails, or yields fewer batches than it did at first; if no label of it counts.
        """
        if number != self._next or number % self.steps == 0:
            epoch, place = divmod(number, self.steps)
            self._reading = read(pass_of(self._loader, epoch, self._seeds[0]), self.what)
            for skipped in range(number - place, number):
                self._read(skipped)
        batch = self._read(number)
        label = split_batch(batch, self.what)[1]
        numbers = isinstance(label, torch.Tensor) and not label.is_floating_point()
        if numbers and not bool((label.long() != IGNORED_LABEL).any()):
            raise DataError(
                f"{self.what}, batch {number % self.steps}, has no label that counts ({IGNORED_LABEL} is left out); "
                "leave out such batches, or mix their samples with others."
            )
        self._next = number + 1
        return batch

    def _read(self, number: int) -> Any:
        torch.manual_seed(int(np.random.SeedSequence((*self._seeds, number)).generate_state(1)[0]))
        for batch in self._reading:
            return batch
        raise DataError(f"{self.what} yields fewer batches than at first; give a loader that can be read again.")
