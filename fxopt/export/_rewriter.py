"""What all forms of quantized files share: from a float ONNX model with markers to one without.

A marker stands for a quantizer. The rewriter surveys the markers, gives weights their integers and keeps the names in
order; a form of its own says what a marker on an activation and on a weight becomes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fxopt.errors import ExportError
from fxopt.export._torch_onnx import MARKER, MARKER_DOMAIN, Marked, rename_values
from fxopt.graph.fake_quantize import ActivationQuantizer, WeightQuantizer

if TYPE_CHECKING:
    import onnx

__all__ = ["INNER", "QuantizedWeight", "Rewriter", "Rewritten"]

INNER = ("quantized", "raised", "unclipped", "loose", "integers")
"""Suffixes of the names of values on the way to a quantizer's result."""


@dataclass(eq=False)
class QuantizedWeight:
    """A quantized weight on its way into the file.

    Attributes:
        name: The initializer's name.
        values: Its floats.
        quantizer: Its quantizer.
        permutation: How its readers transpose it, which is done here and now, or None.
        output: The value that its readers read.
        factor: A power of two that integers are multiplied and steps divided by, which leaves every value as it is.
        least_scale: Steps may not be smaller, so that a bias fits into its integers.
    """

    name: str
    values: NDArray[np.float32]
    quantizer: WeightQuantizer
    permutation: tuple[int, ...] | None
    output: str = ""
    factor: int = 1
    least_scale: NDArray[np.float32] = field(default_factory=lambda: np.zeros(1, np.float32))

    @property
    def axis(self) -> int:
        """The axis that the scales belong to."""
        axis = self.quantizer.axis
        return axis if self.permutation is None else self.permutation.index(axis)

    @property
    def scale(self) -> NDArray[np.float32]:
        """Sizes of a step, shape (channels,)."""
        own = self.quantizer.scale.detach().cpu().numpy() / np.float32(self.factor)
        return np.maximum(own, self.least_scale).astype(np.float32)

    def integers(self) -> NDArray[np.int8]:
        """On the quantizer's grid, unless a bias called for larger steps."""
        weight = torch.from_numpy(self.values)
        plain = self.quantizer.integers(weight).numpy()
        own = self.quantizer.scale.detach().cpu().numpy()
        ratio = np.moveaxis(np.ones(weight.shape, np.float64), self.quantizer.axis, -1) * (own / self.scale)
        found = np.rint(plain * np.moveaxis(ratio, -1, self.quantizer.axis)).astype(np.int8)
        return self._permuted(found)

    def floats(self) -> NDArray[np.float32]:
        """The weight as it was before quantization, transposed as its readers want it."""
        return self._permuted(self.values)

    def _permuted(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self.permutation is None else np.ascontiguousarray(values.transpose(self.permutation))


@dataclass(frozen=True)
class Rewritten:
    """What a form did to a model, for those who compare it with its graph.

    Attributes:
        held: The name of the value behind each activation quantizer, floats on its grid, by the quantizer's path.
        rounded: Parameters that the file rounds and the graph does not, as the file has them.
    """

    held: Mapping[str, str]
    rounded: Mapping[str, NDArray[np.float32]]


class Rewriter(ABC):
    """Replaces the markers of one model, in place.

    Attributes:
        has_weight_offsets: Whether the form holds weights on asymmetric grids.
    """

    has_weight_offsets: ClassVar[bool] = False

    def __init__(self, marked: Marked) -> None:
        self.model = marked.model
        self.graph = marked.model.graph
        self._quantizers = marked.quantizers
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self._renamed: dict[str, str] = {}
        self._weights: dict[tuple[str, int, tuple[int, ...] | None], QuantizedWeight] = {}
        self._behind: dict[str, list[QuantizedWeight]] = defaultdict(list)
        self.weight_of: dict[str, QuantizedWeight] = {}
        self.site_of: dict[str, str] = {}
        self._path_of: dict[str, str] = {}
        self.dropped: set[str] = set()
        self.rounded: dict[str, NDArray[np.float32]] = {}
        self._stored: dict[str, onnx.TensorProto] = {}

    def run(self) -> Rewritten:
        """Rewrite the model.

        Raises:
            ExportError: If a quantizer has a grid that the form cannot hold.
        """
        import onnx

        markers = [node for node in self.graph.node if node.domain == MARKER_DOMAIN and node.op_type == MARKER]
        sites = {node.output[0]: _attributes(node) for node in markers}
        activations = {
            output: found
            for output, found in sites.items()
            if isinstance(self._quantizers[found["site"]], ActivationQuantizer)
        }
        self.site_of = {output: found["site"] for output, found in activations.items()}
        self._path_of = {output: found["path"] for output, found in activations.items()}
        for node in markers:
            quantizer = self._quantizers[sites[node.output[0]]["site"]]
            if isinstance(quantizer, WeightQuantizer):
                self._survey(node, sites[node.output[0]]["site"], quantizer)
        self.prepare()
        nodes = [new for node in list(self.graph.node) for new in self._rewritten(node)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        self._tidy()
        renamed = self._name_values()
        kept = [(entry.domain, entry.version) for entry in self.model.opset_import if entry.domain != MARKER_DOMAIN]
        del self.model.opset_import[:]
        self.model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in kept)
        held = {path: renamed[output] for output, path in self._path_of.items()}
        return Rewritten(held, self.rounded)

    def prepare(self) -> None:  # noqa: B027
        """What a form has to know before the first node is rewritten; nothing by default."""

    @abstractmethod
    def quantize(self, site: str, value: str, output: str) -> Iterator[onnx.NodeProto]:
        """The nodes that hold the activation ``value`` to the grid of quantizer ``site``, as ``output``."""

    @abstractmethod
    def dequantize(self, weight: QuantizedWeight) -> Iterator[onnx.NodeProto]:
        """The nodes that give a quantized weight, as ``weight.output``."""

    def rewrite(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The nodes for an ordinary one; itself by default."""
        yield node

    def activation(self, site: str) -> ActivationQuantizer:
        """The activation quantizer ``site``."""
        quantizer = self._quantizers[site]
        if not isinstance(quantizer, ActivationQuantizer):
            raise ExportError(f"{site!r} is no activation quantizer.")
        return quantizer

    def is_stored(self, name: str) -> bool:
        """Whether a value is an initializer of the float model."""
        return name in self._initializers

    def array(self, name: str) -> NDArray[Any]:
        """The values of an initializer of the float model."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self._initializers[name])

    def rank(self, name: str) -> int | None:
        """Number of dimensions of a value, if the model tells."""
        for value in (*self.graph.value_info, *self.graph.output):
            if value.name == name:
                return len(value.type.tensor_type.shape.dim)
        return None

    def store(self, name: str, values: NDArray[Any]) -> str:
        """Store an initializer, once."""
        from onnx import numpy_helper

        if name not in self._stored:
            self._stored[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def store_new(self, name: str, values: NDArray[Any], read_as_float: bool) -> str:
        """Store integers under the parameter's name, or one beside it if that still stands for something else."""
        free, count = name, 0
        while free in self._stored or (read_as_float and free in self._initializers):
            count += 1
            free = f"{name}_quantized_{count}"
        return self.store(free, values)

    def _survey(self, node: onnx.NodeProto, site: str, quantizer: WeightQuantizer) -> None:
        """A weight is read as it is, or transposed, which is done here and now."""
        name, output = node.input[0], node.output[0]
        if name not in self._initializers:
            layer = site.rpartition(".")[0]
            raise ExportError(f"The weight of {layer!r} is computed, not stored; quantize stored ones.")
        if quantizer.zero_point is not None and not self.has_weight_offsets:
            raise ExportError(
                f"{site.rpartition('.')[0]!r} has a weight on an asymmetric grid, which integer kernels do not read; "
                'quantize with WeightScheme(symmetric=True), or export with format="qonnx" or "float".'
            )
        values = self.array(name).astype(np.float32)
        for reader in self.readers[output]:
            permutation = self.permutation_of(reader)
            key = (name, id(quantizer), permutation)
            weight = self._weights.setdefault(key, QuantizedWeight(name, values, quantizer, permutation))
            if reader.op_type == "Transpose":
                wanted = reader.output[0]
                self.dropped.add(wanted)
            else:
                wanted = output if permutation is None else f"{output}_transposed"
                reader.input[:] = [wanted if given == output else given for given in reader.input]
            if not weight.output:
                weight.output = wanted
                self._behind[output].append(weight)
            self._renamed[wanted] = weight.output
            self.weight_of[wanted] = weight

    def permutation_of(self, reader: onnx.NodeProto) -> tuple[int, ...] | None:
        """How a reader of a weight wants it transposed."""
        return tuple(reader.attribute[0].ints) if reader.op_type == "Transpose" else None

    def _rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        output = node.output[0]
        if output in self.site_of:
            yield from self.quantize(self.site_of[output], node.input[0], output)
        elif node.domain == MARKER_DOMAIN:
            for weight in self._behind[output]:
                yield from self.dequantize(weight)
        elif output not in self.dropped:
            for new in self.rewrite(node):
                new.input[:] = [self._renamed.get(name, name) for name in new.input]
                yield new

    def _tidy(self) -> None:
        """Drop initializers that nobody reads and notes on values that are gone."""
        read = {name for node in self.graph.node for name in node.input}
        floats = [_copied(t) for name, t in self._initializers.items() if name in read and name not in self._stored]
        del self.graph.initializer[:]
        self.graph.initializer.extend([*floats, *(t for name, t in self._stored.items() if name in read)])
        made = {name for node in self.graph.node for name in node.output}
        notes = [_copied(value) for value in self.graph.value_info if value.name in made]
        del self.graph.value_info[:]
        self.graph.value_info.extend(notes)

    def _name_values(self) -> dict[str, str]:
        """Call what the exporter left nameless after the quantizer or weight that it comes from."""
        ends = {value.name for value in self.graph.output}
        taken = {name for node in self.graph.node for name in (*node.input, *node.output)} - set(self.site_of)
        stems = dict(self._path_of) | {name: f"{weight.name}_dequantized" for name, weight in self.weight_of.items()}
        renamed: dict[str, str] = {}
        for old, stem in stems.items():
            new, count = (old, 1) if old in ends else (stem, 1)
            while new in taken and old not in ends:
                count += 1
                new = f"{stem}_{count}"
            taken.add(new)
            renamed |= {old: new} | {f"{old}_{suffix}": f"{new}_{suffix}" for suffix in INNER}
        rename_values(self.model, renamed)
        for node in self.graph.node:
            node.name = node.name or f"{node.output[0]}/{node.op_type}"
        return renamed


def _attributes(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.name: entry.s.decode() for entry in node.attribute}


def _copied(message: Any) -> Any:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin
