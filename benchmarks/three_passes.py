"""Operators, channels and bits together against each part of it, on BitFusion: small networks on Fashion-MNIST.

At each latency, a fraction of that of a MobileNetV2-style network with 8 bits everywhere:

- ``operators``: operators are selected, 8 bits everywhere;
- ``channels``: operators are selected and channels cut, 8 bits everywhere;
- ``4 bits``, ``6 bits``, ``8 bits``: the MobileNetV2-style network, at the largest width that fits with these bits;
- ``mixed bits``: that of 4 bits, the bits of each layer searched;
- ``all``: operators, channels and bits, by one call of ``fxopt.optimize``.

What is selected starts from the MobileNetV2-style network at its full width, trained, as somebody would bring it. The
networks of fewer bits are trained from scratch, for as many images as that and all that follows it, the supernet's
counted. Accuracy is on all 10,000 test images, the latency is that of the last graph. Each result is a line of the file
``--parts``, and a way that was stopped goes on from its checkpoints in ``--work``: the same command goes on where it
was. All of them are printed as JSON at the end.

    .venv/bin/python benchmarks/three_passes.py --parts three.jsonl --work three > three_passes.json
"""

from __future__ import annotations

import argparse
import bisect
import functools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import fashion
from common.output import finish, keep_memory, progress
from common.parts import Parts
from torch import fx, nn

import fxopt
from fxopt import models, targets
from fxopt.data import TensorLoader
from fxopt.decisions import Capabilities, SearchSpace
from fxopt.errors import InfeasibleError
from fxopt.evaluate import accuracy
from fxopt.lowering import lower
from fxopt.passes import PruneChannels, Quantize, SelectOperators, TunablePass
from fxopt.training import fit

WAYS = ("operators", "channels", "4 bits", "6 bits", "8 bits", "mixed bits", "all")
STAGES = ((24, 2), (24, 1), (32, 1), (32, 1), (48, 2), (48, 1))
"""Channels and stride of the blocks, behind a stem of 16 channels and stride 2."""
CANDIDATES = ("mb{e}-k{k}", "fused{e}-k3", "zero")
"""Dense layers as well: depthwise ones leave most of the accelerator's array idle, at any bits."""
LEAST_ERROR = {"method": "mse"}
LAST = 2
"""Epochs of training through the quantizers of a network that was trained from scratch."""


@dataclass(frozen=True)
class SameBits(Quantize):
    """Quantize everything to the same bits.

    Attributes:
        everywhere: Bits of weights and activations.
    """

    everywhere: int = 8

    def search_space(self, graph_module: fx.GraphModule, capabilities: Capabilities | None = None) -> SearchSpace:
        """One choice for every layer."""
        pair = (self.everywhere, self.everywhere)
        found = super().search_space(graph_module, capabilities)
        return SearchSpace(replace(one, choices=(pair,), default=pair) for one in found)


def network(width: float, seed: int) -> nn.Module:
    """A MobileNetV2-style network for 28 x 28 images: expansion 6, kernel 3."""
    torch.manual_seed(seed)
    blocks = tuple(models.Block(scaled(outputs, width), 3, 6, stride) for outputs, stride in STAGES)
    plan = models.Plan(scaled(16, width), blocks, scaled(128, width), 2)
    return models.MobileNetwork(plan, 10, 1).to(memory_format=torch.channels_last)


def scaled(channels: int, width: float) -> int:
    return max(4, round(channels * width / 4) * 4)


@functools.cache
def quantized_latency(name: str, width: float, bits: int) -> float:
    """Seconds of the MobileNetV2-style network of a width on a target, with these bits everywhere."""
    target = targets.load(name)
    graph = fxopt.trace(network(width, 0).eval(), torch.zeros(2, 1, 28, 28))
    space = SameBits(everywhere=bits).search_space(graph, target.capabilities)
    workload = lower(graph, batch=target.capabilities.batch)
    return float(workload.estimate(target, [space.default()]).latency_s[0])


def widest(name: str, limit: float, bits: int) -> float:
    """The largest width within a latency, in steps of a twentieth.

    Raises:
        InfeasibleError: If not even a fifth of the width is.
    """
    widths = [step / 20 for step in range(4, 31)]
    fitting = bisect.bisect_right(widths, limit, key=lambda width: quantized_latency(name, width, bits))
    if not fitting:
        least = quantized_latency(name, widths[0], bits)
        raise InfeasibleError(f"{bits} bits take {least:g} s.", metric="latency", limit=limit, least=least)
    return widths[fitting - 1]


class Experiment:
    """One seed."""

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self.seed, self.options = seed, options
        self.data = fashion.data(128, seed)
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(self.data.train.inputs), generator=generator)

    def images(self, share: float = 1.0) -> Any:
        """Training images, in memory as the network computes them."""
        chosen = self._order[: round(self.options.samples * share)]
        inputs = self.data.train.inputs[chosen].contiguous(memory_format=torch.channels_last)
        loader = fashion.Augmented if self.options.augment else TensorLoader
        return loader(inputs, self.data.train.labels[chosen], self.data.train.batch_size, shuffle=True, seed=self.seed)

    def optimized(
        self, model: nn.Module, passes: tuple[TunablePass, ...], limit: float, name: str, train: Any, epochs: int
    ) -> Any:
        """What the passes make of a model within a latency; held-out images judge."""
        held = self.data.held_out
        val = replace(held, inputs=held.inputs[: self.options.judged], labels=held.labels[: self.options.judged])
        return fxopt.optimize(
            model,
            train.inputs[:2],
            target=self.options.target,
            budget={"latency": f"{limit!r}s"},
            passes=passes,
            engine=self.options.engine,
            trials=self.options.trials,
            train=train,
            val=val,
            epochs=epochs,
            final_epochs=self.options.final,
            learning_rate=self.options.tuning_rate,
            shares=self._shares(passes),
            seed=self.seed,
            workdir=None if self.options.work is None else self.options.work / name,
            verify_on_host=False,
        )

    def _shares(self, passes: tuple[TunablePass, ...]) -> dict[str, float] | None:
        """Operators go their part of the way, channels and bits halves of the rest; bits that are the same go none."""
        if len(passes) < 3:
            return None
        shares = {"select-operators": self.options.operators}
        share = 0.0 if isinstance(passes[-1], SameBits) else self.options.share
        return shares if share is None else {**shares, "quantize": share}

    @property
    def together(self) -> int:
        """Epochs of all parts: warm-up, two of search, the selected network, the quantized one; the last in floats."""
        return 5 * self.options.epochs + self.options.final

    def trained(self, width: float, epochs: int) -> nn.Module:
        """The MobileNetV2-style network of a width, trained from scratch."""
        model = network(width, self.seed)
        work = self.options.work
        name = f"floats-{self.options.samples}-{width}-{epochs}-{self.seed}{'-augmented' * self.options.augment}"
        kept = None if work is None else work / name
        fit(model, self.images(), epochs=epochs, learning_rate=self.options.rate, checkpoint=kept, seed=self.seed)
        return model.eval()

    def way(self, name: str, limit: float, label: str) -> dict[str, Any]:
        """What a way gives at a latency."""
        start = time.process_time()
        result = self._way(name, limit, label)
        counts = {kind: len({*result.policy.of_kind(kind).values()}) for kind in ("operator", "channels", "bits")}
        return {
            "accuracy": round(accuracy(result.model, self.data.test), 4),
            "latency_us": round(result.report.after.latency_s * 1e6, 2),
            "of_limit": result.report.after.latency_s / limit,
            "steps": [[line.name, line.accuracy, line.metrics.latency_s] for line in result.report.passes],
            "policy": {f"{kind} {site}": choice for (kind, site), choice in result.policy.items()},
            "different_choices": counts,
            "cpu_s": round(time.process_time() - start, 1),
        }

    def _way(self, name: str, limit: float, label: str) -> Any:
        quantize = Quantize(weights=LEAST_ERROR, activations=LEAST_ERROR, rounding=True)  # type: ignore[arg-type]
        same = SameBits(weights=LEAST_ERROR, activations=LEAST_ERROR, rounding=True)  # type: ignore[arg-type]
        operators = SelectOperators(patterns=("inverted-residual",), candidates=CANDIDATES, seed=self.seed)
        passes: dict[str, tuple[TunablePass, ...]] = {
            "operators": (operators, same),
            "channels": (operators, PruneChannels(), same),
            "all": (operators, PruneChannels(), quantize),
        }
        if name in passes:
            # Without a network that is cut the selected one is the last in floats: as many images with more in each.
            train = self.images(self.together / (self.together - self.options.epochs) if name == "operators" else 1.0)
            brought = self.trained(1.0, self.options.start)
            return self.optimized(brought, passes[name], limit, label, train, self.options.epochs)
        bits = int(name[0]) if name[0].isdigit() else 4
        train, epochs = self.images(), self.options.start + self.together - LAST
        model = self.trained(widest(self.options.target, limit, bits), epochs)
        last = quantize if name == "mixed bits" else replace(same, everywhere=bits)
        return self.optimized(model, (last,), limit, label, train, LAST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--points", default="0.45,0.32,0.12", help="parts of the latency with 8 bits everywhere")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--target", default="bitfusion", help="the same accelerator at another batch is bitfusion:batch-16"
    )
    parser.add_argument("--augment", action="store_true", help="mirror and shift training images")
    parser.add_argument("--samples", type=int, default=20_000, help="training images")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each of five parts of the training")
    parser.add_argument("--final", type=int, default=7, help="epochs of the last part in floats")
    parser.add_argument("--start", type=int, default=6, help="epochs of the network that is brought")
    parser.add_argument("--rate", type=float, default=0.1, help="highest learning rate from scratch")
    parser.add_argument("--tuning-rate", type=float, default=0.04, help="and of what starts from trained weights")
    parser.add_argument(
        "--operators", type=float, default=0.7, help="part of the way that operators go, before channels"
    )
    parser.add_argument("--share", type=float, help="part of the way that bits go, with all three")
    parser.add_argument("--engine", default="exact")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--judged", type=int, default=2000, help="held-out images that trials are judged on")
    parser.add_argument("--parts", type=Path, help="a file to keep results in")
    parser.add_argument("--work", type=Path, help="a folder for checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    parts = Parts(options.parts)
    whole = quantized_latency(options.target, 1.0, 8)
    others = {name: getattr(options, name) for name in ("target", "augment")}
    others = {name: value for name, value in others.items() if value != parser.get_default(name)}
    for seed in map(int, options.seeds.split(",")):
        experiment = Experiment(seed, options)
        for point in map(float, options.points.split(",")):
            for name in options.ways.split(","):
                # Results of other shares, or with more images, are others.
                shares = [options.operators, options.share] if name in ("channels", "all") else None
                key = {"seed": seed, "point": point, "way": name, "shares": shares, "samples": options.samples}
                key |= others
                kept = (name.replace(" ", "-"), options.samples, point, seed, *(shares or ()), *others.values())
                label = "-".join(map(str, kept)).replace(":", "-")
                try:
                    found = parts.add(key, experiment.way, name, point * whole, label)
                except InfeasibleError as failure:
                    progress(f"{label}: {failure}")
                else:
                    progress(f"{label}: {found['accuracy']:.4f} at {found['latency_us']:.1f} us")
    finish("three_passes", {"all": parts.done}, **{key: str(value) for key, value in vars(options).items()})


if __name__ == "__main__":
    main()
