"""The one call: what it gives, what it refuses, and how it goes on after an interruption."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxopt
from fxopt.errors import (
    BudgetError,
    DataError,
    ExportError,
    FxoptError,
    InfeasibleError,
    JournalError,
    PassError,
    SearchError,
    TargetError,
    TraceError,
    UnknownNameError,
)
from fxopt.evaluate import accuracy
from fxopt.passes import PruneChannels
from fxopt.progress import LineProgress
from tests.optimizing import CLASSES, DATA, EXAMPLE, half_right, make_batches, make_net, optimize, outcome

# What it gives.


def test_the_report_holds_every_budget_as_asked_and_as_achieved() -> None:
    asked = {"latency": 0.6, "size": "60%", "macs": "60k"}
    result = optimize(budget=asked, train=DATA, val=DATA)
    lines = {line.metric: line for line in result.report.budgets}
    assert list(lines) == list(asked)
    assert all(line.met and line.achieved <= line.limit for line in lines.values())
    assert lines["macs"].limit == 60e3
    assert lines["size"].limit == 0.6 * lines["size"].before
    after = result.report.after
    assert (after.latency_s, after.size_bytes, after.macs) == tuple(line.achieved for line in lines.values())


def test_the_report_tells_of_every_step_with_its_costs() -> None:
    report = optimize(budget={"macs": 0.6}, train=DATA, val=DATA).report
    names = [step.name for step in report.passes]
    assert names[:2] == ["prune-channels", "fine-tune"]
    assert all(step.metrics is not None and step.accuracy == step.metrics.accuracy for step in report.passes)
    macs = [step.metrics.macs for step in report.passes if step.metrics is not None]
    assert set(macs) == {report.after.macs}
    assert report.passes[-1].accuracy == report.after.accuracy
    shown = str(report)
    assert all(name in shown for name in names)


def test_only_steps_that_were_taken_are_told() -> None:
    report = optimize(passes="quantize", val=DATA).report
    assert [step.name for step in report.passes] == ["quantize"]
    assert "synthetic" in report.passes[0].detail


def test_measured_and_predicted_figures_stand_side_by_side() -> None:
    report = optimize(passes=("prune-channels",), budget={"macs": 0.6}, val=DATA, trials=1, verify_on_host=True).report
    assert report.before.measured_latency_s is not None
    assert report.after.measured_latency_s is not None
    assert report.after.measured_latency_s != report.after.latency_s


def test_the_model_given_stays_as_it_was() -> None:
    model = make_net(training=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimize(model, budget={"macs": 0.6}, train=DATA, evaluate=shake)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def shake(module: nn.Module) -> float:
    """A function that does not leave alone what it judges."""
    module.train()
    module(DATA[0][0])
    for parameter in module.parameters():
        parameter.mul_(1.01)
    return 0.5


# torch's own tracer makes an object of autograd.Function for every quantizer that it meets, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("passes", [("prune-channels",), ("prune-channels", "quantize")])
def test_the_result_trains_and_runs_under_compile(passes: tuple[str, ...]) -> None:
    model = optimize(budget={"macs": 0.6}, passes=passes, train=DATA).model
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    inputs, labels = make_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(compiled(inputs), model(inputs))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters() if "weight" in name)


def test_the_same_seed_gives_the_same_result() -> None:
    first, second, other = (optimize(budget={"macs": 0.6}, train=DATA, val=DATA, seed=seed) for seed in (0, 0, 1))
    assert outcome(first) == outcome(second)
    assert first.search is not None
    assert other.search is not None
    assert first.search.trials != other.search.trials


def test_the_file_is_judged_by_all_of_the_validation_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = optimize(budget={"macs": 0.6}, passes=("prune-channels",), val=DATA)
    file, score = tmp_path / "net.onnx", 10 / 16
    with torch.no_grad():
        (one, right), (other, wrong) = ((images, result.model(images).argmax(1)) for images, _ in DATA)
    # All of the first batch is right, and two of the second.
    wrong[2:] = (wrong[2:] + 1) % CLASSES
    val = [(one, right), (other, wrong)]

    def writing_and_spoiling(model: nn.Module, *args: Any, **options: Any) -> fxopt.ExportReport:
        report = fxopt.export_onnx(model, *args, **options)
        for parameter in model.parameters():
            parameter.data.zero_()
        return report

    with monkeypatch.context() as patch:
        # What the model itself has is not what the file has.
        patch.setattr("fxopt.api.export_onnx", writing_and_spoiling)
        kept = {name: one.clone() for name, one in result.model.state_dict().items()}
        shown = io.StringIO()
        made = result.export(file, val=val, progress=LineProgress(shown))
        assert shown.getvalue().startswith("judging the file: 0 of 2\njudging the file: 2 of 2 in ")
        assert accuracy(result.model, val) != score
        result.model.load_state_dict(kept)
    assert made.accuracy == score
    assert result.report.export is not None
    assert result.report.export["accuracy"] == score
    assert f"accuracy {score:.2%}" in str(made)
    assert f"{score:.2%}" in result.report.to_html()
    assert result.export(file).accuracy is None
    with pytest.raises(ExportError, match="does not run qonnx"):
        result.export(file, format="qonnx", val=val)
    file.unlink()
    with pytest.raises(DataError, match="val"):
        result.export(file, val=[])
    assert file.exists()
    assert result.report.export["accuracy"] is None


class OfBessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i1(self.net(x))


def test_what_cannot_be_measured_is_told_and_the_result_is_kept() -> None:
    result = optimize(OfBessel(), passes="prune-channels", budget={"macs": 0.6}, epochs=0, verify_on_host=True)
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    assert result.report.before.measured_latency_s is result.report.after.measured_latency_s is None
    told = [note for note in result.report.notes if note.startswith("Not measured in onnxruntime on this machine: ")]
    assert len(told) == 1
    assert "bessel_i1" in told[0]


def test_an_export_enters_the_report(tmp_path: Path) -> None:
    result = optimize(budget={"macs": 0.6}, passes=("prune-channels",))
    made = result.export(tmp_path / "model.onnx")
    assert result.report.export is not None
    assert result.report.export["path"] == "model.onnx"
    assert result.report.export["max_abs_diff"] == made.max_abs_diff


# Models and data of all kinds.


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 16), nn.Linear(5, 16), nn.Linear(32, CLASSES)

    def forward(self, image: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.left(image).relu(), self.right(extra).relu()], 1))


@pytest.mark.parametrize("form", [tuple, dict])
def test_quantizers_are_calibrated_on_all_inputs_of_a_batch(form: type) -> None:
    images, extras = torch.randn(8, 6) + 50.0, torch.randn(8, 5) - 50.0
    inputs: Any = (images, extras) if form is tuple else {"image": images, "extra": extras}
    data = [(inputs, torch.arange(8) % CLASSES)]
    result = optimize(TwoInputs().eval(), inputs, passes=("quantize",), train=data, val=data, budget={"size": 0.34})
    assert result.search is not None
    assert not result.search.failed
    assert {result.policy["bits", site] for site in ("left", "right", "last")} == {(8, 8)}
    seen = [module for name, module in result.model.named_modules() if name.startswith("quantizers.")]
    assert min(float(one.minimum) for one in seen) < -45.0 < 45.0 < max(float(one.maximum) for one in seen)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.boxes, self.scores = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.stem(x).relu()
        return {"boxes": [self.boxes(x)], "scores": self.scores(x).sigmoid()}


def test_several_outputs_are_judged_by_ones_own_function() -> None:
    model = Detector().eval()
    wanted = model(EXAMPLE)["scores"].detach()

    def closeness(module: nn.Module) -> float:
        return -float((module(EXAMPLE)["scores"] - wanted).abs().mean())

    def loss(output: Any, label: torch.Tensor) -> torch.Tensor:
        return (output["scores"].mean((1, 2, 3)) - label).square().mean()

    train = [(EXAMPLE, torch.rand(2))]
    result = optimize(model, budget={"macs": 0.6}, evaluate=closeness, train=train, loss=loss)
    assert set(result.model(EXAMPLE)) == {"boxes", "scores"}
    assert result.report.score_name == "evaluate"
    with torch.no_grad():
        assert result.report.after.accuracy == closeness(result.model)


def test_regression_is_fine_tuned_by_its_own_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 5, generator=generator)
    data = [(inputs, inputs.sum(1, keepdim=True))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 1)).eval()

    def error(module: nn.Module) -> float:
        return -float(nn.functional.mse_loss(module(inputs), data[0][1]))

    result = optimize(
        model,
        inputs,
        passes="prune-channels",
        budget={"macs": 0.6},
        train=data,
        evaluate=error,
        loss=nn.MSELoss(),
        epochs=8,
    )
    cut, tuned = result.report.passes
    assert cut.accuracy is not None
    assert tuned.accuracy is not None
    assert tuned.accuracy > cut.accuracy


def test_sound_is_a_signal_in_one_dimension() -> None:
    model = nn.Sequential(
        *(nn.Conv1d(1, 16, 9, 4), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 5, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES)),
    ).eval()
    data = make_batches(2, 1, 80)
    report = optimize(model, data[0][0], budget={"macs": 0.5}, train=data, val=data).report
    assert report.after.macs <= 0.5 * report.before.macs


def test_labels_may_be_left_out_or_be_probabilities() -> None:
    inputs, labels = DATA[0]
    partly = torch.where(torch.arange(len(labels)) < 4, labels, -100)
    half = optimize(train=[(inputs, partly)], val=[(inputs, partly)], passes="prune-channels").report
    first = optimize(val=[(inputs[:4], labels[:4])], passes="prune-channels").report
    assert half.before.accuracy == first.before.accuracy
    soft = nn.functional.one_hot(labels, CLASSES).float()
    optimize(train=[(inputs, soft)], passes="prune-channels", trials=1)


def test_an_optimized_model_can_be_cut_further_but_not_once_it_is_quantized() -> None:
    cut = optimize(passes=("prune-channels",), budget={"macs": 0.8})
    again = optimize(cut.model, passes=("prune-channels",), budget={"macs": 0.9})
    assert again.report.before.macs == cut.report.after.macs
    assert again.report.after.macs <= 0.9 * cut.report.after.macs
    quantized = optimize(passes=("quantize",), engine="greedy", trials=6)
    with pytest.raises(PassError, match=r"'0.*' is quantized already; start from the graph before"):
        optimize(quantized.model, passes=("prune-channels",), budget={"macs": 0.9})


def test_an_exported_program_is_a_model_too(tmp_path: Path) -> None:
    program = torch.export.export(make_net(), (EXAMPLE,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    result = fxopt.optimize(program, EXAMPLE, target="pixel1", budget={"macs": 0.6}, trials=1, verify_on_host=False)  # type: ignore[arg-type]
    again = fxopt.load(result.save(tmp_path), program)  # type: ignore[arg-type]
    assert torch.equal(again(EXAMPLE), result.model(EXAMPLE))


def test_without_data_it_works_and_says_so() -> None:
    report = optimize(budget={"macs": 0.6}).report
    assert report.score_name.startswith("data-free")
    assert any("No validation data" in note for note in report.notes)
    assert any("No training data" in note for note in report.notes)
    assert "accuracy unknown for want of data" in report.verdict
    assert not optimize(train=DATA, val=DATA).report.notes


def test_nothing_to_decide_is_no_failure_but_is_said() -> None:
    result = optimize(nn.ReLU())
    assert result.search is None
    assert any("nothing to decide" in note for note in result.report.notes)
    with pytest.raises(InfeasibleError, match="nothing to decide"):
        optimize(nn.ReLU(), budget={"latency": 0.5})


@dataclasses.dataclass(frozen=True)
class Moody(PruneChannels):
    """Fails whenever it cuts anything."""

    def call(self, graph_module: Any) -> Any:
        if any(choice < 16 for choice in self.own_choices.values()):
            raise PassError("not today")
        return super().call(graph_module)


def test_trials_that_failed_are_told() -> None:
    report = optimize(passes=(Moody(),), trials=6, val=DATA).report
    (note,) = [note for note in report.notes if "trials failed" in note]
    assert "not today" in note


# What it refuses, before anything is searched or trained.


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a search or a training was begun")

    monkeypatch.setattr("fxopt._course.run_search", refuse)
    monkeypatch.setattr("fxopt._tuning.fit", refuse)


def never(_: nn.Module) -> float:
    raise ZeroDivisionError("no samples")


class Failing:
    """A loader that breaks behind its first batch."""

    def __iter__(self) -> Iterator[Any]:
        yield DATA[0]
        raise OSError("cannot decode image 17")


class ReadOnce:
    """A loader that has nothing for a second reader."""

    def __init__(self) -> None:
        self.batches = list(DATA)

    def __iter__(self) -> Iterator[Any]:
        while self.batches:
            yield self.batches.pop()


def with_labels(labels: Any) -> list[Any]:
    return [(DATA[0][0], labels)]


def with_inputs(inputs: Any) -> list[Any]:
    return [(inputs, DATA[0][1])]


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x


REFUSED: dict[str, tuple[dict[str, Any], type[FxoptError], str]] = {
    "no budget": ({"budget": {"latency": 0}}, BudgetError, "fraction"),
    "too large": ({"budget": {"latency": 1.5}}, BudgetError, "fraction"),
    "parsecs": ({"budget": {"latency": "5 parsecs"}}, BudgetError, "no unit of latency"),
    "metric": ({"budget": {"latncy": 0.5}}, BudgetError, "Did you mean 'latency'"),
    "no mapping": ({"budget": "60%"}, BudgetError, "by metric"),
    "least macs": ({"budget": {"macs": 0.001}}, InfeasibleError, "least possible macs is 23.07 k"),
    "least size": ({"budget": {"size": "10B"}}, InfeasibleError, "least possible size"),
    "target": ({"target": "pixl1"}, UnknownNameError, "'pixel1'"),
    "no target": ({"target": 3}, TargetError, "target is a int"),
    "pass": ({"passes": ("prune-chanels",)}, UnknownNameError, "'prune-channels'"),
    "no pass": ({"passes": ()}, PassError, "empty"),
    "no passes": ({"passes": None}, PassError, "NoneType"),
    "not tunable": ({"passes": (3,)}, PassError, "decides nothing"),
    "twice": ({"passes": ("quantize", "quantize")}, PassError, "twice"),
    "zeros first": ({"passes": ("sparsify-weights", "prune-channels")}, PassError, "whose zeros it would fill"),
    "order": ({"passes": ("quantize", "prune-channels")}, PassError, "put 'quantize' last"),
    "engine": ({"engine": "evolutoin"}, UnknownNameError, "'evolution'"),
    "no engine": ({"engine": None}, UnknownNameError, "engine"),
    "trials": ({"trials": 0}, SearchError, "trials .* at least 1"),
    "half trials": ({"trials": 2.5}, SearchError, "whole number"),
    "parallel": ({"parallel": 0}, SearchError, "parallel"),
    "seed": ({"seed": -1}, SearchError, "seed"),
    "epochs": ({"epochs": -1}, SearchError, "epochs"),
    "rate": ({"train": DATA, "learning_rate": -1.0}, FxoptError, "learning_rate"),
    "executor": ({"executor": "threads"}, SearchError, "executor is a str"),
    "progress": ({"progress": "yes"}, FxoptError, "progress"),
    "both": ({"val": DATA, "evaluate": half_right}, DataError, "one of them"),
    "nothing": ({"val": []}, DataError, "val yields nothing"),
    "nothing to train on": ({"train": []}, DataError, "train yields nothing"),
    "read once": ({"train": ReadOnce()}, DataError, "train yields nothing"),
    "iterator": ({"val": iter(DATA)}, DataError, "read only once"),
    "failing": ({"val": Failing()}, DataError, r"val, batch 1, raised OSError: cannot decode image 17 \(.*test_api"),
    "dicts": ({"train": [{"x": 1}]}, DataError, "train yields a dict"),
    "label 9": ({"val": with_labels(torch.full((8,), 9))}, DataError, "val has the label 9"),
    "label -1": ({"train": with_labels(torch.full((8,), -1))}, DataError, "train has the label -1"),
    "half labels": ({"train": with_labels(torch.rand(8))}, DataError, "train has labels of type torch.float32"),
    "few labels": ({"train": with_labels(torch.zeros(7).long())}, DataError, r"labels of shape \(7,\)"),
    "listed labels": ({"train": with_labels([0] * 8)}, DataError, "has a list"),
    "channels": ({"train": with_inputs(torch.zeros(8, 5, 8, 8))}, DataError, r"given a tensor of shape \(8, 5, 8, 8\)"),
    "bytes": ({"val": with_inputs(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))}, DataError, "type uint8 by val"),
    "nan": ({"val": with_inputs(torch.full((8, 3, 8, 8), float("nan")))}, DataError, "NaN"),
    "judge": ({"evaluate": never}, DataError, r"evaluate raised ZeroDivisionError: no samples \(.*test_api\.py:\d+"),
    "no judge": ({"evaluate": "good"}, DataError, "evaluate is a str"),
    "text": ({"evaluate": lambda _: "good"}, DataError, "gives a str"),
    "not finite": ({"evaluate": lambda _: float("nan")}, DataError, "score nan by evaluate"),
    "loss": ({"train": DATA, "loss": lambda output, _: output.nothing}, DataError, "loss raised AttributeError"),
    "tensor of losses": ({"train": DATA, "loss": lambda output, _: output}, DataError, "one element"),
    "frozen": ({"model": make_net().requires_grad_(False), "train": DATA}, DataError, "no parameter to train"),
    "wrong shape": ({"example": torch.zeros(2, 5, 8, 8)}, TraceError, r"\(2, 5, 8, 8\)"),
    "objective": ({"objective": "macs"}, SearchError, "objective is a str; give one of fxopt.objectives"),
    "reconstruct": ({"reconstruct": "none"}, SearchError, "reconstruct is a str; give True, False"),
    "no example": ({"example": None}, TraceError, "example_inputs is missing"),
    "no model": ({"model": len}, TraceError, "Cannot trace"),
    "branching": ({"model": Branching()}, TraceError, r"test_api\.py:\d+.*torch\.where"),
}


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_at_once_in_one_line(case: str) -> None:
    options, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as caught:
        optimize(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_search")
def test_weights_that_are_not_finite_are_named() -> None:
    model = make_net()
    with torch.no_grad():
        model.get_parameter("3.weight")[0] = float("inf")
    with pytest.raises(DataError, match=r"'3\.weight' holds NaN or infinity"):
        optimize(model)


@pytest.mark.usefixtures("no_search")
def test_an_infeasible_budget_names_the_least_that_is_enough() -> None:
    with pytest.raises(InfeasibleError) as caught:
        optimize(budget={"macs": 0.001}, passes=("prune-channels",))
    failure = caught.value
    assert failure.metric == "macs"
    assert failure.limit < failure.least


def test_the_least_that_an_infeasible_budget_names_is_enough() -> None:
    with pytest.raises(InfeasibleError) as caught:
        optimize(budget={"size": "1B"})
    enough = f"{caught.value.least * (1 + 1e-9)!r}B"
    report = optimize(budget={"size": enough}, trials=1).report
    assert report.after.size_bytes <= caught.value.least


def test_a_batch_that_goes_wrong_in_training_is_told_too() -> None:
    late = [*DATA, (DATA[0][0], torch.full((8,), 9))]
    with pytest.raises(DataError, match="train has the label 9"):
        optimize(train=late, passes=("prune-channels",), trials=1)


# Weights of the original.


def test_weights_of_the_original_do_not_fit_and_the_message_helps() -> None:
    result = optimize(passes=("prune-channels",), budget={"macs": 0.6})
    before = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    with pytest.raises(
        FxoptError, match=r"weight' is \(\d.*\) there and \(\d.*\) here.*fxopt\.load\(folder, original_model\)"
    ):
        result.model.load_state_dict(make_net().state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())
    assert not result.model.load_state_dict(before).missing_keys


def test_a_report_goes_through_json(tmp_path: Path) -> None:
    result = optimize(budget={"macs": 0.6}, val=DATA)
    result.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(result.report.to_json())


def test_a_second_call_in_the_same_folder_is_told_at_once(tmp_path: Path) -> None:
    """Before it trains anything or writes there; the first goes on."""
    seen: list[set[str]] = []

    def evaluate(module: nn.Module) -> float:
        if not seen:
            seen.append({path.name for path in tmp_path.iterdir()})
            with pytest.raises(JournalError, match="in use by another run"):
                optimize(evaluate=lambda _: pytest.fail("judged something"), workdir=tmp_path)
            seen.append({path.name for path in tmp_path.iterdir()})
        return half_right(module)

    optimize(passes="prune-channels", evaluate=evaluate, workdir=tmp_path, trials=1)
    assert seen[0] == seen[1]


def test_the_seed_alone_decides_which_batches_a_shuffling_loader_gives() -> None:
    data = make_batches(4)
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))

    def weights(given: int) -> list[torch.Tensor]:
        torch.manual_seed(given)
        train = DataLoader(TensorDataset(images, labels), 4, shuffle=True)
        result = optimize(passes=("prune-channels", "quantize"), train=train, val=data, epochs=0)
        return list(result.model.state_dict().values())

    assert all(map(torch.equal, weights(0), weights(1)))


def test_passes_may_come_from_a_generator() -> None:
    one, other = (optimize(passes=make(("quantize",)), target="bitfusion", trials=1) for make in (iter, tuple))
    assert one.passes == other.passes
