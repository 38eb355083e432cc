"""Triton kernels of gated_lora: shrink to rank space, gate, expand from it, and gradients of the weights.

linear, down and up compute few tokens together with the base layer; route sorts tokens by expert.

Rank space has K * r columns: column slot * r + i of h (T, K * r) is rank i of the expert in that slot. A block of
columns pads every slot to R_BLOCKS blocks of BLOCK_R columns, so no block of BLOCK_R crosses from one slot to the next.

The tokens come in groups of `group_length`, and no block of tokens crosses from one group to the next. With COMPACT,
expert_ids (G, K) names the expert in each slot of each group; without it there is one group, and slot e holds expert e.

With TOP_K, tokens are sorted by expert: the rows of h are pairs of a token and one of its TOP_K slots, and each group
holds pairs of one expert. Pair p belongs to token p // TOP_K, and pair_ids (G * group_length,) lists the pairs of each
group, with -1 as padding.

The gates of row t are row t // gate_length of gates (., K), which serves one row for all, one per sample or one per
token. All sums are in fp32 (float64 for float64 inputs). A product rounds its factors to DOT_DTYPE: bf16 inputs are
multiplied in bf16; fp16 inputs in TF32, because experts and gradients may be smaller than fp16 can hold, and h may be
larger. No kernel adds atomically, so the results do not depend on the order in which programs run.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _begin(EARLY: tl.constexpr):
    """Wait for the kernels before, where this one may be launched before they end; the next one may do the same."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


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
def _round(value, BITS: tl.constexpr):
    """Round fp32 so that its last BITS bits are zero; NaN stays NaN."""
    bits = (value.to(tl.int32, bitcast=True) + (1 << (BITS - 1))) & -(1 << BITS)
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)


@triton.jit
def _dot(a, b, acc, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr):
    a, b = a.to(DOT_DTYPE), b.to(DOT_DTYPE)
    if ROUND:  # where the hardware, or the interpreter, would cut digits off, which makes all products smaller
        a, b = _round(a, ROUND), _round(b, ROUND)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)


@triton.jit
def _dropout_mask(seed_ptr, token, feature, features, dropout):
    """Say which elements of x dropout keeps; the answer depends on the seed and the element's position only."""
    return tl.rand(tl.load(seed_ptr), token.to(tl.int64) * features + feature) >= dropout


@triton.jit
def gated_lora_shrink_kernel(
    x_ptr, weight_ptr, expert_ids_ptr, pair_ids_ptr, h_ptr, seed_ptr,
    group_length, features, stride_xm, rows, dropout,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, COMPACT: tl.constexpr,
    TOP_K: tl.constexpr, HAS_DROPOUT: tl.constexpr, ACC_DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute h = x weight^T in parts, one for each split of the features.

    x (T, d), row stride stride_xm; weight (E * r, d); h (splits, rows, K * r), whose sum is h. M is tokens, N columns
    of rank space, K features. Grid: (groups * blocks of tokens, blocks of columns, splits).
    """
    _begin(EARLY)
    m_blocks = tl.cdiv(group_length, BLOCK_M)
    group = tl.program_id(0) // m_blocks
    row = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    split, splits = tl.program_id(2), tl.num_programs(2)
    h_row, token, row_mask = _token_rows(pair_ids_ptr, group, row, group_length, group_length, TOP_K)
    _, column, weight_row, column_mask = _rank_columns(
        tl.program_id(1), group, expert_ids_ptr, slots, r, R_BLOCKS, BLOCK_R, BLOCK_N, COMPACT
    )
    weight_row = weight_row.to(tl.int64)
    k_per_split = tl.cdiv(tl.cdiv(features, BLOCK_K), splits) * BLOCK_K
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
        acc = _dot(a, b, acc, DOT_DTYPE, INPUT_PRECISION, ROUND)
    offsets = (split.to(tl.int64) * rows + h_row[:, None]) * (slots * r) + column[None, :]
    tl.store(h_ptr + offsets, acc, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _sum_of_splits(h_ptr, offsets, mask, rows, columns: tl.constexpr, SPLITS: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """Load h (SPLITS, rows, columns), summed over the splits."""
    value = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
    for split in tl.static_range(1, SPLITS):
        value += tl.load(h_ptr + split * rows * columns + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
    return value


@triton.jit
def _store_rounded(pointers, value, mask, ROUND: tl.constexpr):
    if ROUND:
        value = _round(value, ROUND)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def gated_lora_gate_kernel(
    h_ptr, gates_ptr, h_pre_ptr, gated_ptr, gated_pre_ptr, sum_ptr, dgates_ptr,
    rows, gate_length, scaling,
    slots: tl.constexpr, r: tl.constexpr, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, HAS_SUM: tl.constexpr,
    HAS_DGATES: tl.constexpr, ACC_DTYPE: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute gated = gates * scaling * h.

    With HAS_SUM it stores h, too, and with HAS_DGATES gated_pre = gates * scaling * h_pre and dgates, which is
    scaling * h * h_pre, summed over r. h (SPLITS, rows, K * r), whose sum is h; gated, gated_pre, sum and h_pre
    (rows, K * r); dgates (rows, K). Grid: (blocks of rows, K).
    """
    _begin(EARLY)
    slot = tl.program_id(1)
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rank = tl.arange(0, BLOCK_R)
    row_mask = row < rows
    mask = row_mask[:, None] & (rank < r)[None, :]
    offsets = row[:, None] * (slots * r) + slot * r + rank[None, :]
    h = _sum_of_splits(h_ptr, offsets, mask, rows, slots * r, SPLITS, ACC_DTYPE)
    if HAS_SUM:
        tl.store(sum_ptr + offsets, h, mask=mask)
    gate = tl.load(gates_ptr + (row // gate_length) * slots + slot, mask=row_mask, other=0.0).to(ACC_DTYPE)
    gate = (gate * scaling)[:, None]
    _store_rounded(gated_ptr + offsets, h * gate, mask, ROUND)
    if HAS_DGATES:
        h_pre = tl.load(h_pre_ptr + offsets, mask=mask, other=0.0)
        tl.store(dgates_ptr + row * slots + slot, tl.sum(h * h_pre, axis=1) * scaling, mask=row_mask)
        _store_rounded(gated_pre_ptr + offsets, h_pre * gate, mask, ROUND)


@triton.jit
def _add_columns(
    acc, gated_ptr, weight_ptr, expert_ids_ptr, k_block, group, row_mask, n, n_mask, features,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, COMPACT: tl.constexpr,
    DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc + gated weight over one block of columns of rank space; gated_ptr points to the rows, (BLOCK_M, 1)."""
    _, column, weight_row, mask = _rank_columns(
        k_block, group, expert_ids_ptr, slots, r, R_BLOCKS, BLOCK_R, BLOCK_K, COMPACT
    )
    a = tl.load(gated_ptr + column[None, :], mask=row_mask[:, None] & mask[None, :], other=0.0)
    b = tl.load(
        weight_ptr + weight_row.to(tl.int64)[:, None] * features + n[None, :],
        mask=mask[:, None] & n_mask[None, :],
        other=0.0,
    )
    return _dot(a, b, acc, DOT_DTYPE, INPUT_PRECISION, ROUND)


@triton.jit
def gated_lora_expand_kernel(
    gated_ptr, weight_ptr, expert_ids_ptr, pair_ids_ptr, base_ptr, bias_ptr, y_ptr, seed_ptr,
    group_length, features, stride_basem, n_per_program, dropout,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, COMPACT: tl.constexpr,
    TOP_K: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC_DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute y = dropout(gated weight) + base + bias, with the dropout mask that x had.

    gated (rows, K * r); weight (E * r, d); base (T, d), row stride stride_basem; bias (d,); y (T, d). M is tokens, N
    features, K columns of rank space. A program computes n_per_program blocks of features with one load of gated, if
    its columns fit one block.
    Grid: (groups * blocks of tokens, parts of the features).
    """
    _begin(EARLY)
    m_blocks = tl.cdiv(group_length, BLOCK_M)
    group = tl.program_id(0) // m_blocks
    row = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    h_row, token, row_mask = _token_rows(pair_ids_ptr, group, row, group_length, group_length, TOP_K)
    K_BLOCKS: tl.constexpr = (slots * R_BLOCKS * BLOCK_R + BLOCK_K - 1) // BLOCK_K
    _, column, weight_row, column_mask = _rank_columns(
        0, group, expert_ids_ptr, slots, r, R_BLOCKS, BLOCK_R, BLOCK_K, COMPACT
    )
    gated_ptr += h_row[:, None] * (slots * r)
    a = tl.load(gated_ptr + column[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0)
    first = tl.program_id(1) * n_per_program
    for n_block in range(first, tl.minimum(first + n_per_program, tl.cdiv(features, BLOCK_N))):
        n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < features
        b = tl.load(
            weight_ptr + weight_row.to(tl.int64)[:, None] * features + n[None, :],
            mask=column_mask[:, None] & n_mask[None, :],
            other=0.0,
        )
        acc = _dot(a, b, tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE), DOT_DTYPE, INPUT_PRECISION, ROUND)
        if K_BLOCKS > 1:
            for k_block in range(1, K_BLOCKS):
                acc = _add_columns(
                    acc, gated_ptr, weight_ptr, expert_ids_ptr, k_block, group, row_mask, n, n_mask, features,
                    slots, r, R_BLOCKS, BLOCK_R, COMPACT, DOT_DTYPE, INPUT_PRECISION, ROUND, BLOCK_K,
                )  # fmt: skip
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
def gated_lora_linear_kernel(
    x_ptr, linear_ptr, gated_ptr, weight_ptr, expert_ids_ptr, bias_ptr, y_ptr,
    tokens, in_features, features, stride_xm, stride_linearn,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr,
    COMPACT: tl.constexpr, HAS_BIAS: tl.constexpr, ACC_DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute y = x linear^T + gated weight + bias for few tokens of one group: one pass over the base layer's weight.

    x (T, d_in), row stride stride_xm; linear (d, d_in), row stride stride_linearn; gated and weight as in expand; bias
    (d,); y (T, d). M is tokens, N features, K columns of rank space, D input features. Grid: (blocks of features,).
    """
    _begin(EARLY)
    row = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, n_mask = row < tokens, n < features
    linear_row = n.to(tl.int64) * stride_linearn
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    for start in range(0, in_features, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_mask = d < in_features
        a = tl.load(x_ptr + row[:, None] * stride_xm + d[None, :], mask=row_mask[:, None] & d_mask[None, :], other=0.0)
        b = tl.load(linear_ptr + linear_row[None, :] + d[:, None], mask=n_mask[None, :] & d_mask[:, None], other=0.0)
        acc = _dot(a, b, acc, DOT_DTYPE, INPUT_PRECISION, ROUND)
    K_BLOCKS: tl.constexpr = (slots * R_BLOCKS * BLOCK_R + BLOCK_K - 1) // BLOCK_K
    gated_ptr += row[:, None] * (slots * r)
    for k_block in range(0, K_BLOCKS):
        acc = _add_columns(
            acc, gated_ptr, weight_ptr, expert_ids_ptr, k_block, 0, row_mask, n, n_mask, features,
            slots, r, R_BLOCKS, BLOCK_R, COMPACT, DOT_DTYPE, INPUT_PRECISION, ROUND, BLOCK_K,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(ACC_DTYPE)[None, :]
    y_mask = row_mask[:, None] & n_mask[None, :]
    tl.store(y_ptr + row[:, None] * features + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def gated_lora_down_kernel(
    x_ptr, weight_ptr, gates_ptr, expert_ids_ptr, gated_ptr, features, scaling,
    slots: tl.constexpr, r: tl.constexpr, COMPACT: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Compute gated = gates * scaling * weight x of one token.

    x (d,); weight (E * r, d); gates (K,); gated (K * r,). Grid: (K * r,).
    """
    _begin(EARLY)
    column = tl.program_id(0)
    slot = column // r
    expert = slot
    if COMPACT:
        expert = tl.load(expert_ids_ptr + slot).to(tl.int32)
    weight_ptr += (expert * r + column % r).to(tl.int64) * features
    acc = tl.zeros((BLOCK,), ACC_DTYPE)
    for start in range(0, features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + d, mask=d < features, other=0.0).to(ACC_DTYPE)
        acc += x * tl.load(weight_ptr + d, mask=d < features, other=0.0).to(ACC_DTYPE)
    tl.store(gated_ptr + column, tl.sum(acc) * tl.load(gates_ptr + slot).to(ACC_DTYPE) * scaling)


@triton.jit
def gated_lora_up_kernel(
    x_ptr, linear_ptr, gated_ptr, weight_ptr, expert_ids_ptr, bias_ptr, y_ptr, in_features, features, stride_linearn,
    slots: tl.constexpr, r: tl.constexpr, COMPACT: tl.constexpr, HAS_BIAS: tl.constexpr, ACC_DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute y = linear x + weight^T gated + bias of one token, with the base layer's weight.

    x (d_in,); linear (d, d_in), row stride stride_linearn; gated (K * r,); weight (E * r, d); bias (d,); y (d,). N is
    features, K columns of rank space, D input features. Grid: (blocks of features,).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < features
    linear_row = n.to(tl.int64) * stride_linearn
    acc = tl.zeros((BLOCK_N, BLOCK_D), ACC_DTYPE)
    for start in range(0, in_features, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_mask = d < in_features
        w = tl.load(linear_ptr + linear_row[:, None] + d[None, :], mask=n_mask[:, None] & d_mask[None, :], other=0.0)
        # From L2: with an early start nothing says that L1 has forgotten what was at this address before.
        x = tl.load(x_ptr + d, mask=d_mask, other=0.0, cache_modifier=".cg")
        acc += w.to(ACC_DTYPE) * x.to(ACC_DTYPE)[None, :]
    y = tl.sum(acc, axis=1)
    # Until here it read nothing that the kernel before it, down, writes; and down began after those before it ended.
    _begin(EARLY)
    for start in range(0, slots * r, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        mask = column < slots * r
        slot = column // r
        expert = slot
        if COMPACT:
            expert = tl.load(expert_ids_ptr + slot, mask=mask, other=0).to(tl.int32)
        weight_row = (expert * r + column % r).to(tl.int64)
        up = tl.load(
            weight_ptr + weight_row[:, None] * features + n[None, :], mask=mask[:, None] & n_mask[None, :], other=0.0
        )
        gated = tl.load(gated_ptr + column, mask=mask, other=0.0)
        y += tl.sum(up.to(ACC_DTYPE) * gated[:, None], axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(ACC_DTYPE)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n_mask)


@triton.jit
def _add_products(
    acc, gated_ptr, right_ptr, pair_ids_ptr, seed_ptr, group, column, column_mask, n, n_mask, first, end,
    group_length, features, stride_rightk, dropout,
    columns: tl.constexpr, TOP_K: tl.constexpr, HAS_DROPOUT: tl.constexpr, DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc + gated^T right over rows first..end of a group and the given columns of gated."""
    for start in range(first, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        h_row, token, row_mask = _token_rows(pair_ids_ptr, group, row, group_length, end, TOP_K)
        a = tl.load(
            gated_ptr + h_row[:, None] * columns + column[None, :],
            mask=row_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        b = tl.load(
            right_ptr + token[:, None] * stride_rightk + n[None, :],
            mask=row_mask[:, None] & n_mask[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            keep = _dropout_mask(seed_ptr, token[:, None], n[None, :], features, dropout)
            b = tl.where(keep, b / (1 - dropout), 0.0).to(right_ptr.dtype.element_ty)
        acc = _dot(tl.trans(a), b, acc, DOT_DTYPE, INPUT_PRECISION, ROUND)
    return acc


@triton.jit
def gated_lora_weight_gradient_kernel(
    gated_ptr, right_ptr, expert_ids_ptr, pair_ids_ptr, group_bounds_ptr, gradient_ptr, seed_ptr,
    groups, group_length, features, stride_rightk, weight_rows, dropout,
    slots: tl.constexpr, r: tl.constexpr, R_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, COMPACT: tl.constexpr,
    TOP_K: tl.constexpr, HAS_DROPOUT: tl.constexpr, ACC_DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute the weight's gradient in parts, gated^T right over each split of every group's tokens.

    gated (rows, K * r); right (T, d), row stride stride_rightk; gradient (splits, weight_rows, d). M is rows of the
    weight, N features, K tokens. Without COMPACT, row m is column m of gated. With COMPACT a block of BLOCK_M rows is
    one block of one expert, and the program searches the slots of each group for that expert, or with TOP_K finds the
    groups of slot j in group_bounds[j] (TOP_K, E + 1). Grid: (blocks of rows, blocks of features, splits).
    """
    _begin(EARLY)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < features
    split, splits = tl.program_id(2), tl.num_programs(2)
    k_per_split = tl.cdiv(tl.cdiv(group_length, BLOCK_K), splits) * BLOCK_K
    first, last = split * k_per_split, tl.minimum((split + 1) * k_per_split, group_length)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC_DTYPE)
    expert, _, weight_row, _ = _rank_columns(
        tl.program_id(0), 0, expert_ids_ptr, slots, r, R_BLOCKS, BLOCK_R, BLOCK_M, False
    )
    rank = weight_row - expert * r
    column_mask = (rank < r) & (weight_row < weight_rows)
    own_expert = tl.program_id(0) // R_BLOCKS  # with COMPACT
    if TOP_K:
        for index in range(TOP_K):
            bound_ptr = group_bounds_ptr + index * (weight_rows // r + 1) + own_expert
            for group in range(tl.load(bound_ptr), tl.load(bound_ptr + 1)):
                acc = _add_products(
                    acc, gated_ptr, right_ptr, pair_ids_ptr, seed_ptr, group, rank, column_mask, n, n_mask, first,
                    last, group_length, features, stride_rightk, dropout, slots * r, TOP_K, HAS_DROPOUT, DOT_DTYPE,
                    INPUT_PRECISION, ROUND, BLOCK_K,
                )  # fmt: skip
    elif COMPACT:
        for group in range(groups):
            for index in range(slots):
                end = tl.where(tl.load(expert_ids_ptr + group * slots + index) == own_expert, last, first)
                acc = _add_products(
                    acc, gated_ptr, right_ptr, pair_ids_ptr, seed_ptr, group, index * r + rank, column_mask, n, n_mask,
                    first, end, group_length, features, stride_rightk, dropout, slots * r, TOP_K, HAS_DROPOUT,
                    DOT_DTYPE, INPUT_PRECISION, ROUND, BLOCK_K,
                )  # fmt: skip
    else:
        acc = _add_products(
            acc, gated_ptr, right_ptr, pair_ids_ptr, seed_ptr, 0, weight_row, column_mask, n, n_mask, first, last,
            group_length, features, stride_rightk, dropout, slots * r, TOP_K, HAS_DROPOUT, DOT_DTYPE, INPUT_PRECISION,
            ROUND, BLOCK_K,
        )  # fmt: skip
    gradient_row = (split * weight_rows + weight_row).to(tl.int64)
    tl.store(
        gradient_ptr + gradient_row[:, None] * features + n[None, :],
        acc.to(gradient_ptr.dtype.element_ty),
        mask=column_mask[:, None] & n_mask[None, :],
    )


@triton.jit
def gated_lora_reduce_kernel(
    parts_ptr, expert_ids_ptr, gradient_ptr, length, part_length,
    slots: tl.constexpr, SPLITS: tl.constexpr, COMPACT: tl.constexpr, ACC_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Sum the parts of a weight's gradient, and with COMPACT put each slot's rows at its expert; other rows are zero.

    parts (SPLITS, part_length), where each slot has `length` elements; gradient (E, length).
    Grid: (blocks of an expert's elements, E).
    """
    _begin(EARLY)
    element = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    expert = tl.program_id(1)
    mask = element < length
    acc = tl.zeros((BLOCK,), ACC_DTYPE)
    for index in range(slots if COMPACT else 1):
        slot, end = expert, length
        if COMPACT:
            slot = expert * 0 + index
            end = tl.where(tl.load(expert_ids_ptr + index) == expert, length, 0)
        for split in tl.static_range(SPLITS):
            offset = split * part_length + slot.to(tl.int64) * length
            acc += tl.load(parts_ptr + offset + element, mask=element < end, other=0.0)
    tl.store(gradient_ptr + expert.to(tl.int64) * length + element, acc.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _experts_of(
    experts_ptr, start, tokens, served, slot, slots: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Return a block of tokens and the experts that they have in a slot, EXPERTS for what lies beyond the tokens."""
    token = start + tl.arange(0, BLOCK)
    return token, tl.load(experts_ptr + (token // served) * slots + slot, mask=token < tokens, other=EXPERTS)


@triton.jit
def gated_lora_route_kernel(
    experts_ptr, pair_ids_ptr, expert_ids_ptr, group_bounds_ptr, tokens, served, groups,
    slots: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Sort the pairs of each slot by expert, into groups of SIZE: a counting sort, in the order of the tokens.

    experts (T / served, K), where a row serves `served` tokens; pair_ids (K * groups, SIZE), expert_ids (K * groups,)
    and group_bounds (K, EXPERTS + 1) as the other kernels read them. The last expert gets the groups that are left.
    Grid: (K, EXPERTS).
    """
    _begin(EARLY)
    slot, own = tl.program_id(0), tl.program_id(1)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, tokens, BLOCK):
        token, expert = _experts_of(experts_ptr, start, tokens, served, slot, slots, EXPERTS, BLOCK)
        counts += tl.histogram(expert.to(tl.int32), BINS)  # the last bin takes what the mask leaves out
    counts = tl.where(bins < EXPERTS, counts, 0)
    used = (counts + SIZE - 1) // SIZE
    first = slot * groups + tl.sum(tl.where(bins < own, used, 0))
    last = first + tl.sum(tl.where(bins == own, used, 0))
    count = tl.sum(tl.where(bins == own, counts, 0))
    tl.store(group_bounds_ptr + slot * (EXPERTS + 1) + own, first)
    if own == EXPERTS - 1:
        tl.store(group_bounds_ptr + slot * (EXPERTS + 1) + EXPERTS, last)
        last = (slot + 1) * groups
    for start in range(first, last, BLOCK):
        group = start + tl.arange(0, BLOCK)
        tl.store(expert_ids_ptr + group, tl.zeros((BLOCK,), tl.int32) + own, mask=group < last)
    begin = first * SIZE
    for start in range(0, tokens, BLOCK):
        token, expert = _experts_of(experts_ptr, start, tokens, served, slot, slots, EXPERTS, BLOCK)
        mine = expert == own
        position = begin + tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(pair_ids_ptr + position, token * slots + slot, mask=mine)
        begin += tl.sum(mine.to(tl.int32))
    for start in range(first * SIZE + count, last * SIZE, BLOCK):
        position = start + tl.arange(0, BLOCK)
        tl.store(pair_ids_ptr + position, tl.zeros((BLOCK,), tl.int32) - 1, mask=position < last * SIZE)
