# Costs of a block of policies by the scalar formula of the model that includes this file at its end.
#
# There is one formula, ``formula(model, row)``, which ``cost`` calls too. It is compiled again for each case below:
# with the kind known, and all that policies share known to stay, what does not depend on channels is worked out once.

from fxopt.targets._blocks cimport BLOCK, Block, take
from fxopt.targets._rows cimport CONV, DEPTHWISE, ELEMENTWISE, Row


cdef inline void cost_all(
    Model model, const Block* block, int kind, bint in_one_group, bint in_same_bits, double* latency_s, double* energy_j
) noexcept nogil:
    cdef Row row = block.row
    cdef Cost cost
    # Nothing else can see these, so storing into them changes nothing that the formula reads.
    cdef double[BLOCK] seconds
    cdef double[BLOCK] joules
    cdef Py_ssize_t p
    row.kind = kind
    if in_one_group:
        row.transposed = 0
    for p in range(block.count):
        take(&row, block, p)
        if in_one_group:
            row.groups = 1
        if in_same_bits:
            row.weight_bits = block.row.weight_bits
            row.activation_bits = block.row.activation_bits
            row.output_bits = block.row.output_bits
        cost = formula(model, &row)
        seconds[p] = cost.latency_s
        joules[p] = cost.energy_j
    for p in range(block.count):
        latency_s[p] = seconds[p]
        energy_j[p] = joules[p]


cdef void cost_block(Model model, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
    cdef int kind = block.row.kind
    if kind == CONV and block.in_one_group and not block.row.transposed:
        if block.in_same_bits:
            cost_all(model, block, CONV, True, True, latency_s, energy_j)
        else:
            cost_all(model, block, CONV, True, False, latency_s, energy_j)
    elif kind == DEPTHWISE:
        if block.in_same_bits:
            cost_all(model, block, DEPTHWISE, False, True, latency_s, energy_j)
        else:
            cost_all(model, block, DEPTHWISE, False, False, latency_s, energy_j)
    elif kind == ELEMENTWISE and block.in_one_group and not block.row.transposed:
        if block.in_same_bits:
            cost_all(model, block, ELEMENTWISE, True, True, latency_s, energy_j)
        else:
            cost_all(model, block, ELEMENTWISE, True, False, latency_s, energy_j)
    else:
        cost_all(model, block, kind, False, False, latency_s, energy_j)
