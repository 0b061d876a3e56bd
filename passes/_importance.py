"""How important a channel is, apart from what is coupled with it.

An importance gives one number for each unit of a group; of the units of a group those with the largest stay. Numbers of
different groups say little about each other, for layers differ in scale: where groups compete
(:meth:`PruneChannels.ranked`), each group's are divided by their mean first.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxopt.errors import DataError, PassError, UnknownNameError
from fxopt.graph.channels import ChannelGroup, ParameterUse
from fxopt.graph.shapes import eval_mode
from fxopt.passes._calibrate import feed

__all__ = [
    "BatchNormScale",
    "Fisher",
    "GeometricMedian",
    "Importance",
    "Magnitude",
    "Random",
    "Scores",
    "Taylor",
    "as_importance",
    "checked_scores",
]

Scores: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.float64]
Scorer: TypeAlias = Callable[[fx.GraphModule, ChannelGroup], Any]
Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]


class Importance(ABC):
    """What ranks the units of a group. Instances are immutable, compare by their options and may be reused."""

    @abstractmethod
    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Scores:
        """The importance of each unit of a group, shape (units,); larger is more important.

        Args:
            gm: The graph, not changed.
            group: One of its channel groups.

        Raises:
            PassError: If the weights do not allow for a ranking.
        """

    def all_scores(self, gm: fx.GraphModule, groups: Sequence[ChannelGroup]) -> list[Scores]:
        """The scores of several groups; to be overridden where that is less work than one after the other."""
        return [self.scores(gm, group) for group in groups]


@dataclass(frozen=True)
class Magnitude(Importance):
    """The norm of the weights that read a unit, over all layers behind it, or of those that make it.

    With order 1 and ``of="readers"`` it is AMC's (He et al. 2018, section 3.2): a channel matters as much as the layers
    behind it weigh it. A group that no layer's weights read is ranked by the weights that make it.

    Attributes:
        order: 1 for the sum of magnitudes, 2 for the root of the sum of squares.
        of: ``"readers"`` or ``"makers"``.
    """

    order: int = 1
    of: str = "readers"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PassError: If one is out of range.
        """
        if self.order not in (1, 2) or self.of not in ("readers", "makers"):
            raise PassError(f"Magnitude takes order 1 or 2 of 'readers' or 'makers', got {self.order} of {self.of!r}.")

    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Scores:
        """See :class:`Importance`."""
        return self.all_scores(gm, [group])[0]

    def all_scores(self, gm: fx.GraphModule, groups: Sequence[ChannelGroup]) -> list[Scores]:
        """See :class:`Importance`; every tensor is read once, however many groups it has channels of."""
        roles = ("in", "out") if self.of == "readers" else ("out", "in")
        size = 1 + max((int(group.units.max(initial=0)) for group in groups), default=0)
        totals: dict[str, Scores] = {}
        seen: set[tuple[Any, ...]] = set()
        chosen = []
        for group in groups:
            role = next((role for role in roles if any(use.role == role for use in group.members)), "")
            total = totals.setdefault(role, np.zeros(size))
            fresh = [use for use in group.members if use.role == (role or use.role) and (role, id(use)) not in seen]
            seen.update((role, id(use)) for use in fresh)
            for use, tensor in _tensors(gm, fresh, detached=False):
                if (role, id(tensor), use.dim) not in seen:
                    seen.add((role, id(tensor), use.dim))
                    sums = _finite(use, _sums_of_powers(tensor.detach(), use.dim, self.order))
                    counts = (use.atoms >= 0) & (use.atoms < size)
                    total += np.bincount(use.atoms[counts], sums[counts], size)
            chosen.append((role, group))
        found = [totals[role][group.units] for role, group in chosen]
        return found if self.order == 1 else [np.sqrt(scores) for scores in found]


@dataclass(frozen=True)
class BatchNormScale(Importance):
    """The magnitude of the scale of the norms behind a unit (network slimming, Liu et al. 2017, section 3).

    A group without such a norm is ranked by :class:`Magnitude`.
    """

    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Scores:
        """See :class:`Importance`."""
        uses = [
            use
            for use in group.members
            if use.name == "weight" and use.role == "along" and isinstance(gm.get_submodule(use.path), _NORMS)
        ]
        if not uses:
            return Magnitude().scores(gm, group)
        total = np.zeros(group.size)
        for use, tensor in _tensors(gm, uses):
            total += _by_unit(group, use, _finite(use, tensor.double().abs().reshape(-1)))
        return total


_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class GeometricMedian(Importance):
    """The sum of the distances of a unit's weights to those of all other units (He et al. 2019, equation 4).

    What lies near the median of the others can be replaced by them and goes first.
    """

    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Scores:
        """See :class:`Importance`."""
        squared: Rows = np.zeros((group.size, group.size))
        for use, tensor in _tensors(gm, [use for use in group.members if use.role == "out"]):
            rows = _finite(use, tensor.double().movedim(use.dim, 0).flatten(1))
            inside = np.isin(use.atoms, group.units)
            order = np.argsort(use.atoms[inside], kind="stable")
            rows = rows[inside][order].reshape(group.size, -1)
            norms = (rows**2).sum(1)
            squared += np.maximum(norms[:, None] + norms[None, :] - 2 * rows @ rows.T, 0.0)
        return np.asarray(np.sqrt(squared).sum(1))


@dataclass(frozen=True)
class Random(Importance):
    """Random numbers, for comparisons: the same ones for the same seed and site.

    Attributes:
        seed: Seed of the numbers.
    """

    seed: int = 0

    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Scores:
        """See :class:`Importance`."""
        generator = np.random.default_rng([self.seed, zlib.crc32(group.site.encode())])
        return generator.random(group.size)


@dataclass(frozen=True)
class _Gradients(Importance):
    """Importances from the gradient of a loss with respect to a gate of each unit, at 1.

    The gate multiplies the weights and biases that make the unit, so that its gradient is their sum of weight times
    gradient. It is taken batch by batch, in eval mode.

    Attributes:
        data: Batches of (input, label).
        loss: A function of output and label; cross entropy of the first output by default.
        max_batches: Batches to look at.
    """

    data: Iterable[Any] = field(hash=False)
    loss: Loss | None = None
    max_batches: int = 8
    _known: list[Any] = field(default_factory=list, init=False, repr=False, compare=False, hash=False)

    def gates(self, gm: fx.GraphModule, group: ChannelGroup) -> Rows:
        """Gradients of the gates, shape (batches, units)."""
        products = self._products(gm)
        total: Rows = np.zeros((products.batches, group.size))
        for use, tensor in _tensors(gm, group.members, detached=False):
            if _makes(use, group) and id(tensor) in products.of:
                rows = products.of[id(tensor)][use.dim]
                for batch, values in enumerate(rows):
                    total[batch] += _by_unit(group, use, _finite(use, values, "gradients"))
        return total

    def _products(self, gm: fx.GraphModule) -> _Products:
        """Weight times gradient of every parameter, kept until another parameter or value is met."""
        parameters = tuple(gm.parameters())
        key = tuple((id(parameter), parameter._version) for parameter in parameters)
        if not self._known or self._known[0] != key:
            self._known[:] = [key, parameters, self._measured(gm)]
        found: _Products = self._known[2]
        return found

    def _measured(self, gm: fx.GraphModule) -> _Products:
        parameters = [p for p in gm.parameters() if p.is_floating_point()]
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        found: dict[int, list[list[torch.Tensor]]] = {}
        count = 0
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with eval_mode(gm), torch.enable_grad():
                for batch in _first(self.data, self.max_batches):
                    loss = self._loss_of(gm, batch, count)
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            product = (parameter.detach() * gradient).double()
                            rows = found.setdefault(id(parameter), [[] for _ in range(product.dim())])
                            for dim in range(product.dim()):
                                rows[dim].append(_sums(product, dim))
                    count += 1
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        if not count:
            raise DataError("There is no batch to take gradients from; give data with at least one (input, label).")
        return _Products(count, found)

    def _loss_of(self, gm: fx.GraphModule, batch: Any, number: int) -> torch.Tensor:
        where = f"data, batch {number}"
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"{where} is a {type(batch).__name__}; give batches of (input, label).")
        args, kwargs = feed(gm, batch[0], where)
        output = gm(*args, **kwargs)
        loss: Any = (_cross_entropy if self.loss is None else self.loss)(output, batch[1])
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss)):
            raise DataError(f"{where}: the loss is {loss!r}; it has to be one finite number, as a tensor.")
        return loss


@dataclass(frozen=True)
class _Products:
    """Weight times gradient, summed to each index of each dimension.

    Attributes:
        batches: How many batches there were.
        of: By identity of the parameter, for each dimension, a tensor for each batch.
    """

    batches: int
    of: Mapping[int, list[list[torch.Tensor]]]


@dataclass(frozen=True)
class Taylor(_Gradients):
    """How far the loss moves, to first order, if a unit goes (Molchanov et al. 2019, equation 8, with gates).

    The magnitude of the mean, over batches, of the gradient of the unit's gate.
    """

    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Scores:
        """See :class:`Importance`."""
        return np.asarray(np.abs(self.gates(gm, group).mean(0)))


@dataclass(frozen=True)
class Fisher(_Gradients):
    """Half the diagonal of the empirical Fisher information of the gates (Theis et al. 2018, equation 8).

    Gradients are squared batch by batch: with batches of one sample it is the information itself.
    """

    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Scores:
        """See :class:`Importance`."""
        return np.asarray(0.5 * (self.gates(gm, group) ** 2).mean(0))


@dataclass(frozen=True)
class _Function(Importance):
    """A user's function of a graph and a group."""

    function: Scorer

    def scores(self, gm: fx.GraphModule, group: ChannelGroup) -> Scores:
        try:
            found: Any = self.function(gm, group)
        except Exception as failure:
            raise PassError(
                f"The importance of {group.site!r} raised {type(failure).__name__}: {failure}; correct the function."
            ) from failure
        if isinstance(found, torch.Tensor):
            found = found.detach().cpu().numpy()
        try:
            return np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError) as failure:
            raise PassError(f"The importance of {group.site!r} is no array of numbers: {failure}.") from failure


_BY_NAME: dict[str, Importance] = {
    "batch-norm": BatchNormScale(),
    "geometric-median": GeometricMedian(),
    "l1": Magnitude(),
    "l2": Magnitude(2),
    "random": Random(),
}


def as_importance(given: object) -> Importance:
    """An importance by name, itself, or from a function of a graph and a group.

    Raises:
        UnknownNameError: If there is none of that name.
        PassError: If it is none of these.
    """
    if isinstance(given, str):
        if given not in _BY_NAME:
            raise UnknownNameError("importance", given, _BY_NAME)
        return _BY_NAME[given]
    if isinstance(given, Importance):
        return given
    if callable(given) and not isinstance(given, type):
        return _Function(given)
    raise PassError(f"importance takes a name, an Importance or a function of a graph and a group, got {given!r}.")


def checked_scores(importance: Importance, gm: fx.GraphModule, groups: Sequence[ChannelGroup]) -> list[Scores]:
    """The scores of the units of some groups.

    Raises:
        PassError: If they are not one finite number for each unit.
    """
    found = importance.all_scores(gm, groups)
    for group, scores in zip(groups, found, strict=True):
        if scores.shape != (group.size,):
            raise PassError(
                f"The importance of {group.site!r} has shape {scores.shape}; give one number for each of its "
                f"{group.size} units."
            )
        if not np.isfinite(scores).all():
            raise PassError(
                f"The importance of {group.site!r} is NaN or infinite for some units; look at the weights "
                "of the layers that make and read them, or at the data or function that it comes from."
            )
    return found


def _makes(use: ParameterUse, group: ChannelGroup) -> bool:
    """Whether a tensor makes a unit: the weight of a layer, or the bias that is added to it."""
    makers = {one.path for one in group.members if one.role == "out"}
    return use.role == "out" or (use.role == "along" and "bias" in use.name and use.path in makers)


def _tensors(
    gm: fx.GraphModule, uses: Iterable[ParameterUse], detached: bool = True
) -> list[tuple[ParameterUse, torch.Tensor]]:
    """Each tensor of some uses once for each dimension, detached unless it is wanted as it is."""
    found = []
    seen: set[tuple[int, int]] = set()
    for use in uses:
        tensor: torch.Tensor = getattr(gm.get_submodule(use.path), use.name)
        if (id(tensor), use.dim) not in seen:
            seen.add((id(tensor), use.dim))
            found.append((use, tensor.detach() if detached else tensor))
    return found


def _sums(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum at each index of a dimension."""
    others = [axis for axis in range(tensor.dim()) if axis != dim]
    return tensor.sum(others, dtype=torch.float64) if others else tensor.double()


_ROWS, _PIECE, _SMALL = 16, 1 << 20, 1 << 15
"""Rows that are summed in single precision, elements looked at at once, and elements that are not worth the trouble."""


def _sums_of_powers(tensor: torch.Tensor, dim: int, order: int) -> torch.Tensor:
    """The sum of magnitudes (order 1) or squares (order 2) at each index of a dimension, in double precision.

    Large tensors are read piece by piece, so that no copy of them is made, and :data:`_ROWS` numbers at a time are
    added up in the tensor's own precision: the sum is right within 1e-6 in float32, in a third of the time.
    """
    power: Any = torch.abs if order == 1 else torch.square
    count = math.prod(tensor.shape[:dim])
    plain = tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous()
    if not plain or tensor.numel() < _SMALL or count < _ROWS:
        return _sums(power(tensor), dim)
    rows = tensor.view(count, -1)
    width = rows.shape[1]
    step = max(_ROWS, _PIECE // width // _ROWS * _ROWS)
    total = rows.new_zeros(width, dtype=torch.float64)
    space = torch.empty_like(rows[:step])
    for piece in torch.split(rows, step):
        values = power(piece, out=space[: len(piece)])
        whole = len(piece) // _ROWS * _ROWS
        total += values[:whole].view(-1, _ROWS, width).sum(1).sum(0, dtype=torch.float64)
        total += values[whole:].sum(0, dtype=torch.float64)
    return total.view(tensor.shape[dim], -1).sum(1)


def _finite(use: ParameterUse, values: torch.Tensor, what: str = "values") -> Rows:
    found: Rows = values.cpu().numpy()
    if not math.isfinite(found.sum()):
        raise PassError(
            f"{use.name!r} of {use.path!r} holds NaN or infinite {what}, so that its channels cannot be ranked; "
            "repair the weights, or leave the layer out with ignore."
        )
    return found


def _by_unit(group: ChannelGroup, use: ParameterUse, values: Rows) -> Scores:
    """Sum the values of a dimension's indices to their units."""
    scores = np.zeros(group.size)
    inside = np.isin(use.atoms, group.units)
    np.add.at(scores, np.searchsorted(group.units, use.atoms[inside]), values[inside])
    return scores


def _first(data: Iterable[Any], count: int) -> Iterable[Any]:
    for _, batch in zip(range(count), data, strict=False):
        yield batch


def _cross_entropy(output: Any, label: Any) -> torch.Tensor:
    scores = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
    return nn.functional.cross_entropy(scores, label)
