"""Fine-tuning in the one call: how it is asked for, and what the report tells of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt._tuning import Tuning
from fxopt.api import OptimizationResult
from fxopt.decisions import SearchSpace
from fxopt.errors import DataError, FxoptError, JournalError, UnknownNameError
from fxopt.evaluate import Evaluator
from fxopt.graph.fake_quantize import ActivationQuantizer, WeightQuantizer
from fxopt.passes import FoldBatchNorm, PruneChannels, Quantize, SparsifyWeights
from fxopt.sensitivity import sensitivities
from fxopt.training import Distillation, EarlyStop, FineTuning
from tests.optimizing import DATA, EXAMPLE, Stopping, half_right, make_net, optimize, outcome


def tuned(how: FineTuning | None, **options: Any) -> OptimizationResult:
    known = {"budget": {"macs": 0.6}, "passes": "prune-channels", "train": DATA, "val": DATA, "trials": 2}
    return optimize(**(known | options), fine_tune=how)


def detail(result: OptimizationResult) -> str:
    return next(step.detail for step in result.report.passes if step.name == "fine-tune")


def test_the_default_is_to_learn_class_scores() -> None:
    default = tuned(None)
    assert outcome(default) == outcome(tuned(FineTuning()))
    assert outcome(default) != outcome(tuned(FineTuning(distillation=None)))
    assert detail(default) == "epochs: 1"


def epochs_told(result: OptimizationResult) -> list[str]:
    """What the report tells of each training."""
    return [step.detail.split(",")[0] for step in result.report.passes if step.name.startswith("fine-tune")]


def test_the_last_training_in_floats_may_be_longer() -> None:
    """Through quantizers it is not, and where bits alone are decided there is none in floats."""
    few = {"target": "zynq7020", "budget": {"latency": 0.4}, "passes": ("prune-channels", "quantize")}
    assert epochs_told(tuned(None, final_epochs=2)) == ["epochs: 2"]
    assert epochs_told(tuned(None, **few, final_epochs=2)) == ["epochs: 2", "epochs: 1"]
    assert epochs_told(tuned(None, **few, final_epochs=0)) == ["epochs: 1"]
    assert epochs_told(tuned(None, **few, shares={}, final_epochs=2)) == ["epochs: 2", "epochs: 1"]
    assert epochs_told(tuned(None, **(few | {"passes": "quantize"}), final_epochs=2)) == ["epochs: 1"]
    nothing_behind = ("prune-channels", SparsifyWeights(ignore=("*",)))
    last = {"budget": {"latency": 0.9}, "passes": nothing_behind, "shares": {}}
    assert epochs_told(tuned(None, **(few | last), final_epochs=2)) == ["epochs: 2"]
    assert outcome(tuned(None, **few, final_epochs=1)) == outcome(tuned(None, **few))
    with pytest.raises(FxoptError, match="final_epochs"):
        tuned(None, final_epochs=-1)


@pytest.mark.parametrize("change", [{"optimizer": "adamw"}, {"schedule": "constant"}, {"momentum": 0.5}])
def test_every_option_counts(change: dict[str, Any]) -> None:
    assert outcome(tuned(FineTuning(**change))) != outcome(tuned(None))


def test_attention_is_compared_where_channels_were_cut() -> None:
    """Two sizes of positions, 8 x 8 and 4 x 4; all channels are cut, and so no feature map has its shape still."""
    result = tuned(FineTuning(distillation=Distillation(features=1.0, attention=1.0)))
    space = result.passes[0].search_space(fxopt.trace(make_net(), EXAMPLE))
    assert all(result.policy[decision.key] < decision.default for decision in space)
    assert detail(result) == "epochs: 1, feature maps at 0 places, attention maps at 2 places"


def test_an_early_stop_goes_by_the_score_of_the_search() -> None:
    class Falling:
        """The original and the cut model are judged before training: scores fall from there on."""

        score = 1.0

        def __call__(self, module: nn.Module) -> float:
            self.score -= 0.01
            return self.score

    result = tuned(FineTuning(early_stop=EarlyStop(patience=2)), val=None, evaluate=Falling(), epochs=6)
    assert detail(result).startswith("epochs: 3, the best is 1; taken back")


def test_a_loss_of_ones_own_learns_from_a_teacher_when_asked_to() -> None:
    def mean_square(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return output.square().mean()

    options: dict[str, Any] = {"loss": mean_square, "val": None, "evaluate": half_right}
    alone = tuned(None, **options)
    assert outcome(alone) == outcome(tuned(FineTuning(distillation=None), **options))
    how = FineTuning(distillation=Distillation(logits=0.0, attention=1.0))
    assert detail(tuned(how, **options)) == "epochs: 1, attention maps at 2 places"


def test_an_interrupted_fine_tuning_goes_on(tmp_path: Path) -> None:
    how = FineTuning(distillation=Distillation(attention=1.0), early_stop=EarlyStop(patience=2))
    options: dict[str, Any] = {"val": None, "epochs": 4}
    whole = tuned(how, **options, evaluate=Stopping(), workdir=tmp_path / "whole")
    # The original, two trials, the best again, the cut model: the sixth call is after the first epoch.
    counted = Stopping()
    tuned(how, **options, evaluate=counted, workdir=tmp_path / "count")
    with pytest.raises(KeyboardInterrupt):
        tuned(how, **options, evaluate=Stopping(counted.calls - 2), workdir=tmp_path / "cut")
    assert list((tmp_path / "cut").glob("fine-tune*"))
    assert outcome(tuned(how, **options, evaluate=Stopping(), workdir=tmp_path / "cut")) == outcome(whole)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        (lambda: FineTuning(optimizer="sdg"), UnknownNameError, "Did you mean 'sgd'"),  # type: ignore[arg-type]
        (lambda: FineTuning(schedule="cosinus"), UnknownNameError, "schedule 'cosinus'"),  # type: ignore[arg-type]
        (lambda: FineTuning(scales="learned"), UnknownNameError, "way with scales"),  # type: ignore[arg-type]
        (lambda: FineTuning(quantized_rate=0.0), FxoptError, "quantized_rate has to be above zero"),
        (lambda: FineTuning(quantized_clip=0.0), FxoptError, "clip has to be above zero"),
        (lambda: FineTuning(momentum=1.0), FxoptError, r"momentum lies in \[0, 1\)"),
        (lambda: FineTuning(weight_decay=-1.0), FxoptError, "weight_decay has to be finite and not below zero"),
        (lambda: "adamw", FxoptError, "fine_tune is a str"),
        (lambda: FineTuning(distillation=Distillation(attention=1.0, sites=("layer9",))), UnknownNameError, "layer9"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_searched(how: Any, kind: type[Exception], words: str) -> None:
    def never(state: object, *_: object) -> None:
        pytest.fail("a search was begun")

    class Watching:
        start = advance = finish = never

    with pytest.raises(kind, match=words):
        tuned(how(), progress=Watching())


def test_scores_that_cannot_be_distilled_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"Distillation\(logits=0\)"):
        tuned(
            FineTuning(),
            model=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(0)),
            loss=lambda output, label: output.square().mean(),
            val=None,
            evaluate=lambda module: 1.0,
            budget=None,
        )


# In few bits.

FEW: dict[str, Any] = {"target": "zynq7020", "passes": "quantize", "budget": {"latency": 0.2}}


def quantizers(result: OptimizationResult, kind: type[Any]) -> list[Any]:
    return [module for module in result.model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("scales", "said", "of_activations"),
    [("lsq", "step sizes", "lsq"), ("pact", "clipping bounds", "pact"), ("fixed", "scales are fixed", "")],
)
def test_few_bits_are_trained_through_their_quantizers(scales: Any, said: str, of_activations: str) -> None:
    result = tuned(FineTuning(scales=scales, distillation=Distillation(attention=1.0)), **FEW, learning_rate=0.1)
    names = [step.name for step in result.report.passes]
    assert names == ["quantize", "fine-tune quantized"]
    assert said in result.report.passes[-1].detail
    assert {one.learned for one in quantizers(result, ActivationQuantizer)} == {of_activations}
    assert outcome(result)[3] != outcome(tuned(None, **FEW, epochs=0))[3]


def test_scales_that_are_powers_of_two_stay_so() -> None:
    grids = {"power_of_two": True}
    result = tuned(None, **{**FEW, "passes": Quantize(weights=grids, activations=grids)}, learning_rate=0.1)  # type: ignore[arg-type]
    scales = torch.cat([one.scale.flatten() for one in quantizers(result, (ActivationQuantizer, WeightQuantizer))])  # type: ignore[arg-type]
    assert torch.equal(scales.log2(), scales.log2().round())


def test_what_was_cut_and_quantized_is_trained_twice() -> None:
    result = tuned(None, **{**FEW, "passes": ("prune-channels", "quantize"), "budget": {"latency": 0.1}})
    names = [step.name for step in result.report.passes]
    assert names == ["prune-channels", "fine-tune", "quantize", "fine-tune quantized"]


def test_trained_scales_come_back_from_a_file(tmp_path: Path) -> None:
    result = tuned(None, **FEW, learning_rate=0.1)
    result.save(tmp_path)
    again = fxopt.load(tmp_path, make_net())
    inputs = DATA[0][0]
    assert again.meta["fxopt_calibration"] == result.model.meta["fxopt_calibration"]
    assert result.report.after.parameters == tuned(None, **FEW, epochs=0).report.after.parameters
    assert torch.equal(again.eval()(inputs), result.model.eval()(inputs))


def test_the_exact_engine_is_told_what_layers_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first policy is the one that the losses call best; they are kept with the search."""
    options = {**FEW, "trials": 1, "epochs": 0, "engine": "exact"}
    first = tuned(None, **options, workdir=tmp_path)
    (kept,) = tmp_path.glob("losses-*.json")
    graph = FoldBatchNorm()(fxopt.trace(make_net(), EXAMPLE)).graph_module
    (step,) = first.passes
    assert isinstance(step, Quantize)
    space = step.search_space(graph, fxopt.targets.load("zynq7020").capabilities)
    how: Any = {"method": "gradient", "rounding": step.rounding, "weights": step.weights}
    losses = sensitivities(graph, space, DATA[0][0], **how, activations=step.activations)

    def lost(policy: Any) -> float:
        return sum(table[i] for table, i in zip(losses, space.encode(policy), strict=True))

    assert lost(first.policy) < lost(tuned(None, **{**options, "engine": "uniform"}).policy)
    monkeypatch.setattr("fxopt.sensitivity._Information.loss", lambda *_: pytest.fail("measured again"))
    assert outcome(tuned(None, **options, workdir=tmp_path)) == outcome(first)
    assert kept.exists()


def test_the_exact_engine_does_without_data() -> None:
    result = tuned(None, **FEW, train=None, val=None, evaluate=half_right, engine="exact")
    assert set(result.policy.values()) != {(8, 8)}


# In every trial.


def likelihood(module: nn.Module) -> float:
    with torch.no_grad():
        return -sum(float(nn.functional.cross_entropy(module(inputs), labels)) for inputs, labels in DATA)


def test_trials_are_judged_after_training() -> None:
    """Bits, and channels with bits; what is trained is never the model, nor what the next trial starts from."""
    for passes in ("quantize", ("prune-channels", "quantize")):
        options = {**FEW, "passes": passes, "trials": 3, "val": None, "evaluate": likelihood}
        plain, trained, again = (tuned(None, **options, trial_epochs=epochs) for epochs in (0, 1, 1))
        scores = [[trial.score for trial in result.search.trials] for result in (plain, trained, again)]  # type: ignore[union-attr]
        assert scores[0] != scores[1] == scores[2]


@pytest.mark.parametrize("passes", [(Quantize(),), (PruneChannels(), Quantize())])
def test_a_trial_that_trains_leaves_no_trace(passes: Any) -> None:
    """Neither in the graph that all trials start from, nor in what they share, and a copy, as another process
    gets it, does the same."""
    graph = fxopt.trace(make_net(), EXAMPLE)
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    able = fxopt.targets.load("zynq7020").capabilities
    space = SearchSpace(decision for one in passes for decision in one.search_space(graph, able))
    policies = [space.uniform(fraction, bits) for fraction, bits in ((0.5, (4, 4)), (0.75, (5, 5)))]

    def made() -> Evaluator:
        training = Tuning(DATA, 1, None, 0.3, 0).for_trials(1)
        source = (make_net(), EXAMPLE)
        options: Any = {"train": DATA, "evaluate": likelihood, "reconstruct": False}
        return Evaluator(graph, passes, training=training, source=source, **options)

    judge = made()
    scores = [judge(policy) for policy in policies]
    for name, tensor in graph.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    again = made()
    assert [again(policy) for policy in reversed(policies)] == scores[::-1]
    assert [copy.deepcopy(made())(policy) for policy in policies] == scores
    assert scores[0] != Evaluator(graph, passes, train=DATA, evaluate=likelihood, reconstruct=False)(policies[0])


def test_a_search_with_training_is_another_search(tmp_path: Path) -> None:
    tuned(None, **FEW, workdir=tmp_path)
    with pytest.raises(JournalError, match="trial_epochs"):
        tuned(None, **FEW, workdir=tmp_path, trial_epochs=1)


@pytest.mark.parametrize(
    ("passes", "step", "scales"),
    [
        ("prune-channels", "fine-tune", "lsq"),
        ("quantize", "fine-tune quantized", "lsq"),
        ("quantize", "fine-tune quantized", "pact"),
    ],
)
def test_training_that_ends_below_its_start_is_taken_back(passes: str, step: str, scales: Any) -> None:
    def worse(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return -nn.functional.cross_entropy(output, label)

    options: dict[str, Any] = {"passes": passes, "budget": {"size": 0.6}, "target": "zynq7020"}
    options |= {"val": None, "evaluate": likelihood}
    how = FineTuning(distillation=None, scales=scales)
    ruined = tuned(how, loss=worse, epochs=6, learning_rate=0.3, **options)
    lines = {line.name: line for line in ruined.report.passes}
    assert "taken back" in lines[step].detail
    assert lines[step].accuracy == lines[passes].accuracy == ruined.report.after.accuracy
    assert lines[step].metrics == lines[passes].metrics
    assert likelihood(ruined.model.eval()) == ruined.report.after.accuracy
    untrained = tuned(None, epochs=0, **options)
    with torch.no_grad():
        torch.testing.assert_close(ruined.model(EXAMPLE), untrained.model(EXAMPLE))


def test_training_behind_which_the_score_is_no_number_is_taken_back() -> None:
    """The last call judges the trained network: with training there is one more than without."""
    counted = Stopping()
    tuned(None, val=None, evaluate=counted)
    without = Stopping()
    tuned(None, val=None, evaluate=without, epochs=0)
    assert counted.calls == without.calls + 1

    class NoNumber(Stopping):
        def __call__(self, module: nn.Module) -> float:
            score = super().__call__(module)
            return float("nan") if self.calls == counted.calls else score

    result = tuned(None, val=None, evaluate=NoNumber())
    assert detail(result) == "epochs: 1; taken back, it ended at nan"
    assert outcome(result)[3] == outcome(tuned(None, val=None, evaluate=half_right, epochs=0))[3]


def test_without_anything_to_judge_by_training_stays() -> None:
    result = tuned(None, val=None, epochs=1, learning_rate=0.3)
    assert "taken back" not in detail(result)
    assert outcome(result)[3] != outcome(tuned(None, val=None, epochs=0))[3]


def test_training_whose_loss_diverges_is_taken_back_whatever_the_score() -> None:
    calls = []

    def growing(output: Any, label: torch.Tensor) -> torch.Tensor:
        calls.append(label)
        return 10.0 ** len(calls) + output.mean()

    for options in ({"val": None, "evaluate": half_right}, {"val": None}):
        calls.clear()
        result = tuned(None, loss=growing, epochs=4, **options)
        assert "taken back, its loss went from" in detail(result)
        assert outcome(result)[3] == outcome(tuned(None, epochs=0, **options))[3]


def test_a_network_that_stays_in_floats_is_trained_once_and_that_is_told() -> None:
    def floats_alone(module: nn.Module) -> float:
        quantized = any(isinstance(one, WeightQuantizer) for one in module.modules())
        return 0.0 if quantized else half_right(module)

    result = optimize(
        budget={"macs": 0.6},
        passes=("prune-channels", "quantize"),
        shares={"quantize": 0.0},
        target="pixel1",
        train=DATA,
        evaluate=floats_alone,
        epochs=1,
        trials=8,
    )
    assert set(result.policy.of_kind("bits").values()) == {(32, 32)}
    assert [step.name for step in result.report.passes] == ["prune-channels", "fine-tune", "quantize"]
    assert "0 of 3 layers: floats were found better" in result.report.passes[-1].detail
