"""Every mutator of graphs: what it changes, what it refuses, and that the user's own modules are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.errors import VerifyError
from fxopt.graph import edit, trace, verify
from tests.graph.checks import Calls, assert_same, rows

_aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.register_buffer("shift", torch.ones(4))
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.block(self.linear(x) * self.scale) + self.shift + y


@pytest.fixture
def model() -> Net:
    return Net().eval()


@pytest.fixture
def gm(model: Net) -> fx.GraphModule:
    return trace(model, (rows(2), rows(2)))


def find(gm: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.target == target or node.name == target)


def finished(gm: fx.GraphModule) -> Tensor:
    edit.finish(gm)
    verify(gm)
    return gm(X, X)


X = torch.linspace(-1.0, 1.0, 12).view(3, 4)


def test_a_replaced_module_is_called_in_its_place(gm: fx.GraphModule, model: Net) -> None:
    wide = nn.Linear(4, 4)
    edit.replace_module(gm, "block.0", wide)
    expected = torch.relu(wide(model.linear(X))) + 1 + X
    assert_same(finished(gm), expected)
    assert model.block[0] is not wide


def test_no_module_to_replace(gm: fx.GraphModule) -> None:
    with pytest.raises(VerifyError, match=r"No module 'block.7' in the graph; name a site by its module path"):
        edit.replace_module(gm, "block.7", nn.ReLU())


@pytest.mark.parametrize("path", ["shift", "scale", "linear.weight", "linear.bias", "block.0.weight"])
def test_a_replaced_tensor_keeps_its_kind_and_leaves_the_model_alone(gm: fx.GraphModule, model: Net, path: str) -> None:
    before = copy.deepcopy(model.state_dict())
    held = dict([*gm.named_parameters(), *gm.named_buffers()])[path]
    twin = copy.deepcopy(model)
    new = torch.full_like(held, 0.25).detach()
    edit.replace_tensor(gm, path, new)
    found = dict([*gm.named_parameters(), *gm.named_buffers()])[path]
    assert isinstance(found, nn.Parameter) == isinstance(held, nn.Parameter)
    assert found.requires_grad == held.requires_grad
    assert_same(dict(model.state_dict()), dict(before))
    with torch.no_grad():
        twin.state_dict(keep_vars=True)[path].copy_(new)
    assert_same(finished(gm), twin(X, X))
    assert list(gm.state_dict()) == list(model.state_dict())


def test_a_parameter_is_taken_as_it_is(gm: fx.GraphModule) -> None:
    new = nn.Parameter(torch.zeros(4, 4))
    edit.replace_tensor(gm, "linear.weight", new)
    assert gm.get_parameter("linear.weight") is new


@pytest.mark.parametrize("path", ["linear", "linear.nothing", "nowhere.weight", "nothing"])
def test_no_tensor_to_replace(gm: fx.GraphModule, path: str) -> None:
    with pytest.raises(VerifyError, match=f"No tensor '{path}' in the graph"):
        edit.replace_tensor(gm, path, torch.zeros(1))


def test_get_attr_of_a_new_buffer(gm: fx.GraphModule, model: Net) -> None:
    node = edit.insert_get_attr(gm, "constant", torch.full((4,), 3.0))
    edit.replace_uses(find(gm, "shift"), node)
    assert_same(finished(gm), model.block(model.linear(X) * model.scale) + 3.0 + X)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert not find(gm, "constant").prev.name  # The root of the list stands before it.


def test_get_attr_of_what_is_there(gm: fx.GraphModule, model: Net) -> None:
    edit.replace_uses(find(gm, "shift"), edit.insert_get_attr(gm, "linear.bias"))
    assert_same(finished(gm), model.block(model.linear(X) * model.scale) + model.linear.bias + X)


def test_get_attr_of_what_is_not_there(gm: fx.GraphModule) -> None:
    with pytest.raises(VerifyError, match=r"No tensor 'linear.more'"):
        edit.insert_get_attr(gm, "linear.more")
    for path in ("shift", "linear", "some.where", "training"):
        with pytest.raises(VerifyError, match=f"'{path}' is no free name"):
            edit.insert_get_attr(gm, path, torch.zeros(1))
    assert set(dict(gm.named_buffers())) == {"shift"}


@pytest.mark.parametrize("after", ["x", "y", "shift", "linear", "relu"])
def test_a_module_is_inserted_behind_any_node(gm: fx.GraphModule, after: str) -> None:
    anchor = find(gm, "block.1" if after == "relu" else after)
    node = edit.insert_module(gm, "quantizers.one", nn.Tanh(), after=anchor, args=(anchor,))
    edit.replace_uses(anchor, node)
    finished(gm)
    order = [each.op for each in gm.graph.nodes]
    assert order.index("call_module") > order.index("placeholder") + 1
    assert node.args == (anchor,)
    assert anchor.users == {node: None}
    assert type(gm.get_submodule("quantizers.one")) is nn.Tanh


def test_behind_a_parameter_that_is_read_late() -> None:
    model = Calls(lambda self, x: torch.relu(x) * self.late, late=torch.ones(4))
    gm = trace(model, rows(2))
    late, relu = find(gm, "late"), find(gm, _aten.relu.default)
    relu.append(late)
    node = edit.insert_function(gm, _aten.neg.default, late, (late,))
    edit.replace_uses(late, node)
    edit.finish(gm)
    verify(gm)
    assert_same(gm(X), -torch.relu(X))


def test_a_taken_path_is_refused(gm: fx.GraphModule) -> None:
    anchor = find(gm, "linear")
    for path in ("linear", "block", "shift", "linear.weight", "forward"):
        with pytest.raises(VerifyError, match=rf"Something stands at '{path}' already; take .*free_path"):
            edit.insert_module(gm, path, nn.ReLU(), after=anchor, args=(anchor,))


def test_free_paths(gm: fx.GraphModule) -> None:
    assert edit.free_path(gm, "new") == "new"
    assert edit.free_path(gm, "new.deep") == "new.deep"
    assert edit.free_path(gm, "linear") == "linear_1"
    assert edit.free_path(gm, "shift") == "shift_1"
    assert edit.free_path(gm, "linear.weight") == "linear.weight_1"
    gm.add_submodule("linear_1", nn.ReLU())
    assert edit.free_path(gm, "linear") == "linear_2"


def test_an_inserted_function(gm: fx.GraphModule, model: Net) -> None:
    linear = find(gm, "linear")
    node = edit.insert_function(gm, _aten.mul.Tensor, linear, (linear, 0.5))
    edit.replace_uses(linear, node)
    assert_same(finished(gm), model.block(model.linear(X) * 0.5) + 1 + X)


def test_uses_are_replaced_but_for_exceptions(gm: fx.GraphModule) -> None:
    x, y = find(gm, "x"), find(gm, "y")
    kept = next(iter(y.users))
    edit.replace_uses(y, x, except_=[kept])
    assert list(y.users) == [kept]
    edit.replace_uses(y, x)
    assert not y.users
    finished(gm)


def test_an_argument_is_set(gm: fx.GraphModule, model: Net) -> None:
    add = gm.graph.output_node().all_input_nodes[0]
    edit.set_argument(add, 1, 5.0)
    assert_same(finished(gm), model.block(model.linear(X)) + 1 + 5.0)


def test_what_is_read_is_not_erased(gm: fx.GraphModule) -> None:
    with pytest.raises(VerifyError, match=r"Cannot erase 'linear\w*': mul\w* still read it"):
        edit.erase(gm, find(gm, "linear"))


def test_an_erased_call_takes_its_module_along(gm: fx.GraphModule) -> None:
    relu = find(gm, "block.1")
    edit.replace_uses(relu, relu.args[0])
    edit.erase(gm, relu)
    assert "block.1" not in dict(gm.named_modules())
    finished(gm)


def test_a_module_called_twice_stays_until_the_last_call_goes() -> None:
    gm = trace(Calls(lambda self, x: self.act(self.act(x)), act=nn.Tanh()), rows(2))
    first, second = gm.graph.find_nodes(op="call_module")
    edit.replace_uses(second, first)
    edit.erase(gm, second)
    assert "act" in dict(gm.named_modules())
    edit.finish(gm)
    assert_same(gm(X), torch.tanh(X))


def test_finish_removes_what_is_dead_and_gives_new_shapes(gm: fx.GraphModule) -> None:
    edit.insert_function(gm, _aten.neg.default, find(gm, "linear"), (find(gm, "linear"),))
    count = len(gm.graph.nodes)
    edit.replace_module(gm, "block.0", nn.Linear(4, 1))
    edit.finish(gm)
    assert len(gm.graph.nodes) == count - 1
    assert edit.shape(find(gm, "block.1")) == (2, 1)
    assert "neg" not in gm.code


def test_finish_names_what_does_not_fit(gm: fx.GraphModule, capfd: pytest.CaptureFixture[str]) -> None:
    edit.replace_module(gm, "block.0", nn.Linear(3, 4))
    with pytest.raises(VerifyError, match=r"Node 'block_0' \(call_module block.0\) does not fit its inputs"):
        edit.finish(gm)
    assert capfd.readouterr() == ("", "")


def test_finish_refuses_a_malformed_graph(gm: fx.GraphModule) -> None:
    gm.graph.output_node().prepend(find(gm, "linear"))
    with pytest.raises(VerifyError, match="The edited graph is malformed"):
        edit.finish(gm)


def test_a_cloned_module_shares_tensors_and_nothing_else() -> None:
    module = nn.BatchNorm2d(3)
    module.inner = nn.Linear(2, 2)
    clone: Any = edit.clone_module(module)
    assert type(clone) is nn.BatchNorm2d
    assert clone.weight is module.weight
    assert clone.inner is module.inner
    clone.weight = None
    clone.running_mean = torch.ones(3)
    clone.eps, clone.training = 1.0, False
    clone.register_buffer("more", torch.ones(1), persistent=False)
    clone.register_forward_hook(lambda *_: None)
    assert module.weight is not None
    assert not module.running_mean.any()
    assert (module.eps, module.training) == (1e-5, True)
    assert "more" not in module._buffers
    assert not module._non_persistent_buffers_set
    assert not module._forward_hooks


@pytest.mark.parametrize("make", [edit.fork, edit.own_copy, copy.deepcopy])
def test_copies_of_a_graph(gm: fx.GraphModule, make: Any) -> None:
    twin = make(gm)
    verify(twin)
    assert_same(twin(X, X), gm(X, X))
    assert twin.meta == gm.meta
    assert list(twin.state_dict()) == list(gm.state_dict())
    shared = twin.get_parameter("linear.weight") is gm.get_parameter("linear.weight")
    assert shared is (make is edit.fork)
    edit.replace_module(twin, "linear", nn.Linear(4, 4))
    assert type(gm.get_submodule("linear")) is nn.Linear
    assert gm.get_submodule("linear") is not twin.get_submodule("linear")
    twin.graph.erase_node(twin.graph.output_node())
    gm(X, X)


def test_a_copy_of_its_own_keeps_ties_and_gradients() -> None:
    linear = nn.Linear(4, 4)
    linear.bias.requires_grad_(False)
    gm = trace(Calls(lambda self, x: self.two(self.one(x)), one=linear, two=linear), rows(2))
    twin = edit.own_copy(gm)
    assert twin.get_parameter("one.weight") is twin.get_parameter("two.weight")
    assert twin.get_parameter("one.weight") is not linear.weight
    assert not twin.get_parameter("one.bias").requires_grad
