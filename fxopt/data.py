"""Loaders: real data that ships in packages, and checks of the user's own."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from fxopt._seeding import seeded
from fxopt.errors import DataError, FxoptError

__all__ = [
    "IGNORED_LABEL",
    "Loader",
    "TensorLoader",
    "batch_for",
    "blaming",
    "call_model",
    "class_labels",
    "class_numbers",
    "class_scores",
    "count_batches",
    "digits",
    "fashion_mnist",
    "first_batch",
    "pass_of",
    "read",
    "split_batch",
    "told",
]

Loader: TypeAlias = Iterable[Any]
"""Batches of (input, label), as often as one iterates: a DataLoader, a list, a :class:`TensorLoader`."""

IGNORED_LABEL = -100
"""A label that counts for nothing, in losses (as in torch's cross entropy) and accuracies."""

_PROBABILITY_TOLERANCE = 1e-2
"""How far probabilities may be from a sum of one, and below zero: a thousand of them in bfloat16 are within it."""

_MOST_WORDS = 300
_LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(__file__))

_IDX_BYTES = b"\x00\x00\x08"

_FASHION_FOLDERS = ("/usr/share/datasets/fashion-mnist", "data/fashion-mnist")


@dataclass(frozen=True, eq=False)
class TensorLoader:
    """Batches of tensors in memory; shuffled anew each epoch from one seed when asked to.

    Attributes:
        inputs: Inputs, shape (samples, ...).
        labels: Labels, shape (samples,).
        batch_size: Samples in a batch; the last may be smaller.
        shuffle: Whether each pass over the loader has an order of its own.
        seed: Seed of the first order; the order of a pass depends on the seed and on :meth:`at_epoch` alone.
        epoch: Which pass this is.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    batch_size: int = 64
    shuffle: bool = False
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            DataError: If there is no sample, inputs and labels differ in number, or the batch size is below 1.
        """
        if not len(self.inputs):
            raise DataError("There is not a single sample; give at least one.")
        if len(self.inputs) != len(self.labels):
            raise DataError(f"{len(self.inputs)} inputs and {len(self.labels)} labels; give one label an input.")
        if self.batch_size < 1:
            raise DataError(f"batch_size has to be at least 1, got {self.batch_size}.")

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of (inputs, labels)."""
        count = len(self.inputs)
        order = torch.arange(count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
            order = torch.randperm(count, generator=generator)
        for start in range(0, count, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.inputs[chosen], self.labels[chosen]

    def at_epoch(self, epoch: int) -> TensorLoader:
        """The same loader for pass number ``epoch``."""
        return replace(self, epoch=epoch)


def digits(batch_size: int = 64, *, size: int = 16, seed: int = 0) -> tuple[TensorLoader, TensorLoader]:
    """scikit-learn's handwritten digits (1,797 images of 8 x 8, UCI), as loaders for training and validation.

    Args:
        batch_size: Samples in a batch.
        size: Height and width that images are enlarged to, bilinearly.
        seed: Seed of the split (four fifths for training) and of the order in training.

    Returns:
        Training and validation loader; inputs have shape (batch, 1, size, size) and mean 0, variance 1.

    Raises:
        DataError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as failure:
        raise DataError("The digits ship in scikit-learn: pip install 'fxopt[demo]'.") from failure
    found = load_digits()
    images = torch.from_numpy(found.images.astype(np.float32))[:, None]
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = (images - images.mean()) / images.std()
    labels = torch.from_numpy(found.target.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = len(images) * 4 // 5
    train, val = order[:cut], order[cut:]
    return (
        TensorLoader(images[train], labels[train], batch_size, shuffle=True, seed=seed),
        TensorLoader(images[val], labels[val], 256),
    )


def fashion_mnist(
    folder: str | os.PathLike[str] | None = None, batch_size: int = 128, *, seed: int = 0
) -> tuple[TensorLoader, TensorLoader]:
    """Fashion-MNIST (60,000 + 10,000 images of 28 x 28) from its idx files, plain or gzipped.

    Args:
        folder: Where the four files are. None looks in the folder named by ``FXOPT_DATA``, where Debian's package
            ``dataset-fashion-mnist`` puts them, and in ``data/fashion-mnist``.
        batch_size: Samples in a batch.
        seed: Seed of the order in training.

    Returns:
        Training and test loader; inputs have shape (batch, 1, 28, 28), mean 0 and variance 1 over the training set.

    Raises:
        DataError: If a file is missing or is no idx file.
    """
    place = _fashion_folder(folder)
    train, test = (_read_idx(place, f"{part}-images-idx3-ubyte") for part in ("train", "t10k"))
    labels = [_read_idx(place, f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    mean, deviation = float(train.mean()) / 255.0, float(train.std()) / 255.0

    def prepared(images: np.ndarray[Any, Any]) -> torch.Tensor:
        return (torch.from_numpy(images.astype(np.float32))[:, None] / 255.0 - mean) / deviation

    targets = [torch.from_numpy(found.astype(np.int64)) for found in labels]
    return (
        TensorLoader(prepared(train), targets[0], batch_size, shuffle=True, seed=seed),
        TensorLoader(prepared(test), targets[1], 512),
    )


def check_loader(loader: object, what: str) -> None:
    """See that a loader can be read as often as one likes.

    Raises:
        DataError: If it is no iterable, or can be read only once.
    """
    if not isinstance(loader, Iterable):
        raise DataError(f"{what} is a {type(loader).__name__}; give an iterable of (input, label) batches.")
    if isinstance(loader, Iterator):
        raise DataError(
            f"{what} is a {type(loader).__name__}, which can be read only once; give what it was made from: "
            "a DataLoader, a list of batches, or a fxopt.data.TensorLoader."
        )


def first_batch(loader: Loader, what: str) -> Any:
    """The first batch of a loader, checked; torch's generators are left as they are.

    Args:
        loader: What should be a loader of (input, label).
        what: What it is called, for messages.

    Raises:
        DataError: If the loader is no iterable, can be read only once, or yields nothing; or if its first batch is no
            pair, is empty, or holds NaN or infinity.
    """
    check_loader(loader, what)
    with seeded(0):
        batch = next(read(loader, what, 1), None)
    if batch is None:
        raise DataError(f"{what} yields nothing; give a loader with at least one batch, every time that it is read.")
    for part, name in zip(split_batch(batch, what), ("inputs", "labels"), strict=True):
        for leaf in pytree.tree_leaves(part):
            if isinstance(leaf, torch.Tensor):
                _check_tensor(leaf, f"The {name} of {what}'s first batch")
    return batch


def count_batches(loader: Loader, what: str) -> int:
    """The batches of a pass: the loader's length, or as many as it yields where it has none.

    Raises:
        DataError: If the length is 0 or cannot be had.
    """
    with blaming(f"The length of {what}", "Correct __len__, or leave it out: batches are counted where there is none."):
        try:
            count = len(loader)  # type: ignore[arg-type]
        except TypeError:
            count = sum(1 for _ in read(loader, what))
    if not count:
        raise DataError(f"{what} has no batches, by its length; give a loader with one or more, or correct __len__.")
    return count


def pass_of(loader: Loader, number: int, seed: int) -> Loader:
    """A loader for one pass, whose order depends on the number alone where it can be told.

    A generator of a DataLoader's own is seeded: left alone it would go on from wherever the passes before have left it,
    those of another process not among them.

    Args:
        loader: The loader.
        number: The number of the pass.
        seed: A seed.
    """
    if isinstance(loader, TensorLoader):
        return loader.at_epoch(number)
    if isinstance(loader, DataLoader):
        holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        for own in (getattr(holder, "generator", None) for holder in holders):
            if isinstance(own, torch.Generator):
                own.manual_seed(int(seed) + 1_000_003 * number)
    return loader


def read(loader: Loader, what: str = "the loader", count: int | None = None) -> Iterator[Any]:
    """The batches of a loader, at most ``count`` of them.

    Raises:
        DataError: If the loader raises anything; says what and where.
    """
    remedy = "Correct the loader; it has to go through without an error."
    with blaming(what, remedy):
        batches = iter(loader)
    number = 0
    while number != count:
        with blaming(f"{what}, batch {number},", remedy):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch
        number += 1


@contextlib.contextmanager
def blaming(what: str, remedy: str) -> Iterator[None]:
    """Raise an error of the user's own code as a DataError that says whose it is, where, and what to do."""
    try:
        yield
    except FxoptError:
        raise
    except Exception as failure:
        raise DataError(f"{what} raised {told(failure)} {remedy}") from failure


def told(failure: Exception) -> str:
    """An error in one line: its type, the first line of its message, and the line of code that is not torch's."""
    first = next((line for line in str(failure).splitlines() if line.strip()), "").strip().rstrip(".")
    first = first.removesuffix("but expected one of:").rstrip(" ,")  # What it expected follows in other lines.
    words = f"{type(failure).__name__}: {first}" if first else type(failure).__name__
    frames = traceback.extract_tb(failure.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*_LIBRARIES, "<"))]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{words[:_MOST_WORDS]}{where}."


def split_batch(batch: Any, what: str = "the loader") -> tuple[Any, Any]:
    """Split a batch into inputs and labels.

    Raises:
        DataError: If the batch is no pair.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    instead = " In place of val, evaluate=callable(module) -> float does, too." if what == "val" else ""
    raise DataError(
        f"{what} yields a {type(batch).__name__}, not a pair (input, label); wrap it in a class whose __iter__ yields "
        f"such pairs, either of which may be a mapping.{instead}"
    )


def batch_for(model: nn.Module, batch: Any, what: str = "the loader") -> tuple[Any, Any]:
    """Inputs and labels of a batch, on the device of the model's first parameter.

    Raises:
        DataError: If the batch is no pair.
    """
    parts = split_batch(batch, what)
    parameter = next(model.parameters(), None)
    if parameter is None:
        return parts
    inputs, label = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(parameter.device), parts)
    return inputs, label


def call_model(model: nn.Module, inputs: Any, what: str = "the loader") -> Any:
    """Call a model on a batch's inputs: a tensor, a tuple of arguments or a mapping.

    Args:
        model: The model.
        inputs: The inputs.
        what: Where they come from, for messages.

    Raises:
        DataError: If the model fails on them; says how, and what they are.
    """
    with blaming(f"The model, given {_described(inputs)} by {what},", "Give inputs such as example_inputs."):
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, (tuple, list)):
            return model(*inputs)
        return model(inputs)


def class_scores(output: Any, remedy: str) -> torch.Tensor:
    """The class scores in a model's output: the output itself, or its attribute or key ``logits``.

    Args:
        output: What the model returned.
        remedy: What to do if there are none, for the message.

    Raises:
        DataError: If there is no tensor of two or more dimensions.
    """
    scores = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(scores, torch.Tensor) and scores.dim() >= 2:
        return scores
    raise DataError(f"The model gives {_described(output)}, no tensor of class scores (batch, classes); {remedy}.")


def class_numbers(label: Any, scores: torch.Tensor, what: str, remedy: str) -> torch.Tensor:
    """Labels as 64-bit class numbers, checked against class scores.

    Args:
        label: What the loader gives as labels.
        scores: Class scores, classes in dimension 1.
        what: The loader, for messages.
        remedy: What to do about labels of another kind, for messages.

    Raises:
        DataError: If the labels are not one whole number for each position of the scores, or out of range.
    """
    wanted = (scores.shape[0], *scores.shape[2:])
    needs = f"the model's class scores need {wanted}: one class number for each"
    if not isinstance(label, torch.Tensor):
        raise DataError(f"{what} has {_described(label)} for labels, where {needs}, in a tensor; {remedy}.")
    if label.shape != wanted:
        raise DataError(f"{what} has labels of shape {tuple(label.shape)}, where {needs}; {remedy}.")
    if label.is_floating_point() or label.is_complex():
        raise DataError(f"{what} has labels of type {label.dtype}, where class numbers are whole; {remedy}.")
    numbers = label.long()
    classes = scores.shape[1]
    wrong = numbers[((numbers < 0) | (numbers >= classes)) & (numbers != IGNORED_LABEL)]
    if wrong.numel():
        raise DataError(
            f"{what} has the label {int(wrong[0])}, where the model knows the classes 0 to {classes - 1}; correct the "
            f"labels (those to be left out are {IGNORED_LABEL}), or the model's number of classes."
        )
    return numbers


def class_labels(label: Any, scores: torch.Tensor, what: str, remedy: str) -> torch.Tensor:
    """Labels as :func:`class_numbers`, or, where they have the shape of the scores, as probabilities of classes.

    Raises:
        DataError: As for :func:`class_numbers`; or if probabilities are below 0 or do not sum to 1 over classes.
    """
    if not (isinstance(label, torch.Tensor) and label.is_floating_point() and label.shape == scores.shape):
        return class_numbers(label, scores, what, remedy)
    if label.numel():
        least, (low, high) = label.amin(), label.sum(1, dtype=torch.float32).aminmax()
        _check_probabilities(torch.stack([least.float(), low, high]).tolist(), what, remedy)
    return label


def _check_probabilities(found: list[float], what: str, remedy: str) -> None:
    """By the least of them, and the least and the largest of their sums."""
    least, low, high = found
    summed = abs(low - 1.0) <= _PROBABILITY_TOLERANCE and abs(high - 1.0) <= _PROBABILITY_TOLERANCE
    if summed and least >= -_PROBABILITY_TOLERANCE:
        return
    raise DataError(
        f"{what} has floats in the shape of the class scores for labels, which would be probabilities of classes, but "
        f"they sum to {low:.3g} to {high:.3g} over the classes and the least is {least:.3g}. Give probabilities, which "
        f"are 0 or more and sum to 1 (dimension 1), or class numbers; {remedy}."
    )


def _described(value: Any) -> str:
    """Tensors by shape and type, within whatever holds them."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)) and value and all(isinstance(item, torch.Tensor) for item in value):
        return f"a {type(value).__name__} of {', '.join(_described(item) for item in value)}"
    return f"a {type(value).__name__}"


def _check_tensor(tensor: torch.Tensor, where: str) -> None:
    if not tensor.numel():
        raise DataError(f"{where} are empty, of shape {tuple(tensor.shape)}; give batches with samples in them.")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{where} hold NaN or infinity; clean the data.")


def _fashion_folder(folder: str | os.PathLike[str] | None) -> Path:
    wanted = [folder] if folder is not None else [os.environ.get("FXOPT_DATA"), *_FASHION_FOLDERS]
    for place in wanted:
        if place and any(Path(place).glob("t10k-images-idx3-ubyte*")):
            return Path(place)
    searched = ", ".join(str(place) for place in wanted if place)
    raise DataError(
        f"No Fashion-MNIST idx files in {searched}. Install Debian's dataset-fashion-mnist, or name their folder."
    )


def _read_idx(folder: Path, name: str) -> np.ndarray[Any, Any]:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DataError(f"There is no {name}[.gz] in {folder}; all four files of Fashion-MNIST are needed.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as failure:
        raise DataError(f"Cannot read {path}: {failure}; fetch it again.") from failure
    rank = raw[3] if len(raw) > 3 else 0
    header = 4 + 4 * rank
    if raw[:3] != _IDX_BYTES or not rank or len(raw) < header:
        raise DataError(f"{path} is no idx file of bytes; fetch it again.")
    shape = tuple(int.from_bytes(raw[start : start + 4], "big") for start in range(4, header, 4))
    values = np.frombuffer(raw, np.uint8, offset=header)
    if values.size != math.prod(shape):
        raise DataError(f"{path} holds {values.size} of {math.prod(shape)} values; fetch it again.")
    return values.reshape(shape)
