"""Saving an optimized model and building it again: policy, recipe and weights, no pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt import passes as pass_registry
from fxopt._files import replacing, write_text
from fxopt.decisions import Policy
from fxopt.errors import FxoptError, PolicyError
from fxopt.evaluate import apply_policy
from fxopt.graph import as_args, eval_mode, trace
from fxopt.graph.edit import own_copy
from fxopt.graph.packing import Packed, pack, unpack
from fxopt.graph.sparsity import pattern_of, sparse_sites
from fxopt.passes import Canonicalize, TunablePass
from fxopt.passes.quantize import CALIBRATION_META

__all__ = ["explain_other_weights", "load", "save", "shapes_of", "traced"]

_SCHEMA = 1
_RECIPE = "recipe.json"
_POLICY = "policy.json"
_WEIGHTS = "model.safetensors"
_PACKED = "packed"
_VALUES = ":values"
_POSITIONS = ":positions"


def traced(model: nn.Module | ExportedProgram, example_inputs: object) -> fx.GraphModule:
    """The canonical graph of a model in eval mode; the model keeps its mode."""
    with eval_mode(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
        graph: fx.GraphModule = Canonicalize()(trace(model, example_inputs)).graph_module
    return graph


def shapes_of(model: nn.Module | ExportedProgram) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model's state."""
    state = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def save(
    folder: Path,
    model: fx.GraphModule,
    policy: Policy,
    passes: Sequence[TunablePass],
    example_inputs: object,
    original_state: Mapping[str, tuple[int, ...]],
) -> None:
    """Write everything that :func:`load` needs to ``folder``; the recipe, which tells the files' digests, last."""
    recipe: dict[str, Any] = {
        "schema": _SCHEMA,
        "passes": [{"name": one.name, "options": _options(one)} for one in passes],
        "inputs": _written(example_inputs),
        "original_state": {name: list(shape) for name, shape in original_state.items()},
        "calibration": model.meta.get(CALIBRATION_META),
    }
    try:
        json.dumps(recipe)
    except (TypeError, ValueError) as failure:
        raise FxoptError(f"Cannot write the options of the passes as JSON: {failure}. Give plain values.") from failure
    tensors, shapes = _packed(model)
    with replacing(folder / _WEIGHTS) as scratch:
        try:
            save_file(tensors, scratch, {_PACKED: json.dumps(shapes)} if shapes else None)
        except SafetensorError as failure:
            raise FxoptError(f"Cannot write {folder / _WEIGHTS}: {failure}. Choose a folder with space.") from failure
    policy.save(folder / _POLICY)
    recipe["digests"] = {name: _file_digest(folder / name) for name in (_WEIGHTS, _POLICY)}
    write_text(folder / _RECIPE, json.dumps(recipe, indent=1))


def _written(example_inputs: object) -> dict[str, Any]:
    """Example inputs as JSON-ready data, with where the types of named tuples are defined.

    Raises:
        FxoptError: If they are held by a type that torch cannot write.
    """
    inputs = as_args(example_inputs)
    kinds: dict[type, None] = {}

    def seen(value: object) -> bool:
        if pytree.is_namedtuple_instance(value):
            kinds[type(value)] = None
        return False

    pytree.tree_flatten(inputs, seen)
    named = {_named(kind): [kind.__module__, kind.__qualname__] for kind in kinds}
    leaves, spec = pytree.tree_flatten(inputs)
    try:
        structure = pytree.treespec_dumps(spec)
    except NotImplementedError as failure:
        raise FxoptError(
            f"The example inputs cannot be written: {failure}. Register the type with a serialized_type_name, here and "
            "where the result is loaded, and save again; nothing was written."
        ) from failure
    return {"spec": structure, "leaves": [_describe(leaf) for leaf in leaves], "named": named}


def _named(kind: type) -> str:
    """The name that a type of named tuples is written by; it gets one unless somebody gave it one."""
    known = {value: name for name, value in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.items()}
    if kind not in known:
        known[kind] = f"{kind.__module__}.{kind.__qualname__}"
        pytree._register_namedtuple(kind, serialized_type_name=known[kind])
    return known[kind]


def _read_inputs(data: Mapping[str, Any]) -> Any:
    """What :func:`_written` wrote. Types are looked for in modules that are imported already; nothing is imported.

    Raises:
        FxoptError: If a type of named tuples is not there.
    """
    for name, (module, path) in data.get("named", {}).items():
        if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            continue
        kind: Any = sys.modules.get(module)
        for part in path.split("."):
            kind = getattr(kind, part, None)
        if not isinstance(kind, type):
            raise FxoptError(f"The example inputs hold a {path} of {module}; import that module before loading.")
        pytree._register_namedtuple(kind, serialized_type_name=name)
    leaves = [_example(leaf) for leaf in data["leaves"]]
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(data["spec"]))


def _packed(model: fx.GraphModule) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a model, those of sparse layers in their stored form, and the shapes of these by name."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    shapes: dict[str, Any] = {}
    for site, choice in sparse_sites(model).items():
        name = f"{site}.weight"
        packed = pack(tensors[name], pattern_of(choice))
        if packed is not None:
            shapes[name] = list(tensors.pop(name).shape)
            tensors[name + _VALUES], tensors[name + _POSITIONS] = packed.values, packed.positions
    return tensors, shapes


def _unpacked(path: Path, graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, those of sparse layers in the shape that the graph has."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        shapes: Any = json.loads((file.metadata() or {}).get(_PACKED, "{}"))
    sparse = sparse_sites(graph)
    for name, shape in shapes.items():
        packed = Packed(tensors.pop(name + _VALUES), tensors.pop(name + _POSITIONS))
        tensors[name] = unpack(packed, tuple(shape), pattern_of(sparse[name.removesuffix(".weight")]))
    return tensors


def load(folder: Path, model: nn.Module | ExportedProgram) -> fx.GraphModule:
    """Apply the saved policy to ``model`` and load the saved weights."""
    given: object = model
    if not isinstance(given, (nn.Module, ExportedProgram)):
        kind = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise PolicyError(f"The model is {kind}; give an instance of the original model, with any weights.")
    recipe = _read_recipe(folder)
    _check_same_model(folder, recipe.original_state, model)
    _check_files(folder, recipe.digests)
    policy = Policy.load(folder / _POLICY)
    graph = apply_policy(traced(model, recipe.inputs), recipe.passes, policy).eval()
    graph = _with_weights(folder, graph)
    if recipe.calibration is not None:
        # The saved scales are in place, and not those that rebuilding found.
        graph.meta[CALIBRATION_META] = dict(recipe.calibration)
    explain_other_weights(graph)
    return graph


def explain_other_weights(graph: fx.GraphModule) -> None:
    """Let ``graph.load_state_dict`` say what to do with the weights of the model from before the optimization.

    A GraphModule has a class of its own, where fx puts its ``forward``; copies of the graph, to be optimized further,
    get another one. So does this method.
    """
    setattr(type(graph), "load_state_dict", _load_state_dict)  # noqa: B010 (a method, on a class made at run time)


def _load_state_dict(
    self: fx.GraphModule, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    mine = self.state_dict()
    wrong = [
        f"{name!r} is {tuple(tensor.shape)} there and {tuple(mine[name].shape)} here"
        for name, tensor in state_dict.items()
        if name in mine and isinstance(tensor, torch.Tensor) and tensor.shape != mine[name].shape
    ]
    strange = sorted(set(mine) ^ set(state_dict)) if strict else []
    if wrong or strange:
        where = wrong[0] if wrong else f"{strange[0]!r} is only {'here' if strange[0] in mine else 'there'}"
        raise PolicyError(
            f"These weights are of another model than this optimized one: {where}. To build a saved result again, use "
            "fxopt.load(folder, original_model); weights of the original go into the original, before fxopt.optimize."
        )
    return nn.Module.load_state_dict(self, state_dict, strict=strict, assign=assign)


def _with_weights(folder: Path, graph: fx.GraphModule) -> fx.GraphModule:
    """Give the graph tensors of its own, holding the saved values."""
    try:
        saved = _unpacked(folder / _WEIGHTS, graph)
    except (SafetensorError, OSError, KeyError, ValueError) as failure:
        raise FxoptError(f"Cannot read {folder / _WEIGHTS}: {failure}. Save the result again.") from failure
    mine = graph.state_dict()
    wrong = sorted(set(saved) ^ set(mine)) or [name for name in mine if _form(mine[name]) != _form(saved[name])]
    if wrong:
        raise PolicyError(
            f"The weights in {folder} do not fit the rebuilt graph at {wrong[0]!r}: the model has the same parameters "
            "as the original and computes something else with them. Give the original model."
        )
    graph = own_copy(graph)
    graph.load_state_dict(saved)
    return graph


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, tensor.dtype)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How to build a saved model again.

    Attributes:
        passes: The passes in order.
        inputs: Example inputs of the original model, ``(args, kwargs)``.
        original_state: Shapes of the original model's state.
        digests: Digests of the other files.
        calibration: What the saved graph was calibrated on; None if it is not quantized.
    """

    passes: list[Any]
    inputs: Any
    original_state: Mapping[str, list[int]]
    digests: Mapping[str, str]
    calibration: Mapping[str, object] | None


def _read_recipe(folder: Path) -> _Recipe:
    path = folder / _RECIPE
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise FxoptError(
            f"{folder} holds no saved result: cannot read {path.name}: {failure.strerror}. "
            "Give a folder that OptimizationResult.save wrote."
        ) from failure
    except ValueError as failure:
        raise FxoptError(f"{path} is damaged: {failure}. Save the result again.") from failure
    if not isinstance(data, dict) or data.get("schema") != _SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise FxoptError(
            f"{path} has schema {found!r} and this release of fxopt reads {_SCHEMA}. "
            "Save the result again, or load it with the release that wrote it."
        )
    try:
        inputs = _read_inputs(data["inputs"])
        passes = [pass_registry.create(one["name"], **one["options"]) for one in data["passes"]]
        return _Recipe(passes, inputs, dict(data["original_state"]), dict(data["digests"]), data.get("calibration"))
    except FxoptError:
        raise
    except Exception as failure:
        raise FxoptError(f"{path} is damaged: {type(failure).__name__}: {failure}. Save the result again.") from failure


def _check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """The files are those that were saved together."""
    for name in (_WEIGHTS, _POLICY):
        if _file_digest(folder / name) != digests.get(name):
            raise FxoptError(
                f"{folder / name} is damaged, or of another save than {_RECIPE} beside it. Save the result again."
            )


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as failure:
        raise FxoptError(f"Cannot read {path}: {failure.strerror}. Save the result again.") from failure


def _check_same_model(folder: Path, wanted: Mapping[str, Sequence[int]], model: nn.Module | ExportedProgram) -> None:
    mine = shapes_of(model)
    wrong = sorted(set(mine) ^ set(wanted)) or [name for name in mine if mine[name] != tuple(wanted[name])]
    if wrong:
        raise PolicyError(
            f"{folder} was saved from another model: {type(model).__name__} differs at {wrong[0]!r} "
            f"({mine.get(wrong[0], 'nothing')} here, {wanted.get(wrong[0], 'nothing')} then). "
            "Give the original model, not the optimized one, with the same options as then."
        )


def _options(one: TunablePass) -> dict[str, Any]:
    """The options of a pass that differ from their defaults; data and policies are no options."""
    options = {}
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if field.name in ("policy", "calibration") or value == field.default:
            continue
        if not field.metadata.get("saved", True) and not isinstance(value, str):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
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
