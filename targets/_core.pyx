"""The loops under every cost model: a scalar cost per row, totals and per-row arrays over batches of policies.

A model is a cdef class that derives from CostModel and overrides ``cost``, ``dram_bytes`` if it fetches again,
``peak_bytes`` if operators share memory between what they read and write, and ``size_bytes`` if it has a form of its
own for weights.
Everything that is the same on all hardware (fused rows, sizes, MACs, rows without a model) is done here, once.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport NAN
from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fxopt.targets._blocks cimport BLOCK, Block, Columns, Values, fill, load, put, take
from fxopt.targets._rows cimport (
    CURVE, DEPTHWISE, ELEMENTWISE, INTEGERS, Row, dense_bytes, larger, macs, stored_bytes, traffic_bytes,
)


cdef inline bint is_merged(CostModel model, const Row* row) noexcept nogil:
    # Whether the runtime merges the row into its producer, where it costs nothing.
    return model.fuses and row.fused and not (
        model.computes_curves and row.kind == ELEMENTWISE and row.activation == CURVE
    )


cdef inline Cost settled(CostModel model, const Row* row, unsigned char* uncosted) noexcept nogil:
    # The cost as it enters totals: fused rows are free, rows without a model are zero and marked.
    cdef Cost result
    if not is_merged(model, row):
        result = model.cost(row)
        if result.latency_s == result.latency_s:
            return result
        uncosted[0] = 1
    result.latency_s = 0.0
    result.energy_j = 0.0
    return result


cdef struct Known:
    # What one row cost when the fields that differ had these values.
    int32_t integers[INTEGERS]
    double held
    double weight_density
    double position_bytes
    Cost cost
    double stored_bytes
    double macs
    unsigned char used
    unsigned char uncosted


cdef enum:
    SLOTS = 1024


cdef struct Sums:
    # Totals of policies.
    double* latency_s
    double* energy_j
    double* weight_bytes
    double* peak_bytes
    double* macs


cdef inline Sums sums_at(const Sums* sums, Py_ssize_t first) noexcept nogil:
    cdef Sums result
    result.latency_s = sums.latency_s + first
    result.energy_j = sums.energy_j + first
    result.weight_bytes = sums.weight_bytes + first
    result.peak_bytes = sums.peak_bytes + first
    result.macs = sums.macs + first
    return result


cdef inline double size_of(CostModel model, const Row* row) noexcept nogil:
    if model.stores_zeros:
        return dense_bytes(row)
    return model.size_bytes(row) if model.stores_otherwise else stored_bytes(row)


cdef inline void add_policy(
    CostModel model, const Row* row, const Sums* sums, Py_ssize_t p, unsigned char* uncosted
) noexcept nogil:
    cdef Cost cost = settled(model, row, uncosted)
    sums.latency_s[p] += cost.latency_s
    sums.energy_j[p] += cost.energy_j
    sums.weight_bytes[p] += size_of(model, row)
    sums.peak_bytes[p] = larger(model.peak_bytes(row), sums.peak_bytes[p])
    sums.macs[p] += macs(row)


cdef void add_other_sizes(CostModel model, const Block* block, const Sums* sums) noexcept nogil:
    cdef Row row = block.row
    cdef Py_ssize_t p
    for p in range(block.count):
        take(&row, block, p)
        sums.weight_bytes[p] += size_of(model, &row)
        sums.macs[p] += macs(&row)


cdef inline void add_sizes(const Block* block, bint in_one_group, const Sums* sums) noexcept nogil:
    # Of dense rows, and of any whose zeros are stored like other weights.
    cdef Row row = block.row
    cdef double[BLOCK] stored
    cdef double[BLOCK] work
    cdef Py_ssize_t p
    for p in range(block.count):
        take(&row, block, p)
        if in_one_group:
            row.groups = 1
        stored[p] = dense_bytes(&row)
        work[p] = macs(&row)
    for p in range(block.count):
        sums.weight_bytes[p] += stored[p]
        sums.macs[p] += work[p]


cdef inline void add_peaks(CostModel model, const Block* block, const Sums* sums) noexcept nogil:
    cdef Row row = block.row
    cdef Py_ssize_t p
    # Only where each element is read once, by what is written in its place, can an operator write over its input.
    if not model.shares_memory or not (row.kind == DEPTHWISE or row.kind == ELEMENTWISE):
        for p in range(block.count):
            sums.peak_bytes[p] = larger(block.live_bytes[p], sums.peak_bytes[p])
        return
    for p in range(block.count):
        take(&row, block, p)
        sums.peak_bytes[p] = larger(model.peak_bytes(&row), sums.peak_bytes[p])


cdef void add_block(CostModel model, const Block* block, const Sums* sums, unsigned char* uncosted) noexcept nogil:
    cdef double[BLOCK] latency_s
    cdef double[BLOCK] energy_j
    cdef Py_ssize_t p
    cdef int is_costed
    cdef int are_costed = 1
    if not is_merged(model, &block.row):
        model.costs(block, latency_s, energy_j)
        for p in range(block.count):
            is_costed = latency_s[p] == latency_s[p]
            are_costed &= is_costed
            sums.latency_s[p] += latency_s[p] if is_costed else 0.0
            sums.energy_j[p] += energy_j[p] if is_costed else 0.0
        uncosted[0] |= 1 - are_costed
    add_peaks(model, block, sums)
    if model.stores_otherwise or (block.row.position_bytes != 0.0 and not model.stores_zeros):
        add_other_sizes(model, block, sums)
    elif block.in_one_group:
        add_sizes(block, True, sums)
    else:
        add_sizes(block, False, sums)


cdef inline const Known* look_up(CostModel model, const Row* row, const Columns* columns, Known* known) noexcept nogil:
    # Policies repeat the sizes of a single operator, and a search takes long: costs are kept in a table with one place
    # for each hash, where the latest stays.
    cdef uint32_t key = 0
    cdef bint same
    cdef Known* slot
    cdef Py_ssize_t j
    for j in range(columns.integers):
        key = (key ^ <uint32_t>columns.integer_at[j][0]) * <uint32_t>0x9E3779B1
    slot = &known[(key >> 16) & (SLOTS - 1)]
    same = (
        slot.used
        and slot.held == row.held
        and slot.weight_density == row.weight_density
        and slot.position_bytes == row.position_bytes
    )
    for j in range(columns.integers):
        same &= slot.integers[j] == columns.integer_at[j][0]
        slot.integers[j] = columns.integer_at[j][0]
    if same:
        return slot
    slot.held = row.held
    slot.weight_density = row.weight_density
    slot.position_bytes = row.position_bytes
    slot.used = 1
    slot.uncosted = 0
    slot.cost = settled(model, row, &slot.uncosted)
    slot.stored_bytes = size_of(model, row)
    slot.macs = macs(row)
    return slot


cdef void add_searched(
    CostModel model, const Row* row, const Columns* columns, Known* known, const Sums* sums, Py_ssize_t count,
    unsigned char* uncosted
) noexcept nogil:
    cdef const Known* found
    cdef Py_ssize_t p
    memset(known, 0, SLOTS * sizeof(Known))
    for p in range(count):
        fill(columns, p)
        found = look_up(model, row, columns, known)
        sums.latency_s[p] += found.cost.latency_s
        sums.energy_j[p] += found.cost.energy_j
        sums.weight_bytes[p] += found.stored_bytes
        sums.macs[p] += found.macs
        sums.peak_bytes[p] = larger(model.peak_bytes(row), sums.peak_bytes[p])
        uncosted[0] |= found.uncosted


cdef void add_columns(
    CostModel model, const Row* row, const Columns* columns, const Sums* sums, Py_ssize_t count,
    unsigned char* uncosted
) noexcept nogil:
    cdef Block block
    cdef Values shared
    cdef Sums here
    cdef Py_ssize_t first = 0
    cdef Py_ssize_t p, size
    for p in range(BLOCK):
        put(&shared, row, p)
    while first < count:
        size = min(BLOCK, count - first)
        here = sums_at(sums, first)
        load(&block, &shared, row, columns, first, size)
        if block.is_whole:
            add_block(model, &block, &here, uncosted)
        else:
            for p in range(size):
                fill(columns, first + p)
                add_policy(model, row, &here, p, uncosted)
        first += size


cdef struct Differing:
    # A row of the template, and where its values for each policy come from.
    Row row
    Columns columns


cdef int point_at(Differing* line, fields, offsets, Py_ssize_t first) except -1:
    # Find the values of the fields that differ. The caller keeps the arrays alive; they have no other place to go to.
    cdef Columns* columns = &line.columns
    cdef Py_buffer view
    cdef Py_ssize_t offset
    columns.integers = columns.amounts = 0
    for name, column in fields.items():
        offset = offsets[name]
        PyObject_GetBuffer(column, &view, PyBUF_SIMPLE)
        if offset < <Py_ssize_t>(INTEGERS * sizeof(int32_t)):
            columns.integer_at[columns.integers] = <int32_t*>(<char*>&line.row + offset)
            columns.integer_from[columns.integers] = <const int32_t*>view.buf + first
            columns.integers += 1
        else:
            columns.amount_at[columns.amounts] = <double*>(<char*>&line.row + offset)
            columns.amount_from[columns.amounts] = <const double*>view.buf + first
            columns.amounts += 1
        PyBuffer_Release(&view)
    return 0


cdef void add_lines(
    CostModel model, Differing* lines, Py_ssize_t length, Known* known, const Sums* sums, Py_ssize_t count,
    unsigned char* uncosted
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(length):
        if known == NULL:
            add_columns(model, &lines[i].row, &lines[i].columns, sums, count, &uncosted[i])
        else:
            add_searched(model, &lines[i].row, &lines[i].columns, known, sums, count, &uncosted[i])


cdef Sums sums_of(
    double[::1] latency_s, double[::1] energy_j, double[::1] weight_bytes, double[::1] peak_bytes, double[::1] macs_of
):
    cdef Sums sums
    sums.latency_s = &latency_s[0]
    sums.energy_j = &energy_j[0]
    sums.weight_bytes = &weight_bytes[0]
    sums.peak_bytes = &peak_bytes[0]
    sums.macs = &macs_of[0]
    return sums


cdef class CostModel:
    """Base of all cost models.

    Args:
        fuses: Whether the runtime merges rows marked ``fused`` into their producer, where they cost nothing.

    Attributes:
        has_energy: Whether ``cost`` gives an energy; set by subclasses.
        fixed_s: Seconds of a run whatever its operators, in totals and in no row; set by subclasses.
        searches: Whether ``cost`` searches, for tiles or the like, so that known costs are worth looking up; set by
            subclasses.
        computes_curves: Whether activations with a curve (h-swish, SiLU) cost something even where they are marked as
            fused; set by subclasses.
        shares_memory: Whether ``peak_bytes`` is overridden, for operators that compute each output channel or element
            from the input in its place (depthwise, elementwise); set by subclasses.
        stores_otherwise: Whether ``size_bytes`` is overridden; set by subclasses.
        stores_zeros: Whether zeros among weights are stored like any weight; set by subclasses.
    """

    def __init__(self, bint fuses):
        self.fuses = fuses
        self.has_energy = False
        self.fixed_s = 0.0
        self.searches = False
        self.shares_memory = False
        self.computes_curves = False
        self.stores_otherwise = False
        self.stores_zeros = False

    cdef Cost cost(self, const Row* row) noexcept nogil:
        """Cost of one row by itself; NaN where the model has no figures.

        Must not fail on a valid row, and must not look at ``live_bytes``, which is of the whole network.
        """
        cdef Cost none
        none.latency_s = NAN
        none.energy_j = NAN
        return none

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        """Fill what ``cost`` gives for each policy of a block.

        A model with a closed formula overrides it with ``cost_block`` of targets/models/_batch.pxi, which compiles
        ``cost`` into the loop. A subclass that overrides ``cost`` overrides this too, where its base does.
        """
        cdef Row row = block.row
        cdef Cost cost
        cdef Py_ssize_t p
        for p in range(block.count):
            take(&row, block, p)
            cost = self.cost(&row)
            latency_s[p] = cost.latency_s
            energy_j[p] = cost.energy_j

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        """Bytes that one row moves to and from memory: each operand once, unless the model knows better."""
        return traffic_bytes(row)

    cdef double peak_bytes(self, const Row* row) noexcept nogil:
        """Bytes of activations that are held while one row runs: all that are alive, unless the model knows better."""
        return row.live_bytes

    cdef double size_bytes(self, const Row* row) noexcept nogil:
        """Bytes that the parameters of one row add to the model's size: what a packed file takes, unless the model
        knows better."""
        return stored_bytes(row)

    def totals(
        self,
        const Row[:, ::1] rows,
        double[::1] latency_s,
        double[::1] energy_j,
        double[::1] weight_bytes_out,
        double[::1] peak_bytes,
        double[::1] macs_out,
        unsigned char[::1] uncosted,
    ):
        """Fill one total per policy; ``uncosted[i]`` becomes 1 where row i has no model under some policy."""
        cdef Sums sums = sums_of(latency_s, energy_j, weight_bytes_out, peak_bytes, macs_out)
        cdef Py_ssize_t p, i
        latency_s[:] = self.fixed_s
        energy_j[:] = 0.0
        weight_bytes_out[:] = 0.0
        peak_bytes[:] = 0.0
        macs_out[:] = 0.0
        with nogil:
            for p in range(rows.shape[0]):
                for i in range(rows.shape[1]):
                    add_policy(self, &rows[p, i], &sums, p, &uncosted[i])

    def column_totals(
        self,
        const Row[::1] template,
        columns,
        offsets,
        Py_ssize_t first,
        double[::1] latency_s,
        double[::1] energy_j,
        double[::1] weight_bytes_out,
        double[::1] peak_bytes,
        double[::1] macs_out,
        unsigned char[::1] uncosted,
    ):
        """Fill the totals of the policies from ``first`` on, given what differs between them.

        ``template`` has the rows; ``columns`` a mapping for each, from the names of the fields that differ to their
        values for all policies; ``offsets`` the byte offset of each field. Gives what :meth:`totals` gives.
        """
        cdef Sums sums = sums_of(latency_s, energy_j, weight_bytes_out, peak_bytes, macs_out)
        cdef Py_ssize_t length = template.shape[0]
        cdef Known* known = NULL
        cdef Differing* lines
        cdef Py_ssize_t i
        latency_s[:] = self.fixed_s
        energy_j[:] = 0.0
        weight_bytes_out[:] = 0.0
        peak_bytes[:] = 0.0
        macs_out[:] = 0.0
        lines = <Differing*>malloc((length + 1) * sizeof(Differing))
        if self.searches:
            known = <Known*>malloc(SLOTS * sizeof(Known))
        try:
            if lines == NULL or (self.searches and known == NULL):
                raise MemoryError("no memory for the costs of a workload")
            for i in range(length):
                lines[i].row = template[i]
                point_at(&lines[i], columns[i], offsets, first)
            # Once for all rows: threads that take turns at the interpreter's lock wait longer than a row takes.
            with nogil:
                add_lines(self, lines, length, known, &sums, latency_s.shape[0], &uncosted[0])
        finally:
            free(known)
            free(lines)

    def per_row(
        self, const Row[:, ::1] rows, double[:, ::1] latency_s, double[:, ::1] energy_j, double[:, ::1] dram_bytes
    ):
        """Fill one latency, energy and traffic per policy and row; fused rows and those without a model have none."""
        cdef Py_ssize_t p, i
        cdef unsigned char without_model
        cdef bint is_free
        cdef Cost cost
        with nogil:
            for p in range(rows.shape[0]):
                for i in range(rows.shape[1]):
                    without_model = 0
                    cost = settled(self, &rows[p, i], &without_model)
                    latency_s[p, i] = cost.latency_s
                    energy_j[p, i] = cost.energy_j
                    is_free = without_model or is_merged(self, &rows[p, i])
                    dram_bytes[p, i] = 0.0 if is_free else self.dram_bytes(&rows[p, i])

    def held_bytes(self, const Row[:, ::1] rows, double[:, ::1] activation_bytes):
        """Fill the bytes of activations that are held while each row runs, per policy and row."""
        cdef Py_ssize_t p, i
        with nogil:
            for p in range(rows.shape[0]):
                for i in range(rows.shape[1]):
                    activation_bytes[p, i] = self.peak_bytes(&rows[p, i])

    def sizes(self, const Row[:, ::1] rows, double[:, ::1] parameter_bytes):
        """Fill the bytes that the parameters of each row add to the model's size, per policy and row."""
        cdef Py_ssize_t p, i
        with nogil:
            for p in range(rows.shape[0]):
                for i in range(rows.shape[1]):
                    parameter_bytes[p, i] = size_of(self, &rows[p, i])
