"""Steps of the architecture parameters: how each method gets a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxopt.nas._objective import Cost
from fxopt.nas._supernet import Supernet

__all__ = ["BinaryGates", "Reinforce", "Relaxed", "Step", "gate_gradient", "sample"]

Loss = Callable[[Any], torch.Tensor]
"""The loss of a batch in the network as it is set now."""


def sample(probabilities: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """A candidate for every block, drawn with its probability."""
    edges = np.cumsum(probabilities, axis=1)
    # A hair less than the whole, so that rounding never leads behind the last candidate.
    drawn = rng.random((len(probabilities), 1)) * edges[:, -1:] * (1.0 - 1e-12)
    found: npt.NDArray[np.intp] = np.asarray((drawn >= edges).sum(1), dtype=np.intp)
    return found


def gate_gradient(probabilities: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Gradients of architecture parameters from those of gates (Han et al., section 2).

    dL/da_i = sum_j dL/dg_j dp_j/da_i = sum_j dL/dg_j p_j (d_ij - p_i), over the candidates whose gates were open.

    Args:
        probabilities: Of those candidates, shape (blocks, candidates), each row with sum 1.
        gates: The gradients of their gates, of the same shape.
    """
    return probabilities * (gates - (probabilities * gates).sum(1, keepdim=True))


@dataclass
class Step:
    """What one step of the architecture found.

    Attributes:
        loss: Loss of the task.
        gradient: Gradient of the architecture parameters, of their shape.
        touched: Candidates that it is about; None for all.
        costs: Expected cost of every term, over all candidates.
    """

    loss: float
    gradient: torch.Tensor
    touched: torch.Tensor | None
    costs: list[float]


@dataclass
class BinaryGates:
    """Path binarization (Cai et al. 2019, section 3.2): a path is computed, and the gates of a few get gradients.

    Of every block ``paths`` candidates are drawn without replacement in proportion to their probabilities, which are
    renormalized among them; one of these is computed. A block's ZeroOp is a candidate as any other.

    Attributes:
        paths: 2 as in the paper; None for all candidates of a block, N times the work with the memory of one.
    """

    paths: int | None = 2

    def __call__(self, supernet: Supernet, cost: Cost, loss: Loss, batch: Any, rng: np.random.Generator) -> Step:
        """Gradient of one batch."""
        whole = supernet.probabilities().detach().double().cpu().numpy()
        pairs = [self._drawn(row[:size], rng) for row, size in zip(whole, supernet.space.sizes, strict=True)]
        active = [self._active(row, pair, rng) for row, pair in zip(whole, pairs, strict=True)]
        ordered = [[one, *(other for other in pair if other != one)] for one, pair in zip(active, pairs, strict=True)]
        gates = supernet.open_gates(active, [pair[1:] for pair in ordered])
        with supernet.frozen_weights():
            value = loss(batch)
            torch.autograd.backward(value, inputs=gates)
        return self._step(supernet, cost, value.detach(), gates, ordered)

    def _drawn(self, probabilities: npt.NDArray[np.float64], rng: np.random.Generator) -> list[int]:
        count = len(probabilities) if self.paths is None else min(self.paths, len(probabilities))
        kept = np.maximum(probabilities, 1e-12)
        return [int(one) for one in rng.choice(len(kept), count, replace=False, p=kept / kept.sum())]

    def _active(self, probabilities: npt.NDArray[np.float64], pair: list[int], rng: np.random.Generator) -> int:
        kept = np.maximum(probabilities[pair], 1e-12)
        return int(rng.choice(pair, p=kept / kept.sum()))

    def _step(
        self,
        supernet: Supernet,
        cost: Cost,
        value: torch.Tensor,
        gates: Sequence[torch.Tensor],
        ordered: Sequence[Sequence[int]],
    ) -> Step:
        alpha = supernet.alpha.detach()
        width = max(len(pair) for pair in ordered)
        drawn = torch.tensor([[*pair, *[pair[0]] * (width - len(pair))] for pair in ordered], device=alpha.device)
        real = torch.tensor([[place < len(pair) for place in range(width)] for pair in ordered], device=alpha.device)
        scores = alpha.gather(1, drawn).double().masked_fill(~real, -torch.inf).requires_grad_()
        shares = scores.softmax(1)
        opened = torch.zeros(drawn.shape, dtype=torch.float64, device=alpha.device)
        for row, gate in enumerate(gates):
            if gate.grad is not None:
                opened[row, : len(gate)] = gate.grad
        # What the whole loss is to the loss of the task, and to the costs: the former weighs the gates' gradients.
        task = value.to(alpha.device, torch.float64, copy=True).requires_grad_()
        total = cost.combined(task, [one.of_pairs(drawn, shares) for one in cost.expected])
        by_task, by_scores = torch.autograd.grad(total + 0.0 * scores[:, 0].sum(), [task, scores])
        found = gate_gradient(shares.detach(), opened) * by_task + by_scores
        gradient = torch.zeros(alpha.shape, dtype=torch.float64, device=alpha.device)
        gradient.scatter_add_(1, drawn, found.masked_fill(~real, 0.0))
        touched = torch.zeros(alpha.shape, device=alpha.device).scatter_add_(1, drawn, real.float()) > 0
        return Step(float(value), gradient.to(alpha.dtype), touched, _costs(supernet, cost))


@dataclass
class Relaxed:
    """The continuous relaxation (DARTS, Liu et al. 2019, first order): all candidates are computed and weighed."""

    def __call__(self, supernet: Supernet, cost: Cost, loss: Loss, batch: Any, rng: np.random.Generator) -> Step:
        """Gradient of one batch."""
        supernet.mix()
        with supernet.frozen_weights():
            value = loss(batch)
            shares = supernet.probabilities()
            total = cost.combined(value, [one(shares) for one in cost.expected])
            (gradient,) = torch.autograd.grad(total, [supernet.alpha])
        return Step(
            float(value.detach()),
            gradient.masked_fill(~supernet.mask.to(gradient.device), 0.0),
            None,
            _costs(supernet, cost),
        )


@dataclass
class Reinforce:
    """The score-function gradient (Cai et al. 2019, section 3.3.2; Williams 1992), for what has no other gradient.

    A few paths are drawn and judged without gradients; each moves the logarithm of its probability by how much better
    than the baseline it is. Its loss is that of the task, combined with its own cost rather than an expected one.

    Attributes:
        samples: Paths of a step.
        momentum: Of the moving average of losses that is the baseline.
        baseline: The baseline; None before the first step, where the mean of its samples stands in.
    """

    samples: int = 4
    momentum: float = 0.9
    baseline: float | None = None

    def __call__(self, supernet: Supernet, cost: Cost, loss: Loss, batch: Any, rng: np.random.Generator) -> Step:
        """Gradient of one batch."""
        shares = supernet.probabilities().detach()
        values, totals, paths = [], [], []
        for _ in range(self.samples):
            path = sample(shares.double().cpu().numpy(), rng)
            supernet.choose(path)
            with torch.no_grad():
                value = loss(batch)
                onehot = path_matrix(path, shares)
                totals.append(float(cost.combined(value, [one(onehot) for one in cost.expected])))
            values.append(float(value))
            paths.append(onehot)
        mean = float(np.mean(totals))
        baseline = mean if self.baseline is None else self.baseline
        self.baseline = mean if self.baseline is None else self.momentum * baseline + (1.0 - self.momentum) * mean
        gradient = torch.zeros_like(shares)
        for total, onehot in zip(totals, paths, strict=True):
            # d log p(path) / d alpha = onehot - p
            gradient += (total - baseline) * (onehot - shares) / self.samples
        return Step(float(np.mean(values)), gradient, None, _costs(supernet, cost))


def path_matrix(path: npt.NDArray[np.intp], like: torch.Tensor) -> torch.Tensor:
    """A path as probabilities: one for what it takes, zero for the rest."""
    index = torch.from_numpy(np.asarray(path)).to(like.device)[:, None]
    return torch.zeros_like(like).scatter_(1, index, 1.0)


def _costs(supernet: Supernet, cost: Cost) -> list[float]:
    shares = supernet.probabilities().detach()
    return [float(one(shares)) for one in cost.expected]
