from fxopt.targets._blocks cimport Block
from fxopt.targets._rows cimport Row


cdef struct Cost:
    double latency_s        # NaN: the model has no figures for this row
    double energy_j         # NaN: the model has no energy figures


cdef class CostModel:
    cdef readonly bint fuses
    cdef readonly bint has_energy
    cdef readonly double fixed_s
    cdef readonly bint searches
    cdef readonly bint shares_memory
    cdef readonly bint computes_curves
    cdef readonly bint stores_otherwise
    cdef readonly bint stores_zeros
    cdef Cost cost(self, const Row* row) noexcept nogil
    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil
    cdef double dram_bytes(self, const Row* row) noexcept nogil
    cdef double peak_bytes(self, const Row* row) noexcept nogil
    cdef double size_bytes(self, const Row* row) noexcept nogil
