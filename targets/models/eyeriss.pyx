"""Eyeriss, row-stationary: a grid of processing elements, each with a row of a kernel for a row of the map.

    sets      = floor(rows / kernel_h) * floor(columns / out_h), each at least 1; a set: kernel_h x out_h elements
    folds     = ceil(kernel_h / rows) * ceil(out_h / columns)            for those larger than the grid
    turns     = channels * out_channels over the sets, either of them in whole sets
    compute   = batch * turns * folds * out_w * kernel_w * crowding / efficiency                            cycles
    crowding  = psums of a strip of out_h (at most ``columns``) rows, for the ``filters`` filters of each of the sets
                above one another, over half of the buffer; from 1 to ``filters`` / 4. Where they do not fit, fewer
                filters share an input row, which has to be sent again
    latency   = max(compute / clock, traffic / bandwidth) + (first load + last store, a buffer each) / bandwidth
    energy    = MACs * mac_energy + traffic * dram_energy + static_power * latency

Matrix products are 1 x 1 maps, so that sets fill the grid. Everything runs and is stored in 16 bits: narrower operands
gain nothing, and wider ones and floating point run as 16 bits too. Zeros are computed like other numbers. Depth counts
as batch, with a pass for each slice of the kernel; transposed convolutions go through their input pixels. Operators
without MACs take their traffic alone.

Source: Chen et al., "Eyeriss", IEEE JSSC 52(1), 2017, sections III and V: mapping of rows to the grid and its folding.
Whole sets alone are a simplification of its mapper; crowding and its limit are a reading of how the published rates
fall with wide maps.
"""

from cython cimport final
from libc.math cimport NAN

from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    UNKNOWN, WITH_MACS, Row, bias_elements, ceil_div, in_elements, is_among, is_gemm, larger, macs, out_elements,
    weights,
)

from fxopt.targets.parameters import Parameter, expect_all_or_none

cdef enum:
    WORD_BYTES = 2
    LEAST_FILTERS = 4

ENERGIES = {
    "mac_energy": Parameter("energy per MAC", "energy of one MAC with its scratch pads", required=False),
    "dram_energy": Parameter("energy per byte", "energy of moving one byte to or from memory", required=False),
    "static_power": Parameter("power", "power drawn whatever runs, clocks included", required=False, positive=False),
}
PARAMETERS = {
    "rows": Parameter("count", "rows of the grid"),
    "columns": Parameter("count", "columns of the grid"),
    "clock": Parameter("frequency", "clock of the grid"),
    "bandwidth": Parameter("bandwidth", "memory bandwidth"),
    "buffer": Parameter("bytes", "size of the global buffer"),
    "filters": Parameter("count", "filters that an element holds at once"),
    "efficiency": Parameter("ratio", "share of cycles in which mapped elements compute", maximum=1.0),
    **ENERGIES,
}


cdef inline double ceiling(double whole, double part) noexcept nogil:
    cdef double floor = <double><long>(whole / part)
    return floor + <double>(floor * part < whole)


cdef inline double whole_sets(double size, double part) noexcept nogil:
    # How often ``part`` fits into ``size``, at least once.
    cdef double count = <double><long>(size / part)
    return larger(count, 1.0)


cdef inline double smaller(double a, double b) noexcept nogil:
    return a if a < b else b


cdef inline double moved(const Row* row, double read, double written) noexcept nogil:
    # Bytes of all operands, once; biases and what else is held stay in 32 bits.
    return WORD_BYTES * (read + weights(row) + written) + 4.0 * (bias_elements(row) + row.held)


@final
cdef class Model(CostModel):
    """One Eyeriss grid with its buffer and memory."""

    cdef double rows
    cdef double columns
    cdef double filters
    cdef double psum_share          # of half of the buffer, that a psum takes
    cdef double most_crowded
    cdef double buffer
    cdef double seconds_per_cycle
    cdef double seconds_per_byte
    cdef double joules_per_mac
    cdef double joules_per_byte
    cdef double static_watts

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        self.has_energy = expect_all_or_none(values, [*ENERGIES])
        self.rows = values["rows"]
        self.columns = values["columns"]
        self.filters = values["filters"]
        self.buffer = values["buffer"]
        self.psum_share = 2.0 * WORD_BYTES / self.buffer
        self.most_crowded = self.filters / LEAST_FILTERS
        self.seconds_per_cycle = 1.0 / (values["clock"] * values["efficiency"])
        self.seconds_per_byte = 1.0 / values["bandwidth"]
        self.joules_per_mac = values.get("mac_energy", NAN)
        self.joules_per_byte = values.get("dram_energy", NAN)
        self.static_watts = values.get("static_power", NAN)

    cdef inline double compute_cycles(self, const Row* row) noexcept nogil:
        cdef double height = 1.0
        cdef double width = 1.0
        cdef double passes = row.n
        cdef double channels = row.c
        cdef double out_channels = row.k
        cdef double stacked = whole_sets(self.rows, row.kernel_h)
        cdef double sets, inverse, turns, psums
        if row.groups != 1:
            channels /= row.groups
            out_channels /= row.groups
        if is_gemm(row):
            passes *= row.out_h
        elif row.transposed:
            height = row.in_h
            width = row.in_w
            passes *= <double>row.in_d * row.kernel_d
        else:
            height = row.out_h
            width = row.out_w
            passes *= <double>row.out_d * row.kernel_d
        sets = stacked * whole_sets(self.columns, height)
        if row.groups > 1:
            turns = ceiling(row.groups * channels * out_channels, sets)
        else:
            inverse = 1.0 / sets
            turns = smaller(
                ceil_div(channels, sets, inverse) * out_channels, channels * ceil_div(out_channels, sets, inverse)
            )
        turns *= passes * width * row.kernel_w
        # Folds, where a set is larger than the grid; a comparison is cheaper than two divisions.
        if row.kernel_h > self.rows:
            turns *= ceiling(row.kernel_h, self.rows)
        if height > self.columns:
            turns *= ceiling(height, self.columns)
        psums = smaller(height, self.columns) * width * smaller(self.filters * stacked, out_channels)
        return turns * larger(1.0, smaller(psums * self.psum_share, self.most_crowded))

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        return moved(row, in_elements(row), out_elements(row))

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    cdef double read = in_elements(row)
    cdef double written = out_elements(row)
    cdef double bytes = moved(row, read, written)
    result.latency_s = bytes * model.seconds_per_byte
    result.energy_j = bytes * model.joules_per_byte
    if row.kind == UNKNOWN:
        result.latency_s = result.energy_j = NAN
        return result
    if is_among(row, WITH_MACS):
        result.latency_s = larger(model.compute_cycles(row) * model.seconds_per_cycle, result.latency_s)
        result.latency_s += model.seconds_per_byte * (
            smaller(WORD_BYTES * read, model.buffer) + smaller(WORD_BYTES * written, model.buffer)
        )
        result.energy_j += macs(row) * model.joules_per_mac
    result.energy_j += model.static_watts * result.latency_s
    return result


include "_batch.pxi"
