from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport Row


cdef enum:
    CLASSES = 3
    GROUPS = 13


cdef struct Linear:
    double mac
    double weight
    double read
    double written
    double spilled
    double kernel_rows
    double channel
    double constant


cdef class Model(CostModel):
    # For each class of bits and group: the coefficients of every class that an operator may run in.
    cdef Linear candidates[CLASSES][GROUPS][CLASSES]
    cdef int counts[GROUPS]
    cdef double spill_threshold
    cdef double channel_tile
    cdef double inverse_tile
    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil
    cdef Cost cost(self, const Row* row) noexcept nogil
    cdef double latency(self, const Row* row) noexcept nogil
