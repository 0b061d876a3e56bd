"""Measure networks on the CUDA device of this machine, fit the figures of a GPU preset to them, and print JSON.

Sixteen networks in float32 (TF32 off) and bfloat16 at batch 1 and 64. All settings take turns, round after round; each
turn is timed by CUDA events around as many runs as fill some milliseconds, and a setting's time is the median of its
turns. Then launch floor and efficiencies are fitted to all of them, and again without each network, to tell the error
on networks that a fit has not seen. The lines to put into the preset go to standard error.

``--measured FILE`` fits once more to the measurements in an earlier result, on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.networks import NETWORKS
from common.output import finish, progress
from fits.gpu import Case, figures_of, fit, left_out, predict

from fxopt.graph import trace
from fxopt.lowering import ParametricWorkload, lower
from fxopt.passes import Canonicalize
from fxopt.targets import Workload

CHOSEN = (
    *("alexnet", "darknet53", "densenet121", "mnasnet_b1", "mobilenet_w1", "mobilenetv2_w1", "mobilenetv3_large_w1"),
    *("preresnet18", "proxylessnas_mobile", "regnetx004", "resnet18", "resnet50", "seresnet50", "shufflenetv2_w1"),
    *("squeezenet_v1_1", "vgg16"),
)
BITS = {"float32": 32, "bfloat16": 16}
BATCHES = (1, 64)
FREE = ("launch_floor", "dense_efficiency", "depthwise_efficiency", "bandwidth_efficiency")
UNITS = {"launch_floor": ("us", 1e6)}
TURN_S = 0.02
NO_DEVICE = "No CUDA device here: run this where torch.cuda.is_available(), or give --measured FILE to fit only."


@dataclass(frozen=True, order=True)
class Setting:
    """What is timed: a network in a precision at a batch size."""

    network: str
    precision: str
    batch: int

    @property
    def name(self) -> str:
        """In words, the network first."""
        return f"{self.network} {self.precision} at {self.batch}"


def settings(networks: Sequence[str]) -> list[Setting]:
    """Every network in every precision at every batch size."""
    return [Setting(*each) for each in itertools.product(networks, BITS, BATCHES)]


def turns(count: int, rounds: int) -> Iterator[int]:
    """Indices of settings in the order of their turns: forth in one round, back in the next, so that drift cancels."""
    for index in range(rounds):
        yield from range(count) if index % 2 == 0 else reversed(range(count))


def runs_in_a_turn(seconds: float) -> int:
    """How many runs of about ``seconds`` fill a turn; at least 3."""
    return max(3, round(TURN_S / max(seconds, 1e-6)))


def interleaved(timers: Sequence[Callable[[int], float]], rounds: int) -> list[list[float]]:
    """Seconds of each setting, by turn. A timer takes a number of runs and gives the seconds of one of them."""
    counts = [runs_in_a_turn(timer(3)) for timer in timers]
    samples: list[list[float]] = [[] for _ in timers]
    for index in turns(len(timers), rounds):
        samples[index].append(timers[index](counts[index]))
    return samples


def summarized(setting: Setting, samples: Sequence[float]) -> dict[str, Any]:
    """One measurement as it stands in the result."""
    lowest, middle, highest = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {**asdict(setting), "seconds": middle, "quartiles": [lowest, highest], "turns": len(samples)}


def cuda_timer(setting: Setting, *, compiled: bool) -> Callable[[int], float]:
    """A timer of one setting on the CUDA device."""
    network = NETWORKS[f"pytorchcv:{setting.network}"]
    dtype = getattr(torch, setting.precision)
    model: Callable[[torch.Tensor], Any] = network.build().to("cuda", dtype)
    example = network.example(setting.batch).to("cuda", dtype)
    if compiled:
        model = torch.compile(model, mode="reduce-overhead")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(runs: int) -> float:
        with torch.inference_mode():
            # The first run after another network's finds caches cold and clocks low.
            model(example)
            start.record()
            for _ in range(runs):
                model(example)
            end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end) / runs

    return seconds


def measure(networks: Sequence[str], rounds: int, *, compiled: bool) -> list[dict[str, Any]]:
    """Every setting on the CUDA device of this machine."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    chosen = settings(networks)
    timers = []
    for setting in chosen:
        progress(f"preparing {setting.name}")
        timers.append(cuda_timer(setting, compiled=compiled))
        timers[-1](3)
    samples = interleaved(timers, rounds)
    return [summarized(setting, each) for setting, each in zip(chosen, samples, strict=True)]


def lowered(network: str) -> Callable[[int], ParametricWorkload]:
    """The rows of a network, by batch size."""
    known = NETWORKS[f"pytorchcv:{network}"]
    graph = Canonicalize()(trace(known.build(), known.example(2))).graph_module
    return lambda batch: lower(graph, batch=batch)


def in_bits(work: Workload, bits: int) -> Workload:
    """A workload with all operands in ``bits``."""
    rows = work.rows.copy()
    for field in ("weight_bits", "activation_bits", "output_bits"):
        rows[field] = bits
    return Workload(rows, work.names)


def cases(measured: Iterable[Mapping[str, Any]], *, fuses: bool) -> list[Case]:
    """Measurements with the rows of their networks."""
    by_network: dict[str, Callable[[int], ParametricWorkload]] = {}
    found = []
    for point in measured:
        setting = Setting(point["network"], point["precision"], point["batch"])
        if setting.network not in by_network:
            progress(f"lowering {setting.network}")
            by_network[setting.network] = lowered(setting.network)
        work = in_bits(by_network[setting.network](setting.batch).bind(), BITS[setting.precision])
        found.append(Case(setting.name, work, point["seconds"], fuses))
    return found


def errors_by_setting(errors: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Mean and largest magnitude of relative errors, in all and by precision and batch."""
    found = {}
    for label in ("all", *(f"{precision} at {batch}" for precision, batch in itertools.product(BITS, BATCHES))):
        values = np.abs([error for name, error in errors.items() if label == "all" or name.endswith(f" {label}")])
        if len(values):
            found[label] = {"mean": float(values.mean()), "max": float(values.max())}
    return found


def calibrated(values: Mapping[str, float], measured: Sequence[Case]) -> dict[str, Any]:
    """Figures fitted to all measurements, their errors, and those on networks left out of the fit."""
    figures = fit(values, FREE, measured)
    seconds = np.array([case.seconds for case in measured])
    found = predict({**values, **figures}, measured) / seconds - 1.0
    fitted = dict(zip([case.name for case in measured], found.tolist(), strict=True))
    held = left_out(values, FREE, measured)
    return {
        "figures": figures,
        "fitted": errors_by_setting(fitted),
        "left_out": errors_by_setting(held),
        "errors": {name: {"fitted": fitted[name], "left_out": held[name]} for name in fitted},
    }


def preset_lines(figures: Mapping[str, float]) -> list[str]:
    """The figures as they stand in a preset."""
    found = []
    for key, value in figures.items():
        unit, factor = UNITS.get(key, ("1", 1.0))
        found.append(f'{key} = {{ value = {value * factor:.3g}, unit = "{unit}", source = "measured" }}')
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200", help="preset whose peak figures are taken")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile; name the target's fusing mode")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each setting")
    parser.add_argument("--networks", nargs="+", default=CHOSEN, help="architectures of pytorchcv")
    parser.add_argument("--measured", type=Path, help="an earlier result, to fit to its measurements")
    options = parser.parse_args()
    if options.measured is None and not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    torch.set_num_threads(1)
    if options.measured is None:
        device, compiled = torch.cuda.get_device_name(), options.compiled
        points = measure(options.networks, options.rounds, compiled=compiled)
    else:
        earlier = json.loads(options.measured.read_text(encoding="utf-8"))
        device, compiled, points = earlier["device"], earlier["compiled"], earlier["results"]["measurements"]
    fitted = calibrated(figures_of(options.target), cases(points, fuses=compiled))
    for line in preset_lines(fitted["figures"]):
        progress(line)
    results = {"measurements": points, **fitted}
    finish("calibrate_gpu", results, device=device, target=options.target, compiled=compiled)


if __name__ == "__main__":
    main()
