"""What quantizing one float graph finds out, kept for all policies that quantize the same graph.

Ranges of values and weights on their grids follow from the float graph, the data and the options alone; a policy says
which of them are wanted. A search therefore calibrates once, and a trial quantizes nothing that an earlier one did.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxopt.graph import edit
from fxopt.graph.fake_quantize import ActivationQuantizer, QuantizedLayer, quantize_layer
from fxopt.graph.grids import WeightScheme
from fxopt.graph.sparsity import sparse_sites
from fxopt.passes._least_squares import Moments
from fxopt.passes._reconstruction import Reconstruction, Reconstructor
from fxopt.passes._rounding import can_be_rounded, rounded_layer

__all__ = ["ROUNDED_BITS", "Findings", "Site"]

ROUNDED_BITS = 7
"""Weights of more bits lose nothing by rounding to the nearest."""


@dataclass(frozen=True)
class Site:
    """A quantizer that was inserted.

    Attributes:
        quantizer: The quantizer.
        name: What it quantizes, for messages.
        nodes: Names of the nodes whose values it holds to one grid.
    """

    quantizer: ActivationQuantizer
    name: str
    nodes: tuple[str, ...]


class Findings:
    """Ranges and weights that were found for one float graph; another graph's are forgotten.

    Args:
        options: How many samples the weights are rounded by, and how; None rounds them to the nearest.
    """

    def __init__(self, options: Reconstruction | None = None) -> None:
        self.source: Mapping[str, object] = {}
        self._options = options
        self._tensors: list[torch.Tensor] = []
        self._observed: dict[tuple[str, ...], Any] = {}
        self._settled: dict[tuple[tuple[str, ...], int], ActivationQuantizer] = {}
        self._layers: dict[tuple[str, int], QuantizedLayer] = {}
        self._moments: dict[str, Moments] = {}

    def begin(self, gm: fx.GraphModule, data: Iterable[Any] | None) -> None:
        """Turn to a float graph: what is known of it is kept, and moments of its layers' inputs are gathered once."""
        tensors = list(gm.state_dict(keep_vars=True).values())
        if len(tensors) == len(self._tensors) and all(a is b for a, b in zip(tensors, self._tensors, strict=True)):
            return
        self._tensors, self.source = tensors, {}
        self._observed, self._settled, self._layers, self._moments = {}, {}, {}, {}
        if self._options is not None and data is not None:
            self._moments = Reconstructor(gm, data, replace(self._options, sequential=False)).moments()
            for site in sparse_sites(gm):  # Their zeros have to stay.
                self._moments.pop(site, None)

    def unseen(self, sites: Sequence[Site]) -> list[Site]:
        """The sites whose values no calibration has seen."""
        return [site for site in sites if site.nodes not in self._observed]

    def learn(self, sites: Sequence[Site], source: Mapping[str, object]) -> None:
        """Keep what the quantizers at some sites have observed, and in what data."""
        self.source = source
        for site in sites:
            self._observed[site.nodes] = site.quantizer.observed

    def settle(self, sites: Sequence[Site]) -> None:
        """Take scales and zero points from what was observed at these sites, now or before.

        Raises:
            DataError: If no data reached a site, or values that are not finite.
        """
        for site in sites:
            key = (site.nodes, site.quantizer.bits)
            if key not in self._settled:
                site.quantizer.observed = self._observed[site.nodes]
                site.quantizer.settle(site.name)
                self._settled[key] = copy.deepcopy(site.quantizer)
            site.quantizer.settle_like(self._settled[key])

    def layer(self, module: nn.Module, path: str, bits: tuple[int, int], scheme: WeightScheme) -> QuantizedLayer:
        """The quantized form of a layer; its tensors are shared with all that were asked for at these weight bits."""
        known = self._layers.get((path, bits[0]))
        if known is None:
            known = quantize_layer(module, bits[0], scheme=scheme)
            how = self._options
            if how is not None and path in self._moments and can_be_rounded(known, how.most_unknowns, ROUNDED_BITS):
                known = rounded_layer(known, self._moments[path], how.ridge) or known
            self._layers[path, bits[0]] = known
        made: Any = edit.clone_module(known)
        made.activation_bits = bits[1]
        return made  # type: ignore[no-any-return]
