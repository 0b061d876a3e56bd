"""Tensors held to grids in one pass over their memory: forward, backward, and scales that follow weights.

A tensor is ``outer`` times ``channels`` rows of ``inner`` values; each channel has a scale and a zero point, and one
channel stands for a whole tensor. Arguments are addresses of values without gaps: float32, zero points int32. The
address 0 stands for zero points that are all 0. The caller keeps the memory alive, and vouches for its size.
"""

from libc.stdint cimport int32_t, uintptr_t
from libc.string cimport memcpy

cdef enum:
    BLOCK = 256

# 1.5 * 2^23: floats of this size have no bits behind the point, so a sum with it rounds half to even, below 2^22.
cdef float WHOLE = 12582912.0


cdef struct Grid:
    float scale
    float least      # steps from zero to the ends of the grid
    float largest
    float low        # values from here on down are clipped
    float high       # values from here on up are clipped


cdef inline Grid _grid(
    const float* scales, const int32_t* zeros, Py_ssize_t channel, int least, int largest
) noexcept nogil:
    cdef Grid grid
    cdef double zero = zeros[channel] if zeros != NULL else 0
    cdef double scale = scales[channel]
    grid.scale = scales[channel]
    grid.least = <float>(least - zero)
    grid.largest = <float>(largest - zero)
    grid.low = <float>((least - 0.5 - zero) * scale)
    grid.high = <float>((largest + 0.5 - zero) * scale)
    return grid


cdef inline float _step(float steps, float least, float largest) noexcept nogil:
    """The step that is nearest. The ends are whole, so clipping may come before rounding; a NaN stays one."""
    steps = least if steps < least else steps
    steps = largest if steps > largest else steps
    return (steps + WHOLE) - WHOLE


cdef void _hold_row(const float* x, float* y, Py_ssize_t size, Grid grid) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(size):
        y[i] = _step(x[i] / grid.scale, grid.least, grid.largest) * grid.scale


cdef void _pass_row(const float* x, const float* gradient, float* passed, Py_ssize_t size, Grid grid) noexcept nogil:
    cdef Py_ssize_t i
    cdef float value
    for i in range(size):
        value = gradient[i]
        passed[i] = 0.0 if (x[i] <= grid.low) | (x[i] >= grid.high) else value


cdef double _learn_block(
    const float* x, const float* gradient, float* passed, Py_ssize_t size, Grid grid, float inside
) noexcept nogil:
    """Pass the gradient of at most BLOCK values; the sum of what each says of the scale, in pairs."""
    cdef float[BLOCK] terms
    cdef float steps, step, value
    cdef bint clipped
    cdef Py_ssize_t i
    cdef Py_ssize_t half = BLOCK // 2
    for i in range(size):
        steps = x[i] / grid.scale
        step = _step(steps, grid.least, grid.largest)
        clipped = (x[i] <= grid.low) | (x[i] >= grid.high)
        value = gradient[i]
        passed[i] = 0.0 if clipped else value
        steps = (step - steps) * inside
        terms[i] = value * (step if clipped else steps)
    for i in range(size, BLOCK):
        terms[i] = 0.0
    while half >= 1:
        for i in range(half):
            terms[i] += terms[half + i]
        half //= 2
    return terms[0]


cdef double _learn_row(
    const float* x, const float* gradient, float* passed, Py_ssize_t size, Grid grid, bint rounding
) noexcept nogil:
    cdef double total = 0.0
    cdef float inside = 1.0 if rounding else 0.0
    cdef Py_ssize_t start = 0
    cdef Py_ssize_t count
    while start < size:
        count = min(<Py_ssize_t>BLOCK, size - start)
        total += _learn_block(x + start, gradient + start, passed + start, count, grid, inside)
        start += BLOCK
    return total


cdef int32_t _largest_bits(const int32_t* x, Py_ssize_t size) noexcept nogil:
    """The bits of the largest magnitude: without their signs, floats are in the order of their bits, NaN the last."""
    cdef int32_t largest = 0
    cdef int32_t bits
    cdef Py_ssize_t i
    for i in range(size):
        bits = x[i] & 0x7fffffff
        largest = bits if bits > largest else largest
    return largest


def hold(
    uintptr_t x, uintptr_t y, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    uintptr_t scales, uintptr_t zeros, int least, int largest,
):
    """Fill ``y`` with ``x`` held to its grids."""
    cdef Py_ssize_t row, at
    with nogil:
        for row in range(outer * channels):
            at = row * inner
            _hold_row(
                <float*>x + at, <float*>y + at, inner,
                _grid(<float*>scales, <int32_t*>zeros, row % channels, least, largest),
            )


def pass_gradient(
    uintptr_t x, uintptr_t gradient, uintptr_t passed, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    uintptr_t scales, uintptr_t zeros, int least, int largest,
):
    """Fill ``passed`` with the gradient where ``x`` is not clipped, and with zero elsewhere."""
    cdef Py_ssize_t row, at
    with nogil:
        for row in range(outer * channels):
            at = row * inner
            _pass_row(
                <float*>x + at, <float*>gradient + at, <float*>passed + at, inner,
                _grid(<float*>scales, <int32_t*>zeros, row % channels, least, largest),
            )


def pass_and_learn(
    uintptr_t x, uintptr_t gradient, uintptr_t passed, uintptr_t sums,
    Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
    uintptr_t scales, uintptr_t zeros, int least, int largest, double factor, bint rounding,
):
    """:func:`pass_gradient`, and fill ``sums`` with the gradient of each scale, times ``factor``.

    With ``rounding`` that is the sum of the gradient times ``step - x / scale`` inside the grid, and times the step at
    its ends; without, the latter alone.
    """
    cdef Py_ssize_t channel, repeat, at
    cdef Grid grid
    cdef double total
    with nogil:
        for channel in range(channels):
            grid = _grid(<float*>scales, <int32_t*>zeros, channel, least, largest)
            total = 0.0
            for repeat in range(outer):
                at = (repeat * channels + channel) * inner
                total += _learn_row(<float*>x + at, <float*>gradient + at, <float*>passed + at, inner, grid, rounding)
            (<float*>sums)[channel] = <float>(total * factor)


def follow(uintptr_t x, Py_ssize_t channels, Py_ssize_t inner, uintptr_t scales, double steps, double least_scale):
    """Fill ``scales`` with the largest magnitude of each row over ``steps``, at least ``least_scale``.

    Rows of zeros, and rows with a NaN, get 1.
    """
    cdef Py_ssize_t row
    cdef int32_t bits
    cdef double scale
    cdef float* found = <float*>scales
    with nogil:
        for row in range(channels):
            bits = _largest_bits(<int32_t*>x + row * inner, inner)
            memcpy(&found[row], &bits, sizeof(float))
            scale = found[row] / steps
            found[row] = <float>max(scale, least_scale) if scale > 0 else 1.0
