"""What a policy makes of a graph: the passes in order, with what has to be found anew after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxopt.data import Loader, batch_for, call_model, read, split_batch
from fxopt.decisions import Policy
from fxopt.errors import DataError
from fxopt.graph.edit import fork
from fxopt.graph.grids import MAX_BITS
from fxopt.passes import FoldBatchNorm, PruneChannels, Quantize, TunablePass
from fxopt.passes._reconstruction import Reconstruction, Reconstructor
from fxopt.passes.base import PassResult
from fxopt.passes.prune_channels import CutResult
from fxopt.passes.quantize import FLOAT

__all__ = ["SETTLING_BATCHES", "InputsOnly", "Stages", "apply_policy", "recalibrate_batch_norm"]

_BITS = "bits"
_THINNING = frozenset(("channels", "sparsity"))
"""Decisions that take something away, after which batch norm is estimated anew."""

SETTLING_BATCHES = 4
"""Batches that batch norms are estimated anew from, and quantizers calibrated on."""


@dataclass(frozen=True)
class Stages:
    """When a network is trained that a policy makes.

    Attributes:
        in_floats: Before it is quantized: where something else than bits was decided, or nothing is quantized.
        on_grids: Behind that, through the quantizers: where something has fewer than 8 bits, or bits are all that was
            decided.
    """

    in_floats: bool
    on_grids: bool

    @classmethod
    def of(cls, policy: Policy) -> Stages:
        """The stages for a policy."""
        changed = any(kind != _BITS for kind, _ in policy)
        pairs: list[Any] = [choice for (kind, _), choice in policy.items() if kind == _BITS and choice != FLOAT]
        on_grids = bool(pairs) and (not changed or min(map(min, pairs)) < MAX_BITS)
        return cls(changed or not on_grids, on_grids)


def apply_policy(
    gm: fx.GraphModule,
    passes: Sequence[TunablePass],
    policy: Policy,
    *,
    calibration: Loader | None = None,
    reconstruct: bool | Reconstruction | Reconstructor = True,
    between: Callable[[fx.GraphModule], object] | None = None,
) -> fx.GraphModule:
    """Rewrite a graph as a policy says; the graph given is left alone, its tensors are shared.

    Args:
        gm: A canonical graph.
        passes: The passes in order.
        policy: Decisions for all of them.
        calibration: Batches of (input, label) that quantizers are calibrated on and, where channels or weights were
            taken away, batch norm is estimated anew from; the first few are read.
        reconstruct: Whether, where channels were cut, the weights behind them are found anew by least squares on the
            calibration data; or how; or a reconstructor of ``gm``, which saves reading the data again.
        between: Called with the rewritten graph before the first Quantize, or at the end if there is none, after batch
            norm was estimated: the place for fine-tuning, of a graph whose tensors are nobody else's.

    Returns:
        The new graph.
    """
    gm = given = fork(gm)
    settled = thinned = False
    for one in passes:
        if isinstance(one, Quantize):
            if not settled:
                _settle(gm, calibration if thinned else None, between)
            settled = True
            if not _quantizes(one, policy):
                continue
            gm = FoldBatchNorm()(gm.eval()).graph_module
            if one.calibration is None and calibration is not None:
                batches = one.max_batches or SETTLING_BATCHES
                one = replace(one, calibration=InputsOnly(calibration), max_batches=batches)
        result = one.with_policy(policy)(gm)
        if result.modified and isinstance(one, PruneChannels):
            result = _reconstructed(gm, result, one.with_policy(policy), calibration, reconstruct, first=gm is given)
        thinned = thinned or (result.modified and not _THINNING.isdisjoint(one.kinds))
        gm = result.graph_module
    if not settled:
        _settle(gm, calibration if thinned else None, between)
    return gm


def recalibrate_batch_norm(model: nn.Module, loader: Loader, max_batches: int = 8) -> None:
    """Estimate running means and variances anew from data, as plain averages over batches.

    New buffers take the place of the old ones, so that models that share them are not changed.

    Args:
        model: The model; every other module stays in its mode.
        loader: Batches of (input, label).
        max_batches: Batches to average over.

    Raises:
        DataError: If the loader yields nothing, an empty batch, or what makes a mean or variance NaN or infinite; the
            model is then as it was.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    batches = list(read(loader, "train", max_batches))
    if not batches:
        raise DataError("There is no batch to estimate batch norm from; give a loader with at least one.")
    kept = [(norm, norm.momentum, norm.training, dict(norm._buffers)) for norm in norms]
    for norm in norms:
        for name in ("running_mean", "running_var"):
            buffer = norm._buffers[name]
            norm._buffers[name] = None if buffer is None else torch.zeros_like(buffer)
        counter = norm._buffers["num_batches_tracked"]
        norm._buffers["num_batches_tracked"] = None if counter is None else torch.zeros_like(counter)
        # Without a momentum batch norm keeps the plain average over all batches.
        norm.momentum, norm.training = None, True
    done = False
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                inputs, _ = batch_for(model, batch, "train")
                _check_filled(inputs, number)
                call_model(model, inputs, "train")
        _check_statistics(model, norms)
        done = True
    finally:
        for norm, momentum, training, buffers in kept:
            norm.momentum, norm.training = momentum, training
            if not done:
                norm._buffers.update(buffers)


def _check_filled(inputs: Any, number: int) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    if any(not leaf.numel() for leaf in tensors):
        raise DataError(f"train, batch {number}, is empty; give batches with samples in them.")


def _check_statistics(model: nn.Module, norms: Sequence[nn.Module]) -> None:
    paths = {id(module): path for path, module in model.named_modules()}
    for norm in norms:
        for name in ("running_mean", "running_var"):
            buffer = norm._buffers[name]
            if buffer is not None and not bool(torch.isfinite(buffer).all()):
                raise DataError(
                    f"{name} of {paths[id(norm)]!r} becomes NaN or infinite on the batches of train; clean the data, "
                    "or look at the weights in front of that layer."
                )


@dataclass(frozen=True)
class InputsOnly:
    """The inputs of a loader of (input, label), as the arguments of a call."""

    loader: Loader

    def __iter__(self) -> Iterator[Any]:
        for batch in read(self.loader, "train"):
            inputs, _ = split_batch(batch, "train")
            yield (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else inputs


def _settle(gm: fx.GraphModule, data: Loader | None, between: Callable[[fx.GraphModule], object] | None) -> None:
    if data is not None:
        recalibrate_batch_norm(gm, data, SETTLING_BATCHES)
    if between is not None:
        between(gm)


def _reconstructed(
    gm: fx.GraphModule,
    result: PassResult,
    one: PruneChannels,
    data: Loader | None,
    how: bool | Reconstruction | Reconstructor,
    first: bool,
) -> PassResult:
    """The result of a cut with weights found anew, if that is wanted and there are data.

    A reconstructor is taken only where no pass before has changed the graph that it is for.
    """
    reconstructor = how if isinstance(how, Reconstructor) and first else None
    if reconstructor is None:
        if how is False or data is None:
            return result
        options = how.options if isinstance(how, Reconstructor) else how if isinstance(how, Reconstruction) else None
        reconstructor = Reconstructor(gm, InputsOnly(data), options)
    kept = result.kept if isinstance(result, CutResult) else one.kept(gm)
    return PassResult(reconstructor.restore(result.graph_module, kept), True)


def _quantizes(one: Quantize, policy: Mapping[tuple[str, str], object]) -> bool:
    return any(kind in one.kinds and choice != FLOAT for (kind, _), choice in policy.items())
