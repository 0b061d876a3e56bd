"""Sparse matrix-vector engine (EIE): only products of nonzero weights and nonzero activations are computed.

    cycles  = MACs * weight_density * activation_density * (1 + padding) / (elements * balance)
    latency = cycles / clock
    energy  = power * latency

``elements`` processing elements each take one nonzero weight a cycle; ``padding`` counts the zeros that stand in for
runs longer than the index can tell, ``balance`` the cycles that elements wait for one another. Weights are shared
values behind 4-bit indices and lie in SRAM, all of them: nothing moves to or from memory. There is one width of
arithmetic, so bits do not matter: a float model costs what its dense 4-bit form would. The engine is made for fully
connected layers; convolutions run as one matrix-vector product for each output pixel, which keeps the weights where
they are and counts every nonzero product once. Operators without MACs have no model here: a host computes them.

What it stores are entries of 8 bits, a shared value's number and the zeros before it, at most 15; a longer run takes
entries of zeros in between. Rows of a matrix are dealt out to the elements, and for each column every element has a
pointer of 16 bits. Of a column an element holds ``rows = outputs / elements`` weights:

    entries = density * sum over j = 0 ... rows / 16 of (rows - 16 j) * (1 - density)^(16 j)    expected, a column
    bytes   = elements * columns * (entries + 2)

which takes zeros to be strewn at random. A dense layer takes an entry for every weight.

Source: Han et al., "EIE: efficient inference engine on compressed deep neural network" (ISCA 2016).
"""

from cython cimport final
from libc.math cimport NAN

from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    MATMUL, WITH_BIAS, WITH_MACS, Row, bias_elements, dense_bytes, is_among, kernel_volume, macs,
)

from fxopt.targets.parameters import Parameter

cdef enum:
    RUN = 16                # weights that one index of 4 bits steps over, with its own
    ENTRY_BYTES = 1
    POINTER_BYTES = 2

PARAMETERS = {
    "elements": Parameter("count", "processing elements"),
    "clock": Parameter("frequency", "clock of the elements"),
    "padding": Parameter("ratio", "padded zeros over nonzero weights", positive=False),
    "balance": Parameter("ratio", "share of cycles that elements do not wait", maximum=1.0),
    "power": Parameter("power", "power drawn while running"),
}


@final
cdef class Model(CostModel):
    """One engine."""

    cdef double seconds_per_product
    cdef double watts
    cdef double elements

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        rate = values["elements"] * values["balance"] * values["clock"]
        self.seconds_per_product = (1.0 + values["padding"]) / rate
        self.watts = values["power"]
        self.has_energy = True
        self.elements = values["elements"]
        self.stores_otherwise = True

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)

    cdef double size_bytes(self, const Row* row) noexcept nogil:
        cdef double rows, columns, entries, left, share, only_zeros
        if row.reused or not is_among(row, WITH_BIAS):
            return dense_bytes(row)
        rows = <double>row.k / row.groups / self.elements
        columns = row.c * kernel_volume(row)
        entries = 0.0
        left = rows
        share = row.weight_density
        only_zeros = (1.0 - row.weight_density) * (1.0 - row.weight_density)
        only_zeros *= only_zeros
        only_zeros *= only_zeros
        only_zeros *= only_zeros    # 16 of them, a RUN
        while left > 0.0 and share > 0.0:
            entries += share * left
            share *= only_zeros
            left -= RUN
        entries *= ENTRY_BYTES
        return self.elements * columns * (entries + POINTER_BYTES) + 4.0 * (bias_elements(row) + row.held)

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        return 0.0


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    # A product of activations has no stored weights, which the engine is made of.
    if row.kind == MATMUL or not is_among(row, WITH_MACS):
        result.latency_s = result.energy_j = NAN
        return result
    result.latency_s = macs(row) * row.weight_density * row.activation_density * model.seconds_per_product
    result.energy_j = model.watts * result.latency_s
    return result


include "_batch.pxi"
