from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.data import (
    TensorLoader,
    batch_for,
    blaming,
    call_model,
    class_labels,
    class_numbers,
    class_scores,
    count_batches,
    digits,
    fashion_mnist,
    first_batch,
    read,
    split_batch,
    told,
)
from fxopt.errors import DataError


def loader(count: int = 10, **options: Any) -> TensorLoader:
    inputs = torch.arange(count, dtype=torch.float32)[:, None]
    return TensorLoader(inputs, torch.arange(count), **options)


def order(batches: TensorLoader) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def test_batches_cover_every_sample_once_in_order() -> None:
    batches = loader(10, batch_size=4)
    assert len(batches) == 3
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert order(batches) == list(range(10))
    assert all(torch.equal(inputs[:, 0].long(), labels) for inputs, labels in batches)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    shuffled = loader(50, shuffle=True, seed=3)
    assert sorted(order(shuffled)) == list(range(50))
    assert order(shuffled) == order(shuffled)
    assert order(shuffled.at_epoch(1)) != order(shuffled)
    torch.manual_seed(99)
    assert order(shuffled.at_epoch(1)) == order(loader(50, shuffle=True, seed=3).at_epoch(1))
    assert order(loader(50, shuffle=True, seed=4)) != order(shuffled)


def test_without_shuffling_every_epoch_is_the_same() -> None:
    assert order(loader(9).at_epoch(5)) == list(range(9))


@pytest.mark.parametrize(
    ("inputs", "labels", "batch_size", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(2), 1, "3 inputs and 2 labels"),
        (torch.zeros(3, 1), torch.zeros(3), 0, "batch_size has to be at least 1"),
        (torch.zeros(0, 1), torch.zeros(0), 1, "not a single sample"),
    ],
)
def test_loaders_of_nonsense_are_refused(
    inputs: torch.Tensor, labels: torch.Tensor, batch_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        TensorLoader(inputs, labels, batch_size)


def test_first_batch_gives_the_first_batch() -> None:
    inputs, labels = first_batch(loader(5, batch_size=2), "val")
    assert labels.tolist() == [0, 1]
    assert inputs.shape == (2, 1)


class Pairs:
    """Iterable, and nothing else."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


GOOD = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "val is a int; give an iterable"),
        (Pairs(), "val yields nothing"),
        ([], "val yields nothing"),
        (iter([(GOOD, GOOD)]), "can be read only once"),
        (Pairs(GOOD), "yields a Tensor, not a pair"),
        (Pairs((GOOD, GOOD, GOOD)), "yields a tuple, not a pair"),
        (Pairs((torch.full((2, 3), torch.nan), GOOD)), "inputs of val's first batch hold NaN or infinity"),
        (Pairs((GOOD, torch.tensor([0.0, torch.inf]))), "labels of val's first batch hold NaN or infinity"),
        (Pairs(({"x": torch.tensor([-torch.inf])}, GOOD)), "hold NaN or infinity"),
        (Pairs((torch.zeros(0, 3), torch.zeros(0))), "empty, of shape"),
    ],
)
def test_loaders_that_cannot_be_used_are_refused_with_the_reason(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        first_batch(given, "val")


def test_a_function_that_judges_is_offered_in_place_of_val_alone() -> None:
    with pytest.raises(DataError, match="In place of val, evaluate=callable"):
        first_batch(Pairs(GOOD), "val")
    with pytest.raises(DataError, match=r"may be a mapping\.$"):
        first_batch(Pairs(GOOD), "train")


def test_integer_inputs_are_not_taken_for_nan() -> None:
    tokens = torch.tensor([[1, 2]])
    assert first_batch([(tokens, torch.tensor([1]))], "train")[0] is tokens


def test_a_batch_is_split_into_inputs_and_labels() -> None:
    assert split_batch([1, 2]) == (1, 2)


def test_a_batch_goes_to_the_device_of_the_model() -> None:
    model = nn.Linear(1, 1, device="meta")
    inputs, labels = batch_for(model, ({"x": torch.ones(1)}, torch.ones(1)))
    assert inputs["x"].device.type == labels.device.type == "meta"
    inputs, _ = batch_for(nn.Identity(), (torch.ones(1), torch.ones(1)))
    assert inputs.device.type == "cpu"


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.parametrize("inputs", [(GOOD, 2 * GOOD), [GOOD, 2 * GOOD], {"y": 2 * GOOD, "x": GOOD}])
def test_a_model_is_called_with_a_tuple_or_by_name(inputs: Any) -> None:
    assert torch.equal(call_model(Sum(), inputs), 3 * GOOD)


def test_a_model_is_called_with_a_tensor() -> None:
    assert torch.equal(call_model(nn.Identity(), GOOD), GOOD)


class WithLogits:
    logits = GOOD


@pytest.mark.parametrize("output", [GOOD, WithLogits(), {"logits": GOOD, "loss": None}])
def test_class_scores_are_found(output: Any) -> None:
    assert class_scores(output, "do something") is GOOD


@pytest.mark.parametrize("output", [torch.ones(3), (GOOD,), {"scores": GOOD}, None])
def test_what_holds_no_class_scores_is_refused_with_the_remedy(output: Any) -> None:
    with pytest.raises(DataError, match=r"no tensor of class scores .* do something"):
        class_scores(output, "do something")


def test_digits_are_split_without_overlap_and_normalized() -> None:
    train, val = digits(seed=1)
    assert len(train.inputs) + len(val.inputs) == 1797
    assert len(val.inputs) == 360
    assert train.inputs.shape[1:] == (1, 16, 16)
    everything = torch.cat([train.inputs, val.inputs])
    assert abs(float(everything.mean())) < 1e-5
    assert abs(float(everything.std()) - 1.0) < 1e-5
    assert set(train.labels.tolist()) == set(val.labels.tolist()) == set(range(10))
    assert train.shuffle
    assert not val.shuffle


def test_digits_depend_on_the_seed_alone() -> None:
    first, again, other = (digits(seed=seed, size=8)[1].labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def idx(values: np.ndarray[Any, Any]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return b"\x00\x00\x08" + bytes([values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def write_fashion(folder: Path, *, zipped: bool = False) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 4)):
        files = {
            f"{part}-images-idx3-ubyte": idx(rng.integers(0, 256, (count, 5, 5))),
            f"{part}-labels-idx1-ubyte": idx(np.arange(count)),
        }
        for name, raw in files.items():
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(raw, mtime=0) if zipped else raw)


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_reads_idx_files(tmp_path: Path, zipped: bool) -> None:
    write_fashion(tmp_path, zipped=zipped)
    train, test = fashion_mnist(tmp_path, batch_size=2)
    assert train.inputs.shape == (6, 1, 5, 5)
    assert test.labels.tolist() == [0, 1, 2, 3]
    assert abs(float(train.inputs.mean())) < 1e-5
    assert abs(float(train.inputs.std(correction=0)) - 1.0) < 1e-5
    assert len(train) == 3


def test_the_folder_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path)
    monkeypatch.setenv("FXOPT_DATA", str(tmp_path))
    assert len(fashion_mnist()[0].inputs) == 6


def test_a_missing_data_set_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"No Fashion-MNIST idx files in {tmp_path}"):
        fashion_mnist(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="There is no train-labels-idx1-ubyte"):
        fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no idx file"),
        (b"\x00\x00\x08", "no idx file"),
        (b"\x00\x00\x08\x03\x00\x00", "no idx file"),
        (b"\x00\x00\x0d\x01" + (1).to_bytes(4, "big") + b"\x00", "no idx file"),
        (idx(np.zeros((2, 5, 5)))[:-1], "holds 49 of 50 values"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    write_fashion(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        fashion_mnist(tmp_path)


@pytest.mark.parametrize("raw", [b"no gzip at all", gzip.compress(idx(np.zeros((2, 5, 5))), mtime=0)[:-9]])
def test_broken_archives_are_refused(tmp_path: Path, raw: bytes) -> None:
    write_fashion(tmp_path, zipped=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(raw)
    with pytest.raises(DataError, match="fetch it again"):
        fashion_mnist(tmp_path)


def test_reading_gives_the_batches_and_stops_in_time() -> None:
    drawn = []

    class Counting:
        def __iter__(self) -> Any:
            for number in range(5):
                drawn.append(number)
                yield number

    assert list(read(Counting(), "train", 2)) == [0, 1]
    assert drawn == [0, 1]
    assert list(read(Counting())) == [0, 1, 2, 3, 4]
    assert list(read([], "train")) == []


def test_a_loader_that_fails_is_blamed_with_batch_and_line() -> None:
    def batches() -> Any:
        yield 1
        raise KeyError("label")

    with pytest.raises(DataError, match=r"train, batch 1, raised KeyError: 'label' \(.*test_data\.py:\d+\)") as caught:
        list(read(batches(), "train"))
    assert isinstance(caught.value.__cause__, KeyError)


def test_only_the_users_errors_are_blamed() -> None:
    with pytest.raises(KeyboardInterrupt), blaming("it", "Do."):
        raise KeyboardInterrupt
    with pytest.raises(DataError, match=r"^as it is$"), blaming("it", "Do."):
        raise DataError("as it is")


def test_an_error_is_told_in_one_short_line() -> None:
    assert told(ValueError("first.\nsecond")) == "ValueError: first."
    assert told(ValueError()) == "ValueError."
    assert told(TypeError("f() got (int), but expected one of:\n * (Tensor)")) == "TypeError: f() got (int)."
    assert len(told(ValueError("x" * 10_000))) < 400


def test_a_model_that_fails_on_a_batch_is_told_with_what_it_was_given() -> None:
    with pytest.raises(
        DataError, match=r"given a tensor of shape \(2, 5\) and type float32 by val, raised RuntimeError"
    ):
        call_model(nn.Linear(3, 2), torch.zeros(2, 5), "val")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_class_numbers_are_whole_numbers_of_any_type(dtype: torch.dtype) -> None:
    numbers = class_numbers(torch.tensor([0, 1, 1]).to(dtype), torch.zeros(3, 2), "val", "do")
    assert numbers.dtype is torch.int64
    assert numbers.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ([0, 1], "a list for labels"),
        (torch.zeros(3).long(), r"shape \(3,\), .* need \(2, 5\)"),
        (torch.zeros(2, 5), "float32, where class numbers are whole; do something"),
        (torch.full((2, 5), 4), "the label 4, where the model knows the classes 0 to 3"),
        (torch.full((2, 5), -1), "the label -1"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(label: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        class_numbers(label, torch.zeros(2, 4, 5), "val", "do something")
    assert class_numbers(torch.full((2, 5), -100), torch.zeros(2, 4, 5), "val", "do something").sum() == -1000


SHARES = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    "label",
    [
        SHARES,
        SHARES + 5e-3 / 3,
        *(
            torch.full((2, 1000), 1e-4).index_fill(1, torch.tensor([3]), 0.9001).to(kind)
            for kind in (torch.half, torch.bfloat16)
        ),
        torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(1),
        torch.zeros(0, 3),
    ],
)
def test_labels_that_are_probabilities_are_taken(label: torch.Tensor) -> None:
    assert class_labels(label, torch.zeros(label.shape), "train", "do") is label


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
            "they sum to 1 to 2 over the classes and the least is 0. Give",
        ),
        (torch.tensor([[2.0, -1.0, 0.0]]), "they sum to 1 to 1 over the classes and the least is -1"),
        (torch.zeros(2, 3), "they sum to 0 to 0"),
        (torch.full((2, 3), torch.nan), "nan"),
        (torch.cat([SHARES, torch.full((1, 3), torch.nan)]), "nan"),
        (torch.rand(2, 3, 4, 5).softmax(3), r"\(dimension 1\), or class numbers; do something"),
    ],
)
def test_floats_that_are_no_probabilities_are_refused(label: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=f"^train has floats in the shape of the class scores for labels.*{words}"):
        class_labels(label, torch.zeros(label.shape), "train", "do something")


class Lengthy:
    """A loader of three batches with a length of its own."""

    def __init__(self, length: Any) -> None:
        self.length = length

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return int(self.length)

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(2, 1), torch.zeros(2))] * 3)


def test_batches_are_counted_by_the_length_or_one_by_one() -> None:
    assert count_batches(Lengthy(2), "train") == 2
    assert count_batches(Lengthy(TypeError("no length")), "train") == 3


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (0, "^train has no batches, by its length; .* correct __len__"),
        (RuntimeError("no"), "^The length of train raised RuntimeError: no .*Correct __len__"),
        (-1, "^The length of train raised ValueError"),
    ],
)
def test_a_length_that_is_none_is_refused(length: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        count_batches(Lengthy(length), "train")
