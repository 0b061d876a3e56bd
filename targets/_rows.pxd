# One operator of a workload, and the quantities that follow from it. fxopt/targets/rows.py mirrors both in NumPy.

from libc.stdint cimport int32_t, int64_t


cdef enum Kind:
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


cdef enum Activation:
    NO_ACTIVATION = 0
    CLAMP = 1
    CURVE = 2


cdef enum:
    KINDS = 12
    FLAGS = 6               # kind and the flags at the head of Row
    INTEGERS = 27           # the int32 fields of Row
    AMOUNTS = 5             # its double fields
    MAX_BITS = 32           # 32 stands for floating point
    # Sets of kinds, bit i for kind i.
    CONVS = (1 << 0) | (1 << 1)
    GEMMS = (1 << 2) | (1 << 3)
    WITH_BIAS = CONVS | (1 << 2)
    WITH_WEIGHTS = WITH_BIAS | (1 << 8)
    WITH_MACS = CONVS | GEMMS
    FLAT = GEMMS | (1 << 8)     # no groups and no kernel


cdef struct Row:
    int32_t kind
    int32_t fused
    int32_t transposed
    int32_t bias
    int32_t reused
    int32_t activation
    int32_t inputs
    int32_t n
    int32_t c
    int32_t k
    int32_t groups
    int32_t in_d
    int32_t in_h
    int32_t in_w
    int32_t out_d
    int32_t out_h
    int32_t out_w
    int32_t kernel_d
    int32_t kernel_h
    int32_t kernel_w
    int32_t stride_d
    int32_t stride_h
    int32_t stride_w
    int32_t dilation
    int32_t weight_bits
    int32_t activation_bits
    int32_t output_bits
    double weight_density
    double activation_density
    double held
    double live_bytes
    double position_bytes


cdef extern from *:
    """
    #define FXOPT_TWO_TO_52 4503599627370496.0
    """
    const double TWO_TO_52 "FXOPT_TWO_TO_52"


cdef inline double larger(double a, double b) noexcept nogil:
    # One instruction where fmax would be a call; b if a is NaN.
    return a if a > b else b


cdef inline double in_volume(const Row* row) noexcept nogil:
    return <double>row.in_d * row.in_h * row.in_w


cdef inline double out_volume(const Row* row) noexcept nogil:
    return <double>row.out_d * row.out_h * row.out_w


cdef inline double kernel_volume(const Row* row) noexcept nogil:
    return <double>row.kernel_d * row.kernel_h * row.kernel_w


cdef inline double ceil_div(double whole, double part, double inverse) noexcept nogil:
    # ceil(whole / part) of whole numbers below 2^51, given 1 / part: neither a division nor libm, which baseline x86-64
    # would call, nor a conversion, which it cannot do for several numbers at once. Adding 2^52 rounds to the nearest
    # whole number, never above the wanted one; comparing products of whole numbers tells whether it is below.
    cdef double near = (whole * inverse + TWO_TO_52) - TWO_TO_52
    return near + (1.0 if near * part < whole else 0.0)


cdef inline bint is_among(const Row* row, int kinds) noexcept nogil:
    return (kinds >> row.kind) & 1


cdef inline bint is_conv(const Row* row) noexcept nogil:
    return is_among(row, CONVS)


cdef inline bint is_gemm(const Row* row) noexcept nogil:
    return is_among(row, GEMMS)


cdef inline bint is_pointwise(const Row* row) noexcept nogil:
    # A convolution that is a plain matrix product.
    return row.kind == Kind.CONV and row.groups == 1 and row.kernel_d * row.kernel_h * row.kernel_w == 1


# The quantities below branch on sets of kinds alone: the order of kinds repeats from policy to policy, so a processor
# guesses those right, while sizes and bits vary. One formula serves convolutions and matrix products because sound rows
# of the latter have groups, kernel and all but one size of their volumes equal to 1.

cdef inline double connections(const Row* row) noexcept nogil:
    cdef double pairs = <double>row.c * row.k
    # Which rows have groups repeats from policy to policy, so this is guessed right and saves a division.
    if row.groups != 1:
        pairs /= row.groups
    return pairs * kernel_volume(row)


cdef inline double macs(const Row* row) noexcept nogil:
    cdef double volume
    if not is_among(row, WITH_MACS):
        return 0.0
    volume = in_volume(row) if row.transposed else out_volume(row)
    return connections(row) * (row.n * volume)


cdef inline double weights(const Row* row) noexcept nogil:
    return connections(row) if is_among(row, WITH_WEIGHTS) else 0.0


cdef inline double bias_elements(const Row* row) noexcept nogil:
    return <double>row.k if is_among(row, WITH_BIAS) & row.bias else 0.0


cdef inline double in_elements(const Row* row) noexcept nogil:
    cdef double samples = <double>row.n
    if row.kind == Kind.MATMUL:
        return samples * row.out_h * row.c + samples * row.c * row.k
    if row.kind != Kind.LINEAR:
        samples *= row.inputs
    return samples * in_volume(row) * (1 if row.kind == Kind.EMBEDDING else row.c)


cdef inline double out_elements(const Row* row) noexcept nogil:
    return <double>row.n * row.k * out_volume(row)


cdef inline double weight_bytes(const Row* row) noexcept nogil:
    # Parameters that the row reads: biases and what else it holds stay in 32 bits whatever the weights have.
    return weights(row) * row.weight_bits / 8.0 + 4.0 * (bias_elements(row) + row.held)


cdef inline double dense_bytes(const Row* row) noexcept nogil:
    # Parameters that nothing has stored before, zeros like any weight.
    return 0.0 if row.reused else weight_bytes(row)


cdef inline double stored_bytes(const Row* row) noexcept nogil:
    # The same with the nonzero weights and their positions alone, where that is less.
    cdef double zeros
    if row.reused or row.position_bytes == 0.0:
        return dense_bytes(row)
    zeros = weights(row) * (1.0 - row.weight_density) * row.weight_bits / 8.0
    return weight_bytes(row) - larger(zeros - row.position_bytes, 0.0)


cdef inline double traffic_bytes(const Row* row) noexcept nogil:
    # Each operand moved once between memory and the processor.
    return (
        in_elements(row) * row.activation_bits / 8.0
        + weight_bytes(row)
        + out_elements(row) * row.output_bits / 8.0
    )


cdef inline int32_t compute_bits(const Row* row) noexcept nogil:
    # The wider operand decides which arithmetic runs; without weights there are activations alone.
    cdef int32_t weight_bits = row.weight_bits * is_among(row, WITH_BIAS)
    return weight_bits if weight_bits > row.activation_bits else row.activation_bits
