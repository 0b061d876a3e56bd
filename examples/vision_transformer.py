"""A vision transformer of Hugging Face: heads and hidden channels cut, proven in onnxruntime.

    pip install fxopt transformers
    python examples/vision_transformer.py

The weights are random, so that nothing has to be downloaded: load yours by `from_pretrained`, and give loaders of your
own as `train=` and `val=`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import fxopt
from fxopt.passes import PruneChannels


class Scores(nn.Module):
    """The model with class scores as its only output: its own are a dataclass with fields of None."""

    def __init__(self, model: ViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, height, width) to class scores (batch, classes)."""
        scores: torch.Tensor = self.model(pixel_values=pixels).logits
        return scores


def vision_transformer() -> nn.Module:
    """A small one."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    return Scores(ViTForImageClassification(config)).eval()


def optimized() -> fxopt.OptimizationResult:
    """The transformer at 70% of its multiply-accumulates, by whole heads and by hidden channels."""
    model, example = vision_transformer(), torch.randn(2, 3, 32, 32)
    print(PruneChannels().explain(fxopt.trace(model, example)))
    return fxopt.optimize(
        model, example, target="galaxy-s24", budget={"macs": 0.7}, passes="prune-channels", engine="uniform"
    )


if __name__ == "__main__":
    result = optimized()
    print(result.report)
    result.save("transformer-out")
    print(result.export("transformer-out/model.onnx"))
