"""Several processes that train one network, as torchrun starts them."""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Any

import torch
from torch import distributed, nn
from torch.utils import _pytree as pytree

from fxopt.data import IGNORED_LABEL, split_batch
from fxopt.errors import DataError, FxoptError

__all__ = ["Workers"]


class _WithSpare(nn.Module):
    """A network with a parameter that it never uses.

    Of a mixed operator one candidate is computed, so that torch has to look for unused parameters. The relaxation
    computes them all behind its warm-up, and where torch finds none unused it warns of the flag, which nobody can set.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.spare = nn.Parameter(next(net.parameters()).new_zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes."""
        return self.net(*args, **kwargs)


def is_first_process() -> bool:
    """Whether this process is the first of torch.distributed's, or alone; it writes files."""
    together = distributed.is_available() and distributed.is_initialized()
    return not together or distributed.get_rank() == 0


class Workers:
    """The processes of torch.distributed, or this one alone, while a network is trained.

    Attributes:
        net: The network to compute losses of weights with, which averages gradients over processes.
        is_first: Whether this process writes files.
        size: How many there are.
    """

    def __init__(self, net: nn.Module) -> None:
        self.size, self._rank = 1, 0
        self.net = self._plain = net
        if distributed.is_available() and distributed.is_initialized():
            self.size, self._rank = distributed.get_world_size(), distributed.get_rank()
        self.is_first = is_first_process()
        if self.size > 1:
            # Which candidates are computed is the same in all processes.
            self.net = nn.parallel.DistributedDataParallel(_WithSpare(net), find_unused_parameters=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the process group, which then ends with ``destroy_process_group``.

        The wrapper refers to itself. Where it outlives the group's end, so do the threads of gloo, and an interpreter
        that is shut down under them aborts now and then.
        """
        self.net = self._plain
        if self.size > 1:
            gc.collect()

    def share(self, batch: Any, what: str) -> Any:
        """This process's part of a batch; where there are fewer samples than processes, maybe one without a label.

        Raises:
            DataError: If the batch is no pair of inputs and labels.
        """
        if self.size == 1:
            return batch
        inputs, label = split_batch(batch, what)
        count = _count(label)
        if self._rank < count:
            return pytree.tree_map_only(
                torch.Tensor, lambda one: one[self._rank :: self.size] if one.dim() else one, (inputs, label)
            )
        inputs = pytree.tree_map_only(torch.Tensor, lambda one: one[:1] if one.dim() else one, inputs)
        label = pytree.tree_map_only(torch.Tensor, lambda one: torch.full_like(one[:1], IGNORED_LABEL), label)
        return inputs, label

    def weight(self, batch: Any, what: str) -> float:
        """How much this process's part of a batch is of an equal one: means with these weights are the batch's."""
        if self.size == 1:
            return 1.0
        count = _count(split_batch(batch, what)[1])
        if not count:
            raise DataError(f"{what} gives labels without a tensor that several processes could share; give tensors.")
        return len(range(self._rank, count, self.size)) * self.size / max(1, count)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self._device(), copy=True)
        distributed.all_reduce(total)
        return (total / self.size).to(tensor.device)

    def any(self, found: bool) -> bool:
        """Whether it is so in any process."""
        return float(self.mean(torch.tensor(float(found)))) > 0.0

    def begin(self, alpha: torch.Tensor, step: int) -> None:
        """Give all processes the architecture of the first, and see that all begin at one step.

        Raises:
            FxoptError: If they do not.
        """
        if self.size == 1:
            return
        steps = [torch.zeros(1, dtype=torch.long, device=self._device()) for _ in range(self.size)]
        distributed.all_gather(steps, torch.tensor([step], device=self._device()))
        found = [int(one) for one in steps]
        if len(set(found)) > 1:
            raise FxoptError(
                f"The processes begin at the steps {found}: they find different checkpoints. Give a folder that all "
                "of them see, or the same file to each."
            )
        self._broadcast([alpha])

    def end(self) -> None:
        """Give all processes the statistics of the first, which is the one that writes."""
        self._broadcast([one for one in self._plain.buffers() if one.numel()])

    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        if self.size == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                sent = tensor.detach().to(self._device(), copy=True)
                distributed.broadcast(sent, 0)
                tensor.copy_(sent)

    def _device(self) -> torch.device:
        return next(self._plain.parameters()).device


def _count(label: Any) -> int:
    return max((len(leaf) for leaf in tensors_of(label)), default=0)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.dim()]
