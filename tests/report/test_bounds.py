"""What operators wait for, on targets whose figures make the answer plain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.report._bounds import MOST_SLOW, bounds, slow_lines, time_lines
from fxopt.targets import OpKind, Target, Workload, load, make_row, names
from tests.report.samples import workload
from tests.targets.oracle import conv


def bound_of(target: Target, row: object, name: str = "one") -> str:
    (found,) = bounds(target, Workload(np.asarray(row), [name]))
    return found.bound


def test_a_large_convolution_computes_and_a_large_pooling_waits_for_memory() -> None:
    gpu = load("v100")
    assert bound_of(gpu, conv(512, 512, 56, 3)) == "compute"
    assert bound_of(gpu, make_row(OpKind.POOL, c=512, k=512, in_h=448, in_w=448, out_h=224, out_w=224)) == "memory"
    assert bound_of(gpu, make_row(OpKind.LINEAR, c=8192, k=8192)) == "memory"


def test_what_is_tiny_is_bound_by_its_launch() -> None:
    (found,) = bounds(load("v100"), Workload(conv(4, 4, 4, 1), ["tiny"]))
    assert found.bound == "launch"
    assert "smallest operator of its kind" in found.why


def test_a_constant_of_one_kind_of_kernel_is_its_launch_and_of_no_other() -> None:
    """pixel1 charges more than a millisecond for every convolution of more than one position, depthwise apart."""
    phone = load("pixel1")
    assert bound_of(phone, conv(1, 16, 14, 3)) == "launch"
    assert bound_of(phone, conv(64, 64, 14, 1)) == "compute"
    assert bound_of(phone, conv(64, 64, 14, 3, groups=64)) != "launch"


def test_moving_values_is_layout() -> None:
    row = make_row(OpKind.COPY, c=512, k=512, in_h=224, in_w=224, out_h=224, out_w=224, transposed=1)
    assert bound_of(load("v100"), row) == "layout"


@pytest.mark.parametrize("name", [name for name in names() if name != "host"])
def test_every_second_of_every_target_goes_somewhere(name: str) -> None:
    target = load(name)
    before, after = workload(8), workload(4)
    lines = time_lines(target, before, after)
    assert sum(line.before_s for line in lines) == pytest.approx(float(target.estimate(before).latency_s[0]))
    assert sum(line.after_s for line in lines) == pytest.approx(float(target.estimate(after).latency_s[0]))
    for one, seconds in zip(bounds(target, after), target.estimate(after).rows.latency_s[0], strict=True):
        assert bool(one.bound) is bool(seconds > 0.0)
        assert bool(one.why) is bool(one.bound)


@given(st.lists(st.sampled_from([4, 16, 64, 256]), min_size=2, max_size=20))
def test_the_costliest_come_first_with_what_freezes_them(widths: list[int]) -> None:
    rows = [conv(first, last, 14, 3) for first, last in itertools.pairwise(widths)]
    network = Workload(np.concatenate(rows), [f"layer.{index}" for index in range(len(rows))])
    target = load("v100")
    frozen = {"layer.0": "cat (join)"}
    lines = slow_lines(target, network, bounds(target, network), frozen)
    assert len(lines) == min(len(rows), MOST_SLOW)
    seconds = [line.latency_s for line in lines]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(line.share for line in lines) <= 1.0 + 1e-9
    for line in lines:
        assert line.frozen_by == frozen.get(line.site, "")
        assert line.remedy


def test_a_frozen_layer_is_not_told_to_lose_channels() -> None:
    target, network = load("v100"), Workload(conv(512, 512, 56, 3), ["one"])
    found = bounds(target, network)
    (free,) = slow_lines(target, network, found, {})
    (frozen,) = slow_lines(target, network, found, {"one": "cat (join)"})
    assert "Fewer channels" in free.remedy
    assert "Fewer channels" not in frozen.remedy
