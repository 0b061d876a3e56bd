"""Networks are chosen within budget, and by engines over a trained supernet."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fxopt.decisions import Constraint, Policy
from fxopt.errors import (
    BudgetError,
    DataError,
    FxoptError,
    InfeasibleError,
    PassError,
    UnknownNameError,
    VerifyError,
)
from fxopt.evaluate import recalibrate_batch_norm
from fxopt.nas import Cost, CostTerm, ExpectedCost, PathScore, Supernet, check_budget, fine_tune, policy_within
from fxopt.search import engines, run_search
from tests.nas.toys import between, loader, mobile, mobile_table, paths, table, toy


@pytest.fixture
def supernet() -> Supernet:
    made = Supernet(*mobile())
    with torch.no_grad():
        made.alpha.add_(torch.randn(made.alpha.shape, generator=torch.Generator().manual_seed(2)))
    return made


@pytest.mark.parametrize("metrics", [("latency",), ("size", "latency"), ("memory",), ("macs", "memory", "size")])
def test_the_policy_is_the_most_probable_within_the_limits(supernet: Supernet, metrics: tuple[str, ...]) -> None:
    """Against all policies, at limits that some policy just meets."""
    costs, every = mobile_table(), np.array(list(paths(supernet)))
    chances = supernet.alpha.detach().double().log_softmax(1).numpy()
    scores = chances[np.arange(len(supernet.space)), every].sum(1)
    for number in range(0, len(every), len(every) // 7):
        limits = {metric: float(costs.score(every[number][None], metric)[0]) for metric in metrics}
        inside = np.all([costs.score(every, metric) <= limit for metric, limit in limits.items()], axis=0)
        policy = policy_within(supernet, costs, limits)
        row = supernet.space.encode(policy)
        assert all(costs.score(row[None], metric)[0] <= limit * (1 + 1e-9) for metric, limit in limits.items())
        assert chances[np.arange(len(row)), row].sum() == pytest.approx(scores[inside].max())
        check_budget(supernet.derive(policy), costs, limits)
    assert policy_within(supernet, costs, {}) == supernet.most_likely()


def test_limits_that_nothing_meets(supernet: Supernet) -> None:
    with pytest.raises(InfeasibleError, match="cheapest architecture"):
        policy_within(supernet, mobile_table(), {"latency": 1e-9, "size": 1e9})
    with pytest.raises(InfeasibleError, match="memory of"):
        policy_within(supernet, mobile_table(), {"memory": 1.0})
    every = np.array(list(paths(supernet)))
    table = mobile_table()
    flipped = copy.copy(table)
    flipped.costs = {**table.costs, "size": table.costs["size"].max() - table.costs["size"]}
    least = {one: float(flipped.score(every, one).min()) for one in ("latency", "size")}
    with pytest.raises(InfeasibleError, match="together, though each can be met alone"):
        policy_within(supernet, flipped, {metric: 1.0001 * value for metric, value in least.items()})
    with pytest.raises(PassError, match="over the limit"):
        check_budget(supernet.derive(supernet.most_likely()), mobile_table(), {"latency": 1e-9})


def test_limits_and_tables_that_do_not_fit(supernet: Supernet) -> None:
    for limit in ("60%", 0.0, torch.nan):
        with pytest.raises(BudgetError, match=r"The limit of latency in SI units has to be above zero and finite, got"):
            policy_within(supernet, mobile_table(), {"latency": limit})  # type: ignore[dict-item]
    with pytest.raises(BudgetError, match="limits is a float; give them by metric"):
        policy_within(supernet, mobile_table(), 0.6)  # type: ignore[arg-type]
    with pytest.raises(FxoptError, match=r"table is of other decisions than the supernet, such as 'blocks\.0'"):
        policy_within(supernet, table(toy()), {"latency": 1.0})
    with pytest.raises(PassError, match=r"table is a NoneType; give what .*lower_operators"):
        policy_within(supernet, None, {})  # type: ignore[arg-type]
    for duals, words in ((None, "duals is a NoneType"), ("x", "duals is a str"), ([-1.0], r"duals\[0\] has to be")):
        with pytest.raises(FxoptError, match=words):
            policy_within(supernet, mobile_table(), {"latency": 1.0}, duals=duals)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="supernet is a GraphModule"):
        PathScore(supernet.net, loader(), loader())  # type: ignore[arg-type]
    with pytest.raises(FxoptError, match="max_batches has to be a whole number"):
        PathScore(supernet, loader(), loader(), max_batches="a")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="supernet is a GraphModule"):
        fine_tune(supernet.net, supernet.space.default(), loader(), epochs=0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="train is a NoneType"):
        fine_tune(supernet, supernet.space.default(), None, epochs=0)  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match="A Supernet is no graph"):
        check_budget(supernet, mobile_table(), {"latency": 1.0})  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"The network costs .* over the limit of 1e-09\. Derive one within it"):
        check_budget(mobile()[0], mobile_table(), {"latency": 1e-9})


def test_engines_choose_from_a_supernet(supernet: Supernet) -> None:
    score = PathScore(supernet, loader(), loader(16, seed=1))
    before = {name: value.clone() for name, value in supernet.net.state_dict().items()}
    limit = between(0.5)
    constraint = Constraint(
        supernet.space, lambda many: mobile_table().estimate(many).latency_s[:, None], [limit], ["latency"]
    )
    for name in ("random", "evolution", "ddpg", "reinforce", "greedy", "exact", "optuna"):
        found = run_search(engines.create(name, supernet.space, constraint, 0), score, 4)
        assert found.policy is not None
        assert mobile_table().estimate(found.policy).latency_s[0] <= limit
        assert score(found.policy) == score(found.policy)
    assert all(torch.equal(value, before[name]) for name, value in supernet.net.state_dict().items())


def test_paths_are_judged_alike_on_threads_and_in_other_processes(supernet: Supernet) -> None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in supernet.net.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    score = PathScore(supernet, loader(), loader(128, seed=1), max_batches=12)
    rng = np.random.default_rng(0)
    policies = [supernet.space.sample(rng) for _ in range(12)]
    wanted = [score(policy) for policy in policies]
    assert len(set(wanted)) > 1
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(score, policies)) == wanted
    supernet.mix()
    active = [mixed.active for mixed in supernet.mixed.values()]
    arrived = ForkingPickler.loads(ForkingPickler.dumps(score))
    assert [mixed.active for mixed in supernet.mixed.values()] == active
    assert [arrived(policy) for policy in policies] == wanted
    assert arrived(policies[0].merged(Policy({("channels", "stem.0"): 4}))) == wanted[0]


def test_batches_for_statistics_are_read_once(supernet: Supernet) -> None:
    """A loader that shuffles by torch's generator would judge one path by other statistics every time."""

    class Shuffled:
        def __iter__(self) -> Any:
            data = [*loader(64)]
            return iter([data[place] for place in torch.randperm(8).tolist()[:2]])

    score = PathScore(supernet, Shuffled(), loader(64, seed=1))
    policy = supernet.space.default()
    assert len({score(policy) for _ in range(5)}) == 1
    with pytest.raises(DataError, match="val yields nothing"):
        PathScore(supernet, loader(), [])


def test_derived_networks_keep_the_memory_format(supernet: Supernet) -> None:
    supernet.net.to(memory_format=torch.channels_last)
    policy = supernet.space.decode([0] * len(supernet.space))
    for keep in (True, False):
        derived = supernet.derive(policy, keep_weights=keep)
        weights = [one for one in derived.parameters() if one.dim() == 4 and min(one.shape[1], one.shape[2]) > 1]
        assert weights
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)
        x = torch.randn(2, 2, 8, 8).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert derived.get_submodule("stem.0")(x).is_contiguous(memory_format=torch.channels_last)


def test_derived_networks_are_trained_by_the_supernet(supernet: Supernet) -> None:
    policy = supernet.space.decode([0] * len(supernet.space))
    for keep in (True, False):
        network = fine_tune(supernet, policy, loader(), epochs=1, keep_weights=keep)
        assert network(torch.randn(3, 2, 8, 8)).isfinite().all()
        assert not network.training
    as_it_is = fine_tune(supernet, policy, loader(), epochs=0)
    kept = supernet.derive(policy)
    assert all(torch.equal(a, b) for a, b in zip(as_it_is.parameters(), kept.parameters(), strict=True))


def test_statistics_of_other_paths_are_not_left_behind(supernet: Supernet) -> None:
    policy, batches = supernet.space.decode([0] * len(supernet.space)), list(loader())
    for buffer in supernet.net.buffers():
        if buffer.is_floating_point():
            buffer.add_(1e3)

    def statistics(network: torch.nn.Module) -> torch.Tensor:
        return torch.cat([one.flatten() for name, one in network.named_buffers() if "running" in name])

    # Three steps remember most of what they began with, sixty next to nothing.
    short = fine_tune(supernet, policy, batches, epochs=1)
    settled = copy.deepcopy(short)
    recalibrate_batch_norm(settled, batches)
    torch.testing.assert_close(statistics(short), statistics(settled))
    shuffled = DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True))), 8, shuffle=True)
    found = []
    for seed in (1, 2):
        # The state of torch's generator has no say.
        torch.manual_seed(seed)
        found.append(statistics(fine_tune(supernet, policy, shuffled, epochs=1)))
    assert torch.equal(*found)
    for module in supernet.net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    plain = fine_tune(supernet, policy, batches, epochs=1)
    settled = copy.deepcopy(plain)
    recalibrate_batch_norm(settled, batches)
    torch.testing.assert_close(statistics(plain), statistics(settled))
    for module in supernet.net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    long = fine_tune(supernet, policy, batches, epochs=20)
    assert {int(one) for name, one in long.named_buffers() if name.endswith("tracked")} == {3 + 60}
    assert float(statistics(long).abs().max()) < 1e2


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_what_a_limit_leaves_unused_is_given_back_where_the_limit_weighed_on_the_search(share: float) -> None:
    supernet, costs = Supernet(*mobile()), mobile_table()
    with torch.no_grad():
        # As after a search whose limit weighed too much: the cheapest candidate of every block is the likeliest.
        table, _ = costs.of("latency")
        supernet.alpha.sub_(torch.from_numpy(table / table.max() * 4.0).float())
    limit = between(share)
    cheapest = policy_within(supernet, costs, {"latency": limit})
    filled = policy_within(supernet, costs, {"latency": limit}, duals=[0.7])
    row = supernet.space.encode(filled)
    assert cheapest == supernet.most_likely()
    assert costs.estimate(cheapest).latency_s[0] < costs.estimate(filled).latency_s[0] <= limit * (1 + 1e-9)
    for block, size in enumerate(supernet.space.sizes):
        for candidate in range(size):
            dearer = row.copy()
            dearer[block] = candidate
            cost = costs.score(np.stack([row, dearer]))
            assert cost[1] <= cost[0] or cost[1] > limit, "another dearer candidate would have fitted"


def test_a_limit_is_used_up_where_sums_in_another_order_differ_by_their_rounding() -> None:
    supernet, costs = Supernet(*mobile()), mobile_table()
    table, _ = costs.of("latency")
    with torch.no_grad():
        supernet.alpha.sub_(torch.from_numpy(table / table.max() * 4.0).float())
    dearest = np.where(supernet.mask.numpy(), table, -np.inf).argmax(1)
    limit = float(costs.score(dearest[None], "latency")[0]) * (1.0 - 1e-13)
    filled = policy_within(supernet, costs, {"latency": limit}, duals=[0.7])
    assert np.array_equal(supernet.space.encode(filled), dearest)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": None}, {"epochs": -1}, {"seed": "a"}, {"seed": 1.5}, {"seed": 10**30}, {"learning_rate": "fast"}],
)
def test_numbers_of_a_training_are_checked_whether_it_trains_or_not(wrong: dict[str, Any]) -> None:
    supernet = Supernet(*mobile())
    with pytest.raises(FxoptError, match=f"^{next(iter(wrong))} has to be .*got "):
        fine_tune(supernet, supernet.space.default(), loader(), **({"epochs": 0} | wrong))


@pytest.mark.parametrize("wrong", [{"reference": True}, {"weight": True}, {"reference": 0.0}, {"weight": float("inf")}])
def test_numbers_of_a_cost_term_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="has to be above zero and finite, got "):
        CostTerm(**({"metric": "latency", "reference": 1.0} | wrong))


@pytest.mark.parametrize("wrong", [{"metric": "speed"}, {"metric": [1]}, {"form": "hard"}, {"form": np.zeros(2)}])
def test_names_of_a_cost_term_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError, match=r"^Unknown (metric|form of a cost term) .* Known: "):
        CostTerm(**({"metric": "latency", "reference": 1.0} | wrong))
    if "metric" in wrong:
        with pytest.raises(UnknownNameError, match=r"^Unknown metric"):
            mobile_table().of(wrong["metric"])


def test_scores_of_paths_depend_on_the_seed_alone() -> None:
    supernet = Supernet(*mobile())
    data = loader()
    shuffled = DataLoader(TensorDataset(data.inputs, data.labels), 4, shuffle=True)

    def scored(given: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(given)
        score = PathScore(supernet, shuffled, shuffled, 1, seed=3)
        return [labels for _, labels in score._train], torch.rand(1)

    (one, before), (other, after) = scored(0), scored(1)
    assert all(map(torch.equal, one, other))
    for given, drawn in ((0, before), (1, after)):
        torch.manual_seed(given)
        assert torch.equal(torch.rand(1), drawn)


def test_the_least_that_there_is_can_be_asked_for() -> None:
    table = mobile_table()
    least = ExpectedCost(table, "latency").least
    for limit in (least, least * (1 - 1e-15)):
        Cost(table, [CostTerm("latency", limit)])
    with pytest.raises(InfeasibleError):
        Cost(table, [CostTerm("latency", least * 0.999)])
