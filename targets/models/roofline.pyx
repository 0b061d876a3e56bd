"""Roofline: an operator takes as long as its arithmetic or its traffic, whichever is longer, plus an overhead.

    latency = overhead + max(MACs / peak(bits), bytes / bandwidth)
    energy  = MACs * mac_energy(bits) + bytes * byte_energy + static_power * latency

Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009; the energy form is linear in work, traffic and
time. Arithmetic is dense: zeros are computed like other numbers, so densities do not matter.
"""

from cython cimport final
from libc.math cimport NAN

from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport MAX_BITS, UNKNOWN, Row, compute_bits, larger, macs, traffic_bytes

from fxopt.targets.parameters import BIT_CLASSES, Parameter, by_bits, expect_all_or_none

PARAMETERS = {
    "bandwidth": Parameter("bandwidth", "sustained memory bandwidth"),
    "overhead": Parameter("time", "time that each operator takes besides its work", positive=False),
    **{f"peak.{bits}": Parameter("rate", f"peak rate at up to {bits} bits", required=False) for bits in BIT_CLASSES},
    **{
        f"mac_energy.{bits}": Parameter("energy per MAC", f"energy of one MAC at up to {bits} bits", required=False)
        for bits in BIT_CLASSES
    },
    "byte_energy": Parameter("energy per byte", "energy of moving one byte", required=False),
    "static_power": Parameter("power", "power drawn whatever runs", required=False, positive=False),
}


@final
cdef class Model(CostModel):
    """The roofline of one processor and its memory."""

    cdef double seconds_per_mac[MAX_BITS + 1]
    cdef double joules_per_mac[MAX_BITS + 1]
    cdef double seconds_per_byte
    cdef double overhead_s
    cdef double joules_per_byte
    cdef double static_watts

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        energies = [key for key in values if key.startswith("mac_energy.")]
        keys = [*(energies or ["mac_energy.32"]), "byte_energy", "static_power"]
        self.has_energy = expect_all_or_none(values, keys)
        peak = by_bits(values, "peak", rising=False)
        energy = by_bits(values, "mac_energy", rising=True) if self.has_energy else [NAN] * (MAX_BITS + 1)
        for bits in range(MAX_BITS + 1):
            self.seconds_per_mac[bits] = 1.0 / peak[bits]
            self.joules_per_mac[bits] = energy[bits]
        self.seconds_per_byte = 1.0 / values["bandwidth"]
        self.overhead_s = values["overhead"]
        self.joules_per_byte = values.get("byte_energy", NAN)
        self.static_watts = values.get("static_power", NAN)

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    cdef double work = macs(row)
    cdef double moved = traffic_bytes(row)
    cdef double compute_s = work * model.seconds_per_mac[compute_bits(row)]
    cdef double memory_s = moved * model.seconds_per_byte
    if row.kind == UNKNOWN:
        result.latency_s = result.energy_j = NAN
        return result
    if work == 0.0:
        compute_s = 0.0
    result.latency_s = model.overhead_s + larger(compute_s, memory_s)
    # A width without a class: NaN has to survive the comparison above.
    if compute_s != compute_s:
        result.latency_s = NAN
    result.energy_j = model.static_watts * result.latency_s + moved * model.joules_per_byte
    if work > 0.0:
        result.energy_j += work * model.joules_per_mac[compute_bits(row)]
    return result


include "_batch.pxi"
