"""From a trained supernet to a network: within budget, or by any engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.data import Loader
from fxopt.decisions import Policy
from fxopt.errors import InfeasibleError, PassError
from fxopt.evaluate import accuracy, recalibrate_batch_norm
from fxopt.lowering import OperatorTable, lower
from fxopt.nas._supernet import Supernet
from fxopt.training import Loss, fit

__all__ = ["PathScore", "check_budget", "fine_tune", "policy_within"]

_SETTLING_BATCHES = 8
_BISECTIONS = 60


class PathScore:
    """The accuracy of any network of a supernet, with the supernet's weights.

    Its batch norms are estimated anew for every path: with statistics of other paths accuracies mean nothing.

    Args:
        supernet: A trained supernet.
        train: Batches of (input, label) to estimate batch norms on; the first few are read.
        val: Batches of (input, label) to judge by.
        max_batches: Batches of ``val`` to look at; None for all.
    """

    def __init__(self, supernet: Supernet, train: Loader, val: Loader, max_batches: int | None = None) -> None:
        self._supernet = supernet
        self._train, self._val = train, val
        self._max_batches = max_batches

    def __call__(self, policy: Policy) -> float:
        """Accuracy of a policy, in [0, 1].

        Raises:
            PolicyError: If the policy does not fit.
            DataError: If the data do not fit the network.
        """
        self._supernet.choose_policy(policy)
        with _keeping_buffers(self._supernet.net):
            recalibrate_batch_norm(self._supernet.net, self._train, _SETTLING_BATCHES)
            return accuracy(self._supernet.net, self._val, self._max_batches)


def policy_within(supernet: Supernet, table: OperatorTable, limits: Mapping[str, float]) -> Policy:
    """The most probable policy within limits.

    The logarithms of probabilities are weighed against costs by one multiplier, found by bisection; of all policies
    that it leads to, the most probable one within the limits. With several limits, costs count relative to each limit.

    Args:
        supernet: A supernet whose architecture is trained.
        table: Costs of all candidates.
        limits: Upper limits in SI units, by metric.

    Raises:
        InfeasibleError: If the cheapest policy is over a limit.
    """
    scores = supernet.alpha.detach().double().cpu().log_softmax(1).numpy()
    real = supernet.mask.numpy()
    costs = sum((_relative(table, metric, limit) for metric, limit in limits.items()), np.zeros(scores.shape))

    def chosen(multiplier: float) -> npt.NDArray[np.intp]:
        value = np.where(real, scores - multiplier * costs, -np.inf)
        return np.asarray(value.argmax(1), dtype=np.intp)

    def fits(indices: npt.NDArray[np.intp]) -> bool:
        return all(
            float(table.score(indices[None], metric)[0]) <= limit * (1 + 1e-12) for metric, limit in limits.items()
        )

    best = chosen(0.0)
    if fits(best):
        return supernet.space.decode(best)
    low, high = 0.0, 1.0
    while not fits(chosen(high)):
        low, high = high, high * 4.0
        if high > 1e12:
            raise _infeasible(table, limits, np.where(real, costs, np.inf).argmin(1))
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if fits(chosen(middle)) else (middle, high)
    found = chosen(high)
    return supernet.space.decode(_improved(found, scores, real, fits))


def _improved(
    indices: npt.NDArray[np.intp],
    scores: npt.NDArray[np.float64],
    real: npt.NDArray[np.bool_],
    fits: Callable[[npt.NDArray[np.intp]], bool],
) -> npt.NDArray[np.intp]:
    """Move to more probable candidates, the largest gain first, as long as the limits allow."""
    found = indices.copy()
    rows = np.arange(len(found))
    gains = np.where(real, scores - scores[rows, found][:, None], -np.inf)
    order = np.argsort(-gains, axis=None, kind="stable")
    for place in order.tolist():
        row, column = divmod(place, scores.shape[1])
        if not scores[row, column] > scores[row, found[row]] or not real[row, column]:
            continue
        moved = found.copy()
        moved[row] = column
        found = moved if fits(moved) else found
    return found


def check_budget(graph: fx.GraphModule, table: OperatorTable, limits: Mapping[str, float], batch: int = 1) -> None:
    """See that a derived graph is within limits: the graph that was built, not the policy.

    Raises:
        PassError: If it is not.
    """
    estimate = table.target.estimate(lower(graph, batch).bind())
    for metric, limit in limits.items():
        cost = float(estimate.metric(metric)[0])
        if cost > limit * (1 + 1e-9):
            raise PassError(
                f"The derived network costs {cost:g} in {metric}, over the limit of {limit:g} that its policy keeps; "
                "report this with the model and the policy."
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
) -> fx.GraphModule:
    """Derive a network and train it, the supernet as its teacher.

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

    Returns:
        The trained network, in eval mode.
    """
    network = supernet.derive(policy, keep_weights=keep_weights)
    teacher: nn.Module | None = None
    if distil and epochs:
        teacher = supernet.derive(supernet.most_likely())
        recalibrate_batch_norm(teacher, train, _SETTLING_BATCHES)
    fit(network, train, epochs=epochs, learning_rate=learning_rate, loss=loss, teacher=teacher, seed=seed)
    if not epochs:
        recalibrate_batch_norm(network, train, _SETTLING_BATCHES)
    return network.eval()


def _relative(table: OperatorTable, metric: str, limit: float) -> npt.NDArray[np.float64]:
    costs, _ = table.of(metric)
    return costs / limit


def _infeasible(table: OperatorTable, limits: Mapping[str, float], cheapest: npt.NDArray[np.intp]) -> InfeasibleError:
    found = {metric: float(table.score(cheapest[None], metric)[0]) for metric in limits}
    metric = max(limits, key=lambda one: found[one] / limits[one])
    return InfeasibleError(
        f"The cheapest architecture has a {metric} of {found[metric]:g}, over the limit of {limits[metric]:g}. Raise "
        "the limit, or offer cheaper candidates.",
        metric=metric,
        limit=limits[metric],
        least=found[metric],
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
