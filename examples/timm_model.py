"""A timm model for a phone: channels cut to half of the latency, 8 bits, proven in onnxruntime.

    pip install fxopt timm
    python examples/timm_model.py

The weights are random and the images noise, so that nothing has to be downloaded: give `pretrained=True`, and loaders
of your own as `train=` and `val=`, and the search is led by accuracy.
"""

from __future__ import annotations

import timm
import torch

import fxopt


def optimized(name: str = "mobilenetv3_small_050", size: int = 64) -> fxopt.OptimizationResult:
    """A timm model at half of its latency on a Galaxy Note10."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    return fxopt.optimize(
        model,
        torch.randn(2, 3, size, size),
        target="note10",
        budget={"latency": 0.5},
        passes=("prune-channels", "quantize"),
        engine="uniform",
        seed=0,
    )


if __name__ == "__main__":
    result = optimized()
    print(result.report)
    result.save("timm-out")
    print(result.export("timm-out/model.onnx"))
