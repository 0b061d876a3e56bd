"""Workloads: the arrays that every target costs, one row for each operator.

:data:`ROW_DTYPE` has the layout of the C struct in ``_rows.pxd`` (checked at import). The functions below give the
quantities that follow from a row, for whole arrays; the compiled models use the same definitions in C.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxopt.decisions import FLOAT_BITS
from fxopt.errors import FxoptError, TargetError
from fxopt.targets._soundness import first_fault, row_layout

__all__ = [
    "FLOAT_BITS",
    "ROW_DTYPE",
    "Activation",
    "ColumnWorkload",
    "Floats",
    "OpKind",
    "Rows",
    "Workload",
    "bias_elements",
    "compute_bits",
    "default_rows",
    "in_elements",
    "macs",
    "make_row",
    "out_elements",
    "parameters",
    "stored_bytes",
    "traffic_bytes",
    "weight_bytes",
    "weights",
]

Rows: TypeAlias = NDArray[np.void]
Floats: TypeAlias = NDArray[np.float64]


class OpKind(enum.IntEnum):
    """What an operator does, as far as its cost goes."""

    CONV = 0
    DEPTHWISE = 1
    LINEAR = 2
    MATMUL = 3
    ELEMENTWISE = 4
    POOL = 5
    NORM = 6
    SOFTMAX = 7
    EMBEDDING = 8
    COPY = 9
    RESIZE = 10
    UNKNOWN = 11


class Activation(enum.IntEnum):
    """What an ELEMENTWISE operator is, as far as runtimes merge it into what makes its input."""

    NONE = 0
    """Arithmetic: additions, products, and the like."""
    CLAMP = 1
    """An activation that is linear but for a kink or two (ReLU, ReLU6), which every fusing runtime merges."""
    CURVE = 2
    """Any other activation (SiLU, GELU, hardswish), which some runtimes compute by itself."""


_FLAGS = ("fused", "transposed", "bias", "reused")
_SIZES = (
    *("inputs", "n", "c", "k", "groups"),
    *("in_d", "in_h", "in_w", "out_d", "out_h", "out_w"),
    *("kernel_d", "kernel_h", "kernel_w", "stride_d", "stride_h", "stride_w", "dilation"),
)
_BITS = ("weight_bits", "activation_bits", "output_bits")
_DENSITIES = ("weight_density", "activation_density")
_AMOUNTS = ("held", "live_bytes", "position_bytes")

ROW_DTYPE: np.dtype[np.void] = np.dtype(
    [(name, np.int32) for name in ("kind", *_FLAGS, "activation", *_SIZES, *_BITS)]
    + [(name, np.float64) for name in (*_DENSITIES, *_AMOUNTS)],
    align=True,
)
"""Fields of a row.

``kind`` (:class:`OpKind`), ``fused`` (1: a fusing runtime merges it into its producer), ``transposed`` (1: a transposed
convolution; or a COPY that rearranges elements, rather than put tensors side by side), ``bias`` (1: has a bias vector),
``reused`` (1: its weights are those of an earlier row), ``activation`` (:class:`Activation` of an ELEMENTWISE operator,
0 otherwise), ``inputs`` (number of activation inputs), ``n`` (batch), ``c`` (input channels, or the length of a
reduction; for EMBEDDING the number of entries), ``k`` (output channels or columns), ``groups``, sizes of input, output,
kernel and stride in three dimensions (1 where absent; LINEAR and MATMUL hold the rows per sample in ``in_h`` and
``out_h``), ``dilation`` (the largest of a kernel's), bits (32: floating point), densities in (0, 1], ``held`` (elements
of parameters besides weights and bias that no earlier row holds: those of a norm, or an embedding of positions),
``live_bytes``, the bytes of all activations that are alive while the row runs, and ``position_bytes``, the bytes that
tell where the weights stand that are not zero (0: zeros are stored like any weight, whatever the density).
"""


def _check_layout() -> None:
    fields: Mapping[str, Any] = ROW_DTYPE.fields or {}
    ours = {name: int(fields[name][1]) for name in ROW_DTYPE.names or ()} | {"": ROW_DTYPE.itemsize}
    compiled = row_layout()
    if list(ours.items()) != list(compiled.items()):
        raise FxoptError(
            f"fxopt.targets was compiled for other rows than rows.py describes ({compiled} against {ours}). "
            "Build it again: `pip install -e .` or `python setup.py build_ext --inplace`."
        )


_check_layout()


def default_rows(count: int) -> Rows:
    """``count`` rows of kind UNKNOWN with every size 1, every bit-width 32, dense, no amounts."""
    rows = np.zeros(count, ROW_DTYPE)
    rows["kind"] = OpKind.UNKNOWN
    for name in _SIZES:
        rows[name] = 1
    for name in _BITS:
        rows[name] = FLOAT_BITS
    for name in _DENSITIES:
        rows[name] = 1.0
    return rows


def make_row(kind: OpKind, **fields: float) -> Rows:
    """One row, shape (1,): the defaults of :func:`default_rows`, with ``fields`` set.

    Raises:
        TargetError: If a field is not one of :data:`ROW_DTYPE`.
    """
    rows = default_rows(1)
    rows["kind"] = kind
    for name, value in fields.items():
        if name not in (ROW_DTYPE.names or ()):
            raise TargetError(f"A row has no field {name!r}. Fields: {', '.join(ROW_DTYPE.names or ())}.")
        rows[name] = value
    return rows


_WITH_MACS = frozenset(map(int, (OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR, OpKind.MATMUL)))


class Workload:
    """What a model asks of the hardware, for one policy or many.

    Args:
        rows: Structured array of :data:`ROW_DTYPE`, shape (policies, rows), or (rows,) for one policy. Neither
            copied (unless it is not contiguous) nor changed.
        names: A name for each row, unique or not: the module path, or the kind of a functional call.
        columns: The same as columns, if ``rows`` was written out from some and nobody else has it: they are costed in
            less time.

    Attributes:
        rows: A read-only view, shape (policies, rows).
        names: One name a row.
        columns: What the rows were written out from, or None.

    Raises:
        TargetError: If the array has another dtype or shape, or a row holds a size below 1, a bit-width out of
            1..32, a density out of (0, 1], NaN, channels that its groups do not divide, or sizes that its kind does
            not have; it names the row.
    """

    __slots__ = ("columns", "names", "rows")

    def __init__(self, rows: Rows, names: Sequence[str], columns: ColumnWorkload | None = None) -> None:
        if rows.dtype != ROW_DTYPE:
            raise TargetError(f"A workload needs an array of ROW_DTYPE, got {rows.dtype}. Make rows by default_rows().")
        if rows.ndim not in (1, 2):
            raise TargetError(f"A workload has shape (policies, rows) or (rows,), got {rows.shape}.")
        shaped = np.ascontiguousarray(rows).reshape(-1 if rows.ndim == 2 else 1, rows.shape[-1]) if rows.size else rows
        if shaped.size == 0:
            raise TargetError(f"A workload needs at least one policy and one row, got shape {rows.shape}.")
        if len(names) != shaped.shape[1]:
            raise TargetError(f"A workload of {shaped.shape[1]} rows needs as many names, got {len(names)}.")
        fault = first_fault(shaped)
        if fault is not None:
            raise TargetError(_explain_fault(shaped[fault], names[fault[1]], fault))
        view = shaped.view()
        view.flags.writeable = False
        self.rows: Rows = view
        self.names = tuple(names)
        self.columns = columns

    @property
    def policies(self) -> int:
        """Number of policies."""
        return int(self.rows.shape[0])

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.rows.shape[1])

    def __repr__(self) -> str:
        return f"Workload({self.policies} policies, {len(self)} rows)"


_BOUNDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_FLAGS, lambda value: value in (0, 1), "it has to be 0 or 1"),
    (("activation",), lambda value: 0 <= value < len(Activation), "it has to be an Activation"),
    (_SIZES, lambda value: value >= 1, "sizes and counts have to be at least 1"),
    (_BITS, lambda value: 1 <= value <= FLOAT_BITS, f"bits go from 1 to {FLOAT_BITS}"),
    (_DENSITIES, lambda value: 0.0 < value <= 1.0, "a density is above 0 and at most 1"),
    (_AMOUNTS, lambda value: 0.0 <= value < np.inf, "it has to be finite and not negative"),
)


class ColumnWorkload:
    """A workload of many policies, kept as what differs between them: a row for all, and columns.

    It costs what the :class:`Workload` that :meth:`expand` gives costs, at a fraction of the memory and time.

    Args:
        template: One row for each operator, shape (rows,).
        columns: For each row the fields that differ from policy to policy; int32 or float64 (densities
            and amounts), shape (policies,).
        names: A name for each row.
        policies: Number of policies.

    Raises:
        TargetError: If a field of any policy is not sound, as :class:`Workload` says; or if columns have another
            shape or type.
    """

    __slots__ = ("columns", "names", "policies", "template")

    def __init__(
        self, template: Rows, columns: Sequence[Mapping[str, NDArray[Any]]], names: Sequence[str], policies: int
    ) -> None:
        self.template = np.ascontiguousarray(template)
        self.columns = tuple(columns)
        self.names = tuple(names)
        self.policies = policies
        if len(self.columns) != len(self.template):
            raise TargetError(f"{len(self.template)} rows need columns for each, got {len(self.columns)}.")
        for fields in self.columns:
            for name, column in fields.items():
                if column.dtype != ROW_DTYPE[name] or column.shape != (policies,):
                    raise TargetError(
                        f"Column {name!r} needs {policies} values of {ROW_DTYPE[name]}, got {column.dtype} of shape "
                        f"{column.shape}."
                    )
        self._check_bounds()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.template)

    def __repr__(self) -> str:
        return f"ColumnWorkload({self.policies} policies, {len(self)} rows)"

    def may_have_macs(self, index: int) -> bool:
        """Whether a row is of a kind that has multiply-accumulates, under any policy."""
        return "kind" in self.columns[index] or int(self.template["kind"][index]) in _WITH_MACS

    def expand(self) -> Workload:
        """The same rows written out, shape (policies, rows)."""
        rows = np.repeat(self.template[None, :], self.policies, axis=0)
        for index, fields in enumerate(self.columns):
            for name, column in fields.items():
                rows[name][:, index] = column
        return Workload(rows, self.names, self)

    def _check_bounds(self) -> None:
        """See that rows are sound: each of one policy in full, the other policies in the fields that differ."""
        extremes = np.repeat(self.template[None, :], 2, axis=0)
        for index, fields in enumerate(self.columns):
            for name, column in fields.items():
                extremes[name][:, index] = column.min(), column.max()
            groups = fields.get("groups", self.template["groups"][index])
            for name in ("c", "k"):
                size = fields.get(name, self.template[name][index])
                if np.any(groups > 1) and np.any(size % np.maximum(groups, 1)):
                    raise TargetError(f"Row {index} ({self.names[index]!r}): groups do not divide all of its {name}.")
        for name in ("c", "k", "groups"):
            # Divisibility was looked at above, policy by policy.
            extremes[name] = np.minimum(extremes[name], 1)
        Workload(extremes, self.names)


def _explain_fault(row: Any, name: str, where: tuple[int, int]) -> str:
    place = f"Row {where[1]} ({name!r}) of policy {where[0]} cannot be costed: "
    if not 0 <= row["kind"] < len(OpKind):
        return f"{place}kind {row['kind']} is no OpKind."
    for fields, is_sound, wanted in _BOUNDS:
        for field in fields:
            if not is_sound(row[field]):
                return f"{place}{field} is {row[field]}; {wanted}."
    if row["kind"] in (OpKind.LINEAR, OpKind.MATMUL, OpKind.EMBEDDING):
        sizes = {name: int(row[name]) for name in ROW_DTYPE.names or () if row[name] != 1}
        return (
            f"{place}{OpKind(row['kind']).name} has no groups and no kernel, and LINEAR and MATMUL hold the rows of a "
            f"sample in in_h and out_h alone; got {sizes}."
        )
    return f"{place}{row['groups']} groups do not divide {row['c']} input and {row['k']} output channels."


def _product(rows: Rows, *names: str) -> Floats:
    result = np.ones(rows.shape, np.float64)
    for name in names:
        result = result * rows[name]
    return result


def _volume(rows: Rows, what: str) -> Floats:
    return _product(rows, f"{what}_d", f"{what}_h", f"{what}_w")


def _is(rows: Rows, *kinds: OpKind) -> NDArray[np.bool_]:
    return np.isin(rows["kind"], [int(kind) for kind in kinds])


def _by_case(rows: Rows, *cases: tuple[NDArray[np.bool_], Floats]) -> Floats:
    """The value of the first case that holds, row by row; 0 where none does."""
    return np.select([condition for condition, _ in cases], [value for _, value in cases], 0.0).astype(np.float64)


def macs(rows: Rows) -> Floats:
    """Multiply-accumulates of each row, same shape as ``rows``."""
    conv = _is(rows, OpKind.CONV, OpKind.DEPTHWISE)
    taps = _volume(rows, "kernel") / rows["groups"]
    return _by_case(
        rows,
        (conv & (rows["transposed"] == 1), _product(rows, "n", "c", "k") * taps * _volume(rows, "in")),
        (conv, _product(rows, "n", "c", "k") * taps * _volume(rows, "out")),
        (_is(rows, OpKind.LINEAR, OpKind.MATMUL), _product(rows, "n", "out_h", "c", "k")),
    )


def weights(rows: Rows) -> Floats:
    """Number of weights of each row, biases apart."""
    return _by_case(
        rows,
        (
            _is(rows, OpKind.CONV, OpKind.DEPTHWISE),
            _product(rows, "c", "k") * _volume(rows, "kernel") / rows["groups"],
        ),
        (_is(rows, OpKind.LINEAR, OpKind.EMBEDDING), _product(rows, "c", "k")),
    )


def bias_elements(rows: Rows) -> Floats:
    """Number of biases of each row; they are stored in 32 bits."""
    biased = _is(rows, OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR) & (rows["bias"] == 1)
    return _by_case(rows, (biased, _product(rows, "k")))


def in_elements(rows: Rows) -> Floats:
    """Number of activations that each row reads (for EMBEDDING, of indices)."""
    return _by_case(
        rows,
        (_is(rows, OpKind.LINEAR), _product(rows, "n", "in_h", "c")),
        (_is(rows, OpKind.MATMUL), _product(rows, "n", "out_h", "c") + _product(rows, "n", "c", "k")),
        (_is(rows, OpKind.EMBEDDING), _product(rows, "inputs", "n") * _volume(rows, "in")),
        (np.ones(rows.shape, np.bool_), _product(rows, "inputs", "n", "c") * _volume(rows, "in")),
    )


def out_elements(rows: Rows) -> Floats:
    """Number of activations that each row writes."""
    return _by_case(
        rows,
        (_is(rows, OpKind.LINEAR, OpKind.MATMUL), _product(rows, "n", "out_h", "k")),
        (np.ones(rows.shape, np.bool_), _product(rows, "n", "k") * _volume(rows, "out")),
    )


def weight_bytes(rows: Rows) -> Floats:
    """Bytes of the parameters that each row reads: weights at their bits, biases and what else it holds in 4 bytes."""
    read: Floats = weights(rows) * rows["weight_bits"] / 8.0 + 4.0 * (bias_elements(rows) + rows["held"])
    return read


def stored_bytes(rows: Rows) -> Floats:
    """Bytes that the parameters of each row add to the model's size: none where the weights are an earlier row's.

    Where the positions of weights that are not zero are told, those weights and the positions alone are stored, if that
    is less.
    """
    zeros = weights(rows) * (1.0 - rows["weight_density"]) * rows["weight_bits"] / 8.0
    saved = np.where(rows["position_bytes"] > 0.0, np.maximum(zeros - rows["position_bytes"], 0.0), 0.0)
    return np.where(rows["reused"] == 1, 0.0, weight_bytes(rows) - saved)


def parameters(rows: Rows) -> Floats:
    """Number of parameters that each row adds to the model's."""
    return np.where(rows["reused"] == 1, 0.0, weights(rows) + bias_elements(rows) + rows["held"])


def traffic_bytes(rows: Rows) -> Floats:
    """Bytes that each row moves when every operand crosses the memory bus once."""
    read: Floats = in_elements(rows) * rows["activation_bits"] / 8.0
    written: Floats = out_elements(rows) * rows["output_bits"] / 8.0
    return read + weight_bytes(rows) + written


def compute_bits(rows: Rows) -> NDArray[np.int32]:
    """Bits of the arithmetic that each row runs in: those of the wider operand, or of the activations alone."""
    weighted = _is(rows, OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR)
    activation_bits: NDArray[np.int32] = rows["activation_bits"]
    return np.where(weighted, np.maximum(rows["weight_bits"], activation_bits), activation_bits)
