"""Cut units out of a graph: parameters, the attributes that tell their sizes, and the numbers in the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxopt.errors import PassError
from fxopt.graph import edit, ops
from fxopt.graph.channels import ChannelGraph, ChannelGroup, Constant, Mixing, ParameterUse
from fxopt.passes._masked_norms import MaskedNorm, masked_norm

__all__ = ["choose_removed", "cut", "kept_indices", "laid_out_like", "mask", "parameter_share", "saved_elements"]

Units = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]
Gone = npt.NDArray[np.bool_]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def choose_removed(group: ChannelGroup, scores: Scores, kept: int) -> Units:
    """The units to cut so that the ``kept`` most important stay; of two that are equal the first one stays."""
    order = np.argsort(-scores, kind="stable")
    return np.sort(group.units[order[kept:]])


def saved_elements(gm: fx.GraphModule, group: ChannelGroup, removed: Units) -> int:
    """How many elements of parameters and buffers go if this group alone is cut."""
    gone = _table(removed)
    saved: dict[int, int] = {}
    for uses in _by_tensor(group.members).values():
        tensor = _tensor(gm, uses[0])
        size = list(tensor.shape)
        for use in uses:
            size[use.dim] = _kept(use.atoms, gone)
        saved[id(tensor)] = tensor.numel() - math.prod(size)
    return sum(saved.values())


def parameter_share(gm: fx.GraphModule, group: ChannelGroup) -> float:
    """Part of the graph's parameters that a group's channels run through."""
    held = {id(tensor): tensor for tensor in (_tensor(gm, use) for use in group.members)}
    mine = sum(tensor.numel() for tensor in held.values() if isinstance(tensor, nn.Parameter))
    return mine / max(1, sum(parameter.numel() for parameter in gm.parameters()))


def cut(gm: fx.GraphModule, channels: ChannelGraph, removed: Units) -> None:
    """Cut ``removed`` units out of everything that carries them.

    Args:
        gm: The graph, which is edited; its modules and tensors are replaced, not changed.
        channels: The analysis of this very graph.
        removed: Ids of the units to cut.

    Raises:
        PassError: If the graph's outputs would change their shapes.
    """
    before = _output_shapes(gm)
    gone = _table(removed)
    sizes = {node: _size_after(channels, node, gone) for node in gm.graph.nodes}
    copies: dict[str, nn.Module] = {}
    _replace_tensors(gm, channels.parameters, lambda tensor, uses: _select(tensor, uses, gone), copies)
    done: set[str] = set()
    for node in gm.graph.find_nodes(op="call_module"):
        if str(node.target) not in done:
            done.add(str(node.target))
            _resize(gm, node, sizes, copies)
    for node in gm.graph.nodes:
        if ops.semantics(gm, node).flow == "attention":
            _keep_scale(node, sizes)
    for constant in channels.constants:
        _count_anew(constant, _kept(constant.atoms, gone))
    edit.finish(gm, resized=True)
    after = _output_shapes(gm)
    if after != before:
        raise PassError(f"Cutting would change the outputs from {before} to {after}; add the last layers to ignore.")


def kept_indices(channels: ChannelGraph, removed: Units) -> dict[tuple[str, str], dict[int, Units]]:
    """The indices that stay of every tensor that :func:`cut` makes smaller, by path and name, by dimension."""
    gone = _table(removed)
    found: dict[tuple[str, str], dict[int, Units]] = {}
    for use in channels.parameters:
        kept = np.flatnonzero(~_gone(use.atoms, gone))
        if len(kept) < len(use.atoms):
            found.setdefault((use.path, use.name), {})[use.dim] = kept
    return found


def _keep_scale(node: fx.Node, sizes: Mapping[fx.Node, tuple[int, ...]]) -> None:
    """Attention divides by the root of the width of a head: where that is cut, say what it was."""
    query: Any = node.args[0]
    width = edit.shape(query)[-1]
    if sizes[query][-1] != width and node.kwargs.get("scale") is None:
        node.update_kwarg("scale", width**-0.5)


def _count_anew(constant: Constant, count: int) -> None:
    """Write a number that counts channels anew; one that was computed is left to the view to infer."""
    if count == len(constant.atoms):
        return
    value: Any = count
    if constant.position is not None:
        value = list(constant.node.args[constant.argument])  # type: ignore[arg-type]
        value[constant.position] = count if isinstance(value[constant.position], int) else -1
    edit.set_argument(constant.node, constant.argument, value)


def mask(gm: fx.GraphModule, channels: ChannelGraph, removed: Units) -> None:
    """Zero the weights that make and that read ``removed`` units; everything keeps its size.

    Norms that average over channels are replaced by such that average over those that stay, and operands that are
    summed over without weights are multiplied by zeros and ones.
    """
    gone = _table(removed)
    weights = [use for use in channels.parameters if use.role in ("out", "in")]
    _replace_tensors(gm, weights, lambda tensor, uses: _zero(tensor, uses, gone), {})
    for node in list(gm.graph.find_nodes(op="call_module")):
        _mask_norm(gm, channels, node, gone)
    masks: dict[bytes, fx.Node] = {}
    for mixing in channels.mixings:
        _mask_operand(gm, mixing, gone, masks)
    if masks:
        edit.finish(gm)


def _mask_norm(gm: fx.GraphModule, channels: ChannelGraph, node: fx.Node, gone: Gone) -> None:
    """Let a layer, RMS or group norm average over the channels that stay."""
    path, module = str(node.target), gm.get_submodule(str(node.target))
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) or isinstance(module, MaskedNorm):
        return
    atoms = channels.labels(node, 1 if isinstance(module, nn.GroupNorm) else len(edit.shape(node)) - 1)
    if atoms is None or not _gone(atoms, gone).any():
        return
    edit.replace_module(gm, path, masked_norm(module, torch.as_tensor(~_gone(atoms, gone))))


def _mask_operand(gm: fx.GraphModule, mixing: Mixing, gone: Gone, masks: dict[bytes, fx.Node]) -> None:
    """Put what changes nothing where an operand's channels are cut."""
    dropped = _gone(mixing.atoms, gone)
    if not dropped.any():
        return
    operand: Any = mixing.node.args[mixing.argument]
    value: torch.Tensor = operand.meta["val"]
    shape = [1] * value.dim()
    shape[mixing.dim] = len(dropped)
    stays = torch.as_tensor(~dropped).to(value.device).reshape(shape)
    rest: tuple[float, ...] = ()
    if mixing.neutral:
        target, held, rest = torch.ops.aten.masked_fill.Scalar, ~stays, (mixing.neutral,)
    else:
        target, held = torch.ops.aten.mul.Tensor, stays.to(value.dtype)
        if mixing.average:
            held = held * (len(dropped) / int((~dropped).sum()))
    key = held.cpu().double().numpy().tobytes() + str((shape, held.dtype, held.device)).encode()
    if key not in masks:
        masks[key] = edit.insert_get_attr(gm, edit.free_path(gm, "channel_mask"), held)
    product = edit.insert_function(gm, target, operand, (operand, masks[key], *rest))
    edit.set_argument(mixing.node, mixing.argument, product)


def _table(removed: Units) -> Gone:
    """Whether each unit is cut, by its id; the last entry stands for -1, which never is."""
    table = np.zeros(int(removed.max(initial=-1)) + 2, dtype=np.bool_)
    table[removed] = True
    return table


def _gone(atoms: Units, gone: Gone) -> Gone:
    found: Gone = gone[np.where(atoms < len(gone) - 1, atoms, -1)]
    return found


def _kept(atoms: Units, gone: Gone) -> int:
    return len(atoms) - int(_gone(atoms, gone).sum())


def _tensor(gm: fx.GraphModule, use: ParameterUse) -> torch.Tensor:
    tensor: torch.Tensor = getattr(gm.get_submodule(use.path), use.name)
    return tensor


def _by_tensor(uses: Sequence[ParameterUse]) -> dict[tuple[str, str], list[ParameterUse]]:
    found: dict[tuple[str, str], list[ParameterUse]] = {}
    for use in uses:
        found.setdefault((use.path, use.name), []).append(use)
    return found


def _replace_tensors(
    gm: fx.GraphModule, uses: Sequence[ParameterUse], change: Any, copies: dict[str, nn.Module]
) -> None:
    """Put changed tensors into copies of their modules; a tensor under several names stays one tensor."""
    changed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for (path, name), held in _by_tensor(uses).items():
        tensor = _tensor(gm, held[0])
        if id(tensor) not in changed:
            changed[id(tensor)] = (tensor, _as_kind(change(tensor.detach(), held), tensor))
        new = changed[id(tensor)][1]
        if new is tensor:
            continue
        copy = _own_copy(gm, path, copies)
        if name in copy._parameters:
            copy._parameters[name] = new  # type: ignore[assignment]
        else:
            copy._buffers[name] = new


def _as_kind(value: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor:
    """The changed value as a parameter or buffer like the original; the original itself if nothing changed."""
    if value is None:
        return tensor
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _own_copy(gm: fx.GraphModule, path: str, copies: dict[str, nn.Module]) -> nn.Module:
    """The module at a path to write into: a copy in its place, made once, or the graph module itself."""
    if not path:
        return gm
    if path not in copies:
        copies[path] = edit.clone_module(gm.get_submodule(path))
        edit.replace_module(gm, path, copies[path])
    return copies[path]


def _select(tensor: torch.Tensor, uses: Sequence[ParameterUse], gone: Gone) -> torch.Tensor | None:
    result = tensor
    for use in {use.dim: use for use in uses}.values():
        kept = np.flatnonzero(~_gone(use.atoms, gone))
        if len(kept) < tensor.shape[use.dim]:
            result = result.index_select(use.dim, torch.as_tensor(kept, device=tensor.device))
    return None if result is tensor else laid_out_like(result, tensor)


def laid_out_like(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """A tensor channels last in memory if another is: a network that was made so for speed stays so.

    Strides decide. A 1 x 1 or depthwise weight is contiguous in both orders, yet torch chooses kernels by its strides.
    """
    form = _CHANNELS_LAST.get(old.dim())
    if form is None or old.stride() != torch.empty_like(old, device="meta", memory_format=form).stride():
        return new
    return new.to(memory_format=form)


def _zero(tensor: torch.Tensor, uses: Sequence[ParameterUse], gone: Gone) -> torch.Tensor | None:
    result = None
    for use in uses:
        zeros = np.flatnonzero(_gone(use.atoms, gone))
        if len(zeros):
            result = tensor.clone() if result is None else result
            result.index_fill_(use.dim, torch.as_tensor(zeros, device=tensor.device), 0)
    return result


def _size_after(channels: ChannelGraph, node: fx.Node, gone: Gone) -> tuple[int, ...]:
    """Shape of a node's tensor once the units are cut; empty for what is no tensor."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return ()
    sizes = list(edit.shape(node))
    for dim in range(len(sizes)):
        atoms = channels.labels(node, dim)
        if atoms is not None:
            sizes[dim] = _kept(atoms, gone)
    return tuple(sizes)


def _resize(
    gm: fx.GraphModule, node: fx.Node, sizes: Mapping[fx.Node, tuple[int, ...]], copies: dict[str, nn.Module]
) -> None:
    """Set the attributes that tell a module's sizes, on a copy of it if one changes."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not sizes[source] or not sizes[node]:
        return
    module = gm.get_submodule(str(node.target))
    wanted = _attributes(module, sizes[source], sizes[node])
    stale = {name: value for name, value in wanted.items() if getattr(module, name) != value}
    if stale:
        copy = _own_copy(gm, str(node.target), copies)
        for name, value in stale.items():
            setattr(copy, name, value)


def _attributes(module: nn.Module, source: tuple[int, ...], result: tuple[int, ...]) -> dict[str, Any]:
    """The attributes that tell sizes, as they have to be for an input and an output of these shapes."""
    if isinstance(module, (_ConvNd, _ConvTransposeNd)):
        follows = module.groups > 1 and module.groups == module.in_channels
        groups = source[1] if follows else module.groups
        return {"in_channels": source[1], "out_channels": result[1], "groups": groups}
    if isinstance(module, nn.Linear):
        return {"in_features": source[-1], "out_features": result[-1]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": result[-1]}
    if isinstance(module, _NormBase):
        return {"num_features": source[1]}
    if isinstance(module, nn.GroupNorm):
        follows = module.num_groups > 1 and module.num_groups == module.num_channels
        return {"num_channels": source[1], "num_groups": source[1] if follows else module.num_groups}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": source[-len(module.normalized_shape) :]}
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return {"num_parameters": source[1]}
    return {}


def _output_shapes(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    (output,) = gm.graph.find_nodes(op="output")
    values = [source.meta.get("val") for source in output.all_input_nodes]
    return [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]
