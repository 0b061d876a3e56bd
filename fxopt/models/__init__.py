"""Networks: published ones by name, the space that ProxylessNAS searches, and small ones for demonstrations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import nn

from fxopt._numbers import check_whole
from fxopt._seeding import seeded
from fxopt.errors import UnknownNameError
from fxopt.models._blocks import BasicBlock, Bottleneck, DepthwiseSeparable, InvertedResidual, SqueezeExcite
from fxopt.models._classic import MobileNetV1, ResNet
from fxopt.models._mobile import MOBILE_NETWORKS, Block, MobileNetwork, Plan, mobile_network, proxyless_space
from fxopt.models._small import SmallMobileNetV2, small_mobilenet_v2

__all__ = [
    "BasicBlock",
    "Block",
    "Bottleneck",
    "DepthwiseSeparable",
    "InvertedResidual",
    "MobileNetV1",
    "MobileNetwork",
    "Plan",
    "ResNet",
    "SmallMobileNetV2",
    "SqueezeExcite",
    "create",
    "names",
    "proxyless_space",
    "small_mobilenet_v2",
]

_NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    **{name: functools.partial(mobile_network, name) for name in MOBILE_NETWORKS},
    "mobilenet-v1": MobileNetV1,
    "mobilenet-v1-0.75": functools.partial(MobileNetV1, 0.75),
    "resnet-18": functools.partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet-34": functools.partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet-50": functools.partial(ResNet, Bottleneck, (3, 4, 6, 3)),
}


def names() -> list[str]:
    """The names of all published networks, sorted."""
    return sorted(_NETWORKS)


def create(name: str, classes: int = 1000, channels: int = 3, seed: int = 0) -> nn.Module:
    """A published network, in eval mode, with random weights drawn from one seed.

    Args:
        name: One of :func:`names`.
        classes: Number of classes.
        channels: Input channels.
        seed: The seed; torch's global generator is left alone.

    Raises:
        UnknownNameError: If there is no such network; suggests the nearest name.
        FxoptError: If a number is none, or too small.
    """
    check_whole(1, classes=classes, channels=channels)
    check_whole(0, seed=seed)
    if name not in _NETWORKS:
        raise UnknownNameError("network", name, _NETWORKS)
    with seeded(seed):
        return _NETWORKS[name](classes=classes, channels=channels).eval()
