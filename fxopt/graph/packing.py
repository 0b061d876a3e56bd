"""How the weights of a sparse layer are stored: the values that stay, and where they stand.

Values follow one another in the order of the flattened weight, at the bits of the layer. Their positions take the
fewest bits of what the pattern allows. How many never depends on which weights stay, so that sizes are exact before a
single weight was looked at:

    bitmap    any pattern         one bit for every weight
    blocks    "2:4", "kernel:4"   for every value its place in the block or kernel: 2 bits in a block of four, 4 bits
                                  in a kernel of 3 x 3; none for the values behind the last whole block
    sorted    a fraction          the positions in rising order, by Elias and Fano: of the ``m`` positions below ``n``
                                  the ``l = floor(log2(n // m))`` lowest bits as they are, then the rest as a bitmap in
                                  which there is a zero for every step of one: ``m l + m + (n - 1) // 2**l`` bits,
                                  about half a bit a value more than the least possible

A layer is stored densely where that is no larger.

Source: Elias, "Efficient storage and retrieval by content and address of static files" (JACM 1974); places in blocks
of four as in Mishra et al., "Accelerating sparse deep neural networks" (2021), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fxopt.graph.sparsity import Counts, Pattern

__all__ = ["Packed", "pack", "packed_bytes", "position_bytes", "unpack"]

Bits: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Packed:
    """A sparse weight in its stored form.

    Attributes:
        values: What stays, shape (kept,).
        positions: Where it stands, uint8, shape (bytes,).
    """

    values: torch.Tensor
    positions: torch.Tensor


def position_bytes(pattern: Pattern, outputs: Counts, unknowns: Counts, taps: Counts) -> Counts:
    """Whole bytes that the positions of what stays take.

    Args:
        pattern: What stays.
        outputs: Outputs of the layer.
        unknowns: Weights of one output.
        taps: Weights of one kernel.
    """
    found: Counts = (np.minimum(outputs * unknowns, _other_bits(pattern, outputs, unknowns, taps)) + 7) // 8
    return found


def packed_bytes(pattern: Pattern, shape: tuple[int, ...], bits: int) -> int:
    """Whole bytes that a weight takes in its stored form, or densely where that is no more.

    Args:
        pattern: What stays of it.
        shape: Its shape (outputs, channels, ...).
        bits: Bits of a value.
    """
    form = _Form.of(pattern, shape)
    whole = (math.prod(shape) * bits + 7) // 8
    return min(whole, (form.kept * bits + 7) // 8 + form.bytes)


def pack(weight: torch.Tensor, pattern: Pattern) -> Packed | None:
    """A weight in its stored form.

    Args:
        weight: Shape (outputs, channels, ...).
        pattern: What stays of it.

    Returns:
        The stored form; None where it takes no less so, or where more is not zero than the pattern lets stay.
    """
    held = weight.detach()
    mask = pattern.mask(held)
    if bool((held[~mask] != 0).any()):
        return None
    form, size = _Form.of(pattern, held.shape), held.element_size()
    if packed_bytes(pattern, held.shape, 8 * size) == held.numel() * size:
        return None
    return Packed(held[mask].contiguous(), torch.from_numpy(np.packbits(form.encode(mask.cpu().numpy()))))


def unpack(packed: Packed, shape: tuple[int, ...], pattern: Pattern) -> torch.Tensor:
    """The weight of a stored form: :func:`pack` undone.

    Args:
        packed: The stored form.
        shape: Shape of the weight.
        pattern: What stays of it.

    Raises:
        ValueError: If the parts do not fit one another.
    """
    form = _Form.of(pattern, shape)
    if (packed.values.numel(), packed.positions.numel()) != (form.kept, form.bytes):
        raise ValueError(
            f"a weight of shape {tuple(shape)} has {form.kept} values and {form.bytes} bytes of positions, not "
            f"{packed.values.numel()} and {packed.positions.numel()}"
        )
    stays = form.decode(np.unpackbits(packed.positions.numpy()))
    if int(stays.sum()) != form.kept:
        raise ValueError(f"its positions are those of {int(stays.sum())} values, not of {form.kept}")
    weight = torch.zeros(shape, dtype=packed.values.dtype)
    weight[torch.from_numpy(stays.reshape(shape))] = packed.values
    return weight


@dataclass(frozen=True)
class _Form:
    """How the positions of one weight are written.

    Attributes:
        pattern: What stays.
        outputs: Outputs of the layer.
        unknowns: Weights of one output.
        block: Weights that are counted together; 0 where a fraction decides.
        kept: Values that stay.
        bytes: Bytes of the positions.
        is_bitmap: Whether they are a bit for every weight.
    """

    pattern: Pattern
    outputs: int
    unknowns: int
    block: int
    kept: int
    bytes: int
    is_bitmap: bool

    @classmethod
    def of(cls, pattern: Pattern, shape: tuple[int, ...]) -> _Form:
        outputs, unknowns, taps = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
        sizes = np.array([outputs]), np.array([unknowns]), np.array([taps])
        block = int(pattern.block_size(sizes[2])[0]) if pattern.kept else 0
        is_bitmap = outputs * unknowns <= int(_other_bits(pattern, *sizes)[0])
        kept, size = int(pattern.count(*sizes)[0]), int(position_bytes(pattern, *sizes)[0])
        return cls(pattern, outputs, unknowns, block, kept, size, is_bitmap)

    def encode(self, stays: Mask) -> Bits:
        """The bits of the positions, from a mask of any shape."""
        flat = stays.reshape(-1)
        if self.is_bitmap:
            return flat.astype(np.uint8)
        if self.block:
            places = np.nonzero(self._blocks(flat))[1]
            return _as_bits(places, _width(self.block))
        low, above = self._parts()
        positions = np.flatnonzero(flat)
        high = np.zeros(above, np.uint8)
        high[(positions >> low) + np.arange(self.kept)] = 1
        return np.concatenate([_as_bits(positions & ((1 << low) - 1), low), high])

    def decode(self, bits: Bits) -> Mask:
        """The mask, flat, from the bits and those that fill the last byte."""
        flat = np.ones(self.outputs * self.unknowns, np.bool_)
        if self.is_bitmap:
            return bits[: len(flat)].astype(np.bool_)
        if self.block:
            blocks = np.zeros_like(self._blocks(flat))
            width, kept = _width(self.block), min(self.pattern.kept, self.block)
            places = _as_numbers(bits[: len(blocks) * kept * width], width).reshape(len(blocks), kept)
            blocks[np.arange(len(blocks))[:, None], _below(places, self.block)] = True
            rows = flat.reshape(self.outputs, self.unknowns)
            end = self.unknowns // self.block * self.block
            rows[:, :end] = blocks.reshape(self.outputs, end)
            return flat
        low, above = self._parts()
        split = self.kept * low
        ones = np.flatnonzero(bits[split : split + above])[: self.kept]
        positions = (ones - np.arange(len(ones))) << low
        positions |= _as_numbers(bits[:split], low)[: len(ones)] if low else 0
        flat[:] = False
        flat[_below(positions, len(flat))] = True
        return flat

    def _blocks(self, flat: Mask) -> Mask:
        """The whole blocks, shape (blocks, block)."""
        end = self.unknowns // self.block * self.block
        return flat.reshape(self.outputs, self.unknowns)[:, :end].reshape(-1, self.block)

    def _parts(self) -> tuple[int, int]:
        """How many low bits a position has, and how many bits tell the rest of all."""
        whole = self.outputs * self.unknowns
        low = (whole // self.kept).bit_length() - 1
        return low, self.kept + ((whole - 1) >> low)


def _other_bits(pattern: Pattern, outputs: Counts, unknowns: Counts, taps: Counts) -> Counts:
    """Bits of the positions, but for a bitmap."""
    found: Counts
    if pattern.kept:
        block = pattern.block_size(taps)
        found = outputs * (unknowns // block) * np.minimum(pattern.kept, block) * (_exponent(block - 1) + 1)
        return found
    whole, kept = outputs * unknowns, pattern.count(outputs, unknowns, taps)
    low = _exponent(whole // kept)
    found = kept * (low + 1) + ((whole - 1) >> low)
    return found


def _below(places: Counts, end: int) -> Counts:
    if places.size and int(places.max()) >= end:
        raise ValueError(f"a position is {int(places.max())} of {end}")
    return places


def _exponent(value: Counts) -> Counts:
    """The whole part of the binary logarithm; -1 for 0."""
    found: Counts = np.frexp(value.astype(np.float64))[1].astype(np.int64) - 1
    return found


def _width(places: int) -> int:
    """Bits that tell places apart."""
    return (places - 1).bit_length()


def _as_bits(numbers: Counts, width: int) -> Bits:
    """Whole numbers in ``width`` bits each, the highest first."""
    found: Bits = (numbers[:, None] >> np.arange(width - 1, -1, -1) & 1).astype(np.uint8).reshape(-1)
    return found


def _as_numbers(bits: Bits, width: int) -> Counts:
    """:func:`_as_bits` undone."""
    found: Counts = bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))
    return found
