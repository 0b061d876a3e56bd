"""Presets of every family keep what a target promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fxopt.targets import Estimate, PresetTarget, Workload
from fxopt.testing import TargetConformance
from tests.targets.oracle import BOARD


class TestPixel1(TargetConformance):
    target = "pixel1"


class TestV100(TargetConformance):
    target = "v100"


class TestZynq7020(TargetConformance):
    target = "zynq7020"


class TestBitFusion(TargetConformance):
    target = "bitfusion"
    monotone = False


class TestEyeriss(TargetConformance):
    target = "eyeriss"


class TestGalaxyS24(TargetConformance):
    target = "galaxy-s24"


class TestMicrocontroller(TargetConformance):
    target = "stm32f746"


def suite_of(text: str, folder: Path) -> TargetConformance:
    (folder / "board.toml").write_text(text)

    class TestBoard(TargetConformance):
        target = folder / "board.toml"

    return TestBoard()


def test_a_width_that_is_offered_and_has_no_figure_is_found(tmp_path: Path) -> None:
    both = BOARD.replace("[[32, 32]]", "[[32, 32], [8, 8]]")
    narrow = both.replace("peak.32", "peak.8").replace("mac_energy.32", "mac_energy.8")
    with pytest.raises(AssertionError, match="have no cost in floats"):
        suite_of(narrow, tmp_path).test_every_width_on_offer_can_be_costed()
    suite_of(narrow.replace("[32, 32], ", ""), tmp_path).test_every_width_on_offer_can_be_costed()
    suite_of(both, tmp_path).test_every_width_on_offer_can_be_costed()


def test_a_target_whose_costs_depend_on_their_company_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(BOARD, tmp_path)
    suite.test_a_batch_of_policies_costs_what_each_costs_alone()
    honest = PresetTarget.estimate

    def crowded(target: PresetTarget, work: Workload, **options: int) -> Estimate:
        found = honest(target, work, **options)
        return dataclasses.replace(found, latency_s=found.latency_s * len(found.latency_s))

    monkeypatch.setattr(PresetTarget, "estimate", crowded)
    with pytest.raises(AssertionError, match="in a batch"):
        suite.test_a_batch_of_policies_costs_what_each_costs_alone()
