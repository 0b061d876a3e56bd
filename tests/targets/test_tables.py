"""Tables of costs: sums of look-ups equal estimates, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import TargetError, UnknownNameError, UnsupportedError
from fxopt.targets import OpKind, Target, Workload, load, make_row
from fxopt.targets.rows import Rows
from fxopt.targets.tables import CostTable
from tests.targets.oracle import conv, random_rows

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = np.array([1, 2, 4, 8, 16, 32])


def forms_of(row: Rows) -> Rows:
    """A row in all combinations of widths."""
    forms = np.repeat(row, len(WIDTHS) ** 2)
    forms["weight_bits"] = np.repeat(WIDTHS, len(WIDTHS))
    forms["activation_bits"] = np.tile(WIDTHS, len(WIDTHS))
    return forms


def network(seed: int, count: int) -> list[Rows]:
    rows = random_rows(np.random.default_rng(seed), count)
    return [forms_of(rows[i : i + 1]) for i in range(count)]


def written(forms: list[Rows], codes: np.ndarray) -> Workload:
    rows = np.stack([row[codes[:, i]] for i, row in enumerate(forms)], axis=1)
    return Workload(rows, [f"row{i}" for i in range(len(forms))])


@given(SEEDS, st.integers(1, 9))
@pytest.mark.parametrize("name", ["pixel1", "v100", "galaxy-s25"])
def test_sums_of_look_ups_are_estimates(name: str, seed: int, count: int) -> None:
    forms, target = network(seed, count), load(name)
    table = CostTable(target, forms, [f"row{i}" for i in range(count)])
    codes = np.random.default_rng(seed).integers(0, len(WIDTHS) ** 2, (7, count)).astype(table.dtype)
    estimate = target.estimate(written(forms, codes))
    for metric in ("latency", "size", "macs"):
        for threads in (1, 3):
            found = table.score(codes, metric, threads=threads)
            np.testing.assert_allclose(found, estimate.metric(metric), rtol=1e-12)
        lean = table.without(~table.depends)
        few = np.ascontiguousarray(codes[:, table.depends])
        np.testing.assert_allclose(lean.score(few, metric), found, rtol=1e-12)
    assert set(estimate.uncosted) <= set(table.uncosted)


def test_what_costs_nothing_is_not_taken_to_have_no_model() -> None:
    # Joining and ReLU take no time on this processor, whatever they follow.
    relu, joined = make_row(OpKind.ELEMENTWISE, c=8, k=8, activation=1), make_row(OpKind.COPY, c=8, k=8)
    table = CostTable(load("galaxy-s25"), [relu, joined, make_row(OpKind.UNKNOWN)], ["relu", "cat", "unknown"])
    assert table.uncosted == ("unknown",)
    assert table.score(np.zeros((1, 3), np.uint8)).tolist() == [load("galaxy-s25").model.fixed_s]


def test_many_forms_take_wider_codes() -> None:
    widths = np.repeat(conv(4, 4, 4), 300)
    widths["k"] = np.arange(1, 301)
    table = CostTable(load("pixel1"), [widths, conv(3, 4, 4)], ["a", "b"])
    assert table.dtype is np.uint16
    codes = np.array([[299, 0], [0, 0]], np.uint16)
    assert table.score(codes, "macs").tolist() == [(4 * 300 + 3 * 4) * 16.0, (4 + 3 * 4) * 16.0]
    assert table.depends.tolist() == [True, False]


@pytest.fixture(scope="module")
def table() -> CostTable:
    return CostTable(load("pixel1"), [forms_of(conv(4, 4, 4)), conv(4, 8, 4)], ["a", "b"])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 3), np.uint8), r"shape \(policies, 2\)"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.array([[0, 0], [36, 0]], np.uint8), "'a' is not below its 36"),
        (np.array([[0, 1]], np.uint8), "'b' is not below its 1"),
    ],
)
def test_codes_that_do_not_fit_are_refused(table: CostTable, codes: np.ndarray, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        table.score(codes)


def test_metrics_that_are_no_sums_are_refused(table: CostTable) -> None:
    codes = np.zeros((1, 2), np.uint8)
    with pytest.raises(UnsupportedError, match="no sum"):
        table.score(codes, "memory")
    with pytest.raises(UnsupportedError, match="energy"):
        table.score(codes, "energy")
    with pytest.raises(UnknownNameError, match="latency"):
        table.score(codes, "latancy")
    with pytest.raises(TargetError, match="threads"):
        table.score(codes, threads=0)


def test_operators_without_a_model_are_named_and_fused_ones_are_free() -> None:
    target: Target = load("pixel1")
    fused = make_row(OpKind.ELEMENTWISE, c=8, k=8, fused=1)
    table = CostTable(target, [conv(4, 4, 4), make_row(OpKind.UNKNOWN), fused], ["a", "b", "c"])
    assert table.uncosted == ("b",)
    assert len(table.without(np.ones(3, bool))) == 0
    assert (
        table.without(np.ones(3, bool)).score(np.zeros((2, 0), np.uint8)).tolist()
        == table.score(np.zeros((2, 3), np.uint8)).tolist()
    )
    with pytest.raises(TargetError, match="forms"):
        CostTable(target, [], [])
