"""Saving an optimized model and building it again: policy, recipe and weights, no pickle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxopt import passes as pass_registry
from fxopt._files import replacing, write_text
from fxopt.decisions import Policy
from fxopt.errors import FxoptError, PolicyError
from fxopt.evaluate import apply_policy
from fxopt.graph import as_args, trace
from fxopt.passes import Canonicalize, TunablePass
from fxopt.passes._fork import own_copy

__all__ = ["load", "save"]

_SCHEMA = 1
_RECIPE = "recipe.json"
_POLICY = "policy.json"
_WEIGHTS = "model.safetensors"


def save(
    folder: Path,
    model: fx.GraphModule,
    policy: Policy,
    passes: Sequence[TunablePass],
    example_inputs: object,
    original_state: Mapping[str, tuple[int, ...]],
) -> None:
    """Write everything that :func:`load` needs to ``folder``."""
    leaves, spec = pytree.tree_flatten(as_args(example_inputs))
    recipe = {
        "schema": _SCHEMA,
        "passes": [{"name": one.name, "options": _options(one)} for one in passes],
        "inputs": {"spec": pytree.treespec_dumps(spec), "leaves": [_describe(leaf) for leaf in leaves]},
        "original_state": {name: list(shape) for name, shape in original_state.items()},
    }
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(folder / _WEIGHTS) as scratch:
        try:
            save_file(tensors, scratch)
        except Exception as failure:
            raise FxoptError(f"Cannot write {folder / _WEIGHTS}: {failure}. Choose a folder with space.") from failure
    policy.save(folder / _POLICY)
    write_text(folder / _RECIPE, json.dumps(recipe, indent=1))


def load(folder: Path, model: nn.Module) -> fx.GraphModule:
    """Apply the saved policy to ``model`` and load the saved weights."""
    recipe = _read_recipe(folder)
    _check_same_model(folder, recipe["original_state"], model)
    leaves = [_example(leaf) for leaf in recipe["inputs"]["leaves"]]
    args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(recipe["inputs"]["spec"]))
    modes = [(module, module.training) for module in model.modules()]
    try:
        graph = Canonicalize()(trace(model.eval(), (args, kwargs))).graph_module
    finally:
        for module, training in modes:
            module.training = training
    passes: list[Any] = [pass_registry.create(one["name"], **one["options"]) for one in recipe["passes"]]
    graph = apply_policy(graph, passes, Policy.load(folder / _POLICY)).eval()
    return _with_weights(folder, graph)


def _with_weights(folder: Path, graph: fx.GraphModule) -> fx.GraphModule:
    """Give the graph tensors of its own, holding the saved values."""
    try:
        saved = load_file(folder / _WEIGHTS)
    except Exception as failure:
        raise FxoptError(f"Cannot read {folder / _WEIGHTS}: {failure}. Save the result again.") from failure
    mine = graph.state_dict()
    wrong = sorted(set(saved) ^ set(mine)) or [name for name in mine if mine[name].shape != saved[name].shape]
    if wrong:
        raise PolicyError(f"The weights in {folder} do not fit the rebuilt graph at {wrong[0]!r}; is it another model?")
    graph = own_copy(graph)
    graph.load_state_dict(saved)
    return graph


def _read_recipe(folder: Path) -> dict[str, Any]:
    path = folder / _RECIPE
    try:
        recipe: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as failure:
        raise FxoptError(f"{folder} is no saved result: cannot read {path.name}: {failure}.") from failure
    if recipe.get("schema") != _SCHEMA:
        raise FxoptError(f"{path} has schema {recipe.get('schema')!r}; this fxopt reads schema {_SCHEMA}.")
    return recipe


def _check_same_model(folder: Path, wanted: Mapping[str, list[int]], model: nn.Module) -> None:
    mine = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(set(mine) ^ set(wanted)) or [name for name in mine if mine[name] != wanted[name]]
    if wrong:
        raise PolicyError(
            f"{folder} was saved from another model: {type(model).__name__} differs at {wrong[0]!r}. "
            "Give the original model, not the optimized one, with the same options as then."
        )


def _options(one: TunablePass) -> dict[str, Any]:
    """The options of a pass that differ from their defaults; data and policies are no options."""
    options = {}
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if field.name in ("policy", "calibration") or value == field.default:
            continue
        options[field.name] = list(value) if isinstance(value, tuple) else value
    return options


def _describe(leaf: object) -> dict[str, Any]:
    if isinstance(leaf, torch.Tensor):
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    return {"value": leaf}


def _example(leaf: Mapping[str, Any]) -> Any:
    if "shape" not in leaf:
        return leaf["value"]
    return torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"]))
