"""Networks of other code bases and their data, for ``fxopt optimize benchmarks/common/strangers.py:FUNCTION``.

Random weights, ten classes, images of three channels, and few of them: what is tried is whether it works. The networks
are narrow and their images of 32 x 32 pixels, but for those called ``whole``, of full width and for images of
96 x 96, since to start the layers of the others takes a processor more than half of their time.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from common.networks import declare_torchvision_operators
from fxopt.data import TensorLoader, fashion_mnist

SMALL, WHOLE = 32, 96
TRAIN, VAL = 320, 128


def _pytorchcv(module: str, function: str, size: int, **options: float) -> tuple[nn.Module, torch.Tensor]:
    """A network of pytorchcv with a last pooling that takes small images."""
    torch.manual_seed(0)
    model = getattr(importlib.import_module(f"pytorchcv.models.{module}"), function)(num_classes=10, **options)
    model.get_submodule("features").final_pool = nn.AdaptiveAvgPool2d(1)
    return model, torch.randn(1, 3, size, size)


def _timm(name: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    declare_torchvision_operators()
    torch.manual_seed(0)
    model = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10)
    return model, torch.randn(1, 3, size, size)


def pytorchcv_resnet10() -> tuple[nn.Module, torch.Tensor]:
    """A ResNet of a quarter of the width."""
    return _pytorchcv("resnet", "get_resnet", SMALL, blocks=10, width_scale=0.25)


def pytorchcv_mobilenetv2() -> tuple[nn.Module, torch.Tensor]:
    """MobileNetV2 of a quarter of the width."""
    return _pytorchcv("mobilenetv2", "mobilenetv2_wd4", SMALL)


def timm_mobilenetv3() -> tuple[nn.Module, torch.Tensor]:
    """MobileNetV3 of half the width."""
    return _timm("mobilenetv3_small_050", SMALL)


def pytorchcv_resnet10_whole() -> tuple[nn.Module, torch.Tensor]:
    """A ResNet."""
    return _pytorchcv("resnet", "resnet10", WHOLE)


def pytorchcv_mobilenetv2_whole() -> tuple[nn.Module, torch.Tensor]:
    """MobileNetV2."""
    return _pytorchcv("mobilenetv2", "mobilenetv2_w1", WHOLE)


def timm_mobilenetv3_whole() -> tuple[nn.Module, torch.Tensor]:
    """MobileNetV3."""
    return _timm("mobilenetv3_small_100", WHOLE)


def train() -> TensorLoader:
    """The first images of Fashion-MNIST, for training."""
    return _part(fashion_mnist()[0], TRAIN, 32, SMALL)


def val() -> TensorLoader:
    """The first test images."""
    return _part(fashion_mnist()[1], VAL, 64, SMALL)


def train_whole() -> TensorLoader:
    """The same for training, larger."""
    return _part(fashion_mnist()[0], TRAIN, 32, WHOLE)


def val_whole() -> TensorLoader:
    """The same to judge by, larger."""
    return _part(fashion_mnist()[1], VAL, 64, WHOLE)


def _part(loader: TensorLoader, count: int, batch: int, size: int) -> TensorLoader:
    images = nn.functional.interpolate(loader.inputs[:count], size=(size, size)).expand(-1, 3, -1, -1).contiguous()
    return TensorLoader(images, loader.labels[:count], batch, shuffle=True)
