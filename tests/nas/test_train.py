"""Training goes on where it was stopped, stops on nonsense, and tells of a collapse."""

from __future__ import annotations

import copy
import dataclasses
import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from fxopt import _files, targets
from fxopt.data import Loader, TensorLoader
from fxopt.decisions import Policy
from fxopt.errors import BudgetError, DataError, FxoptError, PassError, UnknownNameError
from fxopt.lowering import lower_operators
from fxopt.nas import Cost, CostTerm, Supernet, SupernetResult, SupernetSettings, policy_within, split, train_supernet
from fxopt.nas._batches import Numbered
from fxopt.nas._parallel import Workers
from fxopt.nas._run import Run
from fxopt.progress import Silent
from fxopt.training import read_tensors, write_tensors
from tests.nas.toys import CLASSES, between, loader, mobile, mobile_table, table, toy

SETTINGS = SupernetSettings(warm_up=1, epochs=2, learning_rate=0.02)


def trained(supernet: Supernet | None = None, **options: Any) -> SupernetResult:
    found = supernet or Supernet(*mobile())
    terms = options.pop("terms", [CostTerm("latency", between(0.7), "budget", 0.5)])
    known: dict[str, Any] = {"settings": SETTINGS}
    data = options.pop("data", loader())
    val = options.pop("val", loader(16, seed=1))
    return train_supernet(found, data, val, options.pop("table", mobile_table()), terms, **(known | options))


def state(result: SupernetResult) -> dict[str, torch.Tensor]:
    return {**result.supernet.net.state_dict(), "alpha": result.supernet.alpha.detach()}


def test_any_seed_that_torch_takes_does() -> None:
    settings = dataclasses.replace(SETTINGS, warm_up=0, epochs=1)
    found = [state(trained(settings=dataclasses.replace(settings, seed=seed))) for seed in (2**62, 2**62, 2**62 + 1)]
    assert all(map(torch.equal, found[0].values(), found[1].values()))
    assert not torch.equal(found[0]["alpha"], found[2]["alpha"])


@pytest.mark.parametrize("method", ["binary", "reinforce"])
def test_resumed_equals_uninterrupted(tmp_path: Path, method: Any) -> None:
    settings = dataclasses.replace(SETTINGS, method=method)
    whole = trained(settings=settings)
    for stopped in (2, 7):  # in the warm-up, and in the middle of an epoch of both
        place = tmp_path / f"{method}-{stopped}"
        trained(settings=settings, checkpoint=place, checkpoint_steps=1, stop_after=stopped)
        resumed = trained(settings=settings, checkpoint=place, checkpoint_steps=1)
        assert resumed.resumed_at == stopped
        assert resumed.policy == whole.policy
        assert repr(resumed.history) == repr(whole.history)
        for name, value in state(whole).items():
            assert torch.equal(value, state(resumed)[name]), name
    done = trained(settings=settings, checkpoint=place)
    assert done.resumed_at == 9
    assert torch.equal(done.supernet.alpha, whole.supernet.alpha)


@pytest.mark.parametrize("method", ["binary", "binary-all", "relaxed", "reinforce", "uniform"])
def test_every_method_trains(method: Any) -> None:
    costs = mobile_table()  # The first call makes a model, which draws its weights.
    torch.manual_seed(0)
    outside = torch.get_rng_state()
    result = trained(settings=dataclasses.replace(SETTINGS, method=method), table=costs)
    assert torch.equal(outside, torch.get_rng_state())
    assert len(result.history) == 3
    assert all(0.0 <= epoch.entropy <= 1.0 + 1e-9 for epoch in result.history)
    moved = bool((result.supernet.alpha[result.supernet.mask] != 0.0).any())
    assert moved == (method != "uniform")
    assert any("no candidate is preferred" in note for note in result.notes) == (method == "uniform")
    assert result.supernet.derive(result.policy)(torch.randn(3, 2, 8, 8)).shape == (3, 3)


def test_a_pair_keeps_its_probability_mass() -> None:
    seen = []
    supernet = Supernet(*mobile())
    real = torch.optim.Adam.step

    def watched(self: Any, closure: Any = None) -> Any:
        seen.append(supernet.probabilities().detach().clone())
        return real(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", watched)
        trained(supernet)
    seen.append(supernet.probabilities().detach())
    for before, after in itertools.pairwise(seen):
        # Two entries of a block change, and their sum does not.
        assert ((before - after).abs() > 1e-7).sum(1).max() <= 2
        assert torch.allclose((before - after).sum(1), torch.zeros(len(before)), atol=1e-6)


def test_a_budget_draws_the_expected_latency_down() -> None:
    settings = SupernetSettings(warm_up=0, epochs=8, alpha_learning_rate=0.3, learning_rate=1e-3)
    result = trained(terms=[CostTerm("latency", between(0.3), "budget", 2.0)], settings=settings)
    assert result.history[-1].costs[0] < result.history[0].costs[0]
    assert max(epoch.duals[0] for epoch in result.history) > 0.0


def test_labels_may_be_probabilities_of_classes() -> None:
    def soft(given: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(x, torch.nn.functional.one_hot(label, CLASSES).float()) for x, label in given]

    settings = dataclasses.replace(SETTINGS, label_smoothing=0.1)
    hard, val = list(loader()), list(loader(16, seed=1))
    wanted = state(trained(data=hard, val=val, settings=settings))
    found = state(trained(data=soft(hard), val=soft(val), settings=settings))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_floats_that_are_no_probabilities_are_refused() -> None:
    for what in ("data", "val"):
        with pytest.raises(DataError, match=r"sum to 3 to 3 over the classes.* unless it is given a loss"):
            trained(**{what: [(x, torch.ones(len(x), CLASSES)) for x, _ in loader()]})


def test_a_collapse_to_skips_is_told() -> None:
    supernet = Supernet(*mobile())
    with torch.no_grad():
        for row, decision in enumerate(supernet.space):
            if "zero" in decision.choices:
                supernet.alpha[row, decision.choices.index("zero")] = 9.0
    result = trained(supernet)
    assert result.history[-1].skipped == 1.0
    assert "collapsed to skips" in result.notes[0]
    assert not trained().notes
    # Of a single block that can be left out it tells nothing that it is.
    graph, step = mobile()
    sites = [decision.site for decision in supernet.space if "zero" in decision.choices]
    one = Supernet(graph, dataclasses.replace(step, ignore=tuple(sites[1:])))
    policy = one.space.decode([len(decision.choices) - 1 for decision in one.space])
    assert one.skipped(policy) == 1.0
    assert not one.collapsed(policy)
    assert supernet.collapsed(supernet.most_likely())


def test_an_architecture_that_took_no_step_is_told() -> None:
    for options in ({"epochs": 0}, {"weight_steps": 7}, {"epochs": 0, "method": "relaxed"}):
        result = trained(settings=dataclasses.replace(SETTINGS, **options), terms=[])
        (note,) = result.notes
        assert note.startswith("The architecture took no step, so that no candidate is preferred: there are ")
        assert note.endswith(f"weight_steps is {options.get('weight_steps', 1)}. Raise epochs, or lower weight_steps.")
    assert not trained(settings=dataclasses.replace(SETTINGS, weight_steps=6), terms=[]).notes


def test_a_policy_over_a_limit_is_told() -> None:
    supernet, costs = Supernet(*mobile()), mobile_table()
    table = np.where(supernet.mask.numpy(), costs.of("latency")[0], -1.0)
    with torch.no_grad():
        for row, costliest in enumerate(table.argmax(1)):
            supernet.alpha[row, int(costliest)] = 9.0
    limit = between(0.3)
    result = trained(supernet, terms=[CostTerm("latency", limit, "budget", 1e-6)])
    (note,) = result.notes
    assert note.startswith("The most probable network has a latency of ")
    assert policy_within(supernet, costs, {"latency": limit}) != result.policy
    assert not trained(terms=[CostTerm("latency", 10.0 * between(1.0), "budget", 1e-6)]).notes


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "supernet"
    trained(checkpoint=place, stop_after=3)
    good = place.with_name("supernet.safetensors").read_bytes()
    bad = (torch.full((8, 2, 8, 8), torch.nan), torch.zeros(8, dtype=torch.long))
    with pytest.raises(FxoptError, match=r"loss of the weights is nan in epoch 2, batch 3 \(step 6\), on the path"):
        trained(data=[*[*loader()][:2], bad], checkpoint=place)
    assert place.with_name("supernet.safetensors").read_bytes() == good


def test_the_weight_of_a_cost_that_makes_gradients_infinite_is_named() -> None:
    with pytest.raises(
        FxoptError, match=r"gradient .* infinite .*the loss, the latency term's weight of 1e\+300; or lower"
    ):
        trained(terms=[CostTerm("latency", between(0.7), "additive", 1e300)])


def test_a_checkpoint_of_other_epochs_tells_whose(tmp_path: Path) -> None:
    trained(checkpoint=tmp_path / "s", stop_after=1)
    other = dataclasses.replace(SETTINGS, warm_up=2, epochs=4)
    with pytest.raises(FxoptError, match=r"its warm-up \(in optimize, its epochs\): 1, of this one: 2"):
        trained(checkpoint=tmp_path / "s", settings=other)
    with pytest.raises(FxoptError, match=r"its epochs of the search \(in optimize, of its epochs\): 2, of this one: 4"):
        trained(checkpoint=tmp_path / "s", settings=dataclasses.replace(other, warm_up=1))


def test_a_checkpoint_of_another_models_weights_is_refused(tmp_path: Path) -> None:
    """Of equal shapes; the same supernet goes on where it stopped."""
    place = tmp_path / "supernet"
    supernet = Supernet(*mobile())
    trained(supernet, checkpoint=place, stop_after=3)
    other = Supernet(*mobile())
    with torch.no_grad():
        next(other.net.parameters()).add_(1.0)
    with pytest.raises(FxoptError, match="its model and its weights"):
        trained(other, checkpoint=place)
    assert trained(supernet, checkpoint=place).resumed_at == 3
    assert trained(supernet, checkpoint=place).resumed_at == 9
    with torch.no_grad():
        next(supernet.net.parameters()).add_(1.0)
    with pytest.raises(FxoptError, match="its model and its weights"):
        trained(supernet, checkpoint=place)


def test_what_a_dataloader_does_besides_is_kept_or_refused() -> None:
    data = TensorDataset(torch.arange(60))

    def samples(given: DataLoader[Any]) -> list[set[int]]:
        numbered = [Numbered(part, "train", 0) for part in split(given, 0.2)]
        return [{one for step in range(2 * part.steps) for one in part.at(step)[0].tolist()} for part in numbered]

    class Pairs(TensorDataset):
        """Samples as inputs and labels."""

        def __getitem__(self, index: int) -> Any:
            return index, 0

    pairs = Pairs(torch.arange(60))
    assert set.union(*samples(DataLoader(pairs, 4, sampler=SequentialSampler(range(20))))) == set(range(20))
    own = RandomSampler(pairs, generator=torch.Generator().manual_seed(0))
    weights, architecture = samples(DataLoader(pairs, batch_sampler=BatchSampler(own, 4, False)))
    assert not weights & architecture
    assert {len(batch[0]) for part in split(DataLoader(pairs, 11, shuffle=True), 0.2) for batch in part} == {11, 4}
    assert {len(batch[0]) for part in split(DataLoader(pairs, 47, shuffle=True), 0.2) for batch in part} == {47, 12}
    kept = DataLoader(data, batch_sampler=BatchSampler(own, 4, False), num_workers=1, persistent_workers=True)
    with pytest.raises(DataError, match="persistent_workers=False"):
        split(kept)


@pytest.mark.parametrize("own", [True, False])
def test_a_shuffling_dataloader_is_split_by_samples_and_resumed(tmp_path: Path, own: bool) -> None:
    """With a generator of its own, too, which another process finds at its beginning."""
    data = loader(32)
    images = TensorDataset(data.inputs, torch.arange(32))

    def parts() -> tuple[Loader, Loader]:
        generator = torch.Generator().manual_seed(3) if own else None
        return split(DataLoader(images, 8, shuffle=True, generator=generator), 0.25)

    weights, architecture = parts()
    seen: list[set[int]] = [set(), set()]
    orders = []
    for which, part in enumerate((weights, architecture)):
        numbered = Numbered(part, "train", 0)
        for step in range(3 * numbered.steps):
            seen[which] |= set(numbered.at(step)[1].tolist())
        orders.append([Numbered(part, "train", 0).at(numbered.steps + 1)[1].tolist() for _ in range(2)])
    assert [len(one) for one in seen] == [24, 8]
    assert not seen[0] & seen[1]
    assert all(one == other for one, other in orders)

    labelled = TensorDataset(data.inputs, data.labels)

    def run(**options: Any) -> SupernetResult:
        generator = torch.Generator().manual_seed(3) if own else None
        return trained(data=DataLoader(labelled, 8, shuffle=True, generator=generator), **options)

    whole, place = run(), tmp_path / "supernet"
    run(checkpoint=place, checkpoint_steps=1, stop_after=6)
    resumed = run(checkpoint=place)
    for name, value in state(whole).items():
        assert torch.equal(value, state(resumed)[name]), name


def test_no_part_ends_with_a_batch_of_one_sample() -> None:
    """Batch norm could not take a variance of it."""
    data = loader(22)
    for whole in (dataclasses.replace(data, batch_size=8), DataLoader(TensorDataset(data.inputs, data.labels), 8)):
        weights, architecture = split(whole, 5 / 22)
        assert [len(label) for _, label in weights] == [8, 8]
        assert [len(label) for _, label in architecture] == [5]


def test_batches_of_a_loader_of_ones_own_are_parted_in_one_order() -> None:
    class Shuffled:
        """Batches in an order that torch's global generator decides."""

        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for number in torch.randperm(10).tolist():
                yield torch.full((2, 1), float(number)), torch.zeros(2, dtype=torch.long)

    seen = []
    for part in split(Shuffled(), 0.3):
        numbered = Numbered(part, "train", 0)
        seen.append({float(numbered.at(step)[0][0, 0]) for step in range(3 * numbered.steps)})
    assert [len(one) for one in seen] == [7, 3]
    assert not seen[0] & seen[1]


def test_a_loss_of_ones_own_trains_weights_and_architecture() -> None:
    """Cross entropy by another name gives what cross entropy gives, and labels need not be classes."""
    settings = dataclasses.replace(SETTINGS, label_smoothing=0.0)
    plain = trained(settings=settings)
    own = trained(settings=settings, loss=nn.functional.cross_entropy)
    for name, value in state(plain).items():
        assert torch.allclose(value, state(own)[name], atol=1e-6), name
    several = [(inputs, nn.functional.one_hot(labels, 3).float()) for inputs, labels in loader()]
    result = trained(data=several, val=several, loss=nn.functional.binary_cross_entropy_with_logits)
    assert result.history[-1].loss < result.history[0].loss
    with pytest.raises(DataError, match=r"tensor of shape \(8, 3\); it has to give a tensor of one element"):
        trained(loss=lambda output, label: output)
    with pytest.raises(DataError, match="loss gives a tensor without a gradient"):
        trained(loss=lambda output, label: nn.functional.cross_entropy(output.detach(), label))


@pytest.mark.parametrize("own", [True, False])
def test_a_process_without_a_sample_adds_nothing_to_a_loss(own: bool) -> None:
    """Means over processes, each with its weight, are the mean of the batch; so with probabilities for labels."""
    supernet, batch = Supernet(*mobile()), next(iter(loader()))
    loss = nn.functional.cross_entropy if own else None
    batch = batch if own else (batch[0], nn.functional.one_hot(batch[1], CLASSES).float())
    with Workers(supernet.net) as workers:
        costs = Cost(mobile_table(), [])
        run = Run(supernet, loader(), loader(), costs, SETTINGS, workers, loss)
        whole = run._loss(supernet.net.eval(), batch, "train", 0.0)
        workers.size, parts = 3, []
        for workers._rank in range(3):
            parts.append(run._loss(supernet.net, batch, "train", 0.0).item())
        assert sum(parts) / 3 == pytest.approx(whole.item())
        one = tuple(part[:1] for part in batch)
        idle = run._loss(supernet.net, one, "train", 0.0)
        torch.autograd.backward(idle)
        assert idle.item() == 0.0
        with pytest.raises(DataError, match="labels without a tensor"):
            workers.weight((batch[0], ["a"]), "train")
        workers.size = 1


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "supernet"
    trained(checkpoint=place, stop_after=3)
    with pytest.raises(FxoptError, match="its seed: 0, of this one: 1"):
        trained(checkpoint=place, settings=dataclasses.replace(SETTINGS, seed=1))
    with pytest.raises(FxoptError, match="terms"):
        trained(checkpoint=place, terms=[])
    with pytest.raises(FxoptError, match="its loss: None, of this one: cross_entropy"):
        trained(checkpoint=place, loss=nn.functional.cross_entropy)
    with pytest.raises(FxoptError, match="batches for weights: 3, of this one: 2"):
        trained(checkpoint=place, data=loader(16))
    other = lower_operators(*mobile()).table(targets.load("v100"))
    with pytest.raises(FxoptError, match="costs of candidates"):
        trained(checkpoint=place, table=other)
    before = state(SupernetResult(Supernet(*mobile()), Policy({})))
    wider = Supernet(*mobile())
    assert wider.origin() == Supernet(*mobile()).origin()
    wider.net.get_submodule("stem.0").weight = torch.nn.Parameter(torch.zeros(8, 2, 5, 5))
    with pytest.raises(FxoptError, match="its model and its weights"):
        trained(wider, checkpoint=place)
    _, tensors, told = read_tensors(place) or pytest.fail("there is no checkpoint")
    write_tensors(place, {**tensors, "net.stem.0.weight": torch.zeros(8, 2, 5, 5)}, told)
    with pytest.raises(FxoptError, match=r"stem\.0\.weight is of shape"):
        trained(checkpoint=place)
    kept = wider.net.state_dict()
    assert all(
        torch.equal(kept[name], value) for name, value in before.items() if "stem.0" not in name and name in kept
    )
    place.with_name("supernet.safetensors").write_bytes(b"nothing")
    with pytest.raises(FxoptError, match=r"no checkpoint of this model: .*[^.]\. Remove it"):
        trained(checkpoint=place)


def test_what_cannot_begin_is_told_at_once(tmp_path: Path) -> None:
    data = [*loader()]
    with pytest.raises(FxoptError, match="checkpoint_steps has to be a whole number of at least 1"):
        trained(checkpoint=tmp_path / "supernet", checkpoint_steps=0)
    with pytest.raises(FxoptError, match=r"table is of other decisions than the supernet, such as 'blocks.0'"):
        trained(table=table(toy()))
    with pytest.raises(FxoptError, match="stop_after has to be a whole number of at least 0, got -1"):
        trained(stop_after=-1)
    with pytest.raises(PassError, match=r"supernet is a GraphModule; give what fxopt\.nas\.Supernet"):
        trained(mobile()[0])  # type: ignore[arg-type]
    for terms in (CostTerm("latency", 1.0), [("latency", 1.0)]):
        with pytest.raises(BudgetError, match=r"terms is a list of fxopt\.nas\.CostTerm, got"):
            trained(terms=terms)
    with pytest.raises(FxoptError, match=r"checkpoint is the folder .*; give a file in it, such as"):
        trained(checkpoint=tmp_path)
    assert not tmp_path.with_name(f"{tmp_path.name}.safetensors").exists()
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(FxoptError, match=r"taken\.safetensors is a folder; give another path"):
        trained(checkpoint=tmp_path / "taken")
    with pytest.raises(FxoptError, match="checkpoint is a int; give a path"):
        trained(checkpoint=5)
    place = tmp_path / "file" / "supernet"
    place.parent.write_text("no folder")
    supernet = Supernet(*mobile())
    before = state(SupernetResult(supernet, Policy({})))
    with pytest.raises(FxoptError, match="Cannot write"):
        trained(supernet, data=data, checkpoint=place)
    assert all(torch.equal(value, state(SupernetResult(supernet, Policy({})))[name]) for name, value in before.items())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "supernet"
    trained(checkpoint=place, stop_after=3)
    good = place.with_suffix(".safetensors").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(_files, "_sync", full)
        with pytest.raises(FxoptError, match="No space left"):
            trained(checkpoint=place)
    assert place.with_suffix(".safetensors").read_bytes() == good
    assert [one.name for one in tmp_path.iterdir()] == ["supernet.safetensors"]
    assert torch.equal(trained(checkpoint=place).supernet.alpha, trained().supernet.alpha)


def test_a_gradient_that_is_nan_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a candidate that overflows while it is looked at, and not computed, the loss tells nothing."""
    supernet = Supernet(*mobile())
    real = type(supernet).open_gates

    def broken(self: Supernet, active: Any, others: Any) -> Any:
        gates = real(self, active, others)
        gates[1].register_hook(lambda gradient: gradient * torch.nan)
        return gates

    monkeypatch.setattr(Supernet, "open_gates", broken)
    with pytest.raises(FxoptError, match=r"gradient of the architecture is NaN.*epoch 2, batch 1 \(step 4\)"):
        trained(supernet)
    assert not supernet.alpha.isnan().any()


def test_batches_are_read_once_and_blamed_by_name() -> None:
    """A step of the architecture takes the next batch, without reading those before it again."""
    data = [*loader(64, seed=1)]
    seen = []

    class Watched:
        def __len__(self) -> int:
            return len(data)

        def __iter__(self) -> Any:
            for number, batch in enumerate(data):
                seen.append(number)
                yield batch

    trained(val=Watched())
    assert seen == [0, *range(6)]  # one look at the first batch; two epochs of three steps
    bad = (torch.zeros(8, 2, 8, 8), torch.full((8,), 99))
    with pytest.raises(DataError, match="val has the label 99"):
        trained(val=[data[0], bad])

    class Shrinking:
        def __init__(self) -> None:
            self.left = 3

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            self.left -= 1
            return iter(data[: self.left])

    with pytest.raises(DataError, match="train yields fewer batches than at first"):
        trained(data=Shrinking())


def test_a_batch_without_a_class_number_that_counts_is_refused() -> None:
    images = torch.zeros(2, 2, 8, 8)
    with pytest.raises(DataError, match="train, batch 0, has no label that counts"):
        Numbered([(images, torch.full((2,), -100))], "train", 0).at(0)
    for label in (torch.tensor([-100, 1]), torch.full((2,), -100.0)):
        assert Numbered([(images, label)], "train", 0).at(0)[1] is label


def test_progress_tells_steps_and_costs() -> None:
    told: list[tuple[Any, ...]] = []

    class Watched(Silent):
        def start(self, task: str, total: int) -> None:
            told.append((task, total))

        def advance(self, task: str, n: int = 1, note: str = "") -> None:
            told.append((n, note))

    result = trained(progress=Watched())
    assert told[0] == ("supernet", 9)
    assert sum(n for n, _ in told[1:]) == 9
    last = result.history[-1]
    assert told[-1][1].startswith(
        f"loss {last.loss:.4f}, entropy {last.entropy:.2f}, latency {last.costs[0] / between(0.7):.2f} of"
    )


def test_loaders_are_split_or_refused() -> None:
    whole = loader(20)
    weights, architecture = split(whole, 0.3, seed=1)
    assert (len(weights.inputs), len(architecture.inputs)) == (14, 6)
    both = torch.cat([weights.inputs, architecture.inputs]).flatten(1).sum(1).sort().values
    assert torch.equal(both, whole.inputs.flatten(1).sum(1).sort().values)
    batches = [*loader(20, batch=4)]
    weights, architecture = split(batches, 0.4)
    assert (len(weights), len(architecture)) == (3, 2)
    assert {id(one) for one in (*weights, *architecture)} == {id(one) for one in batches}
    for few in (loader(3), batches[:2]):
        with pytest.raises(DataError, match="cannot be split"):
            split(few, 0.2)
    for share, words in (
        (torch.nan, r"share lies in \[0, 1\), got nan"),
        ("20%", "got '20%'"),
        (0.0, "Give more data, or split.. another share"),
    ):
        with pytest.raises(DataError, match=words):
            split(whole, share)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="seed has to be a whole number"):
        split(whole, seed="a")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="train is a generator, which can be read only once"):
        split(one for one in whole)
    with pytest.raises(DataError, match=r"1 batch cannot be split .* Give more data or smaller batches\.$"):
        split(batches[:1])
    with pytest.raises(DataError, match="val"):
        train_supernet(Supernet(*mobile()), loader(), [], mobile_table())
    with pytest.raises(FxoptError, match=r"settings is a dict; give a fxopt\.nas\.SupernetSettings"):
        train_supernet(Supernet(*mobile()), loader(), loader(), mobile_table(), settings={"epochs": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        *({"epochs": 0, "warm_up": 0}, {"epochs": 1.5}, {"epochs": "3"}, {"weight_steps": 0}, {"seed": -1}),
        *({"seed": 1.5}, {"learning_rate": 0.0}, {"learning_rate": "0.1"}, {"alpha_learning_rate": torch.nan}),
        *({"label_smoothing": 1.0}, {"momentum": -1}, {"momentum": 2}, {"weight_decay": -1}),
    ],
)
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(FxoptError, match=next(reversed(options))):
        SupernetSettings(**options)
    for method in ("binry", None):
        with pytest.raises(UnknownNameError, match="binary"):
            SupernetSettings(method=method)


def test_the_architecture_moves_as_far_in_a_short_search_as_in_a_long_one() -> None:
    def rate(**options: Any) -> float:
        net = toy()
        costs, settings = Cost(table(net), []), SupernetSettings(**options)
        run = Run(net, loader(), loader(16, seed=1), costs, settings, Workers(net.net))
        return float(run.alpha_optimizer.param_groups[0]["lr"])

    candidates = float(toy().space.sizes.mean())
    steps = rate(epochs=1000, warm_up=0) * 1000
    assert rate(epochs=2000, warm_up=0) * 2000 == pytest.approx(steps)
    assert rate(epochs=1000, warm_up=0, weight_steps=5) * 1000 == pytest.approx(5 * steps)
    # Two of the candidates move in a step of two gates, all of them in one of the relaxation.
    assert rate(epochs=1000, warm_up=0, method="relaxed") * candidates == pytest.approx(
        2 * rate(epochs=1000, warm_up=0)
    )
    assert rate(epochs=1) == 0.1
    assert rate(epochs=1, alpha_learning_rate=0.3) == 0.3


def test_a_result_tells_how_much_costs_weighed_at_most() -> None:
    result = trained()
    assert result.duals == [max(epoch.duals[0] for epoch in result.history)]
    assert trained(terms=[]).duals == []
    # A variable may be back at zero when its limit has been met; the network was held back all the same.
    first, second = (dataclasses.replace(result.history[0], duals=duals) for duals in ([0.5, 0.0], [0.0, 0.2]))
    assert dataclasses.replace(result, history=[first, second]).duals == [0.5, 0.2]


@dataclass(frozen=True)
class Sevens(TensorLoader):
    """Gives other inputs than it holds, as augmentation does."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((torch.full_like(inputs, 7.0), labels) for inputs, labels in super().__iter__())


def test_parts_of_a_loader_of_ones_own_give_what_it_gives() -> None:
    for part in split(Sevens(torch.randn(20, 3), torch.arange(20) % 4, 4)):
        assert all((inputs == 7.0).all() for inputs, _ in part)


@pytest.mark.parametrize("method", ["binary", "relaxed"])
def test_a_training_that_fails_leaves_a_path_behind(method: Any) -> None:
    def failing(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 5:
            raise ValueError("a typo")
        return functional.cross_entropy(outputs, labels)

    calls: list[int] = []
    supernet = Supernet(*mobile())
    with pytest.raises(FxoptError, match="a typo"):
        trained(supernet, loss=failing, settings=SupernetSettings(method=method, warm_up=0, epochs=2))
    copy.deepcopy(supernet.net)
    assert not supernet.net.training
    assert all(mixed.mixture is None for mixed in supernet.mixed.values())


@pytest.mark.parametrize("weight_steps", [1, 2])
def test_limits_have_come_down_at_the_end_however_many_steps_the_weights_take(
    weight_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[float] = []
    monkeypatch.setattr(Cost, "tighten", lambda _, part: parts.append(part))
    trained(settings=dataclasses.replace(SETTINGS, warm_up=0, weight_steps=weight_steps))
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1.0, abs=0.3)
