"""Saving a result and building it again; whatever is wrong with the folder or the model is told."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import _digests, _storage
from fxopt.api import OptimizationResult
from fxopt.decisions import Policy
from fxopt.errors import FxoptError, PolicyError
from fxopt.passes import PruneChannels, Quantize, SelectOperators, SparsifyWeights

EXAMPLE = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FILES = {"model.safetensors", "policy.json", "recipe.json", "report.json", "report.html"}


class Net(nn.Module):
    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.second, self.last = nn.Conv2d(width, 16, 3), nn.Linear(16, classes)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.last(x.mean((2, 3))) * scale


class Otherwise(Net):
    """The same parameters, put to another use."""

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return super().forward(x.relu(), scale=scale)


def make_net(kind: type[Net] = Net, **options: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**options).eval()


def make_result(passes: Any = ("prune-channels", "quantize"), example: Any = EXAMPLE) -> OptimizationResult:
    budget = {"size": 0.4} if "quantize" in passes else {"macs": 0.6}
    return fxopt.optimize(
        make_net(), example, target="pixel1", budget=budget, passes=passes, trials=2, verify_on_host=False
    )


@pytest.fixture(scope="module")
def result() -> OptimizationResult:
    return make_result()


@pytest.fixture(scope="module")
def saved(result: OptimizationResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# There and back.


@pytest.mark.parametrize(
    "passes",
    [
        ("prune-channels",),
        ("quantize",),
        ("prune-channels", "quantize"),
        (PruneChannels(ignore=("second", "last"), round_to=4), Quantize(max_batches=2)),
    ],
)
def test_what_is_loaded_computes_the_same(passes: Any, tmp_path: Path) -> None:
    result = make_result(passes)
    loaded = fxopt.load(result.save(tmp_path), make_net(width=16).apply(forget).train())
    assert torch.equal(loaded(EXAMPLE), result.model(EXAMPLE))
    assert not any(module.training for module in loaded.modules())
    state = result.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def forget(module: nn.Module) -> None:
    """Weights of another model of the same class."""
    for parameter in module.parameters(recurse=False):
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("example", [(EXAMPLE,), {"x": EXAMPLE}, ((EXAMPLE,), {"scale": 2.0})])
def test_example_inputs_of_every_form_are_kept(example: Any, tmp_path: Path) -> None:
    result = make_result(example=example)
    loaded = fxopt.load(result.save(tmp_path), make_net())
    args, kwargs = fxopt.graph.as_args(example)
    assert torch.equal(loaded(*args, **kwargs), result.model(*args, **kwargs))


class Pair(NamedTuple):
    x: torch.Tensor
    scale: torch.Tensor


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, pair: Pair) -> torch.Tensor:
        return self.net(pair.x) * pair.scale


def test_named_tuples_among_inputs_are_kept_where_their_type_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = (Pair(EXAMPLE, torch.full((3, 1), 2.0)),)
    told: dict[str, Any] = {"target": "pixel1", "passes": ("prune-channels",), "trials": 1, "verify_on_host": False}
    model = OfPairs().eval()
    result = fxopt.optimize(model, example, budget={"macs": 0.7}, **told)
    folder, kind = result.save(tmp_path), Pair

    def loaded_elsewhere() -> torch.Tensor:
        # As in a process that has not written them.
        pytree._deregister_pytree_node(kind)
        return fxopt.load(folder, model)(*example)

    assert torch.equal(loaded_elsewhere(), result.model(*example))
    monkeypatch.delattr(f"{__name__}.Pair")
    with pytest.raises(FxoptError, match=rf"hold a Pair of {__name__}; import that module"):
        loaded_elsewhere()


@dataclass
class Held:
    x: torch.Tensor


class OfHeld(OfPairs):
    def forward(self, held: Any) -> torch.Tensor:
        return self.net(held.x)


def test_inputs_of_a_type_that_cannot_be_written_are_told_before_anything_is(tmp_path: Path) -> None:
    pytree.register_pytree_node(
        Held,
        lambda one: ([one.x], None),
        lambda parts, _: Held(*parts),
        flatten_with_keys_fn=lambda one: ([(pytree.GetAttrKey("x"), one.x)], None),
    )
    told: dict[str, Any] = {"target": "pixel1", "passes": ("prune-channels",), "trials": 1, "verify_on_host": False}
    result = fxopt.optimize(OfHeld(), (Held(EXAMPLE),), **told)
    with pytest.raises(FxoptError, match=r"cannot be written: .*Held.*Register the type with a serialized_type_name"):
        result.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_the_model_given_stays_as_it_was(saved: Path) -> None:
    model = make_net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = fxopt.load(saved, model)
    for parameter in loaded.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_loaded_model_trains(saved: Path, result: OptimizationResult) -> None:
    loaded = fxopt.load(saved, make_net()).train()
    loaded(EXAMPLE).square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_nothing_but_json_html_and_safetensors_is_written(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == FILES
    assert Policy.load(saved / "policy.json")
    assert load_file(saved / "model.safetensors")
    json.loads((saved / "recipe.json").read_text())


def test_a_result_can_be_saved_over_another(copied: Path) -> None:
    other = make_result(("prune-channels",))
    other.save(copied)
    assert torch.equal(fxopt.load(copied, make_net())(EXAMPLE), other.model(EXAMPLE))


def test_weights_of_the_original_do_not_fit_a_loaded_model(saved: Path) -> None:
    loaded = fxopt.load(saved, make_net())
    with pytest.raises(PolicyError, match=r"weights of the original go into the original"):
        loaded.load_state_dict(make_net().state_dict())
    assert loaded.load_state_dict(loaded.state_dict()).missing_keys == []


# The wrong model.


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (make_net(width=24), r"another model: Net differs at 'first\.weight' \(\(24, 3, 3, 3\) here"),
        (make_net(classes=5), r"differs at 'last\.weight'"),
        (nn.Linear(3, 4), "another model: Linear differs"),
        (make_net(Otherwise), "computes something else"),
        (Net, "the class Net; give an instance"),
        (3, "a int; give an instance"),
    ],
)
def test_the_wrong_model_is_refused(model: Any, words: str, saved: Path) -> None:
    with pytest.raises(PolicyError, match=words):
        fxopt.load(saved, model)


def test_the_optimized_model_is_the_wrong_one(saved: Path, result: OptimizationResult) -> None:
    with pytest.raises(PolicyError, match="not the optimized one"):
        fxopt.load(saved, result.model)


# Damage.


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("name", ["model.safetensors", "policy.json"])
@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], flipped, lambda _: b"", lambda _: b"nonsense " * 9]
)
def test_a_damaged_file_is_noticed(name: str, damage: Callable[[bytes], bytes], copied: Path) -> None:
    path = copied / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FxoptError, match=rf"{name} is damaged, or of another save .*Save the result again"):
        fxopt.load(copied, make_net())


@pytest.mark.parametrize("name", ["model.safetensors", "policy.json", "recipe.json"])
def test_a_missing_file_is_named(name: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(FxoptError, match=rf"(?i)cannot read .*{name}.*no such file"):
        fxopt.load(copied, make_net())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: "{", "is damaged"),
        (lambda _: b"\xff\xfe", "is damaged"),
        (lambda _: "[1]", "schema None"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "schema 9 and this release of fxopt reads 1"),
        (lambda text: text.replace('"passes"', '"passports"'), "is damaged: KeyError: 'passes'"),
        (lambda text: text.replace('"original_state"', '"state"'), "is damaged"),
        (lambda text: text.replace("float32", "float33"), "is damaged"),
        (lambda text: text.replace('"prune-channels"', '"prune-chanels"'), "Did you mean 'prune-channels'"),
    ],
)
def test_a_damaged_recipe_is_told(change: Callable[[str], str | bytes], words: str, copied: Path) -> None:
    path = copied / "recipe.json"
    content = change(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FxoptError, match=words):
        fxopt.load(copied, make_net())


def test_files_of_two_saves_do_not_mix(copied: Path, tmp_path: Path) -> None:
    other = make_result(("prune-channels",)).save(tmp_path / "other")
    shutil.copy(other / "policy.json", copied)
    with pytest.raises(FxoptError, match=r"policy\.json is damaged, or of another save"):
        fxopt.load(copied, make_net())


def test_weights_of_another_type_do_not_fit(copied: Path) -> None:
    path = copied / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
    recipe = json.loads((copied / "recipe.json").read_text())
    recipe["digests"]["model.safetensors"] = _storage._file_digest(path)
    (copied / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(PolicyError, match="do not fit"):
        fxopt.load(copied, make_net())


@pytest.mark.parametrize("place", ["nowhere", "policy.json"])
def test_what_is_no_folder_is_told(place: str, saved: Path) -> None:
    with pytest.raises(FxoptError, match=r"holds no saved result.*OptimizationResult\.save"):
        fxopt.load(saved / place, make_net())


# No place to write.


@pytest.mark.parametrize("below", [(), ("inside",)])
def test_a_folder_that_cannot_be_written_is_told(
    below: tuple[str, ...], result: OptimizationResult, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FxoptError, match=r"Cannot write .*Choose a folder"):
        result.save(file.joinpath(*below))
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("full_from", range(5))
def test_a_full_disk_leaves_every_file_whole(
    full_from: int, copied: Path, result: OptimizationResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    synced = 0
    sync = os.fsync

    def full(handle: int) -> None:
        nonlocal synced
        synced += 1
        if synced > full_from:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FxoptError, match=r"No space left on device.*Choose a folder"):
        result.save(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert torch.equal(fxopt.load(copied, make_net())(EXAMPLE), result.model(EXAMPLE))


# Names for what a graph computes.


def test_a_digest_tells_graphs_apart() -> None:
    first, again = (_storage.traced(make_net(), EXAMPLE) for _ in range(2))
    assert _digests.digest_of(first) == _digests.digest_of(again)
    others = [make_net().apply(forget), make_net(Otherwise), make_net(width=8)]
    digests = {_digests.digest_of(_storage.traced(model, EXAMPLE)) for model in others}
    assert len({_digests.digest_of(first), *digests}) == 4


def test_sparse_weights_are_saved_in_the_bytes_that_the_report_tells(tmp_path: Path) -> None:
    passes = SparsifyWeights(patterns=("2:4", "kernel:2"))
    result = fxopt.optimize(
        make_net(width=64),
        EXAMPLE,
        target="pixel1",
        budget={"size": 0.4},
        passes=passes,
        trials=4,
        verify_on_host=False,
    )
    assert result.report.after.size_bytes <= 0.4 * result.report.before.size_bytes
    folder = result.save(tmp_path)
    again = fxopt.load(folder, make_net(width=64))
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    stored = load_file(folder / "model.safetensors")
    # Batch norm's running figures and its count of batches are state, not parameters.
    sizes = {name: one.numel() * one.element_size() for name, one in stored.items() if "running" not in name}
    assert sum(sizes.values()) - sizes["norm.num_batches_tracked"] == result.report.after.size_bytes
    tensors = {name: one for name, one in stored.items() if name != "second.weight:values"}
    for broken in (tensors, stored | {"second.weight:values": torch.ones(1)}):
        with safe_open(folder / "model.safetensors", "pt") as file:
            told = file.metadata()
        save_file(broken, folder / "model.safetensors", told)
        recipe = json.loads((folder / "recipe.json").read_text())
        recipe["digests"]["model.safetensors"] = _storage._file_digest(folder / "model.safetensors")
        (folder / "recipe.json").write_text(json.dumps(recipe))
        with pytest.raises(FxoptError, match=r"Cannot read .*Save the result again"):
            fxopt.load(folder, make_net(width=64))


def test_options_that_are_no_json_are_told_before_anything_is_written(result: OptimizationResult, copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    other = dataclasses.replace(result, passes=(SelectOperators(seed=np.int64(3)),))
    with pytest.raises(FxoptError, match="options of the passes as JSON"):
        other.save(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
