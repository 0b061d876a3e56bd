"""Neural processors of phones (Qualcomm Hexagon): a sum of what operators compute and move, and a time for each run.

    latency of a run = t0 + sum over operators of
        dense * padded MACs                     (``volume`` instead of ``dense`` where the kernel or input is 3-D)
      + dense * grouped * MACs                  of grouped convolutions, as they are
      + depthwise * MACs                        of depthwise convolutions, as they are
      + element * elements                      + stem * elements of convolutions of 3 channels
                                                + resize * elements of interpolations
      + arithmetic * elements                   of elementwise operators that are no activations
      + moved * elements                        of copies that rearrange (transposes, slices)
      + weight * weights + matmul (each product of activations) + operator (each operator)

Elements are those read and written. Padded MACs have channels in multiples of 32 and height and width, or the rows of a
matrix, in multiples of 8. Dilated convolutions take ``dilated`` times their MACs. What is merged costs nothing: batch
norm into a convolution, ReLU and the like into whatever makes their input; other activations are operators of their
own. Joining tensors moves nothing. Kernels are dense: densities do not matter.

The form is additive and linear in its figures, so that they can be fitted to times of whole networks by non-negative
least squares; it is not one of what overlaps. Source: fits to the NPU timings that Qualcomm publishes with
the package qai-hub-models.

There is a set of figures for each precision: w8a8 (weights and activations of up to 8 bits), w8a16 (weights of up to 8,
activations of up to 16) and float (everything else; the processor computes in 16-bit floating point). An operator
without weights goes by its activations. A precision takes its own figures plus ``of_float`` times those of float; one
that has neither takes those of the next wider one. The measured networks run in one precision throughout: changing it
between operators costs nothing here.

Cost never falls as channels grow, but for the stem's fourth channel. It may fall as bits grow: each operator takes
longer to launch in integers than in floating point, which small operators do not earn back. So it was measured: about a
fifth of the networks run slower in w8a16 than in float.
"""

from cython cimport final
from libc.math cimport NAN
from libc.stdint cimport int32_t, int64_t

from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    CLAMP, CONV, CONVS, COPY, DEPTHWISE, ELEMENTWISE, LINEAR, MATMUL, NO_ACTIVATION, NORM, RESIZE, UNKNOWN,
    WITH_BIAS, Row, in_elements, is_among, kernel_volume, macs, out_elements, traffic_bytes, weights,
)

from fxopt.targets.parameters import Parameter, ParameterError

PRECISION_NAMES = ("w8a8", "w8a16", "float")
TERMS = {
    "dense": ("time per item", "time per padded MAC"),
    "volume": ("time per item", "time per padded MAC of a 3-D convolution"),
    "depthwise": ("time per item", "time per MAC of a depthwise convolution"),
    "element": ("time per item", "time per element read or written"),
    "stem": ("time per item", "time per element of a convolution of 3 channels, besides that of any element"),
    "resize": ("time per item", "time per element of an interpolation, besides that of any element"),
    "arithmetic": ("time per item", "time per element of elementwise arithmetic, besides that of any element"),
    "moved": ("time per item", "time per element of a transpose or slice"),
    "weight": ("time per item", "time per weight"),
    "matmul": ("time", "time of a product of activations, besides its elements"),
    "operator": ("time", "time of each operator besides its work"),
}

PARAMETERS = {
    "run": Parameter("time", "time of a run whatever its operators", positive=False),
    "grouped": Parameter("ratio", "time per MAC of a grouped convolution over that per padded MAC"),
    "dilated": Parameter("ratio", "time of a dilated convolution's MACs over that of others"),
    **{
        f"{precision}.{term}": Parameter(dimension, about, required=False, positive=False)
        for precision in PRECISION_NAMES
        for term, (dimension, about) in TERMS.items()
    },
    **{
        f"{precision}.of_float": Parameter("ratio", "share of the float figures that is added", required=False)
        for precision in ("w8a8", "w8a16")
    },
}


cdef struct Figures:
    double dense
    double volume
    double depthwise
    double element
    double stem
    double resize
    double arithmetic
    double moved
    double weight
    double matmul
    double operator_s


def own_figure(values, precision, term):
    """A figure of a precision; convolutions of a kind without one of its own take that of dense ones."""
    dense = values.get(f"{precision}.dense", 0.0) if term in ("volume", "depthwise") else 0.0
    return values.get(f"{precision}.{term}", dense)


cdef Figures figures(values, precision):
    cdef Figures found
    share = values.get(f"{precision}.of_float", 0.0)
    terms = {term: own_figure(values, precision, term) + share * own_figure(values, "float", term) for term in TERMS}
    found.dense = terms["dense"]
    found.volume = terms["volume"]
    found.depthwise = terms["depthwise"]
    found.element = terms["element"]
    found.stem = terms["stem"]
    found.resize = terms["resize"]
    found.arithmetic = terms["arithmetic"]
    found.moved = terms["moved"]
    found.weight = terms["weight"]
    found.matmul = terms["matmul"]
    found.operator_s = terms["operator"]
    return found


cdef inline int precision_of(const Row* row) noexcept nogil:
    # Without branches: bits vary from policy to policy, so a processor would guess them wrong.
    cdef bint is_wide = (row.activation_bits > 16) | ((row.weight_bits > 8) & is_among(row, WITH_BIAS))
    return 2 * is_wide | ((row.activation_bits > 8) & (not is_wide))


cdef inline double padded(int64_t size, int64_t tile) noexcept nogil:
    # To a multiple of a power of two.
    return <double>((size + tile - 1) & -tile)


cdef inline double plane(double samples, int32_t height, int32_t width) noexcept nogil:
    # A line of pixels is as a matrix of as many rows: it is padded along its length alone.
    if height == 1 and width > 1:
        return samples * padded(width, 8)
    return samples * padded(height, 8) * padded(width, 8)


cdef inline double padded_macs(const Row* row, double taps) noexcept nogil:
    cdef double pairs = padded(row.c, 32) * padded(row.k, 32)
    if row.kind == LINEAR:
        return pairs * padded(<int64_t>row.n * row.out_h, 8)
    if row.transposed:
        return pairs * taps * plane(<double>row.n * row.in_d, row.in_h, row.in_w)
    return pairs * taps * plane(<double>row.n * row.out_d, row.out_h, row.out_w)


@final
cdef class Model(CostModel):
    """The processor with its compiler.

    Args:
        values: Figures in SI units.
        fuses: Whether batch norm and activations that clamp are merged into what makes their input.
    """

    cdef Figures precisions[3]
    cdef double grouped
    cdef double dilated
    cdef bint merges

    def __init__(self, values, bint fuses):
        # Rows marked as fused come here: other activations than clamps are not free.
        CostModel.__init__(self, False)
        if not (values.get("float.dense", 0.0) > 0.0 and values.get("float.element", 0.0) > 0.0):
            raise ParameterError("float", "dense and element have to be given, above 0: most operators rest on them.")
        for name in PRECISION_NAMES:
            for special in ("volume", "depthwise"):
                key = f"{name}.{special}"
                if key in values and values[key] < values.get(f"{name}.dense", 0.0):
                    raise ParameterError(key, "has to be at least that of dense convolutions.")
        self.merges = fuses
        self.fixed_s = values["run"]
        self.grouped = values["grouped"]
        self.dilated = values["dilated"]
        wider = "float"
        for i in reversed(range(3)):
            name = PRECISION_NAMES[i]
            wider = name if any(key.startswith(f"{name}.") for key in values) else wider
            self.precisions[i] = figures(values, wider)

    cdef inline bint free(self, const Row* row) noexcept nogil:
        """Whether a row is merged into what makes its input."""
        if row.kind == ELEMENTWISE:
            return self.merges and row.activation == CLAMP
        return self.merges and row.fused and row.kind == NORM

    cdef inline double macs_s(self, const Row* row, const Figures* here) noexcept nogil:
        """Seconds of the arithmetic of a convolution or linear layer."""
        cdef double seconds
        cdef double taps = kernel_volume(row)
        if row.kind == DEPTHWISE:
            seconds = macs(row) * here.depthwise
        elif row.kind == CONV and row.groups > 1:
            seconds = macs(row) * here.dense * self.grouped
        elif row.kernel_d > 1 or row.in_d > 1 or row.out_d > 1:
            seconds = padded_macs(row, taps) * here.volume
        else:
            seconds = padded_macs(row, taps) * here.dense
        return seconds * self.dilated if row.dilation > 1 and taps > 1.0 else seconds

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        """Bytes of each operand once; none where a row is merged or nothing is moved."""
        if self.free(row) or (row.kind == COPY and not row.transposed):
            return 0.0
        return traffic_bytes(row)


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    cdef const Figures* here = &model.precisions[precision_of(row)]
    cdef double elements
    result.energy_j = NAN
    if row.kind == UNKNOWN:
        result.latency_s = NAN
        return result
    if model.free(row):
        result.latency_s = 0.0
        return result
    elements = in_elements(row) + out_elements(row)
    result.latency_s = here.operator_s
    if row.kind == COPY:
        if row.transposed:
            result.latency_s += here.moved * elements
        return result
    result.latency_s += here.element * elements
    if is_among(row, WITH_BIAS):
        result.latency_s += model.macs_s(row, here) + here.weight * weights(row)
        if row.c == 3 and row.in_d == 1 and is_among(row, CONVS):
            result.latency_s += here.stem * elements
    elif row.kind == MATMUL:
        result.latency_s += here.matmul
    elif row.kind == RESIZE:
        result.latency_s += here.resize * elements
    elif row.kind == ELEMENTWISE and row.activation == NO_ACTIVATION:
        result.latency_s += here.arithmetic * elements
    return result


include "_batch.pxi"
