"""The scripts that fit presets and compare them with measurements go with the package as it is."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fxopt.targets import Activation, OpKind, make_row
from fxopt.targets.models.linear_cpu import GROUP_NAMES

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = [
    f"{folder}.{path.stem}" for folder in ("fits", "accuracy") for path in (BENCHMARKS / folder).glob("[!_]*.py")
]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_script_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module(name).__doc__


def test_the_fit_of_a_core_puts_rows_in_the_groups_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fits = importlib.import_module("fits.linear_cpu")
    sizes = {"c": 8, "k": 8, "in_h": 8, "in_w": 8, "out_h": 8, "out_w": 8}
    windows = {"kernel_h": 3, "kernel_w": 1}
    rows = [make_row(OpKind.CONV, **sizes), make_row(OpKind.CONV, **sizes, **windows)]
    rows += [
        make_row(OpKind.CONV, **sizes, groups=2),
        make_row(OpKind.ELEMENTWISE, **sizes, activation=Activation.CURVE),
    ]
    rows += [make_row(kind, **sizes | ({"groups": 8} if kind == OpKind.DEPTHWISE else {})) for kind in OpKind]
    table = np.concatenate(rows)
    found = fits.groups_of(table)
    assert set(found) == {*GROUP_NAMES, ""}
    points = fits.Points(table, np.arange(len(table)), ("",) * len(table), np.ones(len(table)), ())
    for group in GROUP_NAMES:
        seconds = np.nan_to_num(fits.predict({f"float.{group}.const": 1.0}, points))
        # Without figures of its own an activation with a curve costs what other elementwise operators do.
        likewise = (found == "curve") & (group == "elementwise")
        assert seconds.tolist() == ((found == group) | likewise).tolist(), group


def test_the_fit_of_a_core_keeps_given_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fits = importlib.import_module("fits.linear_cpu")
    sizes = [(8, 3, 14), (24, 5, 7), (16, 7, 28)]
    shapes = [{"kernel_h": kernel, "kernel_w": kernel, "out_h": size, "out_w": size} for _, kernel, size in sizes]
    rows = [
        make_row(OpKind.DEPTHWISE, c=channels, k=channels, groups=channels, in_h=size, in_w=size, **shape)
        for (channels, _, size), shape in zip(sizes, shapes, strict=True)
    ]
    # A MAC takes 2 ns; a channel costs 50 of them, a weight 3.
    seconds = np.array([2e-9 * k * (r * r * size * size + 50 + 3 * r * r) for k, r, size in sizes])
    points = fits.Points(np.concatenate(rows), np.arange(3), ("a", "b", "c"), seconds, ("a", "b", "c"))
    mac, channel, weight = (f"float.depthwise.{name}" for name in ("mac", "channel", "weight"))
    form = fits.Form(terms=((mac, channel, weight),), ratios={channel: 50.0, weight: 3.0})
    assert form.fit(points) == pytest.approx({mac: 2e-9, channel: 100e-9, weight: 6e-9})
    assert fits.predict(form.fit(points), points) == pytest.approx(seconds)
    assert [*fits.left_out(form, points).values()] == pytest.approx([0.0] * 3, abs=1e-12)


def test_what_a_group_costs_is_measured_on_the_layers_that_it_is_fitted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    calibrate = importlib.import_module("calibrate_groups")
    with torch.inference_mode():
        layers = calibrate.layers_of("proxyless-cpu")
        # Counted from the published layer table: channels and multiply-accumulates of all depthwise layers.
        assert sum(layer.module.groups for layer in layers) == 6976
        assert sum(layer.macs for layer in layers) == 32_355_288
        assert layers[0].seconds() > 0.0
    assert not any(layer.module._forward_hooks for layer in layers)
