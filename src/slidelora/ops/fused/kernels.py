"""Triton kernels of gated_lora: shrink to rank space, expand from it, and gradients of the weights.

Rank space has K * r columns: column slot * r + i of h (T, K * r) is rank i of the expert in that slot. A block of
columns pads every slot to R_BLOCKS blocks of BLOCK_R columns, so no block of BLOCK_R crosses from one slot to the next.

The tokens come in groups of `group_length`, and no block of tokens crosses from one group to the next. With COMPACT,
expert_ids (G, K) names the expert in each slot of each group; without it there is one group, and slot e holds expert e.

With TOP_K, tokens are sorted by expert: the rows of h are pairs of a token and one of its TOP_K slots, and each group
holds pairs of one expert. Pair p belongs to token p // TOP_K, and pair_ids (G * group_length,) lists the pairs of each
group, with -1 as padding.

The gates of row t are row t // gate_length of gates (., K), which serves one row for all, one per sample or one per
token. Rank space is in fp32 (float64 for float64 inputs), and so are all sums. A factor of a product is not rounded to
half precision: experts and gradients may be smaller than fp16 can hold, and h may be larger. No kernel adds atomically,
so the results do not depend on the order in which programs run.
"""

import triton
import triton.language as tl


@triton.jit
def _rank_columns(
    block_id, group, expert_ids_ptr,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    COMPACT: tl.constexpr,
):  # fmt: skip
    """Return (slot, column of h, row of the weight, mask) of a block of columns, (BLOCK_SIZE,) each."""
    j = tl.arange(0, BLOCK_SIZE)
    r_block = block_id * (BLOCK_SIZE // BLOCK_R) + j // BLOCK_R
    slot = r_block // R_BLOCKS
    rank = (r_block % R_BLOCKS) * BLOCK_R + j % BLOCK_R
    mask = (slot < slots) & (rank < r)
    expert = slot
    if COMPACT:
        expert = tl.load(expert_ids_ptr + group * slots + slot, mask=mask, other=0).to(tl.int32)
    return slot, slot * r + rank, expert * r + rank, mask


@triton.jit
def _token_rows(pair_ids_ptr, group, row, group_length, end, TOP_K: tl.constexpr):
    """Return (row of h, row of x and y, mask) of a group's rows below `end`, in int64."""
    mask = row < end
    h_row = (group * group_length + row).to(tl.int64)
    token = h_row
    if TOP_K:
        h_row = tl.load(pair_ids_ptr + h_row, mask=mask, other=-1).to(tl.int64)
        mask = h_row >= 0
        h_row = tl.where(mask, h_row, 0)
        token = h_row // TOP_K
    return h_row, token, mask


@triton.jit
def _round_to_tf32(value):
    """Round fp32 to the nearest TF32; NaN stays NaN."""
    # The hardware cuts digits off, which makes all products smaller.
    bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)


@triton.jit
def _dot(a, b, acc, INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr):
    if ROUND:
        if a.dtype == tl.float32:
            a = _round_to_tf32(a)
        if b.dtype == tl.float32:
            b = _round_to_tf32(b)
    if UPCAST or a.dtype != b.dtype:  # the interpreter multiplies the bits of bfloat16 (triton-lang/triton#11584)
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)


@triton.jit
def _dropout_mask(seed_ptr, token, feature, features, dropout):
    """Say which elements of x dropout keeps; the answer depends on the seed and the element's position only."""
    return tl.rand(tl.load(seed_ptr), token.to(tl.int64) * features + feature) >= dropout


@triton.jit
def gated_lora_shrink_kernel(
    x_ptr, weight_ptr, expert_ids_ptr, pair_ids_ptr, h_ptr, h_pre_ptr, dgates_ptr, seed_ptr,
    group_length, features, stride_xm, rows, dropout,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
    COMPACT: tl.constexpr, TOP_K: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_DGATES: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
    BUCKET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute h = x weight^T and, with HAS_DGATES, the sums of h * h_pre over each block of BLOCK_R columns.

    x (T, d), row stride stride_xm; weight (E * r, d); h (rows, K * r), or (SPLIT_K, rows, K * r), whose sum is h;
    dgates (SPLIT_K, rows, K * R_BLOCKS). M is tokens, N columns of rank space, K features.
    Grid: (groups * blocks of tokens, blocks of columns, SPLIT_K).
    """
    m_blocks = tl.cdiv(group_length, BLOCK_M)
    group = tl.program_id(0) // m_blocks
    row = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    h_row, token, row_mask = _token_rows(pair_ids_ptr, group, row, group_length, group_length, TOP_K)
    _, column, weight_row, column_mask = _rank_columns(
        tl.program_id(1), group, expert_ids_ptr, slots, r, R_BLOCKS, BLOCK_R, BLOCK_N, COMPACT
    )
    weight_row = weight_row.to(tl.int64)
    k_per_split = tl.cdiv(tl.cdiv(features, BLOCK_K), SPLIT_K) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    for start in range(split * k_per_split, tl.minimum((split + 1) * k_per_split, features), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < features
        a = tl.load(
            x_ptr + token[:, None] * stride_xm + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0
        )
        if HAS_DROPOUT:
            keep = _dropout_mask(seed_ptr, token[:, None], k[None, :], features, dropout)
            a = tl.where(keep, a / (1 - dropout), 0.0).to(x_ptr.dtype.element_ty)
        b = tl.load(
            weight_ptr + weight_row[None, :] * features + k[:, None],
            mask=column_mask[None, :] & k_mask[:, None],
            other=0.0,
        )
        acc = _dot(a, b, acc, INPUT_PRECISION, ROUND, UPCAST)
    offsets = h_row[:, None] * (slots * r) + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if HAS_DGATES:
        h_pre = tl.load(h_pre_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
        sums = tl.sum(tl.reshape(acc * h_pre, (BLOCK_M, BLOCK_N // BLOCK_R, BLOCK_R)), axis=2)
        r_block = tl.program_id(1) * (BLOCK_N // BLOCK_R) + tl.arange(0, BLOCK_N // BLOCK_R)
        tl.store(
            dgates_ptr + (split * rows + h_row[:, None]) * (slots * R_BLOCKS) + r_block[None, :],
            sums,
            mask=row_mask[:, None] & (r_block < slots * R_BLOCKS)[None, :],
        )
    tl.store(h_ptr + split.to(tl.int64) * rows * (slots * r) + offsets, acc.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_gated_h(
    h_ptr, gates_ptr, h_row, column, slot, mask, rows, gate_length, scaling,
    slots: tl.constexpr, r: tl.constexpr, SPLIT_K: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Load gates * scaling * h in ACC_DTYPE, at rows and columns that are broadcast, summed over SPLIT_K."""
    offsets = h_row * (slots * r) + column
    value = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
    for split in tl.static_range(1, SPLIT_K):
        value += tl.load(h_ptr + split * rows.to(tl.int64) * (slots * r) + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
    gate = tl.load(gates_ptr + (h_row // gate_length) * slots + slot, mask=mask, other=0.0).to(ACC_DTYPE)
    return value * gate * scaling


@triton.jit
def gated_lora_expand_kernel(
    h_ptr, weight_ptr, gates_ptr, expert_ids_ptr, pair_ids_ptr, base_ptr, bias_ptr, y_ptr, seed_ptr,
    group_length, gate_length, features, stride_basem, rows, scaling, dropout,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
    COMPACT: tl.constexpr, TOP_K: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr,
    UPCAST: tl.constexpr, BUCKET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute y = dropout((gates * scaling * h) weight) + base + bias, with the dropout mask that x had.

    h (rows, K * r), or (SPLIT_K, rows, K * r), whose sum is h; weight (E * r, d); base (T, d), row stride stride_basem;
    bias (d,); y (T, d). M is tokens, N features, K columns of rank space.
    Grid: (groups * blocks of tokens, blocks of features).
    """
    m_blocks = tl.cdiv(group_length, BLOCK_M)
    group = tl.program_id(0) // m_blocks
    row = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    h_row, token, row_mask = _token_rows(pair_ids_ptr, group, row, group_length, group_length, TOP_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < features
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    for k_block in range(tl.cdiv(slots * R_BLOCKS * BLOCK_R, BLOCK_K)):
        slot, column, weight_row, column_mask = _rank_columns(
            k_block, group, expert_ids_ptr, slots, r, R_BLOCKS, BLOCK_R, BLOCK_K, COMPACT
        )
        a = _load_gated_h(
            h_ptr, gates_ptr, h_row[:, None], column[None, :], slot[None, :], row_mask[:, None] & column_mask[None, :],
            rows, gate_length, scaling, slots, r, SPLIT_K, ACC_DTYPE,
        )  # fmt: skip
        b = tl.load(
            weight_ptr + weight_row.to(tl.int64)[:, None] * features + n[None, :],
            mask=column_mask[:, None] & n_mask[None, :],
            other=0.0,
        )
        acc = _dot(a, b, acc, INPUT_PRECISION, ROUND, UPCAST)
    mask = row_mask[:, None] & n_mask[None, :]
    if HAS_DROPOUT:
        keep = _dropout_mask(seed_ptr, token[:, None], n[None, :], features, dropout)
        acc = tl.where(keep, acc / (1 - dropout), 0.0)
    if HAS_BASE:
        acc += tl.load(base_ptr + token[:, None] * stride_basem + n[None, :], mask=mask, other=0.0).to(ACC_DTYPE)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(ACC_DTYPE)[None, :]
    tl.store(y_ptr + token[:, None] * features + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_products(
    acc, h_ptr, right_ptr, gates_ptr, pair_ids_ptr, seed_ptr, group, slot, rank, column_mask, n, n_mask, first, end,
    group_length, gate_length, features, stride_rightk, rows, scaling, dropout,
    slots: tl.constexpr, r: tl.constexpr, SPLIT_K: tl.constexpr, TOP_K: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc + (gates * scaling * h)^T right over rows first..end of a group; slot and rank are (BLOCK_M,)."""
    for start in range(first, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        h_row, token, row_mask = _token_rows(pair_ids_ptr, group, row, group_length, end, TOP_K)
        a = _load_gated_h(
            h_ptr, gates_ptr, h_row[None, :], (slot * r + rank)[:, None], slot[:, None],
            column_mask[:, None] & row_mask[None, :], rows, gate_length, scaling, slots, r, SPLIT_K, ACC_DTYPE,
        )  # fmt: skip
        b = tl.load(
            right_ptr + token[:, None] * stride_rightk + n[None, :],
            mask=row_mask[:, None] & n_mask[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            keep = _dropout_mask(seed_ptr, token[:, None], n[None, :], features, dropout)
            b = tl.where(keep, b / (1 - dropout), 0.0).to(right_ptr.dtype.element_ty)
        acc = _dot(a, b, acc, INPUT_PRECISION, ROUND, UPCAST)
    return acc


@triton.jit
def gated_lora_weight_gradient_kernel(
    h_ptr, right_ptr, gates_ptr, expert_ids_ptr, pair_ids_ptr, group_bounds_ptr, gradient_ptr, seed_ptr,
    groups, group_length, gate_length, features, stride_rightk, rows, weight_rows, scaling, dropout,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
    COMPACT: tl.constexpr, TOP_K: tl.constexpr, HAS_DROPOUT: tl.constexpr, TOKEN_SPLITS: tl.constexpr,
    ACC_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
    BUCKET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the weight's gradient: the sum over tokens of gates * scaling * h, transposed, times right.

    Row e * r + i sums h[token, slot * r + i] over the slots that hold expert e. h (rows, K * r), or
    (SPLIT_K, rows, K * r), whose sum is h; right (T, d), row stride stride_rightk; gradient (TOKEN_SPLITS, E * r, d),
    where each split sums its part of every group's tokens. M is rows of the weight, N features, K tokens.
    With COMPACT a block of BLOCK_M rows is one block of one expert. The program searches the slots of each group for
    that expert, or with TOP_K finds the groups of slot j in group_bounds[j] (TOP_K, E + 1). Grid: (blocks of rows,
    blocks of features, TOKEN_SPLITS).
    """
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < features
    split = tl.program_id(2)
    k_per_split = tl.cdiv(tl.cdiv(group_length, BLOCK_K), TOKEN_SPLITS) * BLOCK_K
    first, last = split * k_per_split, tl.minimum((split + 1) * k_per_split, group_length)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    j = tl.arange(0, BLOCK_M)
    r_block = tl.program_id(0) * (BLOCK_M // BLOCK_R) + j // BLOCK_R
    expert = r_block // R_BLOCKS
    rank = (r_block % R_BLOCKS) * BLOCK_R + j % BLOCK_R
    weight_row = expert * r + rank
    column_mask = (weight_row < weight_rows) & (rank < r)
    own_expert = tl.program_id(0) // R_BLOCKS  # with COMPACT
    if TOP_K:
        for index in range(TOP_K):
            bound_ptr = group_bounds_ptr + index * (weight_rows // r + 1) + own_expert
            for group in range(tl.load(bound_ptr), tl.load(bound_ptr + 1)):
                acc = _add_products(
                    acc, h_ptr, right_ptr, gates_ptr, pair_ids_ptr, seed_ptr, group, expert * 0, rank, column_mask, n,
                    n_mask, first, last, group_length, gate_length, features, stride_rightk, rows, scaling, dropout,
                    slots, r, SPLIT_K, TOP_K, HAS_DROPOUT, ACC_DTYPE, INPUT_PRECISION, ROUND, UPCAST, BLOCK_K,
                )  # fmt: skip
    else:
        for group in range(groups):
            for index in range(slots if COMPACT else 1):
                slot, end = expert, last
                if COMPACT:
                    slot = expert * 0 + index
                    end = tl.where(tl.load(expert_ids_ptr + group * slots + index) == own_expert, last, first)
                acc = _add_products(
                    acc, h_ptr, right_ptr, gates_ptr, pair_ids_ptr, seed_ptr, group, slot, rank, column_mask, n, n_mask,
                    first, end, group_length, gate_length, features, stride_rightk, rows, scaling, dropout,
                    slots, r, SPLIT_K, TOP_K, HAS_DROPOUT, ACC_DTYPE, INPUT_PRECISION, ROUND, UPCAST, BLOCK_K,
                )  # fmt: skip
    gradient_row = (split * weight_rows + weight_row).to(tl.int64)
    tl.store(
        gradient_ptr + gradient_row[:, None] * features + n[None, :],
        acc.to(gradient_ptr.dtype.element_ty),
        mask=column_mask[:, None] & n_mask[None, :],
    )
