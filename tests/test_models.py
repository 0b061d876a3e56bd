"""Published networks have the layers, MACs and parameters that were published."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxopt import models
from fxopt.errors import FxoptError, UnknownNameError

TABLES = (
    Path(os.environ.get("FXOPT_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data") / "layer_tables.json"
)

# Multiply-accumulates at 224 x 224 and parameters of the public definitions: convolutions K*C/groups*R*S*P*Q, weights
# plus two a channel for batch norm, classifier with bias.
PUBLISHED = {
    "proxyless-mobile": (320_427_584, 4_080_512),
    "proxyless-cpu": (439_243_864, 4_361_648),
    "proxyless-gpu": (465_260_160, 7_119_848),
    "proxyless-mobile-1.4": (580_883_408, 6_857_568),
    "mobilenet-v1": (568_740_352, 4_231_976),
    "mobilenet-v2": (300_774_272, 3_504_872),
    "mnasnet-b1": (314_415_872, 4_383_312),
    "resnet-18": (1_814_073_344, 11_689_512),
    "resnet-50": (4_089_184_256, 25_557_032),
}

# Table of the same network, where the table is of that very network.
TABLED = {
    "proxyless-mobile": "proxyless_mobile",
    "proxyless-cpu": "proxyless_cpu",
    "proxyless-gpu": "proxyless_gpu",
    "proxyless-mobile-1.4": "proxyless_mobile14",
    "mobilenet-v1": "mobilenet_v1",
    "mobilenet-v1-0.75": "mobilenet_v1_075",
    "mnasnet-b1": "mnasnet_b1",
    "resnet-18": "resnet18",
    "resnet-34": "resnet34",
}


def layers(model: nn.Module, size: int = 224) -> list[tuple[int, ...]]:
    """(C, K, R, stride, groups, P, Q) of every convolution and linear layer, in order of execution."""
    found: list[tuple[int, ...]] = []

    def note(module: nn.Module, _: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            conv = (module.kernel_size[0], module.stride[0], module.groups, *output.shape[2:])
            found.append((module.in_channels, module.out_channels, *conv))
        else:
            found.append((module.in_features, module.out_features, 1, 1, 1, 1, 1))

    handles = [one.register_forward_hook(note) for one in model.modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    model(torch.empty(1, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return found


def shapes_of(name: str) -> nn.Module:
    """The network without weights, which takes no time."""
    with torch.device("meta"):
        return models.create(name)


def macs(rows: list[tuple[int, ...]]) -> int:
    return sum(c * k // groups * r * r * p * q for c, k, r, _, groups, p, q in rows)


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_and_parameters_are_the_published_ones(name: str) -> None:
    model = shapes_of(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (macs(layers(model)), parameters) == PUBLISHED[name]


@pytest.mark.skipif(not TABLES.is_file(), reason="the layer tables are not here (FXOPT_SHARED_DATA)")
@pytest.mark.parametrize("name", TABLED)
def test_layers_are_those_of_the_table(name: str) -> None:
    entries = json.loads(TABLES.read_text())[TABLED[name]]
    wanted = [
        tuple(entry.get(key, 1) for key in ("C", "K", "R", "stride", "groups", "P", "Q"))
        for entry in entries
        if entry["op"] in ("conv", "fc")
    ]
    assert sorted(layers(shapes_of(name))) == sorted(wanted)


def test_one_seed_gives_one_network_and_leaves_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    one, other = (models.create("proxyless-gpu", 10, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one["stem.0.weight"], models.create("proxyless-gpu", 10).stem[0].weight)


def test_an_unknown_network_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="proxyless-mobile"):
        models.create("proxyless-mobil")


@pytest.mark.parametrize("numbers", [{"classes": 0}, {"classes": "10"}, {"channels": 1.5}, {"seed": -1}])
def test_numbers_of_a_published_network_are_checked(numbers: dict[str, Any]) -> None:
    with pytest.raises(FxoptError, match=f"^{next(iter(numbers))} has to be .*got "):
        models.create("mobilenet-v2", **numbers)


@pytest.mark.parametrize(
    ("resolution", "pixels", "strides"),
    [(224, 7, 5), (128, 4, 5), (96, 6, 4), (64, 4, 4), (32, 4, 3), (28, 7, 2), (8, 4, 1), (3, 3, 0)],
)
def test_the_space_leaves_out_strides_of_small_images(resolution: int, pixels: int, strides: int) -> None:
    model = models.proxyless_space(0.25, resolution, classes=7, channels=1)
    assert sum(one.stride[0] == 2 for one in model.modules() if isinstance(one, nn.Conv2d)) == strides
    maps = model.blocks(model.stem(torch.zeros(2, 1, resolution, resolution)))
    assert maps.shape[2:] == (pixels, pixels)
    assert model(torch.zeros(2, 1, resolution, resolution)).shape == (2, 7)


def test_the_space_has_21_blocks_of_which_15_have_a_shortcut() -> None:
    blocks = models.proxyless_space(0.5).blocks
    assert len(blocks) == 1 + 21
    assert sum(block.shortcut for block in blocks[1:]) == 15
    widths = [block.project[0].out_channels for block in blocks]
    assert widths == [8, *[16] * 4, *[24] * 4, *[40] * 4, *[48] * 4, *[96] * 4, 160]


@pytest.mark.parametrize(("width", "resolution", "shortcuts"), [(0.35, 224, 16), (0.35, 32, 17), (0.05, 224, 17)])
def test_stages_that_are_equally_wide_have_a_shortcut_between_them(
    width: float, resolution: int, shortcuts: int
) -> None:
    blocks = models.proxyless_space(width, resolution).blocks
    assert sum(block.shortcut for block in blocks[1:]) == shortcuts


@pytest.mark.parametrize(
    "sizes",
    [
        *({"width": 0.0}, {"resolution": 0}, {"classes": 0}, {"kernel": 4}, {"expansion": 0}),
        *({"width": "a"}, {"classes": 2.5}, {"kernel": None}),
    ],
)
def test_sizes_out_of_range_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(FxoptError, match=f"^{next(iter(sizes))} has to be .*got "):
        models.proxyless_space(**sizes)
