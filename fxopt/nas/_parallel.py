"""Several processes that train one network, as torchrun starts them."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.utils import _pytree as pytree

from fxopt.errors import DataError

__all__ = ["Workers"]


class Workers:
    """The processes of torch.distributed, or this one alone.

    Attributes:
        net: The network to compute losses of weights with, which averages gradients over processes.
        is_first: Whether this process writes files.
    """

    def __init__(self, net: nn.Module) -> None:
        self._size, self._rank = 1, 0
        self.net = net
        if distributed.is_available() and distributed.is_initialized():
            self._size, self._rank = distributed.get_world_size(), distributed.get_rank()
        self.is_first = self._rank == 0
        if self._size > 1:
            # Of a mixed operator one candidate is computed, the same one in all processes.
            self.net = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)

    def share(self, batch: Any) -> Any:
        """This process's part of a batch.

        Raises:
            DataError: If there are fewer samples than processes.
        """
        if self._size == 1:
            return batch

        def part(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not leaf.dim():
                return leaf
            if len(leaf) < self._size:
                raise DataError(f"A batch of {len(leaf)} cannot be shared by {self._size} processes; take larger ones.")
            whole = len(leaf) // self._size * self._size
            return leaf[self._rank : whole : self._size]

        return pytree.tree_map(part, batch)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        if self._size == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total / self._size
