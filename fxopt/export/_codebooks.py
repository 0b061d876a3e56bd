"""Weights of few distinct values as indices into a table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

    from fxopt.graph.fake_quantize import CodebookQuantizer

__all__ = ["store_codebooks"]


def store_codebooks(
    model: onnx.ModelProto, codebooks: Mapping[str, CodebookQuantizer], width_of: Callable[[int], int]
) -> None:
    """Replace float weights by what they were written out of, in place: indices, and a Gather from the codebook.

    Runtimes compute a Gather of constants once, when they load the file. A weight that the exporter has changed on its
    way, other than by transposing it, stays in floats.

    Args:
        model: The model, which holds the weights as float initializers under their names.
        codebooks: Where each weight has come from.
        width_of: Bits of the type to store indices of so many bits in.
    """
    from onnx import TensorProto, helper, numpy_helper

    made = []
    for name, quantizer in codebooks.items():
        found = _find(model, name, quantizer)
        if found is None:
            continue
        tensor, labels = found
        old, book, plain, rebuilt = tensor.name, f"{name}_codebook", f"{name}_indices", f"{name}_dequantized"
        tensor.CopyFrom(numpy_helper.from_array(_unsigned(labels, width_of(quantizer.bits)), name))
        model.graph.initializer.append(numpy_helper.from_array(_table(quantizer), book))
        for node in model.graph.node:
            node.input[:] = [rebuilt if given == old else given for given in node.input]
        made.append(helper.make_node("Cast", [name], [plain], name=f"{plain}/Cast", to=TensorProto.INT32))
        made.append(helper.make_node("Gather", [book, plain], [rebuilt], name=f"{rebuilt}/Gather"))
    if not made:
        return
    nodes = [*made, *model.graph.node]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _find(
    model: onnx.ModelProto, name: str, quantizer: CodebookQuantizer
) -> tuple[onnx.TensorProto, NDArray[Any]] | None:
    """The initializer that holds a weight, as it is or transposed under another name, and the index of each value."""
    from onnx import numpy_helper

    named = [tensor for tensor in model.graph.initializer if tensor.name == name]
    table, plain = _table(quantizer), quantizer.labels.cpu().numpy()
    for tensor in named or model.graph.initializer:
        for labels in (plain, plain.T):
            if tuple(tensor.dims) == labels.shape and np.array_equal(table[labels], numpy_helper.to_array(tensor)):
                return tensor, np.ascontiguousarray(labels)
    return None


def _table(quantizer: CodebookQuantizer) -> NDArray[np.float32]:
    return quantizer.codebook.detach().cpu().numpy().astype(np.float32)


def _unsigned(values: NDArray[Any], width: int) -> NDArray[Any]:
    import ml_dtypes

    types: dict[int, Any] = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
    return values.astype(types[width])
