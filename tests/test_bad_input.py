"""What a stranger gets wrong about pruning: one clear error or the documented behaviour, and nothing half-changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn
from typer.testing import CliRunner

import fxopt
from fxopt.cli import app
from fxopt.decisions import Policy, SearchSpace
from fxopt.errors import DataError, FxoptError, PassError, PolicyError, SearchError, VerifyError
from fxopt.evaluate import Reconstruction, Reconstructor, accuracy, apply_policy, recalibrate_batch_norm
from fxopt.graph import edit
from fxopt.passes import Fisher, FoldBatchNorm, PruneChannels, Quantize, RoundWeights, SparsifyWeights, Taylor
from fxopt.training import fit
from tests.optimizing import DATA, EXAMPLE, half_right, make_net, optimize

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(32) % 4


@functools.cache
def graph() -> fx.GraphModule:
    return fxopt.trace(make_net(), EXAMPLE)


@functools.cache
def space() -> SearchSpace:
    return PruneChannels().search_space(graph())


def kept(**counts: Any) -> Policy:
    return Policy({("channels", site.lstrip("_")): count for site, count in counts.items()})


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """Whatever happens, the graph is the same afterwards: code, attributes, values, tensors and modes."""

    def seen() -> tuple[Any, ...]:
        gm = graph()
        nodes = [
            (node.name, node.op, str(node.target), str(node.args), str(node.meta.get("val"))) for node in gm.graph.nodes
        ]
        held = [(id(tensor), tensor._version) for tensor in (*gm.parameters(), *gm.buffers())]
        grads = [parameter.grad is None and parameter.requires_grad for parameter in gm.parameters()]
        modules = [(name, id(module), module.training, module.extra_repr()) for name, module in gm.named_modules()]
        return gm.code, nodes, held, grads, modules

    before = seen()
    yield
    assert seen() == before


# Groups that would be emptied, ratios out of range, policies for another graph.


@pytest.mark.parametrize("count", [0, -3, 17, 0.5, "8"])
def test_a_group_keeps_from_one_channel_to_all(count: Any) -> None:
    step = PruneChannels(kept(_0=count))
    for run in (step, step.masked, step.explain, step.kept):
        with pytest.raises(PolicyError, match=f"Cannot keep {count!r} channels at '0'; it has 16, keep 1 to 16"):
            run(graph())
    assert apply_policy(graph(), [PruneChannels()], kept(_0=1, _3=1))(IMAGES).shape == (32, 4)


@pytest.mark.parametrize("fraction", [0, -1, 1.5, math.nan, math.inf, "half", None, True])
def test_fractions_lie_above_0_and_at_most_at_1(fraction: Any) -> None:
    with pytest.raises(SearchError, match=r"lies in \(0, 1\], got"):
        space().uniform(fraction)
    if fraction is not True:
        with pytest.raises(PassError, match=r"lies in \(0, 1\], got"):
            PruneChannels().ranked(graph(), fraction)


@pytest.mark.parametrize(
    "options",
    [
        {"bounds": {"*": (0.5, 1.5)}},
        {"bounds": {"*": (0.8, 0.2)}},
        {"bounds": {"*": (-0.1, 1.0)}},
        {"bounds": {"*": (math.nan, 1.0)}},
        {"bounds": {"*": (0.0, 0.0)}},
        {"bounds": {"*": 0.5}},
        {"bounds": 3},
        {"round_to": 0},
        {"round_to": 7.5},
        {"round_to": None},
        {"ignore": 3},
        {"importance": 3},
    ],
)
def test_options_out_of_range_are_refused_when_the_pass_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match=next(iter(options))):
        PruneChannels(**options)


def test_a_tile_larger_than_a_group_leaves_it_whole() -> None:
    assert len(PruneChannels(round_to=1000).search_space(graph())) == 0


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (PruneChannels(kept(layer9=4)), "no channels to cut at 'layer9'. The policy may be of another model"),
        (SparsifyWeights({("sparsity", "layer9"): 0.5}), "at 'layer9'. The policy may be of another model"),
        (Quantize({("bits", "layer9"): (8, 8)}), "'layer9'"),
    ],
)
def test_policies_for_another_graph_are_refused(step: Any, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        step(FoldBatchNorm()(graph()).graph_module)
    with pytest.raises(PolicyError, match="layer9"):
        fxopt.lower(graph()).bind(step.policy)


@pytest.mark.parametrize("step", [PruneChannels(kept(_0=4)), Quantize(), FoldBatchNorm()])
def test_modules_that_were_not_traced_are_refused(step: Any) -> None:
    with pytest.raises(VerifyError, match=r"A Sequential is no graph; give what fxopt\.trace"):
        step(make_net())


def test_a_result_of_another_model_is_refused(tmp_path: Path) -> None:
    optimize(passes="prune-channels", budget={"macs": 0.6}, trials=1).save(tmp_path)
    for other in (nn.Sequential(), make_net(8)):
        with pytest.raises(FxoptError, match=r"was saved from another model.*Give the original model"):
            fxopt.load(tmp_path, other)


# Importances.


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (lambda gm, group: np.full(group.size, math.nan), "NaN or infinite for some units"),
        (lambda gm, group: np.full(group.size, math.inf), "NaN or infinite for some units"),
        (lambda gm, group: np.ones(3), r"has shape \(3,\); give one number for each of its 16"),
        (lambda gm, group: "large", "no array of numbers"),
        (lambda gm, group: 1 / 0, "raised ZeroDivisionError: division by zero; correct the function"),
    ],
)
def test_importances_are_finite_numbers(importance: Any, words: str) -> None:
    step = PruneChannels(space().uniform(0.5), importance=importance)
    for run in (step, step.masked, step.explain, step.kept):
        with pytest.raises(PassError, match=f"The importance of '0' .*{words}|The importance of '0' {words}"):
            run(graph())


def test_weights_that_are_not_finite_are_named() -> None:
    model = make_net()
    model[3].weight.data[0] = math.nan  # type: ignore[index, union-attr]
    with pytest.raises(PassError, match=r"'weight' of '3' holds NaN or infinite values.*repair"):
        PruneChannels(space().uniform(0.5))(fxopt.trace(model, EXAMPLE))
    with pytest.raises(DataError, match=r"'3\.weight' holds NaN or infinity"):
        optimize(model)


@pytest.mark.parametrize("kind", [Taylor, Fisher])
def test_importances_by_gradients_need_data_and_take_as_much_as_there_is(kind: Any) -> None:
    data = [(IMAGES[:8], LABELS[:8])]
    policy = space().uniform(0.5)
    with pytest.raises(DataError, match="There is no batch to take gradients from"):
        PruneChannels(policy, importance=kind([]))(graph())
    short, exact = (PruneChannels(policy, importance=kind(data, max_batches=most)).kept(graph()) for most in (50, 1))
    assert str(short) == str(exact)


# Frozen parameters, and models in train mode.


def test_frozen_parameters_are_cut_and_stay_frozen() -> None:
    model = make_net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("0."))
    gm = fxopt.trace(model, EXAMPLE)
    policy = space().uniform(0.5)
    for importance in ("l1", Taylor([(IMAGES, LABELS)])):
        smaller = PruneChannels(policy, importance=importance)(gm).graph_module
        assert {name for name, one in smaller.named_parameters() if not one.requires_grad} == {"0.weight", "0.bias"}
        assert smaller.get_parameter("0.weight").shape[0] == 8
    restored = edit.own_copy(apply_policy(gm, [PruneChannels()], policy, calibration=[(IMAGES, LABELS)]))
    before = restored.get_parameter("0.weight").clone()
    fit(restored, [(IMAGES, LABELS)], epochs=1)
    assert torch.equal(restored.get_parameter("0.weight"), before)
    assert not restored.get_parameter("0.weight").requires_grad


def test_a_model_that_is_frozen_throughout_is_searched_but_not_trained() -> None:
    model = make_net().requires_grad_(False)
    result = optimize(model, passes="prune-channels", budget={"macs": 0.6}, train=DATA, epochs=0, trials=2)
    assert not any(parameter.requires_grad for parameter in result.model.parameters())
    with pytest.raises(DataError, match="no parameter to train; set requires_grad"):
        optimize(model, passes="prune-channels", budget={"macs": 0.6}, train=DATA, trials=2)


def test_the_mode_of_a_model_is_kept_and_changes_no_result() -> None:
    policy = space().uniform(0.5)
    found = []
    for training in (False, True):
        model = make_net(training=training)
        model[1].eval()  # type: ignore[index]
        modes = {name: module.training for name, module in model.named_modules()}
        gm = fxopt.trace(model, EXAMPLE)
        pruned = PruneChannels(policy)(gm).graph_module
        assert {name: pruned.get_submodule(name).training for name in modes if name != "5"} == {
            name: mode for name, mode in modes.items() if name != "5"
        }
        applied = apply_policy(gm, [PruneChannels()], policy, calibration=[(IMAGES, LABELS)])
        assert {name: module.training for name, module in model.named_modules()} == modes
        found.append((pruned.eval()(IMAGES), applied.eval()(IMAGES)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_optimize_takes_a_model_in_train_mode() -> None:
    options: dict[str, Any] = {"passes": "prune-channels", "budget": {"macs": 0.6}, "trials": 2, "evaluate": half_right}
    first, second = (optimize(make_net(training=training), **options) for training in (False, True))
    assert first.policy == second.policy
    assert not second.model.training
    assert first.report.after.accuracy == second.report.after.accuracy


# Loaders that are shorter than asked, and data that may be meant in two ways.


def test_loaders_that_are_shorter_than_asked_are_read_to_their_end() -> None:
    data = [(IMAGES[:8], LABELS[:8]), (IMAGES[8:16], LABELS[8:16])]
    assert accuracy(graph(), data, max_batches=500) == accuracy(graph(), data)
    one, other = edit.own_copy(graph()), edit.own_copy(graph())
    recalibrate_batch_norm(one, data, max_batches=500)
    recalibrate_batch_norm(other, data, max_batches=2)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    policy = space().uniform(0.5)
    many, few = (
        apply_policy(graph(), [PruneChannels()], policy, calibration=data, reconstruct=Reconstruction(samples=samples))
        for samples in (10**6, 16)
    )
    assert torch.equal(many(IMAGES), few(IMAGES))
    folded = FoldBatchNorm()(graph()).graph_module
    bits = Quantize().search_space(folded).uniform(1.0, (8, 8))
    for most in (500, 2):
        quantized = Quantize(bits, calibration=[one for one, _ in data], max_batches=most)(folded).graph_module
        seen = quantized.meta["fxopt_calibration"]
        assert (seen["batches"], seen["samples"]) == (2, 16)


@pytest.mark.parametrize("batches", [[], [(IMAGES[:0], LABELS[:0])]])
def test_loaders_with_nothing_in_them_are_refused(batches: Any) -> None:
    policy = space().uniform(0.5)
    with pytest.raises(DataError):
        apply_policy(graph(), [PruneChannels()], policy, calibration=batches)
    with pytest.raises(DataError):
        apply_policy(graph(), [PruneChannels()], policy, calibration=batches, reconstruct=False)
    norm = edit.own_copy(graph())
    before = norm.get_buffer("1.running_var").clone()
    for data in (batches, [(IMAGES * math.nan, LABELS)]):
        with pytest.raises(DataError, match=r"no batch|batch 0, is empty|running_mean of '1' becomes NaN"):
            recalibrate_batch_norm(norm, data)
        assert torch.equal(norm.get_buffer("1.running_var"), before)
    with pytest.raises(DataError, match=r"train yields nothing|empty, of shape \(0, 3, 8, 8\)"):
        optimize(passes="prune-channels", budget={"macs": 0.6}, train=batches)


def test_a_tuple_of_batches_is_not_taken_for_one_batch() -> None:
    """``tensor.split(8)`` gives a tuple; as one batch all but its first tensor would count for labels."""
    folded = FoldBatchNorm()(graph()).graph_module
    bits = Quantize().search_space(folded).uniform(1.0, (8, 8))
    words = r"A tuple of 4 tensors of one kind, such as one of shape \(8, 3, 8, 8\), may be one batch or 4.*list\(...\)"
    with pytest.raises(DataError, match=words):
        Quantize(bits, calibration=IMAGES.split(8))(folded)
    with pytest.raises(DataError, match=words):
        Reconstructor(graph(), IMAGES.split(8)).restore(graph(), {})
    with pytest.raises(DataError, match=words):
        RoundWeights(calibration=IMAGES.split(8))(Quantize(bits)(folded).graph_module)
    with pytest.raises(DataError, match="A tuple of 2 tensors"):
        Reconstructor(graph(), IMAGES.split(16))
    seen = Quantize(bits, calibration=list(IMAGES.split(8)))(folded).graph_module.meta["fxopt_calibration"]
    assert (seen["batches"], seen["samples"]) == (4, 32)
    seen = Quantize(bits, calibration=(IMAGES, LABELS))(folded).graph_module.meta["fxopt_calibration"]
    assert (seen["batches"], seen["samples"]) == (1, 32)


def test_a_tuple_with_as_many_tensors_as_inputs_is_one_batch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + y

    one, other = torch.randn(6, 4), torch.randn(6, 4)
    gm = fxopt.trace(Two().eval(), (one, other))
    bits = Quantize().search_space(gm).uniform(1.0, (8, 8))
    seen = Quantize(bits, calibration=(one, other))(gm).graph_module.meta["fxopt_calibration"]
    assert (seen["batches"], seen["samples"]) == (1, 6)
    with pytest.raises(DataError, match="A tuple of 3 tensors"):
        Quantize(bits, calibration=(one, other, one))(gm)


# From the command line.

MODEL = """
import math, torch
from torch import nn

def small(broken=False, frozen=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4))
    return model, torch.randn(2, 3, 8, 8)

def nan():
    model, example = small()
    model[2].weight.data[0] = math.nan
    return model, example

def frozen():
    model, example = small()
    return model.requires_grad_(False), example

def batches():
    return torch.randn(32, 3, 8, 8).split(8)

def data():
    return [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)]
"""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("explain {}:small --keep 0", "lies in (0, 1], got 0"),
        ("explain {}:small --keep 1.5", "lies in (0, 1], got 1.5"),
        ("explain {}:small --keep nan", "lies in (0, 1], got nan"),
        ("explain {}:nan --keep 0.5", "'weight' of '2' holds NaN"),
        ("optimize {}:small --target pixel1 --budget macs=1.5", "fraction"),
        ("optimize {}:small --target pixel1 --budget macs=-1", "fraction of the original"),
        ("optimize {}:small --target pixel1 --budget macs=0.0001 --passes prune-channels", "least possible macs"),
        ("optimize {}:nan --target pixel1 --budget macs=0.6", "'2.weight' holds NaN"),
        ("optimize {0}:frozen --target pixel1 --budget macs=0.6 --train {0}:data", "no parameter to train"),
        ("optimize {0}:small --target pixel1 --budget macs=0.6 --train {0}:batches", "not a pair (input, label)"),
        ("compare-engines {0}:small --target pixel1 --passes prune-channels --val {0}:batches", "not a pair"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(words: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL, encoding="utf-8")
    arguments = words.format(tmp_path / "mine.py").split()
    if arguments[0] != "explain":
        arguments += ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert result.exit_code == 1, result.output
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
