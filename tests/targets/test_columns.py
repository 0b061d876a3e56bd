"""Policies kept as columns cost to the last bit what the same rows cost one policy at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.targets import Workload, load, names
from fxopt.targets._core import CostModel
from fxopt.targets.base import Estimate, Target, TargetInfo
from fxopt.targets.models.measured import GROUP_NAMES, Model, family_keys
from fxopt.targets.rows import ColumnWorkload, OpKind, Rows, make_row

CLOSED = [name for name in names() if name not in ("bitfusion", "host")]


def template() -> Rows:
    sides = {"in_h": 14, "in_w": 14, "out_h": 14, "out_w": 14}
    window = {"kernel_h": 3, "kernel_w": 3}
    return np.concatenate(
        [
            make_row(OpKind.CONV, c=24, k=40, **sides),
            make_row(OpKind.CONV, c=3, k=32, bias=1, **sides, **window),
            make_row(OpKind.CONV, c=32, k=32, groups=4, **sides, **window),
            make_row(OpKind.CONV, c=16, k=8, transposed=1, **sides, **window),
            make_row(OpKind.DEPTHWISE, c=32, k=32, groups=32, **sides, **window),
            make_row(OpKind.NORM, c=32, k=32, fused=1, **sides),
            make_row(OpKind.ELEMENTWISE, c=32, k=32, activation=2, **sides),
            make_row(OpKind.ELEMENTWISE, c=32, k=32, inputs=2, **sides),
            make_row(OpKind.POOL, c=32, k=32, in_h=14, in_w=14, kernel_h=14, kernel_w=14),
            make_row(OpKind.LINEAR, c=32, k=10, bias=1),
            make_row(OpKind.MATMUL, c=32, k=49, in_h=49, out_h=49),
            make_row(OpKind.SOFTMAX, c=49, k=49, in_h=49, out_h=49),
            make_row(OpKind.UNKNOWN, c=8, k=8),
        ]
    )


def columns(count: int, seed: int, bits: bool) -> ColumnWorkload:
    """Channels, groups and what follows of ``count`` policies; some cut a depthwise convolution to a plain one.

    By the seed no weight is zero, some are, or each policy has zeros of its own.
    """
    rng = np.random.default_rng(seed)
    rows, found = template(), []
    if seed % 3:
        rows["weight_density"], rows["position_bytes"] = 0.3, 40.0
    for row in rows:
        size = rng.integers(1, 80, count).astype(np.int32)
        fields: dict[str, np.ndarray] = {"c": size * row["groups"]}
        if row["kind"] == OpKind.DEPTHWISE:
            fields = {"c": size, "k": size, "groups": size}
            if seed % 2:
                fields["kind"] = np.where(size == 1, OpKind.CONV, OpKind.DEPTHWISE).astype(np.int32)
        elif row["groups"] == 1:
            fields["k"] = rng.integers(1, 80, count).astype(np.int32)
        if row["kind"] in (OpKind.MATMUL, OpKind.SOFTMAX):
            fields["n"] = rng.integers(1, 9, count).astype(np.int32)
        if bits:
            widths = ("weight_bits", "activation_bits", "output_bits")
            fields |= {name: rng.choice([2, 4, 8, 16, 32], count).astype(np.int32) for name in widths}
        fields |= {"held": rng.uniform(0, 99, count), "live_bytes": rng.uniform(0, 1e6, count)}
        if seed % 3 == 2:
            fields["weight_density"] = rng.choice([0.1, 0.5, 1.0], count)
            fields["position_bytes"] = rng.choice([0.0, 30.0, 1e6], count)
        found.append(fields)
    return ColumnWorkload(rows, found, [f"row {i}" for i in range(len(rows))], count)


class Factored(Target):
    """A linear model with measured factors of the families of some rows."""

    def __init__(self, rows: Rows) -> None:
        keys = np.empty(len(rows), np.uint64)
        family_keys(rows, keys)
        keys = np.unique(keys)
        factors = np.random.default_rng(0).uniform(0.5, 2.0, len(keys))
        values = {f"float.{group}.{name}": 1e-9 for group in GROUP_NAMES for name in ("mac", "in", "out")}
        self.plain = Model(values, True)
        self.used = Model(values, True, keys, factors)

    @property
    def info(self) -> TargetInfo:
        return load("pixel1").info

    @property
    def model(self) -> CostModel:
        return self.used


def totals(estimate: Estimate) -> list[np.ndarray]:
    energy = np.zeros(0) if estimate.energy_j is None else estimate.energy_j
    return [estimate.latency_s, energy, estimate.weight_bytes, estimate.peak_activation_bytes, estimate.macs]


def expect_same(target: Target, work: ColumnWorkload) -> None:
    rows = work.expand().rows
    whole = target.estimate(work)
    plain = target.estimate(Workload(rows, work.names))
    np.testing.assert_equal(totals(whole), totals(plain))
    np.testing.assert_equal(totals(whole), totals(target.estimate(work, threads=2)))
    assert (whole.uncosted, whole.uncosted_macs_share) == (plain.uncosted, plain.uncosted_macs_share)
    last = target.estimate(Workload(rows[-1:], work.names))
    np.testing.assert_equal([total[-1:] for total in totals(whole)], totals(last))


@pytest.mark.parametrize("name", CLOSED)
@settings(max_examples=6)
@given(count=st.sampled_from([1, 2, 127, 128, 129, 300]), seed=st.integers(0, 99), bits=st.booleans())
def test_columns_cost_what_rows_cost(name: str, count: int, seed: int, bits: bool) -> None:
    expect_same(load(name), columns(count, seed, bits))


def test_columns_cost_what_rows_cost_where_costs_are_searched() -> None:
    expect_same(load("bitfusion"), columns(5, 1, True))


def test_rows_written_out_from_columns_are_costed_as_those() -> None:
    work = columns(50, 0, False)
    assert work.expand().columns is work
    target = load("pixel1")
    np.testing.assert_equal(totals(target.estimate(work.expand())), totals(target.estimate(work)))


@pytest.mark.parametrize("bits", [False, True])
def test_factors_of_measured_families_enter_columns_as_they_enter_rows(bits: bool) -> None:
    work = columns(300, 3, bits)
    target = Factored(np.ravel(work.expand().rows))
    expect_same(target, work)
    with_factors = target.estimate(work).latency_s
    target.used = target.plain
    assert not np.array_equal(with_factors, target.estimate(work).latency_s)
