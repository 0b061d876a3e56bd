# One row of a block of policies, filled from columns of values.

from libc.stdint cimport int32_t

from fxopt.targets._rows cimport AMOUNTS, INTEGERS, Row


cdef enum:
    BLOCK = 128             # most policies of a block


cdef struct Block:
    Row row                 # what all policies share
    Py_ssize_t count
    bint in_one_group       # all policies are
    bint in_same_bits       # all policies are
    bint is_whole           # the policies differ in nothing but the fields below
    const int32_t* c
    const int32_t* k
    const int32_t* groups
    const int32_t* weight_bits
    const int32_t* activation_bits
    const int32_t* output_bits
    const double* held
    const double* live_bytes


cdef struct Values:
    # The fields of a block that all policies share, once for each.
    int32_t c[BLOCK]
    int32_t k[BLOCK]
    int32_t groups[BLOCK]
    int32_t weight_bits[BLOCK]
    int32_t activation_bits[BLOCK]
    int32_t output_bits[BLOCK]
    double held[BLOCK]
    double live_bytes[BLOCK]


cdef inline void take(Row* row, const Block* block, Py_ssize_t p) noexcept nogil:
    # Make a row of the block that of policy p.
    row.c = block.c[p]
    row.k = block.k[p]
    row.groups = block.groups[p]
    row.weight_bits = block.weight_bits[p]
    row.activation_bits = block.activation_bits[p]
    row.output_bits = block.output_bits[p]
    row.held = block.held[p]
    row.live_bytes = block.live_bytes[p]


cdef inline void put(Values* values, const Row* row, Py_ssize_t p) noexcept nogil:
    values.c[p] = row.c
    values.k[p] = row.k
    values.groups[p] = row.groups
    values.weight_bits[p] = row.weight_bits
    values.activation_bits[p] = row.activation_bits
    values.output_bits[p] = row.output_bits
    values.held[p] = row.held
    values.live_bytes[p] = row.live_bytes


cdef inline void point(Block* block, Values* values) noexcept nogil:
    block.c = values.c
    block.k = values.k
    block.groups = values.groups
    block.weight_bits = values.weight_bits
    block.activation_bits = values.activation_bits
    block.output_bits = values.output_bits
    block.held = values.held
    block.live_bytes = values.live_bytes


cdef struct Columns:
    # The fields that differ from policy to policy: where they stand in a row, and where their values come from.
    Py_ssize_t integers
    Py_ssize_t amounts
    int32_t* integer_at[INTEGERS]
    const int32_t* integer_from[INTEGERS]
    double* amount_at[AMOUNTS]
    const double* amount_from[AMOUNTS]


cdef inline const int32_t** integer_place(Block* block, const Row* row, const int32_t* field) noexcept nogil:
    # What points to the values of a field; NULL if a block has no place for them.
    if field == &row.c:
        return &block.c
    if field == &row.k:
        return &block.k
    if field == &row.groups:
        return &block.groups
    if field == &row.weight_bits:
        return &block.weight_bits
    if field == &row.activation_bits:
        return &block.activation_bits
    if field == &row.output_bits:
        return &block.output_bits
    return NULL


cdef inline const double** amount_place(Block* block, const Row* row, const double* field) noexcept nogil:
    if field == &row.held:
        return &block.held
    if field == &row.live_bytes:
        return &block.live_bytes
    return NULL


cdef inline void fill(const Columns* columns, Py_ssize_t p) noexcept nogil:
    # Make the row that the columns point into that of policy p.
    cdef Py_ssize_t j
    for j in range(columns.integers):
        columns.integer_at[j][0] = columns.integer_from[j][p]
    for j in range(columns.amounts):
        columns.amount_at[j][0] = columns.amount_from[j][p]


cdef inline void load(
    Block* block, Values* shared, const Row* row, const Columns* columns, Py_ssize_t first, Py_ssize_t count
) noexcept nogil:
    # Fill a block with ``count`` policies from ``first`` on; ``row`` is what the columns point into, and ``shared``
    # holds its fields once for each policy.
    cdef const int32_t** integers
    cdef const double** amounts
    cdef int32_t differs = 0
    cdef int32_t groups = 0
    cdef Py_ssize_t j, p
    fill(columns, first)
    point(block, shared)
    for j in range(columns.integers):
        integers = integer_place(block, row, columns.integer_at[j])
        if integers != NULL:
            integers[0] = columns.integer_from[j] + first
            continue
        for p in range(count):
            differs |= columns.integer_from[j][first + p] ^ columns.integer_at[j][0]
    for j in range(columns.amounts):
        amounts = amount_place(block, row, columns.amount_at[j])
        if amounts != NULL:
            amounts[0] = columns.amount_from[j] + first
            continue
        for p in range(count):
            differs |= columns.amount_from[j][first + p] != columns.amount_at[j][0]
    block.row = row[0]
    block.count = count
    for p in range(count):
        groups |= block.groups[p]
    block.in_one_group = groups == 1
    block.in_same_bits = (
        (block.weight_bits == shared.weight_bits)
        & (block.activation_bits == shared.activation_bits)
        & (block.output_bits == shared.output_bits)
    )
    block.is_whole = differs == 0
