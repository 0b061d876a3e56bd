"""Patterns of zeros: what stays is what a plain loop over the weights keeps, and is as many as is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import PolicyError
from fxopt.graph.sparsity import Pattern, pattern_of

CHOICES = [0, 0.0, 0.3, 0.5, 0.99, "2:4", "1:2", "3:3", "4:16", "3:20", "kernel:1", "kernel:4", "kernel:20"]


def kept_by_hand(weight: np.ndarray, choice: float | str) -> np.ndarray:
    """Positions that stay, found with sorted lists."""
    rows = weight.reshape(len(weight), -1)
    stay = np.ones_like(rows, dtype=bool)

    def keep(places: list[tuple[int, int]], count: int) -> None:
        for place in sorted(places, key=lambda at: -abs(rows[at]))[count:]:
            stay[place] = False

    everything = [(row, column) for row in range(rows.shape[0]) for column in range(rows.shape[1])]
    if not isinstance(choice, str):
        keep(everything, len(everything) - int(np.floor(choice * len(everything))))
        return stay.reshape(weight.shape)
    first, _, second = choice.partition(":")
    taps = int(np.prod(weight.shape[2:]))
    size, count = (taps, int(second)) if first == "kernel" else (int(second), int(first))
    for row in range(len(rows)):
        for start in range(0, rows.shape[1] - size + 1, size):
            keep([(row, column) for column in range(start, start + size)], count)
    return stay.reshape(weight.shape)


@settings(max_examples=40, deadline=None)
@given(
    choice=st.sampled_from(CHOICES),
    shape=st.sampled_from([(1, 1), (3, 7), (4, 3, 3, 3), (2, 5, 1, 1), (6, 1, 5), (2, 2, 1, 3, 2)]),
    seed=st.integers(0, 1000),
)
def test_what_stays_is_what_a_loop_keeps(choice: float | str, shape: tuple[int, ...], seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=shape)
    if seed % 2:
        weight = weight.round()
    pattern = pattern_of(choice)
    mask = pattern.mask(torch.from_numpy(weight)).numpy()
    np.testing.assert_array_equal(mask, kept_by_hand(weight, choice))
    sizes = (np.array([shape[0]]), np.array([np.prod(shape[1:])]), np.array([np.prod(shape[2:])]).astype(np.int64))
    assert pattern.count(*sizes).tolist() == [mask.sum()]


def test_of_equal_weights_the_first_stay() -> None:
    assert pattern_of(0.5).mask(torch.ones(2, 4)).tolist() == [[True] * 4, [False] * 4]
    assert pattern_of("2:4").mask(-torch.ones(1, 4)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("choice", [1.0, -0.1, True, "4:2", "0:4", "2:4:8", "kernel:0", "half", (2, 4), float("nan")])
def test_other_choices_are_refused(choice: object) -> None:
    with pytest.raises(PolicyError, match=r"sparsity|smaller number"):
        pattern_of(choice)


@pytest.mark.parametrize("choice", [0.7, "2:4", "kernel:4"])
def test_widths_of_numbers_do_not_matter(choice: float | str) -> None:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = pattern_of(choice).mask(weight)
    for wide in (weight.half(), weight.float(), weight.double()):
        assert torch.equal(pattern_of(choice).mask(wide), mask)


def test_a_pattern_is_a_plain_value() -> None:
    assert pattern_of("2:4") == Pattern(kept=2, block=4)
    assert len({pattern_of(0.5), pattern_of(0.5), pattern_of("kernel:2")}) == 2
