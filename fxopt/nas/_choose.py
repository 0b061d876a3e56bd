"""From a trained supernet to a network: within budget, or by any engine."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxopt._numbers import check_not_negative, check_positive, check_whole
from fxopt._seeding import seeded
from fxopt.data import Loader, check_loader, first_batch, pass_of, read
from fxopt.decisions import Policy, format_quantity
from fxopt.decisions._budget import within
from fxopt.errors import BudgetError, FxoptError, InfeasibleError, PassError
from fxopt.evaluate import accuracy, recalibrate_batch_norm
from fxopt.graph import verify
from fxopt.lowering import OperatorTable, encoded, lower
from fxopt.nas._supernet import Supernet, check_kinds, check_table, choose_path
from fxopt.progress import Progress, reporter
from fxopt.search.solver import solve
from fxopt.training import Loss, fit

__all__ = ["PathScore", "check_budget", "fine_tune", "policy_within"]

_SETTLING_BATCHES = 8
_FORGOTTEN = 0.01
"""Part of running statistics that those before a training may still make up behind it."""
_SLACK = 1e-12
_DERIVED = "training what was selected"


class PathScore:
    """The accuracy of any network of a supernet, with the supernet's weights.

    Its batch norms are estimated anew for every path: with statistics of other paths accuracies mean nothing. The
    batches for this are read once and kept, so that every path is judged alike. Paths may be judged on threads, one at
    a time, and in other processes, which are given the weights and, with ``max_batches``, these batches alone.

    Args:
        supernet: A trained supernet.
        train: Batches of (input, label) to estimate batch norms on; the first few are read.
        val: Batches of (input, label) to judge by.
        max_batches: Batches of ``val`` to look at; None for all.
        seed: Seed of the order of loaders that shuffle by torch's global generator.

    Raises:
        DataError: If a loader yields nothing.
    """

    def __init__(
        self, supernet: Supernet, train: Loader, val: Loader, max_batches: int | None = None, *, seed: int = 0
    ) -> None:
        check_kinds(supernet=supernet)
        first_batch(train, "train")
        first_batch(val, "val")
        if max_batches is not None:
            check_whole(1, max_batches=max_batches)
        check_whole(0, seed=seed)
        self._net, self._space = supernet.net, supernet.space
        self._mixed = tuple(supernet.mixed.values())
        with seeded(seed):
            self._train = list(read(train, "train", _SETTLING_BATCHES))
            self._val: Loader = val if max_batches is None else list(read(val, "val", max_batches))
        self._one_at_a_time = threading.Lock()

    def __call__(self, policy: Policy) -> float:
        """Accuracy of a policy, in [0, 1].

        Raises:
            PolicyError: If the policy does not fit.
            DataError: If the data do not fit the network.
        """
        with self._one_at_a_time:
            choose_path(self._mixed, encoded(self._space, policy))
            with _keeping_buffers(self._net):
                recalibrate_batch_norm(self._net, self._train, _SETTLING_BATCHES)
                return accuracy(self._net, self._val)

    def __reduce__(self) -> tuple[Any, ...]:
        """Everything for another process, where the graph is built anew."""
        with self._one_at_a_time:
            # Neither gates nor mixtures can be sent; the path stays what it is.
            choose_path(self._mixed, [one.active for one in self._mixed])
        kept = {name: one for name, one in self.__dict__.items() if name not in ("_net", "_one_at_a_time")}
        build, (body, *rest) = self._net.__reduce__()
        specs = {name: pytree.treespec_dumps(one) for name, one in body.items() if isinstance(one, pytree.TreeSpec)}
        return _arrived, (kept, build, ({name: one for name, one in body.items() if name not in specs}, *rest), specs)


def _arrived(
    state: dict[str, Any], build: Callable[..., fx.GraphModule], parts: tuple[Any, ...], specs: dict[str, str]
) -> PathScore:
    """A score in another process."""
    found = PathScore.__new__(PathScore)
    found.__dict__.update(state)
    found._one_at_a_time = threading.Lock()
    body, *rest = parts
    with warnings.catch_warnings():
        # torch warns of how it makes these itself.
        warnings.simplefilter("ignore", FutureWarning)
        found._net = build({**body, **{name: pytree.treespec_loads(one) for name, one in specs.items()}}, *rest)
    return found


def policy_within(
    supernet: Supernet, table: OperatorTable, limits: Mapping[str, float], *, duals: Sequence[float] = ()
) -> Policy:
    """The most probable policy within limits, exactly: a knapsack with one choice a block.

    Where limits weighed on the search, probabilities hold their price, and what the policy leaves unused was priced too
    high (a limit that is not reached has no price): it is given back, block by block, to where it costs the least
    probability.

    Args:
        supernet: A supernet whose architecture is trained.
        table: Costs of all candidates.
        limits: Upper limits in SI units, by metric.
        duals: Dual variables of the search, such as ``SupernetResult.duals``; none if no cost weighed on it.

    Raises:
        InfeasibleError: If no policy is within all limits.
        UnknownNameError: If there is no such metric.
        UnsupportedError: If the target has no figures for it.
        FxoptError: If the table is of other decisions than the supernet, a limit is no number above zero, or a dual
            variable none from zero on.
    """
    check_table(supernet, table)
    _check_limits(limits)
    duals = _listed(duals)
    check_not_negative(**{f"duals[{index}]": dual for index, dual in enumerate(duals)})
    scores = supernet.alpha.detach().double().cpu().log_softmax(1).numpy()
    offered = supernet.mask.numpy().copy()
    summed: list[str] = []
    for metric, limit in limits.items():
        costs, fixed = table.of(metric)
        if metric != "memory":
            summed.append(metric)
            continue
        offered &= costs <= limit * (1.0 + _SLACK)
        if fixed > limit * (1.0 + _SLACK) or not offered.any(1).all():
            raise _infeasible(supernet, table, limits)
    found = np.where(offered, scores, -np.inf).argmax(1)
    if summed:
        columns = [np.flatnonzero(row) for row in offered]
        priced = np.stack([table.of(metric)[0] for metric in summed], 2)
        room = np.array([limits[metric] - table.of(metric)[1] for metric in summed])
        try:
            solved = solve(
                [-scores[row, some] for row, some in enumerate(columns)],
                [priced[row, some] for row, some in enumerate(columns)],
                room,
            )
        except InfeasibleError:
            raise _infeasible(supernet, table, limits) from None
        found = np.array([some[index] for some, index in zip(columns, solved.indices, strict=True)])
    if any(dual > 0.0 for dual in duals):
        found = _filled(found, scores, offered, table, limits)
    return supernet.space.decode(found)


def _filled(
    indices: npt.NDArray[np.intp],
    scores: npt.NDArray[np.float64],
    offered: npt.NDArray[np.bool_],
    table: OperatorTable,
    limits: Mapping[str, float],
) -> npt.NDArray[np.intp]:
    """Move to dearer candidates while the limits allow, the least loss of probability for its cost first."""
    relative = sum((table.of(metric)[0] / limit for metric, limit in limits.items()), np.zeros(scores.shape))
    costs = np.where(offered, relative, -np.inf)
    found, rows = indices.copy(), np.arange(len(indices))
    while True:
        more = costs - costs[rows, found][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(more > 0.0, (scores[rows, found][:, None] - scores) / more, np.inf)
        for place in np.argsort(price, axis=None, kind="stable").tolist():
            row, column = divmod(place, scores.shape[1])
            if not np.isfinite(price[row, column]):
                return found
            moved = found.copy()
            moved[row] = column
            if all(within(float(table.score(moved[None], metric)[0]), limit) for metric, limit in limits.items()):
                found = moved
                break
        else:
            return found


def check_budget(graph: fx.GraphModule, table: OperatorTable, limits: Mapping[str, float], batch: int = 1) -> None:
    """See that a derived graph is within limits: the graph that was built, not the policy.

    Args:
        graph: The graph.
        table: Costs of all candidates; its target is asked.
        limits: Upper limits in SI units, by metric.
        batch: Batch size that costs are for.

    Raises:
        PassError: If it is not, or ``table`` is something else.
        VerifyError: If ``graph`` is no canonical graph.
        BudgetError: If a limit is no number above zero.
    """
    check_kinds(table=table)
    verify(graph)
    _check_limits(limits)
    estimate = table.target.estimate(lower(graph, batch).bind())
    for metric, limit in limits.items():
        cost = float(estimate.metric(metric)[0])
        if not within(cost, limit):
            raise PassError(
                f"The network costs {cost:g} in {metric}, over the limit of {limit:g}. Derive one within it, by "
                "policy_within; if it is one, report this with the model and the policy."
            )


def fine_tune(
    supernet: Supernet,
    policy: Policy,
    train: Loader,
    *,
    epochs: int,
    keep_weights: bool = True,
    distil: bool = True,
    learning_rate: float = 0.02,
    loss: Loss | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Progress | None = None,
) -> fx.GraphModule:
    """Derive a network and train it, the supernet as its teacher.

    Its batch norms are estimated anew before, since the supernet's are of many paths, and behind a training that is too
    short to outgrow what they were. Batches for that depend on the seed alone.

    Args:
        supernet: A trained supernet.
        policy: The network.
        train: Batches of (input, label).
        epochs: Passes over them; at 0 batch norms alone are estimated anew.
        keep_weights: Whether to begin with the supernet's weights.
        distil: Whether the supernet's most probable network teaches.
        learning_rate: The highest learning rate.
        loss: ``loss(output, label)``; cross entropy by default.
        seed: Seed of the training.
        checkpoint: A file without suffix that the same call resumes from; see :func:`fxopt.training.fit`.
        progress: True shows progress on a terminal; or a reporter of one's own.

    Returns:
        The trained network, in eval mode.
    """
    check_kinds(supernet=supernet)
    check_loader(train, "train")
    check_whole(0, epochs=epochs, seed=seed)
    check_positive(learning_rate=learning_rate)
    show = reporter(progress)
    network = supernet.derive(policy, keep_weights=keep_weights)
    teacher = supernet.derive(supernet.most_likely()) if distil and epochs else None
    with seeded(seed):
        settling = list(read(pass_of(train, 0, seed), "train", _SETTLING_BATCHES))
    for one in (network, teacher):
        if one is not None:
            recalibrate_batch_norm(one, settling, _SETTLING_BATCHES)
    if not epochs:
        return network.eval()
    norms = [one for one in network.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    began = [_batches(norm) for norm in norms]
    show.start(_DERIVED, epochs)
    try:
        fit(
            network,
            train,
            epochs=epochs,
            learning_rate=learning_rate,
            loss=loss,
            teacher=teacher,
            checkpoint=checkpoint,
            seed=seed,
            progress=lambda epoch, _, value: show.advance(_DERIVED, 1, f"loss {value:.4f}"),
        )
    finally:
        show.finish(_DERIVED)
    if any(_remembers(norm, before) for norm, before in zip(norms, began, strict=True)):
        recalibrate_batch_norm(network, settling, _SETTLING_BATCHES)
    return network.eval()


def _remembers(norm: _BatchNorm, before: int) -> bool:
    """Whether running statistics still hold much of those that a training began with, after so many batches."""
    now = _batches(norm)
    kept = before / max(now, 1) if norm.momentum is None else (1.0 - norm.momentum) ** (now - before)
    return kept > _FORGOTTEN


def _batches(norm: _BatchNorm) -> int:
    """The batches that running statistics were estimated on."""
    return 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)


def _listed(duals: Any) -> list[float]:
    try:
        return [float(dual) for dual in duals]
    except (TypeError, ValueError) as failure:
        kind = type(duals).__name__
        raise FxoptError(f"duals is a {kind}; give a sequence of numbers, such as SupernetResult.duals.") from failure


def _check_limits(limits: Mapping[str, float]) -> None:
    given: object = limits
    if not isinstance(given, Mapping):
        raise BudgetError(f"limits is a {type(given).__name__}; give them by metric, such as {{'latency': 0.005}}.")
    check_positive(BudgetError, **{f"The limit of {metric} in SI units": limit for metric, limit in given.items()})


def _infeasible(supernet: Supernet, table: OperatorTable, limits: Mapping[str, float]) -> InfeasibleError:
    real = supernet.mask.numpy()
    least = {}
    for metric in limits:
        cheapest = np.where(real, table.of(metric)[0], np.inf).argmin(1)
        least[metric] = float(table.score(cheapest[None], metric)[0])
    metric = max(limits, key=lambda one: least[one] / limits[one])
    if least[metric] <= limits[metric] * (1.0 + _SLACK):
        what = f"No architecture meets the limits {dict(limits)} together, though each can be met alone."
    else:
        what = (
            f"The cheapest architecture has a {metric} of {format_quantity(metric, least[metric])}, over the limit of "
            f"{format_quantity(metric, limits[metric])}."
        )
    return InfeasibleError(
        f"{what} Raise a limit, or offer cheaper candidates.",
        metric=metric,
        limit=limits[metric],
        least=least[metric],
    )


@contextlib.contextmanager
def _keeping_buffers(net: nn.Module) -> Iterator[None]:
    """Give batch norms their statistics back at the end."""
    kept: list[tuple[nn.Module, dict[str, torch.Tensor | None]]] = [
        (norm, dict(norm._buffers)) for norm in net.modules() if isinstance(norm, _BatchNorm)
    ]
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
