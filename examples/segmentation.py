"""A segmentation network with a score and a loss of its own: channels cut to half of the work, 8 bits.

    python examples/segmentation.py

It finds discs in noise; the images are made here. The score is the mean intersection over union.
"""

from __future__ import annotations

import torch
from torch import nn

import fxopt
from fxopt.data import TensorLoader
from fxopt.training import fit


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions."""
    layers: list[nn.Module] = []
    for source in (inputs, outputs):
        layers += [nn.Conv2d(source, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015): one way down, one way up, joined by a concatenation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down, self.bottom = block(1, width), block(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.joined = block(2 * width, width)
        self.classes = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 1, height, width) to scores of two classes at every pixel."""
        fine = self.down(x)
        coarse = self.up(self.bottom(self.pool(fine)))
        scores: torch.Tensor = self.classes(self.joined(torch.cat((fine, coarse), 1)))
        return scores


def discs(count: int, seed: int) -> TensorLoader:
    """Noisy images of 24 x 24 pixels with a disc in each, and which pixels are the disc's."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator) * 12 + 6
    radii = torch.rand(count, generator=generator) * 4 + 3
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    far = (rows - centres[:, :1, None]).square() + (columns - centres[:, 1:, None]).square()
    inside = far < radii[:, None, None].square()
    noise = torch.randn(count, 1, 24, 24, generator=generator)
    return TensorLoader(inside[:, None].float() + 0.5 * noise, inside.long(), 32, shuffle=True, seed=seed)


TRAIN, HELD_OUT = discs(256, seed=0), discs(64, seed=1)


def overlap(model: nn.Module) -> float:
    """Mean intersection over union of discs that were found and discs that are there; higher is better."""
    found = model(HELD_OUT.inputs).argmax(1) == 1
    there = HELD_OUT.labels == 1
    return float(((found & there).sum((1, 2)) / (found | there).sum((1, 2)).clamp(min=1)).mean())


def optimized(epochs: int = 4) -> fxopt.OptimizationResult:
    """A trained U-Net at half of its multiply-accumulates."""
    torch.manual_seed(0)
    model = UNet()
    fit(model, TRAIN, epochs=epochs, learning_rate=0.05, loss=nn.functional.cross_entropy)
    return fxopt.optimize(
        model.eval(),
        TRAIN.inputs[:2],
        target="phone-int8",
        budget={"macs": 0.5},
        passes=("prune-channels", "quantize"),
        engine="evolution",
        trials=6,
        epochs=epochs // 2,
        train=TRAIN,
        evaluate=overlap,
        loss=nn.functional.cross_entropy,
        seed=0,
    )


if __name__ == "__main__":
    result = optimized()
    print(result.report)
    result.save("segmentation-out")
    print(result.export("segmentation-out/model.onnx"))
