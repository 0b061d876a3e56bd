"""Cut half of the channels of real architectures and check all that has to hold of the result; print JSON.

Every network keeps 50% of the units of every channel group (``SearchSpace.uniform(0.5)``). It is *right* if it

- has fewer parameters,
- runs at a batch size other than the example's,
- computes what the same policy by masks computes: within 1e-4 of the largest output in float32, 1e-10 in float64
  (where the network computes in float64: some fix single precision in their code). A network that puts values back to
  where a maximum was is judged in float64 alone: two pixels that differ in the last bit change places in float32,
- takes one training step that moves its weights and leaves them finite,
- is exported to ONNX, loaded in onnxruntime and agrees there with the graph.

``seconds`` is CPU time of one thread for the groups and the rewrite, without tracing. ``--zoo FILE`` takes the networks
from a Python file in place of those of this folder: ``NAMES``, and ``build(name) -> (module, example tensors)``.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common.further_networks import FURTHER_NETWORKS
from common.more_networks import MORE_NETWORKS
from common.networks import NETWORKS, stirred
from common.output import finish, progress
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt.decisions import Policy
from fxopt.errors import TraceError
from fxopt.export import export_onnx
from fxopt.graph import ops, trace
from fxopt.graph.edit import own_copy
from fxopt.passes import PruneChannels

EXAMPLE_BATCH, OTHER_BATCH = 2, 3
SINGLE, DOUBLE, EXPORTED = 1e-4, 1e-10, 1e-3

Make = Callable[[], tuple[nn.Module, torch.Tensor, torch.Tensor]]


def own_networks() -> dict[str, Make]:
    """The networks of this folder: builds each with examples of two batch sizes."""

    def maker(network: Any) -> Make:
        return lambda: (network.build(), network.example(EXAMPLE_BATCH), network.example(OTHER_BATCH, seed=1))

    return {name: maker(network) for name, network in {**NETWORKS, **MORE_NETWORKS, **FURTHER_NETWORKS}.items()}


def networks_of(file: Path) -> dict[str, Make]:
    """The networks of a Python file."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location("zoo", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file.")
    zoo: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)

    def maker(name: str) -> Make:
        def make() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
            model, (example, *_) = zoo.build(name)
            stirred(model, torch.Generator().manual_seed(2))
            return model, resized(example, EXAMPLE_BATCH), resized(example, OTHER_BATCH, seed=1)

        return make

    return {name: maker(name) for name in zoo.NAMES}


def resized(example: torch.Tensor, batch: int, seed: int = 0) -> torch.Tensor:
    """Random input like an example, of another batch size."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(size, generator=generator)
    return torch.randint(0, int(example.max()) + 1, size, generator=generator)


def outputs(module: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The floating-point tensors that a module gives."""
    leaves = pytree.tree_leaves(module(inputs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def difference(one: nn.Module, other: nn.Module, inputs: torch.Tensor) -> float:
    """The largest difference of two modules' outputs over the largest output."""
    with torch.no_grad():
        pairs = list(zip(outputs(one, inputs), outputs(other, inputs), strict=True))
    worst = 0.0
    for mine, yours in pairs:
        if mine.shape != yours.shape or not bool(torch.isfinite(mine).all()):
            return float("inf")
        worst = max(worst, float((mine - yours).abs().max() / mine.abs().max().clamp_min(1e-30)))
    return worst


def in_double(make: Make, pruned: nn.Module, masked: nn.Module, policy: Policy, dynamic: bool) -> float | None:
    """The difference in double precision; None if the network itself does not compute in it.

    A network that converts its numbers to single precision by name, as they were in the trace, is traced anew.
    """
    example, other = make()[1:]
    inputs = wide(other if dynamic else example)
    try:
        return difference(own_copy(pruned).double(), own_copy(masked).double(), inputs)
    except RuntimeError:
        pass
    try:
        graph = trace(make()[0].double(), wide(example))
    except TraceError:
        return None
    step = PruneChannels(policy)
    return difference(step(graph).graph_module, step.masked(graph), inputs)


def wide(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


def keeps_places(graph: fx.GraphModule) -> bool:
    """Whether a graph works with the places of maxima, which rounding moves where two values are all but equal."""
    return any(ops.semantics(graph, node).flow == "unpool" for node in graph.graph.nodes)


def trains(graph: fx.GraphModule, inputs: torch.Tensor) -> bool:
    """Whether one step of gradient descent towards random outputs moves the weights and leaves them finite."""
    model = own_copy(graph).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    found = [output.float() for output in outputs(model, inputs)]
    loss = sum((output - torch.randn(output.shape, generator=generator)).square().mean() for output in found)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    after = list(model.parameters())
    moved = any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))
    return moved and all(bool(torch.isfinite(parameter).all()) for parameter in after)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check(make: Make) -> dict[str, Any]:
    """What becomes of one network."""
    model, example, other = make()
    result: dict[str, Any] = {"stage": "trace"}
    try:
        graph = trace(model, example)
        dynamic = graph.meta["fxopt"]["dynamic_batch"]
        inputs = other if dynamic else example
        result |= {"stage": "prune", "dynamic": dynamic}
        start = time.thread_time()
        policy = PruneChannels().search_space(graph).uniform(0.5)
        pruned = PruneChannels(policy)(graph).graph_module
        result["seconds"] = round(time.thread_time() - start, 3)
        result |= {"decisions": len(policy), "kept_parameters": round(parameters(pruned) / parameters(graph), 4)}
        result["stage"] = "run"
        masked = PruneChannels(policy).masked(graph)
        result["difference"] = difference(pruned, masked, inputs)
        result["stage"] = "double"
        result["difference_double"] = in_double(make, pruned, masked, policy, dynamic)
        result["stage"] = "train"
        result["trains"] = trains(pruned, example)
        result["stage"] = "export"
        with tempfile.TemporaryDirectory() as folder:
            report = export_onnx(pruned, Path(folder) / "pruned.onnx", example)
        result["difference_onnx"] = report.relative
    except Exception as failure:
        lines = str(failure).strip().splitlines() or [""]
        return {"right": False, **result, "error": f"{type(failure).__name__}: {lines[0]}"[:300]}
    del result["stage"]
    single = result["difference"] <= SINGLE or keeps_places(graph)
    right = result["kept_parameters"] < 1 and result["trains"] and single
    exact = (result["difference_double"] or 0.0) <= DOUBLE and result["difference_onnx"] <= EXPORTED
    return {"right": bool(right and exact), **result}


def chosen(networks: Mapping[str, Make], patterns: list[str]) -> dict[str, Make]:
    found = {name: make for name, make in networks.items() if any(fnmatch.fnmatchcase(name, one) for one in patterns)}
    if not found:
        raise SystemExit(f"No network matches; there are {', '.join(networks)}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="NAME", help="names or patterns")
    parser.add_argument("--zoo", type=Path, help="Python file with NAMES and build")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    networks = networks_of(options.zoo) if options.zoo else own_networks()
    results: dict[str, Any] = {}
    for name, make in chosen(networks, options.models).items():
        try:
            results[name] = check(make)
        except ImportError as failure:
            results[name] = {"skipped": str(failure)}
        progress(f"{name}: {results[name]}")
    built = [one for one in results.values() if "skipped" not in one]
    summary = {"networks": len(built), "right": sum(one["right"] for one in built)}
    finish("prune_zoo", results, example_batch=EXAMPLE_BATCH, other_batch=OTHER_BATCH, summary=summary)


if __name__ == "__main__":
    main()
