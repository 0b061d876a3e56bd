"""Networks of other code bases and their data, for ``fxopt optimize benchmarks/common/strangers.py:FUNCTION``.

Random weights, ten classes, images of 32 x 32 of three channels, and few of them: what is tried is whether it works.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from common.networks import declare_torchvision_operators
from fxopt.data import TensorLoader, fashion_mnist

SIZE, TRAIN, VAL = 32, 320, 128


def _pooled(model: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """A network of pytorchcv with a last pooling that takes small images."""
    features = model.get_submodule("features")
    features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model, torch.randn(1, 3, SIZE, SIZE)


def _timm(name: str) -> tuple[nn.Module, torch.Tensor]:
    declare_torchvision_operators()
    torch.manual_seed(0)
    model = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10)
    return model, torch.randn(1, 3, SIZE, SIZE)


def pytorchcv_resnet10() -> tuple[nn.Module, torch.Tensor]:
    """A ResNet of a quarter of the width."""
    torch.manual_seed(0)
    return _pooled(importlib.import_module("pytorchcv.models.resnet").get_resnet(10, width_scale=0.25, num_classes=10))


def pytorchcv_mobilenetv2() -> tuple[nn.Module, torch.Tensor]:
    """MobileNetV2 of a quarter of the width."""
    torch.manual_seed(0)
    return _pooled(importlib.import_module("pytorchcv.models.mobilenetv2").mobilenetv2_wd4(num_classes=10))


def timm_mobilenetv3() -> tuple[nn.Module, torch.Tensor]:
    """MobileNetV3 of half the width."""
    return _timm("mobilenetv3_small_050")


def train() -> TensorLoader:
    """The first images of Fashion-MNIST, for training."""
    return _part(fashion_mnist()[0], TRAIN, 32)


def val() -> TensorLoader:
    """The first test images."""
    return _part(fashion_mnist()[1], VAL, 64)


def _part(loader: TensorLoader, count: int, batch: int) -> TensorLoader:
    images = nn.functional.interpolate(loader.inputs[:count], size=(SIZE, SIZE)).expand(-1, 3, -1, -1).contiguous()
    return TensorLoader(images, loader.labels[:count], batch, shuffle=True)
