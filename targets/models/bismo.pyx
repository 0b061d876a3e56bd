"""Bit-serial overlays (BISMO): arrays of binary dot products that take one bit of weight and activation at a time.

An array of ``rows`` x ``columns`` dot units, each ``depth`` bits wide. A layer is a matrix product of K rows of weights
and P columns of pixels over a reduction of C * taps, cut into R = ceil(K / rows) *tiles* of ``rows`` output channels,
Q = ceil(P / columns) tiles of ``columns`` pixels and b = ceil(C * taps / depth) blocks of the reduction.
Weights and activations arrive through a port each, one bit plane of one block of one row or column (a *word* of
``depth`` bits) in ``depth / port`` cycles, and stay in buffers of ``words`` words for each row and column.

    x = w * a * b                          cycles to multiply one pair of tiles, plane by plane
    f = depth / port * a * b * pixels      cycles to fetch a tile of activations; g, of weights, by w and rows
    q = ceil(Q / floor(words / (a * b)))   *stripes* of activations: tiles that the buffers hold; r, of weights

Every stripe of weights is multiplied with every stripe of activations, so activations are fetched r times and weights
q times. Inside a pair of stripes one operand is the outer loop. With weights outside, the tiles of activations stream
by for the first row of weights, and are there for the others; the next row starts when its weights have come. A tile
that has come in is multiplied when those before it are done, so the time is the longest of these ways through, each
summed over the stripes, where f', g' belong to the last tile, which may be narrower:

    activations:  r * ((Q - 1) * max(f, x) + max(f', x)) + x * Q * (R - r)              + q * r * (w - 1)
    weights:      r * (Q - q) * x + max(q * ((R - 1) * g + g'),                         the last row comes last
                                        q * (R - 1) * g + x * Q,                        or the one before, if R > r
                                        q * r * g + x * Q * (R - r))                    or the first, if R > 1
                                                                                        + q * r * w * (a - 1)

The terms without f and g are what the last pairs take when everything has come. The last ones fill and drain the array:
a plane of activations meets all w planes of weights before the next one does, so it waits w - 1 cycles for them; and
once the last plane of weights is there, a - 1 more planes of activations of w cycles each are left. With activations
outside, both change places. The overlay takes the order that is faster, and

    cycles = N * min(weights outside, activations outside);             latency = cycles / clock

Each image is a product of its own: weights are fetched again for each. Linear layers have the batch as pixels and fetch
once. A depthwise layer packs its channels into the reduction: taps, padded to a multiple of ``depthwise_pad``, of
depth / taps channels side by side make one block, so that ceil(C / that many) products of that many rows are run.
Grouped convolutions are taken group by group, transposed ones as the product over their input pixels; the second factor
of a product of activations takes the place of weights. Operators without MACs move their elements through the port of
the activations. Writing results takes no time, as in the table below.

Source: Umuroglu et al., "BISMO: a scalable bit-serial matrix multiplication overlay" (FPL 2018) for the array, the
stripes and the two ports. The rules above were inferred from the look-up table in github.com/mit-han-lab/haq (Wang et
al., CVPR 2019), whose 3,392 entries they give to the last cycle; what each term stands for is a reading of it.

Arithmetic is by integers of up to ``widest_bits``: wider rows, as those of a network in floating point, run at that
width. Zeros are computed like other numbers, so densities do not matter.
"""

from cython cimport final
from libc.math cimport NAN
from libc.stdint cimport int64_t

from fxopt.targets._blocks cimport Block
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
    "words": Parameter("count", "words of `depth` bits in the buffer of each row and each column"),
    "depthwise_pad": Parameter("count", "taps of a depthwise kernel are padded to a multiple of it"),
    "clock": Parameter("frequency", "clock of the array"),
    "widest_bits": Parameter("count", "widest operands that it runs", maximum=16),
}


cdef struct Side:
    # One operand of a matrix product.
    double bits
    double lanes            # output channels or pixels
    double tiles
    double stripes
    double fetch            # cycles to fetch a tile
    double last_fetch       # and the last one


cdef struct Product:
    # What a row comes to: ``repeats`` products of ``weights`` and ``activations`` over ``blocks``.
    double repeats
    double blocks
    Side weights
    Side activations


cdef inline double ordered(const Side* outer, const Side* inner, double multiply) noexcept nogil:
    """Cycles of a product with ``outer`` as the outer loop and ``multiply`` cycles for a pair of tiles."""
    cdef double pairs = outer.stripes * inner.stripes
    # Pairs of tiles that are left when the inner operand is there for all: those not in the first row of a stripe.
    cdef double resident = multiply * inner.tiles * (outer.tiles - outer.stripes)
    cdef double streamed = (
        outer.stripes * (
            (inner.tiles - 1.0) * larger(inner.fetch, multiply) + larger(inner.last_fetch, multiply)
        )
        + resident + pairs * (outer.bits - 1.0)
    )
    cdef double earlier = inner.stripes * (outer.tiles - 1.0) * outer.fetch
    cdef double awaited = earlier + inner.stripes * outer.last_fetch
    if outer.tiles > 1.0:
        awaited = larger(awaited, pairs * outer.fetch + resident)
    if outer.tiles > outer.stripes:
        awaited = larger(awaited, earlier + multiply * inner.tiles)
    awaited += outer.stripes * (inner.tiles - inner.stripes) * multiply + pairs * outer.bits * (inner.bits - 1.0)
    return larger(streamed, awaited)


@final
cdef class Model(CostModel):
    """One overlay."""

    cdef double rows
    cdef double depth
    cdef double columns
    cdef double words
    cdef double inverse_rows
    cdef double inverse_depth
    cdef double inverse_columns
    cdef double inverse_port
    cdef double word_cycles
    cdef double depthwise_pad
    cdef double inverse_depthwise_pad
    cdef double seconds_per_cycle
    cdef int widest_bits

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        self.rows = values["rows"]
        self.depth = values["depth"]
        self.columns = values["columns"]
        self.words = values["words"]
        self.inverse_rows = 1.0 / self.rows
        self.inverse_depth = 1.0 / self.depth
        self.inverse_columns = 1.0 / self.columns
        self.inverse_port = 0.125 / values["port"]
        self.word_cycles = self.depth * self.inverse_port
        self.depthwise_pad = values["depthwise_pad"]
        self.inverse_depthwise_pad = 1.0 / self.depthwise_pad
        self.seconds_per_cycle = 1.0 / values["clock"]
        self.widest_bits = int(values["widest_bits"])

    cdef inline double width(self, int bits) noexcept nogil:
        return bits if bits < self.widest_bits else self.widest_bits

    cdef inline Side side(self, double bits, double lanes, double blocks, double size, double inverse) noexcept nogil:
        """One operand: ``lanes`` of it in tiles of ``size``."""
        cdef Side result
        cdef double held = bits * blocks            # words of a tile in the buffer of each lane
        cdef double capacity
        result.bits = bits
        result.lanes = lanes
        result.tiles = ceil_div(lanes, size, inverse)
        result.fetch = size * held * self.word_cycles
        result.last_fetch = (lanes - (result.tiles - 1.0) * size) * held * self.word_cycles
        result.stripes = 1.0
        if result.tiles * held > self.words:
            capacity = larger(<double><int64_t>(self.words / held), 1.0)
            result.stripes = ceil_div(result.tiles, capacity, 1.0 / capacity)
        return result

    cdef inline Product product(self, const Row* row) noexcept nogil:
        """The matrix products that a row with MACs comes to."""
        cdef Product result
        cdef double a = self.width(row.activation_bits)
        cdef double w = a if row.kind == MATMUL else self.width(row.weight_bits)
        cdef double c = row.c
        cdef double k = row.k
        cdef double pixels = in_volume(row) if row.transposed else out_volume(row)
        cdef double taps = kernel_volume(row)
        cdef double packed
        result.repeats = row.n
        if row.kind == DEPTHWISE:
            taps = ceil_div(taps, self.depthwise_pad, self.inverse_depthwise_pad) * self.depthwise_pad
            packed = larger(<double><int64_t>(self.depth / taps), 1.0)
            result.repeats *= ceil_div(c, packed, 1.0 / packed)
            k = k / c * packed
            c = taps
        else:
            if row.kind == LINEAR:
                pixels *= result.repeats
                result.repeats = 1.0
            if row.groups != 1:
                c /= row.groups
                k /= row.groups
                result.repeats *= row.groups
            if row.transposed:
                k *= taps
            else:
                c *= taps
        result.blocks = ceil_div(c, self.depth, self.inverse_depth)
        result.weights = self.side(w, k, result.blocks, self.rows, self.inverse_rows)
        result.activations = self.side(a, pixels, result.blocks, self.columns, self.inverse_columns)
        return result

    cdef inline double moved_bits(self, const Row* row) noexcept nogil:
        """Bits of what an operator without MACs reads and writes."""
        return in_elements(row) * self.width(row.activation_bits) + out_elements(row) * self.width(row.output_bits)

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        cdef Product found
        cdef double planes
        if not is_among(row, WITH_MACS):
            return self.moved_bits(row) / 8.0
        found = self.product(row)
        planes = (
            found.weights.stripes * found.activations.lanes * found.activations.bits
            + found.activations.stripes * found.weights.lanes * found.weights.bits
        )
        return (
            found.repeats * planes * found.blocks * self.depth / 8.0
            + out_elements(row) * self.width(row.output_bits) / 8.0
        )


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    cdef Product found
    cdef double multiply, outside, inside
    result.energy_j = NAN
    if row.kind == UNKNOWN:
        result.latency_s = NAN
        return result
    if not is_among(row, WITH_MACS):
        result.latency_s = model.moved_bits(row) * model.inverse_port * model.seconds_per_cycle
        return result
    found = model.product(row)
    multiply = found.weights.bits * found.activations.bits * found.blocks
    outside = ordered(&found.weights, &found.activations, multiply)
    inside = ordered(&found.activations, &found.weights, multiply)
    result.latency_s = -larger(-outside, -inside) * found.repeats * model.seconds_per_cycle
    return result


include "_batch.pxi"
