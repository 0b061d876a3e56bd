"""What a graph computes with fake quantization is what the integers in its file compute, by NumPy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import fx, nn

from fxopt.decisions import Placement
from fxopt.export import export_onnx
from fxopt.graph import trace
from fxopt.graph.fake_quantize import ActivationQuantizer
from fxopt.passes import Quantize
from tests.export.integers import run

EXAMPLE = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
SHARED = Placement(shared_grids=("add", "cat"))


class Mixed(nn.Module):
    """Convolutions, a sum, a concatenation, a product of activations and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
        self.third, self.last = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.first(x).relu(), self.second(x)
        y = self.third(torch.cat([one + two, two], 1)).flatten(2)
        return self.last((y @ y.transpose(1, 2)).flatten(1))


def quantized(bits: tuple[int, int], **options: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    gm = trace(Mixed().eval(), EXAMPLE[:2])
    step = Quantize(calibration=EXAMPLE, **options)
    chosen = {
        decision.key: bits if decision.operator != "matmul" else (bits[1], bits[1])
        for decision in step.search_space(gm)
    }
    return step.with_policy(chosen)(gm).graph_module  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        ((8, 8), {}),
        ((4, 5), {"activations": {"symmetric": True}, "weights": {"per_channel": False}}),
        ((3, 6), {"activations": {"power_of_two": True}, "weights": {"power_of_two": True}, "placement": SHARED}),
        ((2, 7), {"activations": {"method": "mse"}, "weights": {"narrow": False, "method": "mse"}}),
        ((1, 2), {"placement": SHARED}),
    ],
)
def test_the_file_computes_the_graphs_integers(bits: tuple[int, int], options: dict[str, Any], tmp_path: Path) -> None:
    gm = quantized(bits, **options)
    path = export_onnx(gm, tmp_path / "model.onnx", EXAMPLE[:2], check=False).path
    data = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    found = run(onnx.load(path), {"x": data.numpy()})
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(data)
    compared = 0
    for node, value in interpreter.env.items():
        quantizer = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, ActivationQuantizer) and str(node.target) in found:
            theirs, scale = found[str(node.target)], np.float32(quantizer.scale.item())
            assert np.all(theirs.scale == scale)
            assert theirs.steps.min() >= -int(quantizer.zero_point)
            assert theirs.steps.max() <= quantizer.largest - int(quantizer.zero_point)
            gap = np.abs(np.rint(value.numpy() / scale) - theirs.steps)
            # Rounded biases and sums of floats may fall on the other side of the middle between two steps.
            assert gap.max() <= 1, node
            assert (gap > 0).sum() <= max(3, 0.02 * gap.size), node
            compared += 1
    assert compared >= 6
