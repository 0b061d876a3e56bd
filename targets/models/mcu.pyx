"""One microcontroller core with a library of integer kernels:

    latency = MACs / (clock * mac_per_cycle)              of operators with MACs
            = (inputs + outputs) / (clock * item_per_cycle)     of all others

A library reaches about the same rate on all convolutions of a network, so one rate stands for all of them (Lin et al.
2020, MCUNet, and the totals in github.com/mit-han-lab/tinyengine). An operator takes the rate of the narrowest class
that holds its wider operand. Kernels are of integers: an operator wider than the widest class, floating point above
all, is costed as the integer kernel of that class that would be deployed in its place. Densities do not matter.

Activations are held in SRAM. With ``in_place``, a depthwise convolution writes each channel over the one it has read,
by way of a buffer of one output channel, and an elementwise operator writes over an operand:

    held = alive - min(input, output) + output of one channel       of a depthwise convolution
         = alive - min(input, output)                               of an elementwise operator

That takes an input that nothing else reads later, as in the usual blocks; a row does not tell.

Kernels read weights from flash, where they lie as they are: zeros take what any weight takes.
"""

from cython cimport final
from libc.math cimport NAN

from fxopt.targets._blocks cimport Block
from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    DEPTHWISE, ELEMENTWISE, MAX_BITS, UNKNOWN, WITH_MACS, Row, compute_bits, in_elements, in_volume,
    is_among, larger, macs, out_elements, out_volume,
)

from fxopt.targets.parameters import BIT_CLASSES, Parameter, by_bits

PARAMETERS = {
    "clock": Parameter("frequency", "clock of the core"),
    **{
        f"mac_per_cycle.{bits}": Parameter("work per cycle", f"multiply-accumulates of {bits} bits", required=False)
        for bits in BIT_CLASSES
    },
    "item_per_cycle": Parameter("items per cycle", "elements read or written by operators without MACs"),
    "in_place": Parameter(
        "count", "1 if depthwise and elementwise operators write over their input", positive=False, maximum=1.0
    ),
    "memory_capacity": Parameter("bytes", "SRAM", required=False),
    "storage_capacity": Parameter("bytes", "flash", required=False),
    "storage_used": Parameter("bytes", "flash that code and tables take", required=False),
}


@final
cdef class Model(CostModel):
    """A microcontroller.

    Args:
        values: Figures in SI units.
        fuses: Whether fused rows are free.
    """

    cdef double mac_s[MAX_BITS + 1]
    cdef double item_s
    cdef bint in_place

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        rates = by_bits(values, "mac_per_cycle", rising=False)
        widest = min(rate for rate in rates if rate == rate)
        for bits, rate in enumerate(rates):
            self.mac_s[bits] = 1.0 / (values["clock"] * (rate if rate == rate else widest))
        self.item_s = 1.0 / (values["clock"] * values["item_per_cycle"])
        self.in_place = values["in_place"] != 0.0
        self.shares_memory = self.in_place
        self.stores_zeros = True

    cdef void costs(self, const Block* block, double* latency_s, double* energy_j) noexcept nogil:
        cost_block(self, block, latency_s, energy_j)

    cdef Cost cost(self, const Row* row) noexcept nogil:
        return formula(self, row)

    cdef double peak_bytes(self, const Row* row) noexcept nogil:
        cdef double read, written, shared
        # A fused operator has no tensor of its own.
        if not self.in_place or row.fused or not (row.kind == DEPTHWISE or row.kind == ELEMENTWISE):
            return row.live_bytes
        read = <double>row.n * row.c * in_volume(row) * row.activation_bits / 8.0
        written = out_elements(row) * row.output_bits / 8.0
        shared = written if written < read else read
        if row.kind == DEPTHWISE:
            shared -= out_volume(row) * row.output_bits / 8.0
        return larger(row.live_bytes - larger(shared, 0.0), 0.0)


cdef inline Cost formula(Model model, const Row* row) noexcept nogil:
    cdef Cost result
    result.energy_j = NAN
    if is_among(row, WITH_MACS):
        result.latency_s = macs(row) * model.mac_s[compute_bits(row)]
    elif row.kind == UNKNOWN:
        result.latency_s = NAN
    else:
        result.latency_s = (in_elements(row) + out_elements(row)) * model.item_s
    return result


include "_batch.pxi"
