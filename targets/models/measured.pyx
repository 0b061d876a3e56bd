"""A machine whose operators were timed one by one, linear by kind of operator:

    latency = mac * MACs + patch * patches + tap * taps + rest * rests + weight * weights + in * inputs
            + out * outputs + const

with a set of coefficients for each kind of operator and each class of bits (int8: up to 8, float: above). ``patch``
counts the elements of the windows that a convolution or pooling gathers, inputs of a window times its positions;
``tap`` the places of those windows, whatever their channels, once for each group of channels; ``rest`` the elements of
windows in channels that do not fill a block of 16, which vector kernels take one by one. All coefficients are at least
0, so cost never falls as sizes grow, nor as channels do by whole blocks. An int8 kind without coefficients, for which
the runtime has no integer kernel, takes those of float; a kind without any is not costed.

A family is everything but channels: group, kernel, stride, spatial sizes, batch, class of bits. Where families were
measured too (on the host), the estimate is the linear one times the factor of its family, which keeps it as monotone in
channels as it was.

Where the runtime fuses, what is marked fused costs nothing, but for activations with a curve (SiLU, GELU), which
runtimes on CPUs compute by themselves; a clamp between integers is the range of their grid and costs nothing either.
"""

from libc.math cimport NAN
from libc.stdint cimport int32_t, uint64_t

import numpy as np

from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    CLAMP, CONV, COPY, CURVE, ELEMENTWISE, POOL, UNKNOWN, Row, compute_bits, in_elements, is_conv, is_pointwise,
    kernel_volume, macs, out_elements, out_volume, traffic_bytes, weights,
)

from fxopt.targets.parameters import Parameter, ParameterError

CLASS_NAMES = ("int8", "float")
# In the order of the kinds, behind those that are told apart further.
GROUP_NAMES = (
    "pointwise", "grouped", "curve", "clamp", "scale", "global_pool", "join", "dense", "depthwise", "linear", "matmul",
    "elementwise", "pool", "norm", "softmax", "embedding", "copy", "resize",
)
COEFFICIENTS = {
    "mac": "MAC",
    "patch": "element of a gathered window",
    "tap": "place of a window and group",
    "rest": "element of a window beyond whole blocks of 16 channels",
    "weight": "weight",
    "in": "input element",
    "out": "output element",
}

PARAMETERS = {
    f"{bits}.{group}.{name}": (
        Parameter("time", "time besides the work", required=False, positive=False)
        if name == "const"
        else Parameter("time per item", f"time per {COEFFICIENTS[name]}", required=False, positive=False)
    )
    for bits in CLASS_NAMES
    for group in GROUP_NAMES
    for name in (*COEFFICIENTS, "const")
}


cdef enum:
    CLASSES = 2
    GROUPS = 18
    TERMS = 8
    FIRST_KIND = 7          # the place of CONV in GROUP_NAMES
    BLOCK = 16              # channels of a vector of 512 bits in float; kernels in 8 bits take as many


cdef inline int class_of(const Row* row) noexcept nogil:
    return compute_bits(row) > 8


cdef inline int group_of(const Row* row) noexcept nogil:
    if row.kind == UNKNOWN:
        return -1
    if is_pointwise(row):
        return 0
    if row.kind == CONV and row.groups > 1:
        return 1
    if row.kind == ELEMENTWISE:
        return 2 if row.activation == CURVE else 3 if row.activation == CLAMP else 4 if row.inputs == 1 else 11
    if row.kind == POOL and out_volume(row) == 1.0:
        return 5
    if row.kind == COPY and not row.transposed:
        return 6
    return FIRST_KIND + row.kind


cdef inline void fill_terms(const Row* row, double* terms) noexcept nogil:
    cdef bint windows = is_conv(row) or row.kind == POOL
    cdef double places = kernel_volume(row) * out_volume(row) * row.n if windows else 0.0
    terms[0] = macs(row)
    terms[1] = places * row.c
    terms[2] = places * (row.groups if row.kind == CONV else 1)
    terms[3] = places * (row.c % BLOCK) if is_conv(row) else 0.0
    terms[4] = weights(row)
    terms[5] = in_elements(row)
    terms[6] = out_elements(row)
    terms[7] = 1.0


def terms_of(const Row[::1] rows):
    """What coefficients are multiplied with, in the order of COEFFICIENTS and then ``const``, shape (rows, 8)."""
    cdef double[:, ::1] terms = np.empty((rows.shape[0], TERMS), np.float64)
    cdef Py_ssize_t i
    for i in range(rows.shape[0]):
        fill_terms(&rows[i], &terms[i, 0])
    return np.asarray(terms)


def group_names(const Row[::1] rows):
    """The class of bits and the group of coefficients of each row, or None for kinds that have none."""
    cdef Py_ssize_t i
    groups = [(class_of(&rows[i]), group_of(&rows[i])) for i in range(rows.shape[0])]
    return [None if group < 0 else (CLASS_NAMES[bits], GROUP_NAMES[group]) for bits, group in groups]


cdef inline uint64_t mixed(uint64_t state, int32_t value) noexcept nogil:
    # The step of splitmix64 (Steele, Lea, Flood 2014): distinct families get distinct keys but for 2^-64 chances.
    state += <uint64_t>0x9E3779B97F4A7C15 + <uint64_t>value
    state = (state ^ (state >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * <uint64_t>0x94D049BB133111EB
    return state ^ (state >> 31)


cdef inline uint64_t family_of(const Row* row) noexcept nogil:
    cdef int bits = compute_bits(row)
    cdef uint64_t key = mixed(mixed(0, row.kind), row.activation)
    key = mixed(key, is_pointwise(row) + 2 * (row.groups > 1) + 4 * row.transposed)
    key = mixed(key, 0 if bits <= 8 else 1 if bits <= 16 else 2)
    key = mixed(key, row.n)
    key = mixed(key, row.inputs)
    key = mixed(mixed(mixed(key, row.in_d), row.in_h), row.in_w)
    key = mixed(mixed(mixed(key, row.out_d), row.out_h), row.out_w)
    key = mixed(mixed(mixed(key, row.kernel_d), row.kernel_h), row.kernel_w)
    return mixed(mixed(mixed(mixed(key, row.stride_d), row.stride_h), row.stride_w), row.dilation)


def family_keys(const Row[::1] rows, uint64_t[::1] keys):
    """Fill the key of each row's family."""
    cdef Py_ssize_t i
    for i in range(rows.shape[0]):
        keys[i] = family_of(&rows[i])


cdef class Model(CostModel):
    """The linear model of a measured machine, corrected by family where families are given.

    Args:
        values: Coefficients in SI units, by name.
        fuses: Whether fused rows are free, curves apart.
        keys: Keys of the measured families, ascending.
        factors: Measured over linear time of each, same shape.
    """

    cdef double coefficients[CLASSES][GROUPS][TERMS]
    cdef bint merges
    cdef const uint64_t[::1] keys
    cdef const double[::1] factors

    def __init__(self, values, bint fuses, keys=None, factors=None):
        # Which fused rows are free is told here, row by row.
        CostModel.__init__(self, False)
        self.merges = fuses
        self.keys = np.empty(0, np.uint64) if keys is None else keys
        self.factors = np.empty(0, np.float64) if factors is None else factors
        if not values:
            raise ParameterError("float", "holds no coefficient of any operator; calibrate the machine again.")
        for j, group in enumerate(GROUP_NAMES):
            given = [self.given(values, f"{bits}.{group}") for bits in CLASS_NAMES]
            for i in range(CLASSES):
                terms = next((terms for terms in given[i:] if terms is not None), [NAN] * TERMS)
                for k in range(TERMS):
                    self.coefficients[i][j][k] = terms[k]

    def given(self, values, prefix):
        """The coefficients under ``prefix``, or None if there are none."""
        names = [f"{prefix}.{name}" for name in (*COEFFICIENTS, "const")]
        if not any(name in values for name in names):
            return None
        found = [values.get(name, 0.0) for name in names]
        if not any(found):
            raise ParameterError(prefix, "all coefficients are 0: the operator would cost nothing.")
        return found

    cdef bint is_merged(self, const Row* row) noexcept nogil:
        if not self.merges:
            return False
        if row.kind == ELEMENTWISE and row.activation == CURVE:
            return False
        return row.fused or (row.kind == ELEMENTWISE and row.activation == CLAMP and row.activation_bits <= 8)

    cdef double factor(self, const Row* row) noexcept nogil:
        """The factor of the row's family, 1 where that was not measured."""
        cdef Py_ssize_t low = 0
        cdef Py_ssize_t high = self.keys.shape[0]
        cdef Py_ssize_t middle
        cdef uint64_t key
        if high == 0:
            return 1.0
        key = family_of(row)
        while low < high:
            middle = (low + high) // 2
            if self.keys[middle] < key:
                low = middle + 1
            else:
                high = middle
        return self.factors[low] if low < self.keys.shape[0] and self.keys[low] == key else 1.0

    cdef Cost cost(self, const Row* row) noexcept nogil:
        cdef Cost result
        cdef double terms[TERMS]
        cdef int group = group_of(row)
        cdef const double* by
        cdef int k
        result.energy_j = NAN
        result.latency_s = 0.0
        if self.is_merged(row):
            return result
        result.latency_s = NAN
        if group < 0:
            return result
        fill_terms(row, terms)
        by = &self.coefficients[class_of(row)][group][0]
        result.latency_s = 0.0
        for k in range(TERMS):
            result.latency_s += by[k] * terms[k]
        result.latency_s *= self.factor(row)
        return result

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        return 0.0 if self.is_merged(row) else traffic_bytes(row)
