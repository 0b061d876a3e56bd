"""The linear model with coefficients of measurements, and a correction factor for each measured family of operators.

A family is everything but channels: group, kernel, stride, spatial sizes, batch, class of bits. Within one, estimates
are the linear model times a constant, so they stay monotone in channels.
"""

from libc.math cimport NAN
from libc.stdint cimport int32_t, uint64_t

from fxopt.targets._core cimport Cost
from fxopt.targets._rows cimport Row, compute_bits, is_pointwise
from fxopt.targets.models.linear_cpu cimport Model as LinearModel


cdef inline uint64_t mixed(uint64_t state, int32_t value) noexcept nogil:
    # The step of splitmix64 (Steele, Lea, Flood 2014): distinct families get distinct keys but for 2^-64 chances.
    state += <uint64_t>0x9E3779B97F4A7C15 + <uint64_t>value
    state = (state ^ (state >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * <uint64_t>0x94D049BB133111EB
    return state ^ (state >> 31)


cdef inline uint64_t family_of(const Row* row) noexcept nogil:
    cdef int bits = compute_bits(row)
    cdef uint64_t key = mixed(0, row.kind)
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


cdef class MeasuredModel(LinearModel):
    """The linear model, corrected by family.

    Args:
        values: Coefficients in SI units, by the names of the linear model.
        fuses: Whether fused rows are free.
        keys: Keys of the measured families, ascending.
        factors: Measured over linear time of each, same shape.
    """

    cdef const uint64_t[::1] keys
    cdef const double[::1] factors

    def __init__(self, values, bint fuses, const uint64_t[::1] keys, const double[::1] factors):
        LinearModel.__init__(self, values, fuses, True)
        self.keys = keys
        self.factors = factors

    cdef double factor(self, const Row* row) noexcept nogil:
        """The factor of the row's family, 1 where that was not measured."""
        cdef uint64_t key = family_of(row)
        cdef Py_ssize_t low = 0
        cdef Py_ssize_t high = self.keys.shape[0]
        cdef Py_ssize_t middle
        while low < high:
            middle = (low + high) // 2
            if self.keys[middle] < key:
                low = middle + 1
            else:
                high = middle
        return self.factors[low] if low < self.keys.shape[0] and self.keys[low] == key else 1.0

    cdef Cost cost(self, const Row* row) noexcept nogil:
        cdef Cost result
        result.latency_s = self.latency(row) * self.factor(row)
        result.energy_j = NAN
        return result
