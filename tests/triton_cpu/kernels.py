"""Small kernels for the tests of the CPU launcher: one for each thing that it must compute or notice. (Triton reads their source from a
file.)"""

import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr + i, 2 * x, mask=i < n)


@triton.jit
def unmasked_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def lost_update_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Every program adds to the same cell, not atomically."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0), axis=0)
    tl.store(y_ptr, tl.load(y_ptr) + total)


@triton.jit
def atomic_sum_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0), axis=0))


@triton.jit
def product_kernel(x_desc, w_desc, y_desc, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """y [m, n] = x [m, k] w [n, k]ᵀ by descriptors."""
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, k, BLOCK_K):
        acc = tl.dot(x_desc.load([m0, k0]), w_desc.load([n0, k0]).T, acc, input_precision=PRECISION)
    y_desc.store([m0, n0], acc.to(y_desc.dtype))


@triton.jit
def softmax_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    """Rows, each in one block; padding is −inf."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * width + i, mask=i < width, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + tl.program_id(0) * width + i, (e / tl.sum(e, axis=0)).to(y_ptr.dtype.element_ty), mask=i < width)


@triton.jit
def chosen_kernel(inputs, y_ptr, which, n, BLOCK: tl.constexpr):
    """Copies one of several tensors: a tuple of pointers, a branch for each."""
    i = tl.arange(0, BLOCK)
    for k in tl.static_range(len(inputs)):
        if which == k:
            tl.store(y_ptr + i, tl.load(inputs[k] + i, mask=i < n), mask=i < n)


@triton.jit
def through_table_kernel(table_ptr, scale_ptr, x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """A table says which part of x a program copies and how often; the scale changes values, not addresses."""
    first, times = tl.load(table_ptr + 2 * tl.program_id(0)), tl.load(table_ptr + 2 * tl.program_id(0) + 1)
    i = tl.arange(0, BLOCK)
    from_ptr = x_ptr + first
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(times):
        total += tl.load(from_ptr + i, mask=i < n, other=0.0)
        from_ptr += BLOCK
    tl.store(y_ptr + tl.program_id(0) * BLOCK + i, total * tl.load(scale_ptr))


@triton.jit
def column_major_kernel(x_ptr, y_ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] with rows `stride` apart, transposed: the tile's elements come column by column."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x_cr = tl.load(x_ptr + row[None, :] * stride + column[:, None])
    tl.store(y_ptr + column[:, None] * ROWS + row[None, :], x_cr)
