"""Learning from a teacher: class scores, feature maps and attention maps."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt.data import TensorLoader
from fxopt.decisions import Policy
from fxopt.errors import DataError, FxoptError, UnknownNameError
from fxopt.graph import edit
from fxopt.graph.taps import Taps
from fxopt.passes import PruneChannels
from fxopt.training import Distillation, fit, rehearse
from fxopt.training._distilling import Distiller
from fxopt.training._losses import attention_distance, attention_map, feature_distance, score_distance
from fxopt.training._places import shared_places

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.outer = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(self.inner(x))


class Net(nn.Module):
    """Two residual blocks, at 8 x 8 and at 4 x 4 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = Block(8)
        self.down = nn.MaxPool2d(2)
        self.second = Block(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.down(self.first(self.stem(x))))
        return self.head(self.drop(x.mean((2, 3))))


@functools.cache
def traced(seed: int) -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fxopt.trace(Net().eval(), IMAGES[:2])


def make_graph(seed: int = 0) -> fx.GraphModule:
    return edit.own_copy(traced(seed))


def pruned(gm: fx.GraphModule, **kept: int) -> fx.GraphModule:
    policy = Policy({("channels", site.replace("__", ".")): count for site, count in kept.items()})
    return edit.own_copy(PruneChannels(policy)(gm).graph_module)


def names(places: Any) -> list[str]:
    return [place.name for place in places]


# The distances.


def test_the_attention_map_of_a_hand_made_value() -> None:
    """Channels (1, 2), (3, 0), (0, 2), (2, 2) at four positions: squares sum to 5, 9, 4, 8, of norm sqrt(186)."""
    value = torch.tensor([[[[1.0, 3.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 2.0]]]])
    assert attention_map(value, 1).tolist() == [pytest.approx([one / math.sqrt(186.0) for one in (5, 9, 4, 8)])]
    assert torch.equal(attention_map(value, 1), attention_map(value.permute(0, 2, 3, 1), 3))


def test_the_distance_of_hand_made_attention_maps() -> None:
    """Maps (1, 0) and (0.6, 0.8): 0.4^2 + 0.8^2 = 0.8; and maps that are equal up to a factor: 0. The mean is 0.4."""
    mine = torch.tensor([[[1.0, 0.0]], [[1.0, 2.0]]])
    wanted = torch.tensor([[[math.sqrt(3.0), 2.0]], [[3.0, 6.0]]])
    assert float(attention_distance(mine, wanted, 1)) == pytest.approx(0.4)


def test_the_distance_of_hand_made_feature_maps() -> None:
    """Differences (1, -1) of squares 2, over 9 + 16."""
    assert float(feature_distance(torch.tensor([[4.0, 3.0]]), torch.tensor([[3.0, 4.0]]))) == pytest.approx(2 / 25)


@pytest.mark.parametrize("value", [torch.zeros(2, 3, 4), torch.ones(2, 3, 4)])
def test_distances_of_nothing_are_finite(value: torch.Tensor) -> None:
    mine = torch.zeros(2, 3, 4, requires_grad=True)
    (attention_distance(mine, value, 1) + feature_distance(mine, value)).backward()
    assert mine.grad is not None
    assert bool(torch.isfinite(mine.grad).all())


# The whole loss.


@pytest.mark.parametrize(
    "how",
    [
        Distillation(logits=0.3, temperature=3.0, features=0.7, attention=0.2),
        Distillation(logits=0.0, attention=2.0),
        Distillation(logits=1.0, features=1.0),
    ],
)
def test_the_loss_is_the_weighted_sum(how: Distillation) -> None:
    teacher, student = make_graph(1), make_graph(2)
    distiller = Distiller(student, teacher, how)
    own = torch.tensor(1.5)
    found = float(distiller.loss(own, distiller.student(IMAGES), IMAGES).detach())
    with torch.no_grad():
        mine, other = (
            Taps(gm, [place.student for place in shared_places(student, teacher, None)]) for gm in (student, teacher)
        )
        scores, wanted = mine.graph(IMAGES) / how.temperature, other.graph(IMAGES) / how.temperature
    soft = (wanted.softmax(1) * (wanted.log_softmax(1) - scores.log_softmax(1))).sum(1).mean() * how.temperature**2
    pairs = [(value, other.values[name]) for name, value in mine.values.items()]
    features = sum(float((s - t).square().sum() / t.square().sum()) for s, t in pairs) / len(pairs)
    maps = [[v.square().sum(1).flatten(1) for v in pair] for pair in pairs]
    apart = [
        (s / s.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)).square().sum(1).mean() for s, t in maps
    ]
    attention = float(sum(apart)) / len(apart)
    expected = (1 - how.logits) * 1.5 + how.logits * float(soft) + how.features * features + how.attention * attention
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_student_that_equals_its_teacher_loses_nothing() -> None:
    teacher = make_graph()
    distiller = Distiller(make_graph(), teacher, Distillation(logits=1.0, features=1.0, attention=1.0))
    with torch.no_grad():
        whole = distiller.loss(torch.tensor(5.0), distiller.student(IMAGES), IMAGES)
    assert float(whole) == pytest.approx(0.0, abs=1e-6)


def test_gradients_reach_the_student_alone() -> None:
    teacher, student = make_graph(1).train(), make_graph(2)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    how = Distillation(logits=0.0, features=1.0, attention=1.0)
    fit(student, TensorLoader(IMAGES, LABELS, 8), epochs=1, teacher=teacher, distillation=how)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert teacher.training
    for name in ("stem", "first.outer", "second.inner.0"):
        grad = student.get_submodule(name).weight.grad
        assert isinstance(grad, torch.Tensor)
        assert float(grad.abs().sum()) > 0.0, name


def test_a_graph_with_taps_is_the_graph() -> None:
    """Same outputs, same random numbers, same buffers, in whichever mode; and nothing of it is in the graph."""
    plain, watched = make_graph(), make_graph()
    nodes, state = [node.name for node in watched.graph.nodes], list(watched.state_dict())
    taps = Taps(watched, ["add", "add_1"])
    for mode in (True, False):
        plain.train(mode)
        watched.train(mode)
        torch.manual_seed(3)
        expected = plain(IMAGES)
        torch.manual_seed(3)
        assert torch.equal(taps.graph(IMAGES), expected)
    assert all(torch.equal(tensor, watched.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert ([node.name for node in watched.graph.nodes], list(watched.state_dict())) == (nodes, state)
    assert taps.values["add"].shape == (24, 8, 8, 8)


# Where graphs are compared.


def test_blocks_are_residual_sums_and_the_last_value_of_each_size() -> None:
    assert names(shared_places(make_graph(), make_graph(1), None)) == ["add", "add_1"]
    plain = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)),
    )
    gm = fxopt.trace(plain.eval(), IMAGES[:2])
    found = shared_places(gm, gm, None)
    nodes = {node.name: node.target for node in gm.graph.nodes}
    assert [nodes[place.student] for place in found] == ["3", "4", "6"]


def test_channels_that_were_cut_leave_attention_and_take_features() -> None:
    """The residual stream keeps its width; inside the first block half of the channels are gone."""
    teacher = make_graph()
    student = pruned(teacher, first__inner__0=8)
    places = shared_places(student, teacher, ("first.inner", "first.outer", "second.inner"))
    assert {place.name: place.equal for place in places} == {
        "first.inner": False,
        "first.outer": True,
        "second.inner": True,
    }
    narrow = pruned(teacher, stem=4)
    assert [place.equal for place in shared_places(narrow, teacher, None)] == [False, False]
    history = fit(
        narrow,
        TensorLoader(IMAGES, LABELS, 8),
        epochs=1,
        teacher=teacher,
        distillation=Distillation(features=1.0, attention=1.0),
    )
    assert (history.features, history.attention) == ([], ["add", "add_1"])


def test_a_transformers_stream_is_compared_token_by_token() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    gm = fxopt.trace(nn.Sequential(nn.Linear(5, 8), layer, layer).eval(), torch.randn(2, 6, 5))
    student = pruned(gm, **{"1__linear1": 8})
    found = shared_places(student, gm, None)
    assert len(found) == 4
    assert all(place.channels == 2 and place.equal for place in found)


def test_places_are_named_by_patterns() -> None:
    gm = make_graph()
    assert names(shared_places(gm, gm, ("second",))) == ["second"]
    assert [place.student for place in shared_places(gm, gm, ("second",))] == ["add_1"]
    assert names(shared_places(gm, gm, ("*.outer", "stem"))) == ["stem", "first.outer", "second.outer"]
    with pytest.raises(UnknownNameError, match=r"'frist'.*Did you mean 'first'"):
        shared_places(gm, gm, ("frist",))


@pytest.mark.parametrize("which", ["model", "teacher"])
def test_maps_are_compared_in_graphs(which: str) -> None:
    models: dict[str, nn.Module] = {"model": make_graph(), "teacher": make_graph()}
    models[which] = Net()
    for run in (fit, rehearse):
        with pytest.raises(DataError, match=rf"The {which} is a Net; .*fxopt.trace"):
            run(
                models["model"],
                [(IMAGES, LABELS)],
                epochs=1,
                teacher=models["teacher"],
                distillation=Distillation(attention=1.0),
            )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logits": 1.5}, r"lies in \[0, 1\]; got 1.5"),
        ({"logits": math.nan}, r"lies in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature has to be above zero"),
        ({"features": -1.0}, "features has to be finite and not below zero"),
        ({"attention": math.inf}, "attention has to be finite"),
        ({"sites": ()}, "sites takes patterns"),
        ({"sites": (3,)}, "sites takes patterns"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FxoptError, match=words):
        Distillation(**options)


def test_class_scores_of_other_classes_are_refused() -> None:
    """``rehearse`` sees it, before anything is searched or trained."""
    teacher = make_graph()
    student = fxopt.trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 7)).eval(), IMAGES[:2])
    for run in (fit, rehearse):
        with pytest.raises(DataError, match=r"of shape \(24, 7\) and its teacher of \(24, 4\)"):
            run(student, [(IMAGES, LABELS)], epochs=1, teacher=teacher)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": "resnet"}, r"teacher is a str; give a torch\.nn\.Module"),
        ({"distillation": 0.5}, r"distillation is a float; give a fxopt\.training\.Distillation"),
        ({"early_stop": 2, "evaluate": len}, r"early_stop is a int; give a fxopt\.training\.EarlyStop"),
        ({"epochs": 1.5}, "epochs has to be a whole number of at least 0, got 1.5"),
        ({"learning_rate": "fast"}, "learning_rate has to be above zero and finite, got 'fast'"),
        ({"model": "resnet"}, "model is a str"),
    ],
)
def test_options_of_another_type_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FxoptError, match=words):
        fit(**({"model": make_graph(), "train": [(IMAGES, LABELS)], "epochs": 1} | options))


# In training.


@pytest.mark.parametrize(("kind", "weight"), [("features", 1.0), ("attention", 20.0)])
def test_a_student_comes_near_to_its_teacher(kind: str, weight: float) -> None:
    teacher = make_graph(1)
    how = Distillation(logits=0.0, **{kind: weight})  # type: ignore[arg-type]

    def apart(student: fx.GraphModule) -> float:
        distiller = Distiller(student, teacher, Distillation(logits=0.0, **{kind: 1.0}))  # type: ignore[arg-type]
        with torch.no_grad():
            return float(distiller.loss(torch.zeros(()), distiller.student(IMAGES), IMAGES))

    student = make_graph(2)
    first = apart(student)
    fit(student, TensorLoader(IMAGES, LABELS, 8), epochs=6, teacher=teacher, distillation=how, learning_rate=0.01)
    assert apart(student) < 0.6 * first


def test_a_teacher_that_is_asked_for_nothing_is_not_called() -> None:
    plain, taught = make_graph(), make_graph()
    data = TensorLoader(IMAGES, LABELS, 8)
    expected = fit(plain, data, epochs=2)
    found = fit(taught, data, epochs=2, teacher=nn.Linear(1, 1), distillation=Distillation(logits=0.0))
    assert found == expected


def test_a_loss_of_ones_own_goes_with_maps_of_a_teacher() -> None:
    history = fit(
        make_graph(),
        TensorLoader(IMAGES, torch.randn(24, 4, generator=torch.Generator().manual_seed(2)), 8),
        epochs=1,
        loss=nn.functional.mse_loss,
        teacher=make_graph(1),
        distillation=Distillation(logits=0.0, attention=1.0),
    )
    assert history.attention == ["add", "add_1"]


def test_without_class_scores_it_is_told_how_to_train_without_a_teacher() -> None:
    """By ``fit``, and by ``nas.fine_tune``, which brings a teacher of its own."""
    with pytest.raises(DataError, match=r"leave the teacher out \(distil=False\), or give Distillation\(logits=0\)"):
        score_distance({"mask": IMAGES}, {"mask": IMAGES}, 1.0)
