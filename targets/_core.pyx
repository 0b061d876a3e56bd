"""The loops under every cost model: a scalar cost per row, totals and per-row arrays over batches of policies.

A model is a cdef class that derives from CostModel and overrides ``cost``, ``dram_bytes`` if it fetches again, and
``peak_bytes`` if operators share memory between what they read and write.
Everything that is the same on all hardware (fused rows, sizes, MACs, rows without a model) is done here, once.
"""

from libc.math cimport NAN, isfinite
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport free, malloc

from fxopt.targets._rows cimport (
    AMOUNTS, CURVE, FLAGS, FLAT, INTEGERS, KINDS, MAX_BITS, Row, is_among, is_gemm, larger, macs, stored_bytes,
    traffic_bytes,
)


cdef inline Cost settled(CostModel model, const Row* row, unsigned char* uncosted) noexcept nogil:
    # The cost as it enters totals: fused rows are free, rows without a model are zero and marked.
    cdef Cost result
    if not (model.fuses and row.fused):
        result = model.cost(row)
        if result.latency_s == result.latency_s:
            return result
        uncosted[0] = 1
    result.latency_s = 0.0
    result.energy_j = 0.0
    return result


cdef struct Columns:
    # Where the fields that differ from policy to policy stand in a row, and where their values come from.
    Py_ssize_t integers
    Py_ssize_t amounts
    int32_t* integer_at[INTEGERS]
    const int32_t* integer_from[INTEGERS]
    double* amount_at[AMOUNTS]
    const double* amount_from[AMOUNTS]


cdef struct Known:
    # What one row cost when the fields that differ had these values.
    int32_t integers[INTEGERS]
    double held
    Cost cost
    double stored_bytes
    double macs
    unsigned char used
    unsigned char uncosted


cdef enum:
    SLOTS = 1024


cdef inline void fill(const Columns* columns, Py_ssize_t p) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(columns.integers):
        columns.integer_at[j][0] = columns.integer_from[j][p]
    for j in range(columns.amounts):
        columns.amount_at[j][0] = columns.amount_from[j][p]


cdef inline const Known* look_up(CostModel model, const Row* row, const Columns* columns, Known* known) noexcept nogil:
    # Policies repeat the sizes of a single operator. Where a cost takes a search it is kept in a table with one place
    # for each hash, where the latest stays; a closed formula is as quick as the table.
    cdef uint32_t key = 0
    cdef bint same
    cdef Known* slot = known
    cdef Py_ssize_t j
    if model.searches:
        for j in range(columns.integers):
            key = (key ^ <uint32_t>columns.integer_at[j][0]) * <uint32_t>0x9E3779B1
        slot = &known[(key >> 16) & (SLOTS - 1)]
        same = slot.used and slot.held == row.held
        for j in range(columns.integers):
            same &= slot.integers[j] == columns.integer_at[j][0]
            slot.integers[j] = columns.integer_at[j][0]
        if same:
            return slot
        slot.held = row.held
        slot.used = 1
    slot.uncosted = 0
    slot.cost = settled(model, row, &slot.uncosted)
    slot.stored_bytes = stored_bytes(row)
    slot.macs = macs(row)
    return slot


cdef class CostModel:
    """Base of all cost models.

    Args:
        fuses: Whether the runtime merges rows marked ``fused`` into their producer, where they cost nothing.

    Attributes:
        has_energy: Whether ``cost`` gives an energy; set by subclasses.
        fixed_s: Seconds of a run whatever its operators, in totals and in no row; set by subclasses.
        searches: Whether ``cost`` searches, for tiles or the like, so that known costs are worth looking up; set by
            subclasses.
    """

    def __init__(self, bint fuses):
        self.fuses = fuses
        self.has_energy = False
        self.fixed_s = 0.0
        self.searches = False

    cdef Cost cost(self, const Row* row) noexcept nogil:
        """Cost of one row by itself; NaN where the model has no figures.

        Must not fail on a valid row, and must not look at ``live_bytes``, which is of the whole network.
        """
        cdef Cost none
        none.latency_s = NAN
        none.energy_j = NAN
        return none

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        """Bytes that one row moves to and from memory: each operand once, unless the model knows better."""
        return traffic_bytes(row)

    cdef double peak_bytes(self, const Row* row) noexcept nogil:
        """Bytes of activations that are held while one row runs: all that are alive, unless the model knows better."""
        return row.live_bytes

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
        cdef Py_ssize_t p, i
        cdef double latency, energy, stored, peak, work
        cdef const Row* row
        cdef Cost cost
        with nogil:
            for p in range(rows.shape[0]):
                latency = self.fixed_s
                energy = stored = peak = work = 0.0
                for i in range(rows.shape[1]):
                    row = &rows[p, i]
                    cost = settled(self, row, &uncosted[i])
                    latency += cost.latency_s
                    energy += cost.energy_j
                    stored += stored_bytes(row)
                    work += macs(row)
                    peak = larger(self.peak_bytes(row), peak)
                latency_s[p] = latency
                energy_j[p] = energy
                weight_bytes_out[p] = stored
                peak_bytes[p] = peak
                macs_out[p] = work

    def add_row(
        self,
        const Row[::1] template,
        integers,
        amounts,
        double[::1] latency_s,
        double[::1] energy_j,
        double[::1] weight_bytes_out,
        double[::1] peak_bytes,
        double[::1] macs_out,
        unsigned char[::1] uncosted,
    ):
        """Add one row's costs to the totals of many policies.

        ``template`` is the row; ``integers`` and ``amounts`` are (byte offset, column) pairs of the int32 and the
        double fields that differ from policy to policy. Adding the rows in order to totals that start from 0, and
        from :attr:`fixed_s` in latency, gives what :meth:`totals` gives.
        """
        cdef Known* known = <Known*>malloc(SLOTS * sizeof(Known))
        cdef Columns columns
        cdef Row row = template[0]
        cdef const Known* found
        cdef Py_ssize_t j, p
        cdef const int32_t[::1] integer_column
        cdef const double[::1] amount_column
        if known == NULL:
            raise MemoryError("no memory for the costs of one operator")
        columns.integers = len(integers)
        columns.amounts = len(amounts)
        for j, (offset, column) in enumerate(integers):
            integer_column = column[:latency_s.shape[0]]
            columns.integer_at[j] = <int32_t*>(<char*>&row + <Py_ssize_t>offset)
            columns.integer_from[j] = &integer_column[0]
        for j, (offset, column) in enumerate(amounts):
            amount_column = column[:latency_s.shape[0]]
            columns.amount_at[j] = <double*>(<char*>&row + <Py_ssize_t>offset)
            columns.amount_from[j] = &amount_column[0]
        with nogil:
            for j in range(SLOTS):
                known[j].used = 0
            for p in range(latency_s.shape[0]):
                fill(&columns, p)
                found = look_up(self, &row, &columns, known)
                latency_s[p] += found.cost.latency_s
                energy_j[p] += found.cost.energy_j
                weight_bytes_out[p] += found.stored_bytes
                macs_out[p] += found.macs
                uncosted[0] |= found.uncosted
                peak_bytes[p] = larger(self.peak_bytes(&row), peak_bytes[p])
        free(known)

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
                    is_free = without_model or (self.fuses and rows[p, i].fused)
                    dram_bytes[p, i] = 0.0 if is_free else self.dram_bytes(&rows[p, i])

    def held_bytes(self, const Row[:, ::1] rows, double[:, ::1] activation_bytes):
        """Fill the bytes of activations that are held while each row runs, per policy and row."""
        cdef Py_ssize_t p, i
        with nogil:
            for p in range(rows.shape[0]):
                for i in range(rows.shape[1]):
                    activation_bytes[p, i] = self.peak_bytes(&rows[p, i])


cdef inline bint is_sound(const Row* row) noexcept nogil:
    cdef const int32_t* integers = <const int32_t*>row
    cdef int32_t least = 1
    cdef Py_ssize_t j
    # All integers after the flags are sizes or counts.
    for j in range(FLAGS, INTEGERS):
        least = integers[j] if integers[j] < least else least
    if least < 1 or row.kind < 0 or row.kind >= KINDS:
        return False
    if ((row.fused | row.transposed | row.bias | row.reused) & ~1) != 0:
        return False
    if row.activation < 0 or row.activation > CURVE:
        return False
    if row.weight_bits > MAX_BITS or row.activation_bits > MAX_BITS or row.output_bits > MAX_BITS:
        return False
    if not (0.0 < row.weight_density <= 1.0 and 0.0 < row.activation_density <= 1.0):
        return False
    if not (row.live_bytes >= 0.0 and isfinite(row.live_bytes) and row.held >= 0.0 and isfinite(row.held)):
        return False
    if is_among(row, FLAT) and row.groups * row.kernel_d * row.kernel_h * row.kernel_w != 1:
        return False
    if is_gemm(row) and (row.in_d != 1 or row.in_w != 1 or row.out_d != 1 or row.out_w != 1):
        return False
    return row.groups == 1 or (row.c % row.groups == 0 and row.k % row.groups == 0)


def first_fault(const Row[:, ::1] rows):
    """(policy, row) of the first row that no cost can be given for, or None if all are sound."""
    cdef Py_ssize_t p, i
    cdef Py_ssize_t bad_policy = -1
    cdef Py_ssize_t bad_row = -1
    with nogil:
        for p in range(rows.shape[0]):
            for i in range(rows.shape[1]):
                if not is_sound(&rows[p, i]):
                    bad_policy = p
                    bad_row = i
                    break
            if bad_policy >= 0:
                break
    return None if bad_policy < 0 else (bad_policy, bad_row)


def row_layout():
    """Name and byte offset of every field of the C struct, in order, and its size under the name ''."""
    cdef Row row
    cdef size_t base = <size_t>&row
    return {
        "kind": <size_t>&row.kind - base,
        "fused": <size_t>&row.fused - base,
        "transposed": <size_t>&row.transposed - base,
        "bias": <size_t>&row.bias - base,
        "reused": <size_t>&row.reused - base,
        "activation": <size_t>&row.activation - base,
        "inputs": <size_t>&row.inputs - base,
        "n": <size_t>&row.n - base,
        "c": <size_t>&row.c - base,
        "k": <size_t>&row.k - base,
        "groups": <size_t>&row.groups - base,
        "in_d": <size_t>&row.in_d - base,
        "in_h": <size_t>&row.in_h - base,
        "in_w": <size_t>&row.in_w - base,
        "out_d": <size_t>&row.out_d - base,
        "out_h": <size_t>&row.out_h - base,
        "out_w": <size_t>&row.out_w - base,
        "kernel_d": <size_t>&row.kernel_d - base,
        "kernel_h": <size_t>&row.kernel_h - base,
        "kernel_w": <size_t>&row.kernel_w - base,
        "stride_d": <size_t>&row.stride_d - base,
        "stride_h": <size_t>&row.stride_h - base,
        "stride_w": <size_t>&row.stride_w - base,
        "dilation": <size_t>&row.dilation - base,
        "weight_bits": <size_t>&row.weight_bits - base,
        "activation_bits": <size_t>&row.activation_bits - base,
        "output_bits": <size_t>&row.output_bits - base,
        "weight_density": <size_t>&row.weight_density - base,
        "activation_density": <size_t>&row.activation_density - base,
        "held": <size_t>&row.held - base,
        "live_bytes": <size_t>&row.live_bytes - base,
        "": sizeof(Row),
    }
