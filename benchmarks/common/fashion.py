"""Small networks on Fashion-MNIST: what the benchmarks of accuracy start from.

Each is trained once; its weights are kept as safetensors in a folder outside the repository: ``FXOPT_BENCHMARK_CACHE``,
or ``~/.cache/fxopt/benchmarks``. The last 5,000 training images are held out: searches judge by them, and the test
images are looked at once, at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.output import progress
from fxopt.data import TensorLoader, fashion_mnist
from fxopt.evaluate import accuracy
from fxopt.models import InvertedResidual
from fxopt.training import fit

HELD_OUT = 5_000
SHIFT = 2
"""Pixels."""


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def classifier(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def mobilenet_v1(width: int = 16) -> nn.Sequential:
    """Depthwise separable convolutions (Howard et al. 2017) for 28 x 28 images: 13 pointwise layers."""
    layers: list[nn.Module] = [conv_norm(1, width, 3)]
    inputs = width
    for outputs, stride in ((2, 1), (4, 2), (4, 1), (8, 2), *[(8, 1)] * 3, (12, 2), (12, 1)):
        layers += [conv_norm(inputs, inputs, 3, stride, inputs), conv_norm(inputs, width * outputs, 1)]
        inputs = width * outputs
    return nn.Sequential(*layers, *classifier(inputs))


def mobilenet_v2() -> nn.Sequential:
    """Inverted residuals (Sandler et al. 2018) for 28 x 28 images."""
    layers: list[nn.Module] = [conv_norm(1, 16, 3)]
    inputs = 16
    for outputs, repeats, first in ((24, 2, 2), (40, 3, 2), (56, 2, 1)):
        for index in range(repeats):
            layers.append(InvertedResidual(inputs, outputs, first if index == 0 else 1, 4))
            inputs = outputs
    return nn.Sequential(*layers, conv_norm(inputs, 192, 1), *classifier(192))


class Bottleneck(nn.Module):
    """Reduce, filter, expand (He et al. 2016, figure 5)."""

    def __init__(self, inputs: int, middle: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * middle
        self.reduce = conv_norm(inputs, middle, 1)
        self.filter = conv_norm(middle, middle, 3, stride)
        self.expand = nn.Sequential(nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, height, width) to (batch, 4 middle, height / stride, width / stride)."""
        y: torch.Tensor = self.activation(self.expand(self.filter(self.reduce(x))) + self.shortcut(x))
        return y


def resnet_50_like(width: int = 16) -> nn.Sequential:
    """ResNet-50's bottlenecks, 3-4-6-3 of them, at a quarter of its width, for 28 x 28 images."""
    layers: list[nn.Module] = [conv_norm(1, width, 3, 2)]
    inputs = width
    for stage, repeats in enumerate((3, 4, 6, 3)):
        for index in range(repeats):
            layers.append(Bottleneck(inputs, width * 2**stage, 2 if stage and index == 0 else 1))
            inputs = 4 * width * 2**stage
    return nn.Sequential(*layers, *classifier(inputs))


@dataclass(frozen=True)
class Augmented(TensorLoader):
    """Batches of images, each mirrored or not and shifted by up to two pixels; anew in each pass, from the seed."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of (inputs, labels)."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch + 1)
        for images, labels in super().__iter__():
            count, _, height, width = images.shape
            down, right = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.arange(width).expand(count, width)
            rows, columns = down + torch.arange(height), right + torch.where(mirrored, columns.flip(1), columns)
            padded = nn.functional.pad(images, (SHIFT,) * 4, value=float(images.min())).permute(0, 2, 3, 1)
            found = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
            # A view of (batch, height, width, channels), as the images lie in memory.
            yield found.permute(0, 3, 1, 2), labels


@dataclass(frozen=True)
class Data:
    """Loaders of Fashion-MNIST.

    Attributes:
        train: The training images that are not held out, shuffled.
        held_out: The images that searches judge by.
        test: The test images.
    """

    train: TensorLoader
    held_out: TensorLoader
    test: TensorLoader


def data(batch_size: int = 128, seed: int = 0) -> Data:
    train, test = fashion_mnist(batch_size=batch_size, seed=seed)
    inputs, labels = train.inputs, train.labels
    held = TensorLoader(inputs[-HELD_OUT:], labels[-HELD_OUT:], 500)
    return Data(replace(train, inputs=inputs[:-HELD_OUT], labels=labels[:-HELD_OUT]), held, test)


def cache() -> Path:
    """The folder of trained networks; made if it is not there."""
    default = Path.home() / ".cache" / "fxopt" / "benchmarks"
    place = Path(os.environ.get("FXOPT_BENCHMARK_CACHE", default))
    place.mkdir(parents=True, exist_ok=True)
    return place


def trained(
    name: str,
    make: Callable[[], nn.Module],
    found: Data,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    weight_decay: float = 1e-4,
) -> nn.Module:
    """A network with trained weights, from the folder of kept ones if they are there; channels last in memory."""
    path = cache() / f"{name}-{epochs}-epochs{f'-seed-{seed}' if seed else ''}.safetensors"
    torch.manual_seed(seed)
    model = make()
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.to(memory_format=torch.channels_last).eval()
    fit(
        model.to(memory_format=torch.channels_last),
        replace(found.train, seed=seed),
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
        progress=lambda epoch, total, loss: progress(f"{name}: epoch {epoch} of {total}, loss {loss:.4f}"),
    )
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    progress(f"{name}: test accuracy {accuracy(model, found.test):.4f}")
    return model
