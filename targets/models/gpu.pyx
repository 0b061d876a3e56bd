"""GPU, a kernel for each operator, with tiles and waves:

    matrix view  M = batch * output pixels, N = output channels, K = input channels * taps (one for each group)
    tiles        = ceil(M / tile_m) * ceil(N / tile_n) * split_k * groups
    waves        = ceil(tiles / (sm_count * blocks_per_sm))
    compute      = waves * tile_m * tile_n * ceil(K / split_k) / (mac_per_sm_cycle(bits) * efficiency * clock)
    latency      = max(launch_floor, compute, bytes / (bandwidth * bandwidth_efficiency))
    energy       = power * latency, where a power was measured

Depthwise convolutions have no matrix view and run on the ordinary lanes, whatever units there are for matrices of few
bits: MACs at ``depthwise_efficiency`` of the peak at the widest class. Operators without MACs take the memory branch.
A width that the device has no arithmetic for runs in the next wider one. Rows marked ``fused`` cost a kernel of their
own unless the runtime fuses. Kernels are dense: densities do not matter. Wave quantization is textbook theory (NVIDIA,
"Matrix multiplication background": tile and wave quantization).
"""

from cython cimport final
from libc.math cimport NAN
from libc.stdint cimport int32_t

from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    DEPTHWISE, MATMUL, MAX_BITS, UNKNOWN, WITH_MACS,
    Row, ceil_div, compute_bits, in_volume, is_among, kernel_volume, larger, macs, out_volume, traffic_bytes,
)

from fxopt.targets.parameters import BIT_CLASSES, Parameter, by_bits

PARAMETERS = {
    "sm_count": Parameter("count", "streaming multiprocessors"),
    "clock": Parameter("frequency", "clock of the multiprocessors"),
    **{
        f"mac_per_sm_cycle.{bits}": Parameter("work per cycle", f"peak at up to {bits} bits", required=False)
        for bits in BIT_CLASSES
    },
    "dense_efficiency": Parameter("ratio", "share of the peak that matrix kernels reach", maximum=1.0),
    "depthwise_efficiency": Parameter(
        "ratio", "share of the peak at the widest class that depthwise kernels reach", maximum=1.0
    ),
    "tile_m": Parameter("count", "rows of a tile"),
    "tile_n": Parameter("count", "columns of a tile"),
    "split_k": Parameter("count", "parts that a reduction is split into", required=False),
    "blocks_per_sm": Parameter("count", "tiles that one multiprocessor holds at once", required=False),
    "bandwidth": Parameter("bandwidth", "peak memory bandwidth"),
    "bandwidth_efficiency": Parameter("ratio", "share of the bandwidth that kernels reach", maximum=1.0),
    "launch_floor": Parameter("time", "least time from one kernel to the next", positive=False),
    "power": Parameter("power", "power drawn while running", required=False),
}


@final
cdef class Model(CostModel):
    """One GPU and the runtime that launches its kernels."""

    cdef double seconds_per_mac[MAX_BITS + 1]               # on one multiprocessor, by width
    cdef double depthwise_seconds_per_mac[MAX_BITS + 1]     # on all of them
    cdef double slots
    cdef double tile_m
    cdef double tile_n
    cdef double split_k
    cdef double inverse_slots
    cdef double inverse_tile_m
    cdef double inverse_tile_n
    cdef double inverse_split_k
    cdef double dense_share         # of a multiprocessor's peak time, for each MAC that it spends
    cdef double seconds_per_byte
    cdef double launch_floor_s
    cdef double watts

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        rates = by_bits(values, "mac_per_sm_cycle", rising=False)
        slowest = min(rate for rate in rates if rate == rate)
        lanes = slowest * values["sm_count"] * values["depthwise_efficiency"]
        for bits in range(MAX_BITS + 1):
            self.seconds_per_mac[bits] = 1.0 / (rates[bits] * values["clock"])
            runs = rates[bits] == rates[bits]
            self.depthwise_seconds_per_mac[bits] = 1.0 / (lanes * values["clock"]) if runs else NAN
        self.slots = values["sm_count"] * values.get("blocks_per_sm", 1.0)
        self.tile_m = values["tile_m"]
        self.tile_n = values["tile_n"]
        self.split_k = values.get("split_k", 1.0)
        self.inverse_slots = 1.0 / self.slots
        self.inverse_tile_m = 1.0 / self.tile_m
        self.inverse_tile_n = 1.0 / self.tile_n
        self.inverse_split_k = 1.0 / self.split_k
        self.dense_share = 1.0 / values["dense_efficiency"]
        self.seconds_per_byte = 1.0 / (values["bandwidth"] * values["bandwidth_efficiency"])
        self.launch_floor_s = values["launch_floor"]
        self.has_energy = "power" in values
        self.watts = values.get("power", NAN)

    cdef inline double tiled_macs(self, const Row* row) noexcept nogil:
        """MACs that each multiprocessor spends time on, with the idle parts of tiles and waves."""
        cdef double m, tiles
        cdef double n = row.k
        cdef double k = row.c
        if row.groups != 1:
            n /= row.groups
            k /= row.groups
        if row.transposed:
            m = row.n * in_volume(row)
            n *= kernel_volume(row)
        else:
            m = row.n * out_volume(row)
            k *= kernel_volume(row)
        # A product of activations is one matrix product for each sample.
        tiles = row.groups * self.split_k
        if row.kind == MATMUL:
            tiles *= row.n
            m = row.out_h
        tiles *= ceil_div(m, self.tile_m, self.inverse_tile_m) * ceil_div(n, self.tile_n, self.inverse_tile_n)
        return (
            ceil_div(tiles, self.slots, self.inverse_slots) * self.tile_m * self.tile_n
            * ceil_div(k, self.split_k, self.inverse_split_k)
        )

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    cdef int32_t bits = compute_bits(row)
    cdef double compute_s = 0.0
    cdef double memory_s
    result.latency_s = result.energy_j = NAN
    if row.kind == UNKNOWN:
        return result
    if row.kind == DEPTHWISE:
        compute_s = macs(row) * model.depthwise_seconds_per_mac[bits]
    elif is_among(row, WITH_MACS):
        compute_s = model.tiled_macs(row) * model.seconds_per_mac[bits] * model.dense_share
    memory_s = traffic_bytes(row) * model.seconds_per_byte
    # In this order a NaN, of a width that there is no arithmetic for, stays.
    result.latency_s = larger(model.launch_floor_s, larger(memory_s, compute_s))
    result.energy_j = model.watts * result.latency_s
    return result


include "_batch.pxi"
