"""Time of a step of quantization-aware training against torch's own fake-quantize modules, in the same places.

Prints JSON: processor seconds of forward, backward and update of a MobileNetV2 for small images, W8A8, 1 thread;
medians of steps taken in turn, and of ratios within a turn. ``observed`` is how torch's modules come (ranges observed
at every step), ``fixed`` has observers of activations off, ``learned`` learns scales (torch's
``_LearnableFakeQuantize``, ours by LSQ). ``quantizers`` are the same without convolutions: the step
less that of the float graph.

    python benchmarks/qat_step.py > qat_step.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from common.fashion import mobilenet_v2
from common.output import finish, keep_memory
from torch import fx, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

from fxopt.graph import edit, trace
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer, learn_scales
from fxopt.passes import FoldBatchNorm, Quantize

WARM_UP = 3


def theirs(gm: fx.GraphModule, kind: str) -> fx.GraphModule:
    """The graph with torch's modules in the place of ours, at the same scales."""
    other = copy.deepcopy(gm)
    for module in list(other.modules()):
        if isinstance(module, ActivationQuantizer):
            made = _activation(module, kind)
            for name, twin in list(other.named_modules(remove_duplicate=False)):
                if twin is module:
                    edit.replace_module(other, name, made)
        elif isinstance(module, QuantizedLayer):
            module._modules["weight_quantizer"] = _weight(module, kind)
    return other.train()


def _activation(module: ActivationQuantizer, kind: str) -> nn.Module:
    if kind == "learned":
        made = _LearnableFakeQuantize(
            MovingAverageMinMaxObserver,
            0,
            255,
            float(module.scale),
            float(module.zero_point),
            use_grad_scaling=True,
            dtype=torch.quint8,
        )
        made.enable_param_learning()
        return made
    made = FakeQuantize(MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8)
    made.scale.copy_(module.scale)
    made.zero_point.copy_(module.zero_point)
    if kind == "fixed":
        made.disable_observer()
    return made


def _weight(module: QuantizedLayer, kind: str) -> nn.Module:
    observer = MovingAveragePerChannelMinMaxObserver.with_args(averaging_constant=1.0)
    options = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
    if kind == "learned":
        made = _LearnableFakeQuantize(
            observer, -127, 127, channel_len=len(module.weight), use_grad_scaling=True, **options
        )
        made.enable_param_learning()
        with torch.no_grad():
            made.scale.copy_(module.weight_quantizer.scale)
        return made
    return FakeQuantize(observer, -127, 127, **options)


def step_of(gm: fx.GraphModule, images: torch.Tensor) -> Callable[[], float]:
    gm.train()
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-4, momentum=0.9)
    labels = torch.arange(len(images)) % 10

    def step() -> float:
        start = time.thread_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(gm(images), labels).backward()
        optimizer.step()
        return time.thread_time() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30, help="steps of each kind")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--keep-memory", action="store_true", help="let glibc keep freed memory: no fresh pages")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.keep_memory:
        keep_memory()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    images = torch.randn(options.batch, 1, 28, 28)
    plain = FoldBatchNorm()(trace(mobilenet_v2().eval(), images[:2])).graph_module
    quantized = Quantize(calibration=images)(plain).graph_module
    learned = copy.deepcopy(quantized)
    learn_scales(learned, "lsq")
    graphs = {"float": copy.deepcopy(plain), "ours": copy.deepcopy(quantized), "ours learned": learned}
    graphs |= {f"torch {kind}": theirs(quantized, kind) for kind in ("observed", "fixed", "learned")}
    steps = {name: step_of(gm, images) for name, gm in graphs.items()}
    pairs = {"observed": "ours", "fixed": "ours", "learned": "ours learned"}
    names = list(steps)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + options.repeat):
        # Each kind comes first as often as any other: what a step leaves in caches and heap is the next one's start.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = steps[name]()
            if turn >= WARM_UP:
                taken[name].append(seconds)

    def ratio(mine: str, other: str, less: str = "") -> float:
        base = taken[less] if less else [0.0] * options.repeat
        turns = zip(taken[mine], taken[other], base, strict=True)
        return round(statistics.median((one - own) / (two - own) for one, two, own in turns), 3)

    finish(
        "qat_step",
        {
            "ms": {name: round(1e3 * statistics.median(times), 1) for name, times in taken.items()},
            "step": {kind: ratio(mine, f"torch {kind}") for kind, mine in pairs.items()},
            "quantizers": {kind: ratio(mine, f"torch {kind}", "float") for kind, mine in pairs.items()},
        },
        batch=options.batch,
        repeat=options.repeat,
    )


if __name__ == "__main__":
    main()
