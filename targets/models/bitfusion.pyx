"""BitFusion: an array of multipliers fused from 2-bit bricks, with a search for tiles and the order of loops.

    operands of w and a bits run in widths f(b) = 2, 4 or 8 that hold them
    lanes     = rows * (8 / f(w)) * (8 / f(a))                     channels that the rows take in at once
    compute   = tiles * pixels * taps * ceil(channels / lanes) * ceil(out_channels / columns)            cycles
    traffic   = weights * w + inputs * a + psums * 32 read + psums * 32 written                          bits
    latency   = ceil(max(compute + exposed, traffic / bandwidth))                                        cycles
    exposed   = (what is loaded before the first tile + what is stored after the last) / bandwidth
    energy    = compute * cycle_energy + array and buffer accesses + traffic * dram_energy + static_power * latency

Tiles are powers of two of batch, pixels, channels and output channels (those in multiples of the columns). Loops over
pixels (width in height in batch), channels and output channels run in any order. A tile lives in half of its buffer, so
that the next one is loaded meanwhile. An operand is fetched again by every turn of a loop that does not concern it,
unless all that the loops inside of that one go through is resident. Memory holds operands packed; buffers hold them at
their fused width, with channels filled up to whole lanes and output channels to whole columns. The fastest choice
counts, among equals that of least traffic.

Few channels under a window (a first layer) are laid out as patches, ceil(channels * taps / lanes) a pixel. Depthwise
and narrow grouped convolutions run as dense blocks of ``depthwise_macs_per_cycle * lanes / rows`` channels, zeros
included; 1 runs channel by channel at 8 bits. Products of activations load one operand as weights, for each sample. A
transposed convolution is the product of its input pixels with all taps. Depth counts as batch.

Floating point and widths above 8 run as 8 bits, the widest that is fused in space. Psums are stored at 32 bits
whatever the output's bits, and come with the bias. Operators without MACs stream through: traffic alone. Zeros are
computed like other numbers.

The widths are part of the choice too, so latency never falls as bits grow. As channels grow it may, though in one case
of a thousand: what fits a buffer is loaded whole before the first tile, a little more is loaded tile by tile. Energy is
that of the fastest choice, which is not the thriftiest: it may fall as bits or channels grow.

Source: Sharma et al., "Bit Fusion", ISCA 2018, and the simulator published with it (github.com/hsharma35/bitfusion);
packed traffic, padding in buffers and depthwise blocks were read off the operators published with Wang et al., "APQ",
CVPR 2020, which they reproduce to a cycle or two.
"""

from libc.math cimport INFINITY, NAN

from fxopt.targets._core cimport Cost, CostModel
from fxopt.targets._rows cimport (
    MATMUL, UNKNOWN, WITH_MACS, Row, is_among, is_gemm, kernel_volume, larger, traffic_bytes)

from fxopt.targets.parameters import Parameter, ParameterError, expect_all_or_none

cdef enum:
    WIDEST = 8
    PSUM_BITS = 32
    MAX_TILES = 32          # powers of two in an int32

ENERGIES = {
    "cycle_energy": Parameter("energy per cycle", "energy of the array in a cycle that it computes", required=False),
    **{
        f"{buffer}_{access}_energy": Parameter(
            "energy per byte", f"energy of a {access} in the {buffer} buffer", required=False
        )
        for buffer in ("weight", "input", "output")
        for access in ("read", "write")
    },
    "dram_energy": Parameter("energy per byte", "energy of moving one byte to or from memory", required=False),
    "static_power": Parameter("power", "power drawn whatever runs", required=False, positive=False),
}
PARAMETERS = {
    "rows": Parameter("count", "rows of the array, which take in channels"),
    "columns": Parameter("count", "columns of the array, which put out channels"),
    "clock": Parameter("frequency", "clock of the array"),
    "bandwidth": Parameter("bytes per cycle", "memory bandwidth"),
    "weight_buffer": Parameter("bytes", "size of the weight buffer, both halves"),
    "input_buffer": Parameter("bytes", "size of the input buffer, both halves"),
    "output_buffer": Parameter("bytes", "size of the output buffer, both halves"),
    "depthwise_macs_per_cycle": Parameter("work per cycle", "useful MACs in depthwise convolutions at 8 bits"),
    **ENERGIES,
}


cdef struct Layer:
    # What is searched: one dense convolution, ``repeats`` times.
    double repeats
    double batch, height, width, channels, out_channels, taps
    double kernel_h, kernel_w   # with the gaps of dilation
    double slices               # of the kernel along depth
    double stride_h, stride_w
    bint patches
    double weight_bits
    double input_bits
    double weight_slot          # bits of one operand in a buffer
    double input_slot
    double lanes


cdef struct Operand:
    # One tile of an operand: bits in memory, bits in its buffer, and half of that.
    double bits
    double held
    double half


cdef struct Trips:
    double pixels[3]            # along width, height and batch
    double all_pixels
    double channels
    double out_channels


cdef struct Choice:
    # Tiles and an order: time in all, in bits that memory could move meanwhile (whole numbers, which compare exactly),
    # cycles of computing, bits loaded and stored while nothing else goes on, and bits of each operand that cross the
    # memory bus; psums cross it twice.
    double time
    double compute
    double exposed
    double weights
    double inputs
    double psums


cdef inline double ceiling(double whole, double part) noexcept nogil:
    cdef double floor = <double><long>(whole / part)
    return floor + <double>(floor * part < whole)


cdef inline double smaller(double a, double b) noexcept nogil:
    return a if a < b else b


cdef inline double slot(int bits) noexcept nogil:
    return 2.0 if bits <= 2 else (4.0 if bits <= 4 else 8.0)


cdef inline int weights_of(const Row* row) noexcept nogil:
    return row.activation_bits if row.kind == MATMUL else row.weight_bits


cdef inline double again(const Operand* tile, double once, double turns, double outer) noexcept nogil:
    # Bits over all loops, when ``turns`` are inside of a loop of ``outer`` turns that does not concern the operand.
    return once if tile.held * turns <= tile.half else once * outer


cdef inline double traffic(const Choice* choice) noexcept nogil:
    return choice.weights + choice.inputs + 2.0 * choice.psums


cdef inline bint is_better(const Choice* one, double times, const Choice* other, double other_times) noexcept nogil:
    # Faster; or as fast with less traffic; or with as much, with fewer cycles of computing.
    cdef double ahead = other_times * other.time - times * one.time
    if ahead == 0.0:
        ahead = other_times * traffic(other) - times * traffic(one)
    if ahead == 0.0:
        ahead = other_times * other.compute - times * one.compute
    return ahead > 0.0


cdef inline double streamed(const Row* row) noexcept nogil:
    # Bits of an operator that computes next to nothing.
    cdef Row narrow = row[0]
    narrow.weight_bits = min(row.weight_bits, WIDEST)
    narrow.activation_bits = min(row.activation_bits, WIDEST)
    narrow.output_bits = min(row.output_bits, WIDEST)
    return 8.0 * traffic_bytes(&narrow)


cdef inline double resident(const Operand* tile, const double* turns, int count) noexcept nogil:
    # Bits of the largest part that stays in the buffer, over loops from the innermost outwards.
    cdef double bits = tile.bits
    cdef double held = tile.held
    cdef int i
    for i in range(count):
        held *= turns[i]
        if held > tile.half:
            break
        bits *= turns[i]
    return bits


cdef inline int powers(double size, double step, double* tiles) noexcept nogil:
    # step, 2 * step, 4 * step ... and size itself; how many. The largest comes first.
    cdef double tile = step
    cdef int count = 1
    cdef int i
    while tile < size and count < MAX_TILES:
        tile *= 2.0
        count += 1
    for i in range(count):
        tiles[i] = smaller(tile, size)
        tile *= 0.5
    return count


cdef class Model(CostModel):
    """One BitFusion array with its buffers and memory."""

    cdef double rows
    cdef double columns
    cdef double seconds_per_cycle
    cdef double bits_per_cycle
    cdef double weight_half         # bits
    cdef double input_half
    cdef double output_half
    cdef double block
    cdef double joules_per_cycle
    cdef double joules_per_weight_read, joules_per_weight_fill      # for each bit, as all below
    cdef double joules_per_input_read, joules_per_input_fill
    cdef double joules_per_psum
    cdef double joules_per_bit
    cdef double static_watts

    def __init__(self, values, bint fuses):
        CostModel.__init__(self, fuses)
        self.has_energy = expect_all_or_none(values, [*ENERGIES])
        self.searches = True
        self.rows = values["rows"]
        self.columns = values["columns"]
        self.seconds_per_cycle = 1.0 / values["clock"]
        self.bits_per_cycle = 8.0 * values["bandwidth"]
        self.weight_half = 4.0 * values["weight_buffer"]
        self.input_half = 4.0 * values["input_buffer"]
        self.output_half = 4.0 * values["output_buffer"]
        self.block = values["depthwise_macs_per_cycle"]
        energies = {key: values.get(key, NAN) for key in ENERGIES}
        self.joules_per_cycle = energies["cycle_energy"]
        self.joules_per_weight_read = energies["weight_read_energy"] / 8.0
        self.joules_per_weight_fill = energies["weight_write_energy"] / 8.0
        self.joules_per_input_read = energies["input_read_energy"] / 8.0
        self.joules_per_input_fill = energies["input_write_energy"] / 8.0
        self.joules_per_psum = (energies["output_read_energy"] + energies["output_write_energy"]) / 8.0
        self.joules_per_bit = energies["dram_energy"] / 8.0
        self.static_watts = energies["static_power"]
        # The smallest tile: all lanes and columns once, at the widths that fill most.
        least = {
            "weight_buffer": 8.0 * self.rows * self.columns,
            "input_buffer": 8.0 * self.rows,
            "output_buffer": 8.0 * self.columns,
        }
        for key, need in least.items():
            if values[key] < need:
                raise ParameterError(key, f"has to hold {need:g} B, two tiles of the smallest size.")

    cdef void take(self, const Row* row, double weight_slot, double input_slot, Layer* layer) noexcept nogil:
        """The dense convolutions that a row with MACs is, when it runs at these widths."""
        cdef double packed
        layer.weight_bits = smaller(weights_of(row), WIDEST)
        layer.input_bits = smaller(row.activation_bits, WIDEST)
        layer.weight_slot = weight_slot
        layer.input_slot = input_slot
        layer.lanes = self.rows * (WIDEST / weight_slot) * (WIDEST / input_slot)
        layer.repeats = layer.taps = layer.kernel_h = layer.kernel_w = layer.slices = 1.0
        layer.height = layer.width = layer.stride_h = layer.stride_w = 1.0
        layer.channels = <double>row.c / row.groups
        layer.out_channels = <double>row.k / row.groups
        layer.batch = row.n
        layer.patches = False
        if row.kind == MATMUL:
            layer.batch = row.out_h
            layer.repeats = row.n
            return
        if is_gemm(row):
            layer.batch *= row.out_h
            return
        if row.transposed:
            layer.height = row.in_h
            layer.width = row.in_w
            layer.batch *= row.in_d
            layer.out_channels *= kernel_volume(row)
        else:
            layer.height = row.out_h
            layer.width = row.out_w
            layer.batch *= row.out_d
            layer.taps = kernel_volume(row)
            layer.kernel_h = <double>(row.kernel_h - 1) * row.dilation + 1.0
            layer.kernel_w = <double>(row.kernel_w - 1) * row.dilation + 1.0
            layer.slices = row.kernel_d
            layer.stride_h = row.stride_h
            layer.stride_w = row.stride_w
        if row.groups == 1:
            layer.patches = layer.taps > 1.0 and layer.channels < self.rows
            return
        packed = <double><long>(self.block * (layer.lanes / self.rows) / layer.channels)
        packed = smaller(larger(packed, 1.0), row.groups)
        layer.repeats = ceiling(row.groups, packed)
        layer.channels *= packed
        layer.out_channels *= packed

    cdef Choice search(self, const Layer* layer, double bound) noexcept nogil:
        """The fastest tiles and order, if they take at most ``bound``; else a choice of infinite traffic."""
        cdef double[MAX_TILES] pixel_tiles, batch_tiles, channel_tiles, out_tiles
        cdef int pixel_count = powers(larger(layer.height, layer.width), 1.0, pixel_tiles)
        cdef int batch_count = powers(layer.batch, 1.0, batch_tiles)
        cdef int channel_count = powers(layer.channels, 1.0, channel_tiles)
        cdef int out_count = powers(layer.out_channels, self.columns, out_tiles)
        cdef double batch, height, width, out_channels, filled, held_taps, splits
        cdef Operand psums
        cdef Trips trips
        cdef Choice best
        cdef int p, b, k
        best.time = bound
        best.weights = best.inputs = best.psums = INFINITY
        best.compute = best.exposed = INFINITY
        # A kernel that overflows its buffer by itself is loaded in parts, which accumulate like channels.
        held_taps = self.weight_half / (layer.lanes * self.columns * layer.weight_slot)
        held_taps = smaller(held_taps, self.input_half / (layer.lanes * layer.input_slot))
        splits = ceiling(layer.taps, <double><long>held_taps)
        psums.half = self.output_half
        for p in range(pixel_count):
            height = smaller(pixel_tiles[p], layer.height)
            width = smaller(pixel_tiles[p], layer.width)
            if height * width * self.columns * PSUM_BITS > self.output_half:
                continue
            trips.pixels[0] = ceiling(layer.width, width)
            trips.pixels[1] = ceiling(layer.height, height)
            for b in range(batch_count):
                batch = batch_tiles[b]
                if batch * height * width * self.columns * PSUM_BITS > self.output_half:
                    continue
                trips.pixels[2] = ceiling(layer.batch, batch)
                trips.all_pixels = trips.pixels[0] * trips.pixels[1] * trips.pixels[2]
                for k in range(out_count):
                    out_channels = out_tiles[k]
                    filled = ceiling(out_channels, self.columns) * self.columns
                    psums.held = batch * height * width * filled * PSUM_BITS
                    if psums.held > self.output_half:
                        continue
                    psums.bits = batch * height * width * out_channels * PSUM_BITS
                    trips.out_channels = ceiling(layer.out_channels, out_channels)
                    self.search_channels(
                        layer, batch * height * width, self.window(layer, batch, height, width, splits), splits,
                        out_channels, filled, channel_tiles, channel_count, &psums, &trips, &best,
                    )
        return best

    cdef inline double window(
        self, const Layer* layer, double batch, double height, double width, double splits
    ) noexcept nogil:
        """Positions of the input that a tile of pixels needs."""
        cdef double pixels = batch * height * width
        cdef double tall = layer.kernel_h + (height - 1.0) * layer.stride_h
        cdef double wide = layer.kernel_w + (width - 1.0) * layer.stride_w
        cdef double positions = batch * layer.slices * tall * wide
        if layer.patches or splits > 1.0:
            return pixels * ceiling(layer.taps, splits)
        # The rectangle around them; with gaps in the kernel, no more than each pixel's own taps.
        if layer.kernel_h * layer.kernel_w * layer.slices > layer.taps:
            return smaller(positions, pixels * layer.taps)
        return positions

    cdef void search_channels(
        self, const Layer* layer, double pixels, double positions, double splits, double out_channels, double filled,
        const double* tiles, int count, const Operand* psums, Trips* trips, Choice* best,
    ) noexcept nogil:
        """Try all tiles of channels for given tiles of the rest."""
        cdef double taps = ceiling(layer.taps, splits)
        cdef double columns = filled / self.columns
        cdef double per_pixel, padded, channels, compute
        cdef Operand weights, inputs
        cdef int c
        weights.half = self.weight_half
        inputs.half = self.input_half
        for c in range(count):
            channels = tiles[c]
            if layer.patches:
                per_pixel = ceiling(taps * channels, layer.lanes)
                padded = per_pixel * layer.lanes / taps
            else:
                padded = ceiling(channels, layer.lanes)
                per_pixel = taps * padded
                padded *= layer.lanes
            weights.held = taps * padded * filled * layer.weight_slot
            inputs.held = positions * padded * layer.input_slot
            if weights.held > weights.half or inputs.held > inputs.half:
                continue
            weights.bits = taps * channels * out_channels * layer.weight_bits
            inputs.bits = positions * channels * layer.input_bits
            trips.channels = ceiling(layer.channels, channels) * splits
            compute = trips.all_pixels * trips.channels * trips.out_channels * pixels * per_pixel * columns
            if compute * self.bits_per_cycle <= best.time:
                self.try_orders(&weights, &inputs, psums, trips, compute, best)

    cdef void try_orders(
        self, const Operand* weights, const Operand* inputs, const Operand* psums, const Trips* trips, double compute,
        Choice* best,
    ) noexcept nogil:
        """Try the six orders of the loops over pixels (P), channels (C) and output channels (K)."""
        cdef double p = trips.all_pixels
        cdef double c = trips.channels
        cdef double k = trips.out_channels
        cdef double once_w = weights.bits * c * k
        cdef double once_i = inputs.bits * p * c
        cdef double once_o = psums.bits * p * k
        cdef double exposed = weights.bits + inputs.bits + 2.0 * psums.bits
        cdef double i_pc, i_cp, w_ck, w_kc, o_pk, o_kp
        cdef double[5] channel_turns = [c, trips.pixels[0], trips.pixels[1], trips.pixels[2], c]
        cdef double[5] out_turns = [k, trips.pixels[0], trips.pixels[1], trips.pixels[2], k]
        cdef double[3] both_turns = [c, k, c]
        cdef Choice choice
        choice.compute = compute
        if larger(once_w + once_i + 2.0 * once_o, compute * self.bits_per_cycle + exposed) > best.time:
            return
        # Resident parts, with the loop named first inside of the other.
        i_cp = resident(inputs, channel_turns, 4)
        i_pc = resident(inputs, &channel_turns[1], 4)
        o_kp = 2.0 * resident(psums, out_turns, 4)
        o_pk = 2.0 * resident(psums, &out_turns[1], 4)
        w_ck = resident(weights, both_turns, 2)
        w_kc = resident(weights, &both_turns[1], 2)
        # Loops from the innermost; the one that does not concern an operand may fetch it again.
        choice.exposed = w_ck + i_pc + o_pk
        choice.weights = once_w
        choice.inputs = again(inputs, once_i, p * c, k)
        choice.psums = again(psums, once_o, p, c)
        self.settle(&choice, best)                                      # P C K
        if c > 1.0:
            choice.exposed = w_ck + i_cp + o_pk
            choice.weights = again(weights, once_w, c, p)
            choice.psums = once_o
            self.settle(&choice, best)                                  # C P K
        if k > 1.0:
            choice.exposed = w_kc + i_pc + o_kp
            choice.weights = again(weights, once_w, k, p)
            choice.inputs = once_i
            choice.psums = again(psums, once_o, p * k, c)
            self.settle(&choice, best)                                  # K P C
        if c > 1.0 and k > 1.0:
            choice.exposed = w_kc + i_pc + o_pk
            choice.weights = once_w
            choice.inputs = again(inputs, once_i, p, k)
            self.settle(&choice, best)                                  # P K C
            choice.exposed = w_ck + i_cp + o_kp
            choice.weights = again(weights, once_w, c * k, p)
            choice.inputs = again(inputs, once_i, c, k)
            choice.psums = once_o
            self.settle(&choice, best)                                  # C K P
            choice.exposed = w_kc + i_cp + o_kp
            choice.inputs = once_i
            choice.psums = again(psums, once_o, k, c)
            self.settle(&choice, best)                                  # K C P

    cdef inline void settle(self, Choice* choice, Choice* best) noexcept nogil:
        """Keep a choice that is better than the best."""
        choice.time = larger(choice.compute * self.bits_per_cycle + choice.exposed, traffic(choice))
        if is_better(choice, 1.0, best, 1.0):
            best[0] = choice[0]

    cdef Choice fastest(self, const Row* row, Layer* layer) noexcept nogil:
        """The fastest choice at any widths that hold the operands; ``layer`` becomes what it is of."""
        cdef double weight_slot, bound
        cdef double narrowest = slot(weights_of(row))
        cdef double input_slot = slot(row.activation_bits)
        cdef Layer candidate
        cdef Choice choice, best
        best.time = best.compute = best.exposed = best.weights = best.inputs = best.psums = INFINITY
        layer.repeats = 1.0
        while input_slot <= WIDEST:
            weight_slot = narrowest
            while weight_slot <= WIDEST:
                self.take(row, weight_slot, input_slot, &candidate)
                # Quotients are rounded: a hair more, so that no equal is lost.
                bound = layer.repeats * best.time / candidate.repeats * (1.0 + 1e-12)
                choice = self.search(&candidate, bound)
                if is_better(&choice, candidate.repeats, &best, layer.repeats):
                    best = choice
                    layer[0] = candidate
                weight_slot *= 2.0
            input_slot *= 2.0
        return best

    cdef Cost cost(self, const Row* row) noexcept nogil:
        cdef Cost result
        cdef Layer layer
        cdef Choice best
        cdef double array
        if row.kind == UNKNOWN:
            result.latency_s = result.energy_j = NAN
            return result
        if not is_among(row, WITH_MACS):
            result.latency_s = streamed(row) / self.bits_per_cycle * self.seconds_per_cycle
            result.energy_j = streamed(row) * self.joules_per_bit + self.static_watts * result.latency_s
            return result
        best = self.fastest(row, &layer)
        # Every cycle all multipliers read their weights, rows their inputs, and columns update their psums.
        array = (
            self.joules_per_cycle
            + layer.lanes * self.columns * layer.weight_bits * self.joules_per_weight_read
            + layer.lanes * layer.input_bits * self.joules_per_input_read
            + self.columns * PSUM_BITS * self.joules_per_psum
        )
        result.latency_s = layer.repeats * ceiling(best.time, self.bits_per_cycle) * self.seconds_per_cycle
        result.energy_j = self.static_watts * result.latency_s + layer.repeats * (
            best.compute * array
            + best.weights * self.joules_per_weight_fill
            + best.inputs * self.joules_per_input_fill
            + best.psums * self.joules_per_psum
            + traffic(&best) * self.joules_per_bit
        )
        return result

    cdef double dram_bytes(self, const Row* row) noexcept nogil:
        cdef Layer layer
        cdef Choice best
        if not is_among(row, WITH_MACS):
            return streamed(row) / 8.0
        best = self.fastest(row, &layer)
        return layer.repeats * traffic(&best) / 8.0
