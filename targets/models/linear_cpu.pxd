from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport Row


cdef enum:
    CLASSES = 3
    GROUPS = 12


cdef struct Linear:
    double mac
    double weight
    double read
    double written
    double spilled
    double kernel_rows
    double constant


cdef class Model(CostModel):
    # For each class of bits and group: the coefficients of every class that an operator may run in.
    cdef Linear candidates[CLASSES][GROUPS][CLASSES]
    cdef int counts[GROUPS]
    cdef double spill_threshold
    cdef double channel_tile
    cdef double inverse_tile
    cdef Cost cost(self, const Row* row) noexcept nogil
    cdef double padded_macs(self, const Row* row) noexcept nogil
    cdef double latency(self, const Row* row) noexcept nogil
