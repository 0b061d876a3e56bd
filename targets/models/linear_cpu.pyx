"""One CPU core, linear by kind of operator:

    latency = mac * MACs + weight * weights + in * inputs + out * outputs
            + spill * max(0, input bytes - threshold) / 4 + kernel_out * kernel_h * outputs + channel * channels + const

with a set of coefficients for each kind of operator and each class of bits (float: up to 32, int16, int8). Vector
kernels take channels in blocks: with a ``channel_tile``, the MACs of pointwise and depthwise convolutions are counted
with their channels rounded up to it. Channels are those of the output, for kernels that run once for each. Kernels are
dense: densities do not matter.

Activations with a curve (h-swish, SiLU) have the group ``curve``: with coefficients for it they cost that, merged into
a convolution or not; without, they are as elementwise operators and free where they are merged.

An operator takes the fastest class that holds its wider operand, as a runtime may always run it wider, so cost never
falls as bits grow; a kind without coefficients in a class takes a wider one.
"""

from libc.math cimport INFINITY, NAN

from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    CURVE, DEPTHWISE, ELEMENTWISE, UNKNOWN, Row, ceil_div, compute_bits, in_elements, in_volume, is_pointwise,
    kernel_volume, larger, macs, out_elements, out_volume, weights,
)

from fxopt.targets.parameters import Parameter, ParameterError

CLASS_NAMES = ("int8", "int16", "float")
GROUP_NAMES = (
    "pointwise", "dense", "depthwise", "linear", "matmul", "elementwise", "pool", "norm", "softmax", "embedding",
    "copy", "resize", "curve",
)
COEFFICIENTS = {
    "mac": "MAC",
    "weight": "weight",
    "in": "input element",
    "out": "output element",
    "spill": "four bytes of input beyond the threshold",
    "kernel_out": "output element and kernel row",
    "channel": "output channel",
}

PARAMETERS = {
    "spill_threshold": Parameter("bytes", "input size from which the cache spills", required=False),
    "channel_tile": Parameter("count", "channels that pointwise and depthwise kernels take at once", required=False),
    **{
        f"{bits}.{group}.{name}": Parameter("time per item", f"time per {item}", required=False, positive=False)
        for bits in CLASS_NAMES
        for group in GROUP_NAMES
        for name, item in COEFFICIENTS.items()
    },
    **{
        f"{bits}.{group}.const": Parameter("time", "time besides the work", required=False, positive=False)
        for bits in CLASS_NAMES
        for group in GROUP_NAMES
    },
}


cdef inline int class_of(int bits) noexcept nogil:
    return (bits > 8) + (bits > 16)


cdef inline int group_of(const Row* row) noexcept nogil:
    # The groups stand in the order of the kinds, between the convolutions that are a matrix product and curves.
    if row.kind == UNKNOWN:
        return -1
    if row.kind == ELEMENTWISE and row.activation == CURVE:
        return GROUPS - 1
    return 0 if is_pointwise(row) else row.kind + 1


cdef struct Work:
    double macs
    double weights
    double read
    double written
    double spilled
    double kernel_rows
    double channels


cdef inline double seconds_by(const Linear* terms, const Work* work) noexcept nogil:
    return (
        terms.mac * work.macs + terms.weight * work.weights + terms.read * work.read
        + (terms.written + terms.kernel_rows * work.kernel_rows) * work.written
        + terms.spilled * work.spilled + terms.channel * work.channels + terms.constant
    )


cdef inline double smaller(double a, double b) noexcept nogil:
    return a if a < b else b


cdef Linear linear(given):
    cdef Linear terms
    terms.mac = given.get("mac", 0.0)
    terms.weight = given.get("weight", 0.0)
    terms.read = given.get("in", 0.0)
    terms.written = given.get("out", 0.0)
    terms.spilled = given.get("spill", 0.0)
    terms.kernel_rows = given.get("kernel_out", 0.0)
    terms.channel = given.get("channel", 0.0)
    terms.constant = given.get("const", 0.0)
    return terms


def coefficients_of(values, prefix):
    """The coefficients under ``prefix`` as a struct, or None if there are none."""
    given = {name: values[f"{prefix}.{name}"] for name in (*COEFFICIENTS, "const") if f"{prefix}.{name}" in values}
    if given and not any(given.values()):
        raise ParameterError(prefix, "all coefficients are 0: the operator would cost nothing.")
    return linear(given) if given else None


cdef class Model(CostModel):
    """The linear model of one core.

    Args:
        values: Figures in SI units.
        fuses: Whether fused rows are free.
    """

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        self.spill_threshold = values.get("spill_threshold", INFINITY)
        self.channel_tile = values.get("channel_tile", 1.0)
        self.inverse_tile = 1.0 / self.channel_tile
        if "spill_threshold" not in values and any(key.endswith(".spill") for key in values):
            raise ParameterError("spill_threshold", "is missing, but there are spill coefficients.")
        self.computes_curves = any(".curve." in key for key in values)
        for j, group in enumerate(GROUP_NAMES):
            if group == "curve" and not self.computes_curves:
                group = "elementwise"
            given = [coefficients_of(values, f"{bits}.{group}") for bits in CLASS_NAMES]
            self.counts[j] = max(1, sum(terms is not None for terms in given))
            for i in range(CLASSES):
                usable = [terms for terms in given[i:] if terms is not None] or [linear({"const": NAN})]
                # As many candidates for narrow operators as for wide ones: a loop of fixed length needs no guessing.
                for slot in range(self.counts[j]):
                    self.candidates[i][j][slot] = usable[min(slot, len(usable) - 1)]

    cdef double latency(self, const Row* row) noexcept nogil:
        """Seconds of one row, NaN where no class has coefficients for it."""
        return seconds_of(self, row)

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)


cdef inline double padded_macs(Model model, const Row* row) noexcept nogil:
    # MACs of a pointwise or depthwise convolution with channels rounded up to whole blocks.
    cdef double pairs = ceil_div(row.k, model.channel_tile, model.inverse_tile) * model.channel_tile
    if row.kind == DEPTHWISE:
        pairs *= <double>row.c / row.groups
    else:
        pairs *= ceil_div(row.c, model.channel_tile, model.inverse_tile) * model.channel_tile
    return pairs * kernel_volume(row) * row.n * (in_volume(row) if row.transposed else out_volume(row))


cdef inline double seconds_of(Model model, const Row* row) noexcept nogil:
    cdef int group = group_of(row)
    cdef Work work
    cdef double best
    cdef const Linear* terms
    if group < 0:
        return NAN
    terms = &model.candidates[class_of(compute_bits(row))][group][0]
    if model.channel_tile > 1.0 and (group == 0 or row.kind == DEPTHWISE):
        work.macs = padded_macs(model, row)
    else:
        work.macs = macs(row)
    work.weights = weights(row)
    work.read = in_elements(row)
    work.written = out_elements(row)
    work.spilled = larger(work.read * row.activation_bits / 8.0 - model.spill_threshold, 0.0) / 4.0
    work.kernel_rows = row.kernel_h
    work.channels = row.k
    best = seconds_by(terms, &work)
    # NaN stays: where there are no coefficients, every candidate is NaN.
    if model.counts[group] > 1:
        best = smaller(best, seconds_by(terms + 1, &work))
    if model.counts[group] > 2:
        best = smaller(best, seconds_by(terms + 2, &work))
    return best


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    result.latency_s = seconds_of(model, row)
    result.energy_j = NAN
    return result


include "_batch.pxi"
