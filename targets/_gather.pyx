"""Sums of looked-up costs: a number for each operator and form, a code for each policy and operator."""

from libc.stdint cimport uint8_t, uint16_t

ctypedef fused Code:
    uint8_t
    uint16_t


def gather(const double[:, ::1] table, const Code[:, ::1] codes, double[::1] totals):
    """Fill ``totals[p]`` with the sum over operators ``i`` of ``table[i, codes[p, i]]``; every code is in range."""
    cdef Py_ssize_t rows = codes.shape[1]
    cdef Py_ssize_t width = table.shape[1]
    cdef Py_ssize_t even = rows - rows % 4
    cdef Py_ssize_t p, i
    cdef const double* costs
    cdef const Code* code
    cdef double first, second, third, fourth
    with nogil:
        for p in range(codes.shape[0]):
            code = &codes[p, 0]
            costs = &table[0, 0]
            # Four sums at a time do not wait for one another.
            first = second = third = fourth = 0.0
            for i in range(0, even, 4):
                first += costs[code[i]]
                second += costs[width + code[i + 1]]
                third += costs[2 * width + code[i + 2]]
                fourth += costs[3 * width + code[i + 3]]
                costs += 4 * width
            for i in range(even, rows):
                first += costs[code[i]]
                costs += width
            totals[p] = (first + second) + (third + fourth)
