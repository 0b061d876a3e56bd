"""A systolic array with buffers, in one of three dataflows.

    product of (M x R) and (R x K):  M = batch * output pixels, R = channels * taps, K = output channels, for each group
    weight-stationary   down = R, across = K, streamed = M
    input-stationary    down = R, across = M, streamed = K
    output-stationary   down = M, across = K, streamed = R
    compute  = groups * (ceil(down / rows) * ceil(across / columns) * (2 * rows + columns + streamed - 2) - 1) * passes
    traffic  = weights, inputs and outputs, each once, or once for each fold that its buffer is too small for
    latency  = max(compute / clock, traffic / bandwidth)
    energy   = MACs * passes * mac_energy + traffic * dram_energy + static_power * latency

``passes`` is ceil(w / native_bits) * ceil(a / native_bits): wider operands are taken in parts. Widths above 16 and
floating point run as 16 bits; narrower operands save memory, but no cycles. Inputs that do not stay in their buffer are
fetched again for each fold over output channels, weights for each fold over pixels, and psums of 32 bits are stored and
fetched between folds over the reduction, as far as the dataflow has such folds. Zeros are computed like other numbers.
A transposed convolution is the product of its input pixels with all taps; products of activations run sample by
sample. Operators without MACs take their traffic alone.

Source: Samajdar et al., "SCALE-Sim", arXiv:1811.02883, equations 1 to 3; its tool reports one cycle less than they say.
"""

from cython cimport final
from libc.math cimport NAN

from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    MATMUL, UNKNOWN, WITH_MACS, Row, bias_elements, ceil_div, in_elements, in_volume, is_among, kernel_volume, larger,
    macs, out_elements, out_volume, weights,
)

from fxopt.targets.parameters import Parameter, expect_all_or_none

cdef enum:
    WEIGHTS_STAY = 1
    INPUTS_STAY = 2
    OUTPUTS_STAY = 3
    WIDEST = 16
    PSUM_BYTES = 4

ENERGIES = {
    "mac_energy": Parameter("energy per MAC", "energy of one MAC of native width", required=False),
    "dram_energy": Parameter("energy per byte", "energy of moving one byte to or from memory", required=False),
    "static_power": Parameter("power", "power drawn whatever runs", required=False, positive=False),
}
PARAMETERS = {
    "rows": Parameter("count", "rows of the array"),
    "columns": Parameter("count", "columns of the array"),
    "dataflow": Parameter("count", "what stays in the array: 1 weights, 2 inputs, 3 outputs", maximum=3.0),
    "native_bits": Parameter("count", "width of the multipliers", maximum=16.0),
    "clock": Parameter("frequency", "clock of the array"),
    "bandwidth": Parameter("bandwidth", "memory bandwidth"),
    "weight_buffer": Parameter("bytes", "size of the buffer of weights"),
    "activation_buffer": Parameter("bytes", "size of the buffer that inputs and outputs share evenly"),
    **ENERGIES,
}


cdef struct Product:
    double count                # how many
    double m
    double r
    double k


cdef struct Folds:
    double over_m
    double over_r
    double over_k
    double cycles


cdef inline int narrowed(int bits) noexcept nogil:
    return bits if bits < WIDEST else WIDEST


@final
cdef class Model(CostModel):
    """One systolic array with its buffers and memory."""

    cdef double rows
    cdef double columns
    cdef double inverse_rows
    cdef double inverse_columns
    cdef double fill
    cdef int dataflow
    cdef double[33] parts           # of an operand, by its bits
    cdef double seconds_per_cycle
    cdef double seconds_per_byte
    cdef double weight_buffer
    cdef double half_buffer
    cdef double joules_per_mac
    cdef double joules_per_byte
    cdef double static_watts

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        self.has_energy = expect_all_or_none(values, [*ENERGIES])
        self.rows = values["rows"]
        self.columns = values["columns"]
        self.inverse_rows = 1.0 / self.rows
        self.inverse_columns = 1.0 / self.columns
        self.fill = 2.0 * self.rows + self.columns - 2.0
        self.dataflow = <int>values["dataflow"]
        for bits in range(33):
            self.parts[bits] = -(-min(bits, WIDEST) // int(values["native_bits"]))
        self.seconds_per_cycle = 1.0 / values["clock"]
        self.seconds_per_byte = 1.0 / values["bandwidth"]
        self.weight_buffer = values["weight_buffer"]
        self.half_buffer = 0.5 * values["activation_buffer"]
        self.joules_per_mac = values.get("mac_energy", NAN)
        self.joules_per_byte = values.get("dram_energy", NAN)
        self.static_watts = values.get("static_power", NAN)

    cdef inline Product product(self, const Row* row) noexcept nogil:
        cdef Product result
        result.count = row.groups
        result.r = row.c
        result.k = row.k
        if row.groups != 1:
            result.r /= row.groups
            result.k /= row.groups
        if row.transposed:
            result.m = row.n * in_volume(row)
            result.k *= kernel_volume(row)
        else:
            result.m = row.n * out_volume(row)
            result.r *= kernel_volume(row)
        if row.kind == MATMUL:
            result.count = row.n
            result.m = row.out_h
        return result

    cdef inline Folds fold(self, const Product* product) noexcept nogil:
        cdef Folds folds
        cdef double streamed
        folds.over_m = folds.over_r = folds.over_k = 1.0
        if self.dataflow == WEIGHTS_STAY:
            folds.over_r = ceil_div(product.r, self.rows, self.inverse_rows)
            folds.over_k = ceil_div(product.k, self.columns, self.inverse_columns)
            streamed = product.m
        elif self.dataflow == INPUTS_STAY:
            folds.over_r = ceil_div(product.r, self.rows, self.inverse_rows)
            folds.over_m = ceil_div(product.m, self.columns, self.inverse_columns)
            streamed = product.k
        else:
            folds.over_m = ceil_div(product.m, self.rows, self.inverse_rows)
            folds.over_k = ceil_div(product.k, self.columns, self.inverse_columns)
            streamed = product.r
        folds.cycles = folds.over_m * folds.over_r * folds.over_k * (self.fill + streamed) - 1.0
        return folds

    cdef inline double moved(self, const Row* row, const Product* product, const Folds* folds) noexcept nogil:
        """Bytes to and from memory."""
        cdef double read_bits = narrowed(row.activation_bits)
        cdef double written = out_elements(row)
        cdef double read = in_elements(row)
        cdef double weight_bytes = weights(row) * narrowed(row.weight_bits) / 8.0
        cdef double in_bytes = read * read_bits / 8.0
        cdef double bytes = in_bytes + weight_bytes + written * narrowed(row.output_bits) / 8.0
        bytes += 4.0 * (bias_elements(row) + row.held)
        if row.kind == MATMUL:
            in_bytes = product.count * product.m * product.r * read_bits / 8.0
            weight_bytes = product.count * product.r * product.k * read_bits / 8.0
        # A group, or a sample of a product of activations, after the other: what stays is of one of them.
        if in_bytes > self.half_buffer * product.count:
            bytes += (folds.over_k - 1.0) * in_bytes
        if weight_bytes > self.weight_buffer * product.count:
            bytes += (folds.over_m - 1.0) * weight_bytes
        if written * PSUM_BYTES > self.half_buffer * product.count:
            bytes += 2.0 * (folds.over_r - 1.0) * written * PSUM_BYTES
        return bytes

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        cdef Product product
        cdef Folds folds
        product.count = folds.over_m = folds.over_r = folds.over_k = 1.0
        if is_among(row, WITH_MACS):
            product = self.product(row)
            folds = self.fold(&product)
        return self.moved(row, &product, &folds)

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    cdef Product product
    cdef Folds folds
    cdef double passes, bytes
    cdef double compute_s = 0.0
    cdef double work = macs(row)
    if row.kind == UNKNOWN:
        result.latency_s = result.energy_j = NAN
        return result
    passes = model.parts[row.activation_bits]
    passes *= passes if row.kind == MATMUL else model.parts[row.weight_bits]
    product.count = folds.over_m = folds.over_r = folds.over_k = 1.0
    if is_among(row, WITH_MACS):
        product = model.product(row)
        folds = model.fold(&product)
        compute_s = product.count * folds.cycles * passes * model.seconds_per_cycle
    bytes = model.moved(row, &product, &folds)
    result.latency_s = larger(compute_s, bytes * model.seconds_per_byte)
    result.energy_j = (
        work * passes * model.joules_per_mac + bytes * model.joules_per_byte + model.static_watts * result.latency_s
    )
    return result


include "_batch.pxi"
