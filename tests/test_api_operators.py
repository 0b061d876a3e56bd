"""fxopt.optimize with operators among what is decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxopt
from fxopt import _precision as precision
from fxopt import models, targets
from fxopt.api import OptimizationResult
from fxopt.decisions import Policy
from fxopt.errors import BudgetError, DataError, FxoptError, InfeasibleError, PassError, SearchError
from fxopt.export import FastestBits
from fxopt.lowering import lower_operators
from fxopt.objectives import SmallestCost
from fxopt.passes import Canonicalize, FoldBatchNorm, PruneChannels, Quantize, SelectOperators, TunablePass
from fxopt.progress import Silent
from fxopt.targets.rows import Floats, Rows, compute_bits, macs
from tests.optimizing import InProcess, make_batches, optimize, outcome

EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STEP = SelectOperators(patterns=("inverted-residual",), kernels=(3, 5), expansions=(2, 3))

DATA = make_batches(3)
SHARES = {"select-operators": 0.5, "prune-channels": 0.25}


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = (models.Block(8, 3, 3), models.Block(12, 3, 3, 2), models.Block(12, 3, 3))
    return models.MobileNetwork(models.Plan(8, blocks, 16, 1), 4, 3).eval()


def test_operators_channels_and_bits_within_one_budget(tmp_path: Path) -> None:
    model = make()
    data = make_batches(3)
    result = optimize(
        model,
        EXAMPLE,
        passes=(STEP, PruneChannels(round_to=4), "quantize"),
        budget={"macs": 0.7},
        target="pixel1",
        trials=2,
        train=data,
        val=data,
        workdir=tmp_path / "work",
    )
    assert set(result.policy.of_kind("operator")) == {"blocks.0", "blocks.1", "blocks.2"}
    assert {kind for kind, _ in result.policy} == {"operator", "channels", "bits"}
    before, after = result.report.before, result.report.after
    assert after.macs <= 0.7 * before.macs
    assert result.report.passes[0].name == "select-operators"
    result.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved", make())
    assert torch.equal(again(EXAMPLE), result.model(EXAMPLE))
    assert (tmp_path / "work" / "supernet.safetensors").exists()
    assert [line.name for line in result.report.passes[:3]] == ["select-operators", "prune-channels", "fine-tune"]


class HardlyWorks:
    """Says of any network but the one as it is that it is right once in ten times."""

    def __init__(self, original: torch.nn.Module) -> None:
        self.outputs = original(EXAMPLE)

    def __call__(self, module: torch.nn.Module) -> float:
        outputs = module(EXAMPLE)
        return 0.9 if torch.allclose(outputs, self.outputs, rtol=0.01, atol=1e-4) else self.score

    score = 0.1


@pytest.mark.parametrize(("score", "told"), [(0.1, True), (0.5, True), (0.6, False)])
@pytest.mark.parametrize("passes", [(STEP,), (STEP, "prune-channels")])
@pytest.mark.parametrize(("epochs", "words"), [(1, "training hardly worked"), (0, "it was not trained")])
def test_a_selected_network_that_has_not_learnt_is_told(
    passes: tuple[Any, ...], epochs: int, words: str, score: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HardlyWorks, "score", score)
    model = make()
    options: dict[str, Any] = {"budget": {"macs": 0.6}, "train": DATA, "evaluate": HardlyWorks(model)}
    result = optimize(model, EXAMPLE, passes=passes, epochs=epochs, **options)
    notes = [note for note in result.report.notes if note.startswith(f"What was selected has {score}")]
    assert len(notes) == told
    assert all(f"the original 0.9: {words}" in note for note in notes)


def test_a_search_that_ended_undecided_is_told_and_one_that_did_not_is_not() -> None:
    options: dict[str, Any] = {"passes": (STEP,), "train": make_batches(8), "val": DATA, "budget": {"macs": 0.8}}
    short, long = (optimize(make(), EXAMPLE, epochs=epochs, **options) for epochs in (0, 12))
    assert any("ended undecided" in note for note in short.report.notes)
    assert not any("ended undecided" in note for note in long.report.notes)


class Machine:
    """A measured machine on which floats are faster than integers."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precision, "fastest_bits", self._fastest)
        self._folder, self.asked = folder, 0

    def target(self) -> targets.HostTarget:
        """What another process finds."""
        return targets.HostTarget(self._profile, "an imaginary machine", folder=self._folder)

    def _profile(self, rows: Rows) -> Floats:
        """No line goes through these times, so that what is fitted depends on what was measured."""
        return (4e-6 + macs(rows) * 6e-10) * (1.2 + 0.2 * np.sin(macs(rows)))

    def _fastest(self, graph: torch.fx.GraphModule, _: object, quantize: Quantize) -> FastestBits:
        self.asked += 1
        floats = Policy({decision.key: (32, 32) for decision in quantize.search_space(graph)})
        return FastestBits(floats, median_s=1.0, float_s=1.0, integer_s=2.0)


@pytest.mark.parametrize("others", [("quantize",), ("prune-channels", "quantize")])
def test_operators_go_as_far_as_they_have_to_on_a_machine_that_is_measured(
    others: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch)
    told: dict[str, Any] = {"target": machine.target(), "train": DATA, "val": DATA, "epochs": 0, "trials": 1}
    told |= {"shares": {"select-operators": 0.1}}
    result = optimize(make(), EXAMPLE, passes=(STEP, *others), budget={"latency": 0.45}, **told)
    assert result.report.after.latency_s <= 0.45 * result.report.before.latency_s
    told |= {"progress": Untrained()}
    with pytest.raises(InfeasibleError, match="budget"):
        optimize(make(), EXAMPLE, passes=(STEP, *others), budget={"latency": 0.02}, **told)


class Fickle(Machine):
    """A measured machine on which integers are three times as fast, until a network has fewer weights."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        self._whole = sum(weight.numel() for weight in make().parameters())

    def _profile(self, rows: Rows) -> Floats:
        return 1e-7 + macs(rows) * 6e-10 / (1 + 2 * (compute_bits(rows) <= 8))

    def _fastest(self, graph: torch.fx.GraphModule, example: object, quantize: Quantize) -> FastestBits:
        found = super()._fastest(graph, example, quantize)
        fewer = sum(weight.numel() for weight in graph.parameters()) < self._whole
        return found if fewer else FastestBits(Policy({}), median_s=1.0, float_s=1.0, integer_s=1.0)


@pytest.mark.parametrize("folder", [False, True])
def test_channels_go_further_where_bits_gain_less_behind_the_cut_than_before_it(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Fickle(tmp_path, monkeypatch)
    told: dict[str, Any] = {"target": machine.target(), "passes": ("prune-channels", "quantize"), "trials": 1}
    told |= {"train": DATA, "val": DATA, "epochs": 1, "budget": {"latency": 0.55}, "shares": {"quantize": 0.6}}
    told |= {"workdir": tmp_path / "work"} if folder else {}
    result = optimize(make(), EXAMPLE, **told)
    assert result.report.budgets[0].met
    assert [line.name for line in result.report.passes] == ["prune-channels", "fine-tune"]
    assert [note for note in result.report.notes if note.startswith("prune-channels was searched twice")]
    # The original, behind the first cut, behind the second.
    assert machine.asked == 3
    if folder:
        assert outcome(optimize(make(), EXAMPLE, **told)) == outcome(result)
        assert machine.asked == 3


def test_a_cut_that_cannot_go_further_where_bits_gain_less_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {"target": Fickle(tmp_path, monkeypatch).target(), "train": DATA, "val": DATA, "trials": 1}
    told |= {"passes": (PruneChannels(bounds={"*": (0.75, 1.0)}), "quantize"), "budget": {"latency": 0.4}}
    with pytest.raises(InfeasibleError, match=r'left too much .*shares=\{"quantize": 0\}'):
        optimize(make(), EXAMPLE, shares={"quantize": 0.8}, epochs=1, progress=Untrained("fine-tune"), **told)


def test_a_run_on_a_machine_that_is_measured_goes_on_with_what_it_knew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch)
    whole = three(tmp_path / "work", target=machine.target(), shares=None)
    asked = machine.asked
    # Another process knows from its beginning what the first one measured on the way.
    again = three(tmp_path / "work", target=machine.target(), shares=None)
    assert machine.asked == asked
    assert outcome(again) == outcome(whole)


def three(folder: Path | None = None, model: torch.nn.Module | None = None, **options: Any) -> OptimizationResult:
    """Operators, channels and bits for a machine of few bits."""
    known: dict[str, Any] = {
        "passes": (STEP, PruneChannels(round_to=4), Quantize()),
        "budget": {"latency": 0.6},
        "target": "zynq7020",
        "shares": SHARES,
        "trials": 2,
        "train": DATA,
        "val": DATA,
        "workdir": folder,
    }
    return optimize(make() if model is None else model, EXAMPLE, **(known | options))


def test_each_pass_is_under_its_share(whole: OptimizationResult) -> None:
    first = whole.report.before.latency_s
    costs = {line.name: line.metrics.latency_s / first for line in whole.report.passes if line.metrics is not None}
    assert costs["select-operators"] <= 0.6**0.5 * (1 + 1e-9)
    assert costs["prune-channels"] <= 0.6**0.75 * (1 + 1e-9)
    assert whole.report.after.latency_s <= 0.6 * first * (1 + 1e-9)
    assert {kind for kind, _ in whole.policy} == {"operator", "channels", "bits"}


def test_a_policy_replays_by_single_passes(whole: OptimizationResult) -> None:
    graph = Canonicalize()(fxopt.trace(make(), EXAMPLE)).graph_module
    for one in (STEP, PruneChannels(), FoldBatchNorm(), Quantize()):
        made = one.with_policy(whole.policy) if isinstance(one, TunablePass) else one
        graph = made(graph).graph_module
    assert graph.code == whole.model.code
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (graph, whole.model)]
    assert shapes[0].keys() <= shapes[1].keys()
    assert all(shapes[1][name] == shape for name, shape in shapes[0].items())


STEPS = ("supernet", "training what was selected", "search", "fine-tuning", "fine-tuning quantized")


class Killing(Silent):
    """Ends the run when a task is as far as it is told."""

    def __init__(self, task: str, at: int = 1) -> None:
        self.task, self.left = task, at

    def advance(self, task: str, n: int = 1, note: str = "") -> None:
        self.left -= task == self.task
        if not self.left:
            raise KeyboardInterrupt


def test_resumed_equals_uninterrupted_wherever_it_stops(tmp_path: Path, whole: OptimizationResult) -> None:
    for task in STEPS:
        with pytest.raises(KeyboardInterrupt):
            three(tmp_path, progress=Killing(task))
    again = three(tmp_path)
    assert again.policy.to_json() == whole.policy.to_json()
    assert torch.equal(again.model(EXAMPLE), whole.model(EXAMPLE))


def test_a_folder_of_another_models_weights_is_refused(tmp_path: Path) -> None:
    three(tmp_path)
    other = make()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(FxoptError, match="another training; its model and its weights"):
        three(tmp_path, other)


@pytest.fixture(scope="module")
def whole() -> OptimizationResult:
    return three()


def test_what_no_passes_can_reach_is_told_before_the_supernet() -> None:
    with pytest.raises(InfeasibleError, match="budget"):
        three(budget={"latency": 0.01}, progress=Killing("supernet", 1))


def test_what_comes_out_is_trained_for_longer_than_what_is_on_the_way_to_it() -> None:
    told: list[tuple[str, int]] = []

    class Listening(Silent):
        def start(self, task: str, total: int) -> None:
            told.append((task, total))

    for passes in ((STEP, PruneChannels(round_to=4), Quantize()), (STEP, Quantize()), (STEP,)):
        told.clear()
        three(passes=passes, final_epochs=3, shares=None, progress=Listening())
        lengths = [(task, total) for task, total in told if "train" in task or "tuning" in task]
        on_the_way = [("training what was selected", 1)] if len(passes) == 3 else []
        selected = "training what was selected" if len(passes) == 2 else "fine-tuning"
        behind = [("fine-tuning quantized", 1)] if len(passes) > 1 else []
        assert lengths == [*on_the_way, (selected, 3), *behind]
    told.clear()
    three(passes=(STEP, PruneChannels(ignore=("*",))), budget={}, final_epochs=3, shares=None, progress=Listening())
    assert [one for one in told if "train" in one[0] or "tuning" in one[0]] == [("training what was selected", 3)]


def test_shares_without_operators_search_pass_by_pass() -> None:
    told: dict[str, Any] = {"target": "zynq7020", "train": DATA, "val": DATA, "budget": {"latency": 0.7}, "trials": 1}
    step = PruneChannels(round_to=4)
    result = optimize(make(), EXAMPLE, passes=(step, Quantize()), shares={"quantize": "40%"}, **told)
    costs = [line.metrics.latency_s for line in result.report.passes if line.metrics is not None]
    assert costs[0] <= 0.7**0.6 * result.report.before.latency_s * (1 + 1e-9)
    assert {kind for kind, _ in result.policy} == {"channels", "bits"}
    # A pass with nothing to decide leaves the whole way to the others.
    step = PruneChannels(ignore=("*",))
    result = optimize(make(), EXAMPLE, passes=(step, Quantize()), shares={"prune-channels": 0.9}, **told)
    assert result.report.after.latency_s <= 0.7 * result.report.before.latency_s * (1 + 1e-9)
    assert [line.name for line in result.report.passes] == ["quantize", "fine-tune quantized"]


@pytest.mark.parametrize(("step", "budget"), [(PruneChannels(round_to=4), 0.4), (STEP, 0.18)])
def test_bits_are_counted_on_down_to_four_unless_their_share_is_given(step: TunablePass, budget: float) -> None:
    """On this target four bits take half of the time: what comes before goes further, if it can."""
    told: dict[str, Any] = {"target": "zynq7020", "train": DATA, "val": DATA, "epochs": 0, "engine": "uniform"}

    def before_bits(part: float, **shares: float) -> float:
        result = optimize(make(), EXAMPLE, passes=(step, Quantize()), shares=shares, budget={"latency": part}, **told)
        assert result.report.after.latency_s <= part * result.report.before.latency_s * (1 + 1e-9)
        lines = {line.name: line.metrics.latency_s for line in result.report.passes if line.metrics is not None}
        return lines[step.name] / result.report.before.latency_s

    literal, free = before_bits(budget, quantize=1.0), before_bits(budget, **{step.name: 0.0})
    assert 0.5 * free <= 1.01 * budget < 0.5 * literal
    # What cannot be without fewer bits is as far as the share goes.
    assert before_bits(0.1, quantize=1.0) == before_bits(0.1, **{step.name: 0.0})


def test_limits_that_no_network_meets_together_are_left_to_the_other_passes() -> None:
    shares = {"select-operators": 0.9, "prune-channels": 0.05}
    result = three(budget={"latency": 0.5, "size": 0.3, "macs": 0.9}, shares=shares, epochs=0)
    for line in result.report.budgets:
        assert line.achieved <= line.limit * (1 + 1e-9)


def test_shares_that_do_not_go() -> None:
    with pytest.raises(BudgetError, match="give a budget"):
        optimize(make(), EXAMPLE, passes=("prune-channels", "quantize"), shares={"quantize": 0.5})
    with pytest.raises(BudgetError, match="sum to"):
        three(shares={"quantize": 0.6, "prune-channels": 0.6})


def dense_or_separable() -> tuple[torch.nn.Module, SelectOperators]:
    """On an array separable layers cost less than dense ones of many channels, and more than dense ones of few."""
    torch.manual_seed(0)
    layers = [
        module
        for inputs, outputs in ((3, 64), (64, 128))
        for module in (
            torch.nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            torch.nn.BatchNorm2d(outputs),
            torch.nn.ReLU(),
        )
    ]
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(128, 4))
    return model.eval(), SelectOperators(candidates=("conv-k3", "separable-k3"))


def test_operators_that_are_cheap_but_not_when_they_are_cut_do_not_make_a_budget_infeasible() -> None:
    model, step = dense_or_separable()
    told: dict[str, Any] = {"target": "bitfusion", "train": DATA, "val": DATA, "epochs": 0, "trials": 1}

    def least(*passes: Any) -> float:
        with pytest.raises(InfeasibleError) as caught:
            optimize(model, EXAMPLE, passes=passes, budget={"latency": 1e-4}, **told)
        return caught.value.least

    alone, cheapest = least("prune-channels", "quantize"), 3.5e-6
    assert alone < cheapest
    assert least(step, "prune-channels", "quantize") == alone
    budget = {"latency": f"{cheapest}s"}
    result = optimize(model, EXAMPLE, passes=(step, "prune-channels", "quantize"), budget=budget, **told)
    assert result.report.after.latency_s <= cheapest * (1 + 1e-9)


class Untrained(Silent):
    """Fails where something is trained."""

    def __init__(self, task: str = "supernet") -> None:
        self.task = task

    def start(self, task: str, total: int) -> None:
        assert task != self.task


def mistyped(_: torch.nn.Module) -> float:
    raise ValueError("a typo")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"evaluate": mistyped, "val": None}, "evaluate raised ValueError: a typo"),
        ({"val": [(torch.zeros(2, 3, 8, 8), torch.zeros(5))]}, "val"),
        ({"loss": lambda output, label: output}, "loss"),
        ({"objective": SmallestCost(1.0, "macs")}, "The model before the search has the score"),
    ],
)
def test_what_does_not_fit_is_told_before_a_supernet_is_trained(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(FxoptError, match=words):
        three(tmp_path / "work", progress=Untrained(), **options)


def test_limits_that_can_only_be_met_one_by_one_are_told_before_a_supernet_is_trained() -> None:
    model, step = dense_or_separable()
    table = lower_operators(fxopt.trace(model, EXAMPLE), step).table(targets.load("bitfusion"))
    default = table.space.encode(table.space.default())[None]
    budget = {}
    for metric in ("latency", "macs"):
        costs, fixed = table.of(metric)
        budget[metric] = 1.001 * (costs.min(1).sum() + fixed) / float(table.score(default, metric)[0])
    told: dict[str, Any] = {"target": "bitfusion", "train": DATA, "val": DATA, "progress": Untrained()}
    with pytest.raises(InfeasibleError, match="together, though each can be met alone"):
        optimize(model, EXAMPLE, passes=(step,), budget=budget, **told)


def test_operators_alone() -> None:
    data = make_batches(5)
    result = optimize(make(), EXAMPLE, passes=(STEP,), budget={"macs": 0.9}, train=data, val=data)
    assert result.report.after.macs <= 0.9 * result.report.before.macs
    assert result.search is None


def test_trials_after_operators_run_in_other_processes() -> None:
    """What travels is the model and the weights; the policy of operators makes the graph anew."""
    data = make_batches(4)
    options = {"passes": (STEP, PruneChannels(round_to=4)), "budget": {"macs": 0.6}, "train": data, "val": data}

    pool = InProcess()
    assert outcome(optimize(make(), EXAMPLE, executor=pool, **options)) == outcome(optimize(make(), EXAMPLE, **options))
    assert pool.sent > 1


def test_what_does_not_go() -> None:
    with pytest.raises(PassError, match="put it first"):
        optimize(make(), EXAMPLE, passes=("prune-channels", STEP), train=make_batches(5))
    with pytest.raises(DataError, match="give train"):
        optimize(make(), EXAMPLE, passes=(STEP,))
    smallest = SmallestCost(0.9, "latency")
    with pytest.raises(SearchError, match=r"not for SmallestCost.*Give a budget in its place"):
        optimize(make(), EXAMPLE, passes=(STEP,), train=make_batches(5), objective=smallest)
    with pytest.raises(PassError, match="no block"):
        optimize(torch.nn.Linear(3, 4), torch.randn(2, 3), passes=(STEP,), train=[(torch.randn(4, 3), torch.arange(4))])
