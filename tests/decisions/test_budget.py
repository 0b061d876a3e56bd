"""Budgets as people write them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.decisions import METRICS, Budget, format_quantity
from fxopt.errors import BudgetError


@pytest.mark.parametrize(
    ("metric", "value", "limit", "relative"),
    [
        ("latency", 0.6, 0.6, True),
        ("latency", 1, 1.0, True),
        ("latency", np.float32(0.5), 0.5, True),
        ("latency", Fraction(1, 4), 0.25, True),
        ("latency", "0.6", 0.6, True),
        ("latency", "60%", 0.6, True),
        ("latency", " 12.5 % ", 0.125, True),
        ("latency", "100%", 1.0, True),
        ("latency", "5ms", 5e-3, False),
        ("latency", "5 ms", 5e-3, False),
        ("latency", ".5s", 0.5, False),
        ("latency", "1e3us", 1e-3, False),
        ("latency", "250µs", 250e-6, False),
        ("latency", "40ns", 40e-9, False),
        ("energy", "3mJ", 3e-3, False),
        ("energy", "2J", 2.0, False),
        ("energy", "7uJ", 7e-6, False),
        ("energy", "9pJ", 9e-12, False),
        ("size", "2MB", 2e6, False),
        ("size", "512KB", 512e3, False),
        ("size", "512KiB", 512 * 1024.0, False),
        ("size", "100B", 100.0, False),
        ("memory", "1GiB", 2.0**30, False),
        ("macs", "300M", 300e6, False),
        ("macs", "1.5G", 1.5e9, False),
        ("macs", "300MMACs", 300e6, False),
    ],
)
def test_accepted_forms(metric: str, value: object, limit: float, relative: bool) -> None:
    budget = Budget.parse(metric, value)
    assert budget.metric == metric
    assert budget.limit == pytest.approx(limit, rel=1e-15)
    assert budget.relative is relative


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "value",
    [
        *(0, 0.0, -1, -0.5, 1.5, 2, 1e9, float("nan"), float("inf"), True, None, [], {}, b"5ms", 1 + 2j),
        *("", "5 parsecs", "fast", "ms", "0%", "-5%", "101%", "nan", "inf", "1.5", "0", "5 5", "5m s", "--5", "1e999s"),
        *("0ms", "-5ms", "0MB", "-1J", "0M", "nan ms", "1e999MB", "1e999M", "1e999J"),
    ],
)
def test_bad_budgets_say_what_is_accepted(metric: str, value: object) -> None:
    with pytest.raises(
        BudgetError, match=rf"{metric}=.*Accepted: a fraction .*percentage.* in {next(iter(METRICS[metric]))}"
    ):
        Budget.parse(metric, value)


@pytest.mark.parametrize(
    ("metric", "value", "owner"),
    [
        ("latency", "5MB", "size and memory"),
        ("size", "5ms", "latency"),
        ("macs", "3mJ", "energy"),
        ("energy", "1G", "macs"),
    ],
)
def test_a_unit_of_another_metric_is_named(metric: str, value: str, owner: str) -> None:
    with pytest.raises(BudgetError, match=f"is a unit of {owner}, not of {metric}"):
        Budget.parse(metric, value)


def test_an_unknown_metric_lists_the_known() -> None:
    for make in (lambda: Budget.parse("flops", 0.5), lambda: Budget("flops", 0.5, True)):
        with pytest.raises(BudgetError, match=r"flops.*latency, energy, size, macs, memory"):
            make()


@pytest.mark.parametrize(("limit", "relative"), [(0.0, False), (-1.0, False), (float("nan"), False), (1.5, True)])
def test_the_constructor_checks_too(limit: float, relative: bool) -> None:
    with pytest.raises(BudgetError):
        Budget("latency", limit, relative)


def test_parse_all_keeps_the_order() -> None:
    budgets = Budget.parse_all({"size": "2MB", "latency": 0.6})
    assert budgets == (Budget("size", 2e6, False), Budget("latency", 0.6, True))
    assert Budget.parse_all({"size": budgets[0]}) == budgets[:1]
    assert Budget.parse_all({}) == ()
    with pytest.raises(BudgetError, match="own metric"):
        Budget.parse_all({"latency": budgets[0]})
    for nonsense in (0.6, "60%", ["latency"]):
        with pytest.raises(BudgetError, match="by metric"):
            Budget.parse_all(nonsense)  # type: ignore[arg-type]


def test_absolute_is_in_si_units() -> None:
    assert Budget.parse("latency", "50%").absolute(0.02) == 0.01
    assert Budget.parse("latency", "5ms").absolute(123.0) == 0.005
    assert Budget.parse("latency", "5ms").absolute(float("nan")) == 0.005
    for reference in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BudgetError, match="absolute budget"):
            Budget.parse("latency", 0.5).absolute(reference)


@given(st.floats(1e-9, 1e3))
def test_what_is_shown_reads_back(value: float) -> None:
    for metric in ("latency", "energy"):
        shown = format_quantity(metric, value)
        assert Budget.parse(metric, shown).limit == pytest.approx(value, rel=1e-3)


def test_quantities_read_well() -> None:
    assert format_quantity("latency", 0.0032) == "3.2 ms"
    assert format_quantity("size", 2_500_000) == "2.5 MB"
    assert format_quantity("macs", 3e8) == "300 M"
    assert format_quantity("macs", 12) == "12"
    assert format_quantity("latency", 0.0) == "0 ns"
    assert format_quantity("cost", 1.5) == "1.5"
    assert str(Budget.parse("latency", "5ms")) == "latency <= 5 ms"
    assert str(Budget.parse("latency", "60%")) == "latency <= 0.6 of the original"
