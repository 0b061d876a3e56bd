"""Bit-serial overlays (BISMO): arrays of binary dot products that take one bit of weight and activation at a time.

An array of ``rows`` x ``columns`` dot units, ``depth`` bits wide, fed by a port for activations and one for weights:

    blocks  = ceil(C * taps / depth)
    compute = w * a * blocks * ceil(K / rows) * N * ceil(pixels / columns)
    fetch A = a * N * pixels * blocks * depth / port
    fetch W = w * K * blocks * depth * N / port             (fetched again for each image; linear layers once)
    depthwise, channels in the rows, taps padded to ``depthwise_pad``:
              compute = w * a * C * N * ceil(pixels / columns) / rows
              fetch A = a * N * C * pixels * depthwise_pad / port * depthwise_fetch
              fetch W = w * C * N * depthwise_pad / port * depthwise_fetch
    cycles  = max(A, W, compute) + overlap * min(A, W, compute);        latency = cycles / clock

Linear layers and products of activations have their rows of a sample (and for linear layers the batch) as pixels; the
second factor of a product takes the place of weights. Grouped convolutions are taken group by group, transposed ones as
the matrix product over their input pixels. Operators without MACs move their elements through the activation port.

Source: Umuroglu et al., "BISMO: a scalable bit-serial matrix multiplication overlay" (FPL 2018) for the array; the
fetches and their overlap were fitted to the look-up table in github.com/mit-han-lab/haq (Wang et al., CVPR 2019).

Arithmetic is by integers of up to ``widest_bits``: wider rows, as those of a network in floating point, run at that
width. Zeros are computed like other numbers, so densities do not matter.
"""

from libc.math cimport NAN

from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    DEPTHWISE, LINEAR, MATMUL, UNKNOWN, WITH_MACS,
    Row, ceil_div, in_elements, in_volume, is_among, kernel_volume, larger, out_elements, out_volume,
)

from fxopt.targets.parameters import Parameter

PARAMETERS = {
    "rows": Parameter("count", "rows of dot units, which output channels are mapped to"),
    "depth": Parameter("count", "bits that a dot unit takes in a cycle"),
    "columns": Parameter("count", "columns of dot units, which pixels are mapped to"),
    "port": Parameter("bytes per cycle", "width of each of the two ports to memory"),
    "depthwise_pad": Parameter("count", "taps that a depthwise kernel is padded to"),
    "depthwise_fetch": Parameter("ratio", "fetches of depthwise layers over the formula's", required=False),
    "overlap": Parameter("ratio", "share of the shortest phase that is not hidden", positive=False, maximum=1.0),
    "clock": Parameter("frequency", "clock of the array"),
    "widest_bits": Parameter("count", "widest operands that it runs", maximum=16),
}


cdef struct Phases:
    double activations
    double weights
    double compute


cdef class Model(CostModel):
    """One overlay."""

    cdef double rows
    cdef double depth
    cdef double columns
    cdef double inverse_rows
    cdef double inverse_depth
    cdef double inverse_columns
    cdef double inverse_port
    cdef double depthwise_pad
    cdef double depthwise_fetch
    cdef double overlap
    cdef double seconds_per_cycle
    cdef double port_bytes
    cdef int widest_bits

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        self.rows = values["rows"]
        self.depth = values["depth"]
        self.columns = values["columns"]
        self.inverse_rows = 1.0 / self.rows
        self.inverse_depth = 1.0 / self.depth
        self.inverse_columns = 1.0 / self.columns
        self.inverse_port = 0.125 / values["port"]
        self.port_bytes = values["port"]
        self.depthwise_pad = values["depthwise_pad"]
        self.depthwise_fetch = values.get("depthwise_fetch", 1.0)
        self.overlap = values["overlap"]
        self.seconds_per_cycle = 1.0 / values["clock"]
        self.widest_bits = int(values["widest_bits"])

    cdef inline double width(self, int bits) noexcept nogil:
        return bits if bits < self.widest_bits else self.widest_bits

    cdef Phases phases(self, const Row* row) noexcept nogil:
        """Cycles of the two fetches and of the arithmetic."""
        cdef Phases result
        cdef double a = self.width(row.activation_bits)
        cdef double w = a if row.kind == MATMUL else self.width(row.weight_bits)
        cdef double images = row.n
        cdef double c = row.c
        cdef double k = row.k
        cdef double pixels = in_volume(row) if row.transposed else out_volume(row)
        cdef double taps = kernel_volume(row)
        cdef double blocks
        if row.kind == DEPTHWISE:
            result.activations = (
                a * images * c * pixels * self.depthwise_pad * self.inverse_port * self.depthwise_fetch
            )
            result.weights = w * k * images * self.depthwise_pad * self.inverse_port * self.depthwise_fetch
            result.compute = (
                w * a * k * images * ceil_div(pixels, self.columns, self.inverse_columns) * self.inverse_rows
            )
            return result
        if row.kind == LINEAR:
            pixels *= images
            images = 1.0
        if row.groups != 1:
            c /= row.groups
            k /= row.groups
            images *= row.groups
        if row.transposed:
            k *= taps
        else:
            c *= taps
        blocks = ceil_div(c, self.depth, self.inverse_depth)
        result.activations = a * images * pixels * blocks * self.depth * self.inverse_port
        result.weights = w * k * blocks * self.depth * images * self.inverse_port
        result.compute = (
            w * a * blocks * images * ceil_div(k, self.rows, self.inverse_rows)
            * ceil_div(pixels, self.columns, self.inverse_columns)
        )
        return result

    cdef double moved_bits(self, const Row* row) noexcept nogil:
        """Bits of what an operator without MACs reads and writes."""
        return in_elements(row) * self.width(row.activation_bits) + out_elements(row) * self.width(row.output_bits)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        cdef Cost result
        cdef Phases phases
        cdef double longest, shortest
        result.energy_j = NAN
        if row.kind == UNKNOWN:
            result.latency_s = NAN
            return result
        if not is_among(row, WITH_MACS):
            result.latency_s = self.moved_bits(row) * self.inverse_port * self.seconds_per_cycle
            return result
        phases = self.phases(row)
        longest = larger(larger(phases.activations, phases.weights), phases.compute)
        shortest = -larger(larger(-phases.activations, -phases.weights), -phases.compute)
        result.latency_s = (longest + self.overlap * shortest) * self.seconds_per_cycle
        return result

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        cdef Phases phases
        if not is_among(row, WITH_MACS):
            return self.moved_bits(row) / 8.0
        phases = self.phases(row)
        return (
            (phases.activations + phases.weights) * self.port_bytes
            + out_elements(row) * self.width(row.output_bits) / 8.0
        )
