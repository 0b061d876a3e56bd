from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt.data import TensorLoader
from fxopt.decisions import Policy
from fxopt.errors import DataError, SearchError
from fxopt.evaluate import Evaluator, accuracy, apply_policy, recalibrate_batch_norm
from fxopt.graph import trace
from fxopt.graph.fake_quantize import QuantizedLayer
from fxopt.passes import Canonicalize, PruneChannels, Quantize

EXAMPLE = torch.zeros(2, 3, 6, 6)
CUT = Policy({("channels", "first"): 4})
INTEGERS = Policy({("bits", site): (8, 8) for site in ("first", "second", "last")})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(x)).mean((2, 3)))


def make_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture
def graph() -> fx.GraphModule:
    return traced(make_net())


def traced(model: nn.Module, example: object = EXAMPLE) -> fx.GraphModule:
    graph: fx.GraphModule = Canonicalize()(trace(model, example)).graph_module
    return graph


def make_data(count: int = 24, **options: Any) -> TensorLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = 2.0 * torch.randn(count, 3, 6, 6, generator=generator) + 1.0
    return TensorLoader(inputs, torch.randint(0, 4, (count,), generator=generator), **({"batch_size": 8} | options))


def snapshot(graph: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in graph.state_dict().items()}


def is_unchanged(graph: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = graph.state_dict()
    return before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


# Accuracy


def test_accuracy_is_the_part_that_is_right() -> None:
    scores = torch.eye(4)
    data = TensorLoader(scores, torch.tensor([0, 1, 2, 0]), batch_size=2)
    assert accuracy(nn.Identity(), data) == 0.75
    assert accuracy(nn.Identity(), data, max_batches=1) == 1.0


def test_accuracy_counts_positions_of_a_segmentation() -> None:
    scores = torch.zeros(1, 2, 2, 2)
    scores[0, 1, 0] = 1.0
    assert accuracy(nn.Identity(), [(scores, torch.ones(1, 2, 2, dtype=torch.long))]) == 0.5


def test_accuracy_judges_in_eval_mode_and_restores_the_modes() -> None:
    model = nn.Sequential(nn.Dropout(0.99), nn.Flatten())
    model[1].eval()
    assert accuracy(model, TensorLoader(torch.eye(4), torch.arange(4))) == 1.0
    assert [module.training for module in model] == [True, False]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "val yields nothing"),
        ([(torch.eye(4), torch.eye(4))], r"labels of shape \(4, 4\), where .* need \(4,\)"),
        ([(torch.eye(4), 3)], "has a int for labels"),
        ([(torch.ones(4), torch.ones(4))], "no tensor of class scores"),
        ([torch.eye(4)], "not a pair"),
    ],
)
def test_accuracy_of_nonsense_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        accuracy(nn.Identity(), data)


# Applying a policy


@pytest.mark.parametrize("policy", [Policy({}), CUT, INTEGERS, CUT.merged(INTEGERS)])
def test_applying_a_policy_leaves_the_graph_alone(graph: fx.GraphModule, policy: Policy) -> None:
    before, code = snapshot(graph), graph.code
    data = make_data()
    seen: list[fx.GraphModule] = []

    def between(model: fx.GraphModule) -> None:
        recalibrate_batch_norm(model, data)
        seen.append(model)

    result = apply_policy(graph, (PruneChannels(), Quantize()), policy, calibration=data, between=between)
    assert result is not graph
    assert is_unchanged(graph, before)
    assert graph.code == code
    assert len(seen) == 1
    assert not any(isinstance(module, QuantizedLayer) for module in seen[0].modules())
    assert seen[0].first.out_channels == policy.get(("channels", "first"), 8)
    quantized = [module for module in result.modules() if isinstance(module, QuantizedLayer)]
    assert len(quantized) == (3 if ("bits", "last") in policy else 0)


@pytest.mark.parametrize("passes", [(PruneChannels(),), (Quantize(),), (Quantize(), PruneChannels())])
def test_between_is_called_once_whatever_the_passes(graph: fx.GraphModule, passes: Any) -> None:
    seen: list[fx.GraphModule] = []
    apply_policy(graph, passes, Policy({}), between=seen.append)
    assert len(seen) == 1


def test_batch_norm_is_estimated_anew_where_channels_are_cut(graph: fx.GraphModule) -> None:
    data, seen = make_data(), []
    for policy in (Policy({}), PruneChannels().search_space(graph).default(), CUT):
        apply_policy(graph, (PruneChannels(),), policy, calibration=data, between=seen.append)
    undecided, uncut, cut = seen
    assert is_unchanged(undecided, snapshot(graph))
    assert is_unchanged(uncut, snapshot(graph))
    expected = apply_policy(graph, (PruneChannels(),), CUT)
    assert float(expected.norm.running_mean.abs().max()) == 0.0
    recalibrate_batch_norm(expected, data)
    assert torch.equal(cut.norm.running_mean, expected.norm.running_mean)
    assert float(cut.norm.running_mean.abs().max()) > 0.0


def test_quantizers_see_the_data_and_keep_their_options(graph: fx.GraphModule) -> None:
    read: list[int] = []

    class Counting:
        def __iter__(self) -> Iterator[Any]:
            for index, batch in enumerate(make_data(80)):
                read.append(index)
                yield batch

    apply_policy(graph, (Quantize(max_batches=2),), INTEGERS, calibration=Counting())
    assert 2 <= len(read) <= 3
    own = make_data(8)
    read.clear()
    apply_policy(graph, (Quantize(calibration=own),), INTEGERS, calibration=Counting())
    assert not read


# Batch norm


def test_batch_norm_is_estimated_from_the_data() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout()).eval()
    model[1].train()
    data = make_data(24)
    recalibrate_batch_norm(model, data, 2)
    used = [data.inputs[:8], data.inputs[8:16]]
    means = torch.stack([one.mean((0, 2, 3)) for one in used]).mean(0)
    variances = torch.stack([one.transpose(0, 1).flatten(1).var(1) for one in used]).mean(0)
    assert torch.allclose(model[0].running_mean, means, atol=1e-6)
    assert torch.allclose(model[0].running_var, variances, rtol=1e-5)
    assert (model[0].momentum, model[0].training, model[1].training) == (0.3, False, True)


def test_batch_norm_buffers_that_others_share_stay() -> None:
    model, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    other._buffers.update(model._buffers)
    recalibrate_batch_norm(model, make_data())
    assert float(other.running_mean.abs().max()) == 0.0
    assert float(model.running_mean.abs().max()) > 0.5


@pytest.mark.parametrize("bad", [[], [(torch.ones(2, 5, 4, 4), torch.ones(2))]])
def test_batch_norm_stays_as_it_was_when_the_data_do_not_fit(bad: Any) -> None:
    model = nn.BatchNorm2d(3).eval()
    before = snapshot(model)
    with pytest.raises((DataError, ValueError, RuntimeError)):
        recalibrate_batch_norm(model, bad)
    assert is_unchanged(model, before)
    assert not model.training
    assert model.momentum == 0.1


def test_a_model_without_batch_norm_is_not_run() -> None:
    recalibrate_batch_norm(nn.Linear(2, 2), [])


# Scores


def make_evaluator(graph: fx.GraphModule, **options: Any) -> Evaluator:
    return Evaluator(graph, (PruneChannels(), Quantize()), **options)


@pytest.mark.parametrize("policy", [Policy({}), CUT, INTEGERS])
def test_scores_are_repeatable_and_leave_the_graph_alone(graph: fx.GraphModule, policy: Policy) -> None:
    before = snapshot(graph)
    data = make_data()
    scores = [make_evaluator(graph, train=data, val=data)(policy) for _ in range(2)]
    assert scores[0] == scores[1]
    assert 0.0 <= scores[0] <= 1.0
    assert is_unchanged(graph, before)


def test_a_policy_is_judged_once(graph: fx.GraphModule) -> None:
    judged: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        judged.append(model)
        return 0.5

    evaluator = make_evaluator(graph, evaluate=evaluate)
    assert evaluator(CUT) == evaluator(Policy(dict(CUT))) == 0.5
    assert len(judged) == 1
    assert evaluator.score_name == "evaluate"


def test_every_policy_is_judged_on_the_same_samples(graph: fx.GraphModule) -> None:
    data = make_data(40, shuffle=True)
    loader: Any = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data.inputs, data.labels), batch_size=8, shuffle=True
    )
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = make_evaluator(graph, train=loader, val=loader, max_batches=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    second = make_evaluator(graph, train=loader, val=loader, max_batches=2)
    assert [first(policy) for policy in (CUT, INTEGERS)] == [second(policy) for policy in (CUT, INTEGERS)]
    assert first.judge(graph) == pytest.approx(second.judge(graph))


def test_trials_look_at_part_of_the_data_and_reports_at_all(graph: fx.GraphModule) -> None:
    data = make_data(40)
    evaluator = make_evaluator(graph, val=data, max_batches=1)
    assert evaluator.judge(graph) == accuracy(graph, data)
    assert evaluator(Policy({})) == accuracy(graph, data, 1)
    assert accuracy(graph, data) != accuracy(graph, data, 1)


def test_without_data_the_original_is_best_and_cuts_cost(graph: fx.GraphModule) -> None:
    evaluator = make_evaluator(graph)
    assert evaluator.score_name.startswith("data-free")
    assert evaluator(Policy({})) == pytest.approx(0.0, abs=1e-6)
    scores = [evaluator(Policy({("channels", "first"): kept})) for kept in (7, 4, 1)]
    assert -1.0 < min(scores) <= max(scores) < -0.01
    assert 0.0 > evaluator(INTEGERS) > max(scores)


def test_a_trial_is_worth_its_reward(graph: fx.GraphModule) -> None:
    def reward(score: float, policy: Policy) -> float:
        return score - (0.05 if policy else 0.1)

    evaluator = make_evaluator(graph, evaluate=lambda model: 1.0, reward=reward)
    assert evaluator(CUT) == pytest.approx(0.95)
    assert evaluator(Policy({})) == pytest.approx(0.9)
    assert evaluator.score(CUT) == evaluator.judge(graph) == 1.0


@pytest.mark.parametrize("value", [None, "good", torch.ones(2)])
def test_what_evaluate_gives_has_to_be_a_number(graph: fx.GraphModule, value: Any) -> None:
    evaluator = make_evaluator(graph, evaluate=lambda model: value)
    with pytest.raises(DataError, match="it has to give a number"):
        evaluator(CUT)


def test_a_model_with_integer_outputs_cannot_be_judged_without_data() -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).argmax(1)

    graph = traced(Best().eval(), torch.zeros(2, 4))
    with pytest.raises(DataError, match="no floating-point output"):
        Evaluator(graph, (PruneChannels(),))
    assert Evaluator(graph, (PruneChannels(),), evaluate=lambda model: 1.0)(Policy({})) == 1.0


POLICIES = [Policy({("channels", "first"): kept}) for kept in range(1, 9)]


def test_threads_give_the_same_scores(graph: fx.GraphModule) -> None:
    data = make_data()
    alone = make_evaluator(graph, train=data, val=data)
    together = make_evaluator(graph, train=data, val=data)
    with ThreadPoolExecutor(4) as executor:
        scores = list(executor.map(together, POLICIES))
    assert scores == [alone(policy) for policy in POLICIES]


def test_an_evaluator_works_in_another_process(graph: fx.GraphModule) -> None:
    data = make_data()
    evaluator = make_evaluator(graph, train=data, val=data, source=(make_net(), EXAMPLE))
    travelled = ForkingPickler.loads(ForkingPickler.dumps(evaluator))
    assert [travelled(policy) for policy in POLICIES[:3]] == [evaluator(policy) for policy in POLICIES[:3]]


def test_an_evaluator_without_its_model_stays_where_it_is(graph: fx.GraphModule) -> None:
    with pytest.raises(SearchError, match="executor of threads"):
        ForkingPickler.dumps(make_evaluator(graph))


def test_what_judges_is_told(graph: fx.GraphModule) -> None:
    names: list[Callable[[], Evaluator]] = [
        lambda: make_evaluator(graph, val=make_data()),
        lambda: make_evaluator(graph, evaluate=lambda model: 0.0),
        lambda: make_evaluator(graph, train=make_data()),
    ]
    assert [make().score_name for make in names] == ["accuracy", "evaluate", "data-free: minus output error"]


def test_trials_of_bits_read_data_once_and_score_what_a_policy_gives_alone(graph: fx.GraphModule) -> None:
    passes, data = (Quantize(weights={"method": "mse"}),), make_data()
    judge = Evaluator(graph, passes, train=data, val=data)
    for bits in ((8, 8), (4, 4), (3, 8)):
        policy = Policy({("bits", site): bits for site in ("first", "second", "last")})
        alone = apply_policy(graph, passes, policy, calibration=list(data))
        assert judge.score(policy) == accuracy(alone, data)
