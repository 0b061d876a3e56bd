"""What a row has to be for its cost to mean something, and how it lies in memory."""

from libc.math cimport isfinite
from libc.stddef cimport size_t
from libc.stdint cimport int32_t

from fxopt.targets._rows cimport CURVE, FLAGS, FLAT, INTEGERS, KINDS, MAX_BITS, Row, is_among, is_gemm


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
    if not (row.position_bytes >= 0.0 and isfinite(row.position_bytes)):
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
        "position_bytes": <size_t>&row.position_bytes - base,
        "": sizeof(Row),
    }
