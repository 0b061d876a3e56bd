"""The conformance suite for targets."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from fxopt.decisions import Policy, SearchSpace
from fxopt.errors import UnsupportedError
from fxopt.lowering import ParametricWorkload, lower
from fxopt.passes import PruneChannels, Quantize
from fxopt.targets import Estimate, OpKind, Target, Workload, load
from fxopt.targets.rows import FLOAT_BITS
from fxopt.testing._expect import expect
from fxopt.testing._passes import NETWORKS, traced

__all__ = ["TargetConformance"]

_Network = Callable[[], tuple[nn.Module, Any]]
_METRICS = ("latency", "size", "macs", "memory")


class TargetConformance:
    """Every promise of a target, as tests. Subclass it, say which target, and let pytest collect it.

    Each promise is checked on the rows of a few small networks, with channels and bits as policies choose them.

    Example::

        class TestMyBoard(TargetConformance):
            target = "my_board.toml"

    Attributes:
        target: A name, a TOML file, or a target.
        monotone: Whether a network never costs more when channels are cut, all in the multiples that the target asks
            for. Accelerators that search for tiles may gain from a channel more; say so here.
        more_networks: Functions that give a module and example inputs, by name.
    """

    target: ClassVar[str | os.PathLike[str] | Target]
    monotone: ClassVar[bool] = True
    more_networks: ClassVar[Mapping[str, _Network]] = {}

    def loaded(self) -> Target:
        """The target under test."""
        return load(self.target)

    def graphs(self) -> Iterator[tuple[str, fx.GraphModule]]:
        """Graphs of the networks, by name."""
        for name, make in {**NETWORKS, **self.more_networks}.items():
            yield name, traced(make)[0]

    def workloads(self) -> Iterator[tuple[str, ParametricWorkload, SearchSpace]]:
        """Workloads of the networks at the target's batch, with all that can be decided about them."""
        able = self.loaded().capabilities
        for name, graph in self.graphs():
            spaces = (step.search_space(graph, able) for step in (PruneChannels(), Quantize()))
            yield name, lower(graph, able.batch), SearchSpace([decision for space in spaces for decision in space])

    def test_it_says_what_it_is(self) -> None:
        """Name, title, status and error are there, and the error of what is calibrated is told."""
        info = self.loaded().info
        for name in ("name", "title", "status", "error"):
            expect(bool(getattr(info, name)), f"The target does not tell its {name}.")

    def test_every_width_on_offer_can_be_costed(self) -> None:
        """Layers have a cost in floats, if these are on offer, and what has one has it at all other bits on offer."""
        target = self.loaded()
        for name, workload, space in self.workloads():
            bound = workload.bind()
            known = set(target.estimate(bound).uncosted)
            layers = np.isin(bound.rows["kind"][0], (OpKind.CONV, OpKind.LINEAR))
            for kind in ("conv", "linear"):
                if (FLOAT_BITS, FLOAT_BITS) in target.capabilities.allowed_bits(kind):
                    found = known & set(np.array(bound.names)[layers])
                    expect(not found, f"{name}: {sorted(found)} have no cost in floats, which are on offer.")
            for policy in _corners(space):
                found = set(target.estimate(workload.bind(policy)).uncosted) - known
                expect(not found, f"{name}: {sorted(found)} have no cost at {dict(policy)}.")

    def test_costs_are_finite_and_above_zero(self) -> None:
        """Whatever is decided, a network takes time, memory and space."""
        target = self.loaded()
        for name, workload, space in self.workloads():
            estimate = target.estimate(workload.bind(_drawn(space, 16)))
            for metric in _METRICS:
                values = estimate.metric(metric)
                expect(bool(np.isfinite(values).all() and (values > 0).all()), f"{name}: {metric} is {values.min()}.")

    def test_a_batch_of_policies_costs_what_each_costs_alone(self) -> None:
        """Policies do not influence each other, nor does the number of threads."""
        target = self.loaded()
        for name, workload, space in self.workloads():
            policies = _drawn(space, 5)
            together = _totals(target.estimate(workload.bind(policies)))
            alone = np.stack([_totals(target.estimate(workload.bind(one)))[:, 0] for one in policies], axis=1)
            expect(bool((together == alone).all()), f"{name}: costs differ in a batch.")
            shared = _totals(target.estimate(workload.bind(policies), threads=3))
            expect(bool((together == shared).all()), f"{name}: costs differ with threads.")

    def test_policies_cost_what_the_rewritten_graph_costs(self) -> None:
        """What a search looks up is what the network that comes out of it costs."""
        target = self.loaded()
        for name, graph in self.graphs():
            able = target.capabilities
            step = PruneChannels()
            for policy in _corners(step.search_space(graph, able)):
                looked_up = target.estimate(lower(graph, able.batch).bind(policy))
                cut = step.with_policy(policy)(graph).graph_module
                built = target.estimate(lower(cut, able.batch).bind())
                same = np.allclose(_totals(looked_up)[:, 0], _totals(built)[:, 0], rtol=1e-9)
                expect(same, f"{name}: {dict(policy)} is costed otherwise once it is carried out.")

    def test_cutting_channels_never_costs(self) -> None:
        """A network with fewer channels costs no more, where the target is monotone."""
        target = self.loaded()
        if not self.monotone:
            return
        for name, workload, _ in self.workloads():
            graph = next(graph for other, graph in self.graphs() if other == name)
            space = PruneChannels().search_space(graph, target.capabilities)
            whole = float(target.estimate(workload.bind()).latency_s[0])
            for policy in _drawn(space, 8):
                less = float(target.estimate(workload.bind(policy)).latency_s[0])
                expect(less <= whole * (1 + 1e-9), f"{name}: {less} s with {dict(policy)}, {whole} s without.")

    def test_what_has_no_model_is_named_and_costs_nothing(self) -> None:
        """An operator that nobody knows is told; it is not guessed."""
        target = self.loaded()
        _, workload, _ = next(self.workloads())
        bound = workload.bind()
        rows = np.concatenate((bound.rows, bound.rows[:, :1]), axis=1)
        rows["kind"][:, -1] = OpKind.UNKNOWN
        estimate = target.estimate(Workload(rows, (*bound.names, "mystery")))
        expect("mystery" in estimate.uncosted, "A row of unknown kind is not among those without a cost.")
        expect(float(estimate.rows.latency_s[0, -1]) == 0.0, "A row of unknown kind is given a time.")

    def test_energy_is_there_or_refused(self) -> None:
        """Energy is a figure, or an error that gives the reason."""
        target = self.loaded()
        _, workload, _ = next(self.workloads())
        estimate = target.estimate(workload.bind())
        try:
            energy = estimate.metric("energy")
        except UnsupportedError as refused:
            expect(len(str(refused)) > len("energy"), "Energy is refused without a reason.")
            return
        expect(bool((energy > 0).all()), f"Energy is {energy}.")

    def test_it_can_be_copied(self) -> None:
        """Searches send targets to other processes."""
        target = self.loaded()
        _, workload, _ = next(self.workloads())
        bound = workload.bind()
        same = _totals(copy.deepcopy(target).estimate(bound)) == _totals(target.estimate(bound))
        expect(bool(same.all()), "A copy of the target costs otherwise.")


def _corners(space: SearchSpace) -> list[Policy]:
    """The policies of everything's first, middle and last choice."""
    sizes = space.sizes
    return [space.decode(places) for places in (np.zeros_like(sizes), sizes // 2, sizes - 1)]


def _drawn(space: SearchSpace, count: int) -> list[Policy]:
    rng = np.random.default_rng(0)
    return [space.decode(rng.integers(0, space.sizes)) for _ in range(count)]


def _totals(estimate: Estimate) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.stack([estimate.metric(metric) for metric in _METRICS])
    return found
