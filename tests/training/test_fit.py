from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxopt.data import TensorLoader
from fxopt.errors import DataError, FxoptError, UnknownNameError
from fxopt.training import fit, rehearse


def make_model(seed: int = 0, dropout: float = 0.2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def make_data(count: int = 48, seed: int = 0, **options: Any) -> TensorLoader:
    """Three classes that a straight line tells apart."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator)
    labels = inputs[:, :3].argmax(1)
    return TensorLoader(inputs, labels, **({"batch_size": 16, "shuffle": True} | options))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("sgd", 0.1), ("adamw", 0.02)])
def test_training_learns(optimizer: Any, learning_rate: float) -> None:
    model, data = make_model(dropout=0.0), make_data(96)
    history = fit(model, data, epochs=12, learning_rate=learning_rate, optimizer=optimizer)
    assert len(history.loss) == 12
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert not model.training
    assert (model(data.inputs).argmax(1) == data.labels).float().mean() > 0.9


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone() -> None:
    first, second, other = make_model(), make_model(), make_model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    fit(first, make_data(), epochs=2, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    fit(second, make_data(), epochs=2, seed=5)
    fit(other, make_data(), epochs=2, seed=6)
    assert_same(state_of(first), state_of(second))
    assert not torch.equal(first[0].weight, other[0].weight)


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    history = fit(make_model(), make_data(), epochs=8, learning_rate=0.1)
    assert max(history.learning_rate) <= 0.1
    assert history.learning_rate == sorted(history.learning_rate, reverse=True)
    assert history.learning_rate[-1] < 0.001


def test_schedules_go_as_told() -> None:
    """48 samples in batches of 16, 8 epochs: 24 steps; the rate at the end of an epoch is that of step 2, 5, 8, ..."""
    rates = {
        name: fit(make_model(), make_data(), epochs=8, learning_rate=1.0, schedule=name).learning_rate  # type: ignore[arg-type]
        for name in ("constant", "step", "one-cycle")
    }
    assert rates["constant"] == pytest.approx([1.0] * 8)
    assert rates["step"] == pytest.approx([1.0] * 3 + [1.0] + [0.1] * 2 + [0.01] * 2)
    rising, falling = rates["one-cycle"][:2], rates["one-cycle"][2:]
    assert rising == pytest.approx(
        [0.04 + 0.96 * 0.5 * (1.0 - math.cos(math.pi * step / 24 / 0.3)) for step in (2, 5)], abs=1e-9
    )
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.01


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="schedule 'cosinus'"):
        fit(make_model(), make_data(), epochs=1, schedule="cosinus")  # type: ignore[arg-type]


def test_no_epochs_change_nothing() -> None:
    model = make_model()
    before = state_of(model)
    assert fit(model, make_data(), epochs=0).loss == []
    assert_same(before, state_of(model))


def test_progress_is_told_after_every_epoch() -> None:
    told: list[tuple[int, int]] = []
    fit(make_model(), make_data(), epochs=3, progress=lambda epoch, epochs, loss: told.append((epoch, epochs)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_frozen_parameter_stays() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, make_data(), epochs=1)
    assert torch.equal(model[0].weight, before)


class StopError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: Any, stop: int) -> None:
    def run(model: nn.Module, checkpoint: Path | None, stop: int = 99) -> Any:
        def interrupt(epoch: int, epochs: int, loss: float) -> None:
            if epoch == stop:
                raise StopError

        return fit(model, make_data(), epochs=4, optimizer=optimizer, checkpoint=checkpoint, seed=3, progress=interrupt)

    whole = make_model()
    expected = run(whole, None)
    with pytest.raises(StopError):
        run(make_model(), tmp_path / "run", stop)
    resumed = make_model(seed=1)
    history = run(resumed, tmp_path / "run")
    assert history.resumed_at == stop
    assert history.loss == expected.loss
    assert history.learning_rate == expected.learning_rate
    assert_same(state_of(resumed), state_of(whole))
    again = make_model(seed=2)
    assert run(again, tmp_path / "run").resumed_at == 4
    assert_same(state_of(again), state_of(whole))


@pytest.mark.parametrize("own", [True, False])
def test_resumed_equals_uninterrupted_with_a_data_loader(tmp_path: Path, own: bool) -> None:
    """With a generator of its own, too: another process finds it at its beginning."""
    data = make_data()
    generator = torch.Generator().manual_seed(0) if own else None
    batches: Any = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data.inputs, data.labels), batch_size=16, shuffle=True, generator=generator
    )
    whole = make_model()
    fit(whole, batches, epochs=3, seed=np.int64(0))

    def interrupt(epoch: int, epochs: int, loss: float) -> None:
        raise StopError

    with pytest.raises(StopError):
        fit(make_model(), batches, epochs=3, checkpoint=tmp_path / "run", progress=interrupt)
    torch.rand(7)
    if generator is not None:
        generator.manual_seed(0)
    resumed = make_model()
    fit(resumed, batches, epochs=3, checkpoint=tmp_path / "run")
    assert_same(state_of(resumed), state_of(whole))


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "run")
    with pytest.raises(FxoptError, match=r"with epochs = 1, this one has 2"):
        fit(make_model(), make_data(), epochs=2, checkpoint=tmp_path / "run")
    with pytest.raises(FxoptError, match=r"learning_rate = 0\.02, this one has 0\.5"):
        fit(make_model(), make_data(), epochs=1, learning_rate=0.5, checkpoint=tmp_path / "run")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "run")
    with pytest.raises(FxoptError, match="no checkpoint of this model"):
        fit(nn.Sequential(nn.Linear(4, 3)), make_data(), epochs=1, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncate", "text", "metadata"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "run")
    path = tmp_path / "run.safetensors"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "text":
        path.write_text("what is this")
    else:
        save_file(load_file(path), path, metadata={"history": json.dumps({})})
    with pytest.raises(FxoptError, match=r"no checkpoint of this model.* Remove it"):
        fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "run")


def test_a_checkpoint_in_which_any_bit_has_changed_is_refused(tmp_path: Path) -> None:
    fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "run")
    file = tmp_path / "run.safetensors"
    written = file.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.choice(len(written), 100, replace=False):
        damaged = bytearray(written)
        damaged[place] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        model = make_model()
        with pytest.raises(FxoptError, match=r"Remove it to start afresh"):
            fit(model, make_data(), epochs=1, checkpoint=tmp_path / "run")
        assert all(map(torch.equal, model.state_dict().values(), make_model().state_dict().values()))


def test_a_checkpoint_of_a_former_version_says_so(tmp_path: Path) -> None:
    fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "run")
    file = tmp_path / "run.safetensors"
    save_file(load_file(file), file, {"history": "{}", "settings": "{}"})
    with pytest.raises(FxoptError, match=r"no digest, as those of fxopt 0\.1\.0 and before\. Remove it"):
        fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "run")


def test_an_unwritable_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FxoptError, match="Cannot write"):
        fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "file" / "run")


def test_a_dot_in_the_checkpoint_name_is_kept(tmp_path: Path) -> None:
    fit(make_model(), make_data(), epochs=1, checkpoint=tmp_path / "run.v2")
    assert (tmp_path / "run.v2.safetensors").exists()


def exploding_after(good_calls: int) -> Any:
    calls = 0

    def loss(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(output, label) * (math.nan if calls > good_calls else 1.0)

    return loss


def test_a_loss_that_is_not_finite_stops_at_the_last_good_epoch(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(FxoptError, match=r"The loss is nan in epoch 2 of 3, batch 2;.*learning_rate"):
        fit(model, make_data(), epochs=3, loss=exploding_after(4), checkpoint=tmp_path / "run")
    assert not model.training
    saved = load_file(tmp_path / "run.safetensors")
    kept = {name.removeprefix("model."): tensor for name, tensor in saved.items() if name.startswith("model.")}
    assert_same(kept, state_of(model))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


def test_a_last_step_that_breaks_a_parameter_is_noticed() -> None:
    model = make_model(dropout=0.0)
    before = state_of(model)

    def infinite_gradient(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        # The root is 0, its derivative infinite.
        return (output - output.detach()).pow(2).sum().sqrt()

    with pytest.raises(FxoptError, match=r"A parameter or buffer is NaN or infinite in epoch 1 of 1, batch 1"):
        fit(model, make_data(16), epochs=1, loss=infinite_gradient)
    assert_same(before, state_of(model))


def test_distillation_follows_the_teacher() -> None:
    teacher, data = make_model(seed=4, dropout=0.5), make_data(96)
    fit(teacher, data, epochs=8, learning_rate=0.1)
    teacher.train()
    teacher_state = state_of(teacher)

    def gap(**options: Any) -> float:
        student = make_model(seed=5, dropout=0.0)
        fit(student, data, epochs=10, learning_rate=0.1, seed=1, **options)
        with torch.no_grad():
            mine, wanted = (one(data.inputs).softmax(1) for one in (student, teacher.eval()))
        teacher.train()
        return float((mine - wanted).abs().mean())

    assert gap(teacher=teacher) < gap()
    assert teacher.training
    assert_same(teacher_state, state_of(teacher))


def test_a_loss_of_ones_own_is_used() -> None:
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(4, 4)
    history = fit(model, TensorLoader(inputs, 2 * inputs), epochs=30, loss=nn.functional.mse_loss, learning_rate=0.1)
    assert history.loss[-1] < 0.05 * history.loss[0]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epochs": -1}, FxoptError, "epochs has to be a whole number of at least 0"),
        ({"learning_rate": 0.0}, FxoptError, "learning_rate has to be above zero"),
        ({"learning_rate": math.nan}, FxoptError, "learning_rate has to be above zero"),
        ({"optimizer": "sdg"}, UnknownNameError, "Did you mean 'sgd'"),
        ({"loss": lambda output, label: 0.5}, DataError, "loss gives a float"),
        ({"loss": lambda output, label: output}, DataError, r"loss gives a tensor of shape \(16, 3\)"),
        ({"train": []}, DataError, "train yields nothing"),
        ({"train": iter([(torch.ones(2, 4), torch.zeros(2))])}, DataError, "only once"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fit(make_model(), **({"train": make_data(), "epochs": 1} | options))


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(DataError, match="no parameter to train"):
        fit(nn.Identity(), make_data(), epochs=1)


def test_a_single_sample_in_a_batch_says_what_to_do() -> None:
    with pytest.raises(DataError, match="drop_last=True"):
        fit(make_model(), make_data(17), epochs=1)


def test_outputs_without_class_scores_need_a_loss() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(x), x

    with pytest.raises(DataError, match=r"give loss=callable"):
        fit(Two(), make_data(), epochs=1)


@pytest.mark.parametrize(
    ("batch", "options", "words"),
    [
        ((torch.zeros(4, 5), torch.zeros(4).long()), {}, r"given a tensor of shape \(4, 5\) and type float32 by train"),
        (
            (torch.zeros(4, 4), torch.full((4,), 3)),
            {},
            "train has the label 3, where the model knows the classes 0 to 2",
        ),
        ((torch.zeros(4, 4), torch.zeros(4)), {}, "class numbers are whole; for another task give loss="),
        ((torch.zeros(4, 4), torch.zeros(4).long()), {"loss": lambda *_: 1 / 0}, "loss raised ZeroDivisionError"),
        ((torch.zeros(4, 4), torch.zeros(4).long()), {"loss": "mse"}, "'str' object is not callable"),
        ((torch.zeros(4, 4), torch.zeros(4).long()), {"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_a_rehearsal_notices_what_training_would(batch: Any, options: dict[str, Any], words: str) -> None:
    model = make_model()
    before = state_of(model)
    for run in (rehearse, fit):
        with pytest.raises(FxoptError, match=words):
            run(model, [batch], epochs=1, **options)
        assert_same(state_of(model), before)
    rehearse(model, [batch], epochs=0)


def test_a_rehearsal_changes_nothing() -> None:
    model = make_model().train()
    before, state = state_of(model), torch.get_rng_state()
    rehearse(model, make_data(), epochs=3, teacher=make_model(1))
    assert_same(state_of(model), before)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()])
def test_an_epoch_that_breaks_off_leaves_no_trace(error: BaseException) -> None:
    class Breaking:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            yield next(iter(make_data()))
            raise error

    model = make_model()
    before = state_of(model)
    with pytest.raises((DataError, KeyboardInterrupt)):
        fit(model, Breaking(), epochs=1)
    assert_same(state_of(model), before)


def test_a_loss_without_a_gradient_is_refused() -> None:
    with pytest.raises(DataError, match="loss gives a tensor without a gradient; compute it from the model's output"):
        fit(make_model(), make_data(), epochs=1, loss=lambda output, label: output.detach().sum())


def test_a_loader_whose_length_is_0_is_refused() -> None:
    class Empty(list[Any]):
        def __len__(self) -> int:
            return 0

    with pytest.raises(DataError, match="train has no batches, by its length"):
        fit(make_model(), Empty(make_data()), epochs=1)


def test_several_labels_a_sample_are_no_probabilities() -> None:
    data = make_data(16)
    with pytest.raises(DataError, match="probabilities of classes, but they sum to 3 to 3"):
        fit(make_model(), [(data.inputs, torch.ones(16, 3))], epochs=1)


def test_whole_numbers_of_any_type_and_probabilities_are_labels() -> None:
    data = make_data(16)
    losses = []
    for labels in (data.labels, data.labels.int(), data.labels.byte(), nn.functional.one_hot(data.labels, 3).float()):
        losses += fit(make_model(), [(data.inputs, labels)], epochs=1).loss
    assert losses == pytest.approx([losses[0]] * 4)
