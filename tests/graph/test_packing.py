"""Stored forms of sparse weights: what is packed comes back, takes what is told, and dense where that is no more."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.graph.packing import Packed, pack, position_bytes, unpack
from fxopt.graph.sparsity import pattern_of

CHOICES = [0.3, 0.5, 0.9, 0.97, 0.999, "2:4", "1:2", "3:4", "1:16", "2:5", "kernel:1", "kernel:2", "kernel:4"]
SHAPES = [(64, 48), (7, 9), (16, 8, 3, 3), (5, 3, 2, 2), (6, 5, 1, 1), (8, 1, 5), (3, 2, 1, 3, 2)]


def bits_by_hand(choice: float | str, shape: tuple[int, ...], kept: int) -> int:
    """Bits of the positions, by the table at the head of the module."""
    whole, unknowns, taps = math.prod(shape), math.prod(shape[1:]), math.prod(shape[2:])
    if isinstance(choice, str):
        first, _, second = choice.partition(":")
        block, stay = (taps, int(second)) if first == "kernel" else (int(second), int(first))
        places = shape[0] * (unknowns // block) * min(stay, block)
        return min(whole, places * math.ceil(math.log2(block)))
    low = 0
    while kept << (low + 1) <= whole:
        low += 1
    return min(whole, kept * low + kept + (whole - 1) // 2**low)


def sparse(choice: float | str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight * pattern_of(choice).mask(weight)


@settings(max_examples=120, deadline=None)
@given(choice=st.sampled_from(CHOICES), shape=st.sampled_from(SHAPES), seed=st.integers(0, 99))
def test_what_is_packed_comes_back_and_takes_what_is_told(
    choice: float | str, shape: tuple[int, ...], seed: int
) -> None:
    weight, pattern = sparse(choice, shape, seed), pattern_of(choice)
    kept = int(pattern.mask(weight).sum())
    expected = math.ceil(bits_by_hand(choice, shape, kept) / 8)
    sizes = (np.array([shape[0]]), np.array([math.prod(shape[1:])]), np.array([math.prod(shape[2:])]))
    assert position_bytes(pattern, *sizes).tolist() == [expected]
    packed = pack(weight, pattern)
    if packed is None:
        assert 4 * kept + expected >= 4 * weight.numel()
        return
    assert packed.positions.numel() == expected
    assert packed.values.numel() == kept
    assert torch.equal(unpack(packed, shape, pattern), weight)


def test_a_large_layer_in_half_precision() -> None:
    weight, pattern = sparse(0.95, (300, 700), 0).half(), pattern_of(0.95)
    packed = pack(weight, pattern)
    assert packed is not None
    assert torch.equal(unpack(packed, (300, 700), pattern), weight)
    # 0.286 bits a weight are the least possible for 5%; a bitmap takes one, a place of 18 bits for each value 0.9.
    assert 0.286 < 8 * packed.positions.numel() / weight.numel() < 0.32


def test_weights_that_happen_to_be_zero_are_kept_in_place() -> None:
    weight = sparse("2:4", (4, 16), 0)
    weight[0] = 0.0
    packed = pack(weight, pattern_of("2:4"))
    assert packed is not None
    assert torch.equal(unpack(packed, (4, 16), pattern_of("2:4")), weight)


def test_a_weight_with_more_than_stays_is_not_packed() -> None:
    assert pack(torch.ones(4, 16), pattern_of("2:4")) is None


@pytest.mark.parametrize("choice", [0.9, "2:8", "kernel:1"])
def test_damaged_parts_are_refused(choice: float | str) -> None:
    pattern = pattern_of(choice)
    packed = pack(sparse(choice, (8, 8, 3, 3), 0), pattern)
    assert packed is not None
    with pytest.raises(ValueError, match="values and"):
        unpack(Packed(packed.values[1:], packed.positions), (8, 8, 3, 3), pattern)
    with pytest.raises(ValueError, match=r"positions are those of|a position is"):
        unpack(Packed(packed.values, torch.full_like(packed.positions, 255)), (8, 8, 3, 3), pattern)
