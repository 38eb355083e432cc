"""Triton kernels of gated_lora in rank space: shrink, expand and weight gradients.

The columns of rank space are slots times ranks: column slot * r + i of h (T, K * r) is rank i of the expert in the
slot. A tile of columns pads each slot to blocks of RANK_BLOCK, so that no block straddles two slots. Rows of a weight
(E * r, d) are addressed by expert: experts (G, K) names the expert in each slot for each group of `group_length`
tokens, and tiles of tokens never straddle groups; without COMPACT, slot and expert are the same.

With FAN, what is numbered as tokens are pairs of a token and one of its FAN slots: pair p belongs to token p // FAN,
has one slot, and rows (G * group_length,) lists the pairs of each group, -1 where there is none. So tokens that chose
the same expert are computed together, wherever they stand.

The gate of a token is row token // gate_length of gates (., K): one row for all, one a sequence, or one a token.
Everything is accumulated in fp32 (float64 for float64 inputs) and rounded once. Nothing is added atomically, so results
do not depend on the order in which programs run.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(
    tile,
    group,
    experts,
    slots: tl.constexpr,
    r: tl.constexpr,
    PIECES: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """Columns of a tile: (slot, column of h, row of the weight, whether it exists), (COLUMNS,) each."""
    j = tl.arange(0, COLUMNS)
    block = tile * (COLUMNS // RANK_BLOCK) + j // RANK_BLOCK
    slot = block // PIECES
    rank = (block % PIECES) * RANK_BLOCK + j % RANK_BLOCK
    there = (slot < slots) & (rank < r)
    expert = slot
    if COMPACT:
        expert = tl.load(experts + group * slots + slot, mask=there, other=0).to(tl.int32)
    return slot, slot * r + rank, expert * r + rank, there


@triton.jit
def _tokens(rows, group, row, group_length, limit, FAN: tl.constexpr):
    """(place in h, row of x and y, whether it exists) of a group's rows below limit, int64."""
    here = row < limit
    token = (group * group_length + row).to(tl.int64)
    source = token
    if FAN:
        token = tl.load(rows + token, mask=here, other=-1).to(tl.int64)
        here = token >= 0
        token = tl.where(here, token, 0)
        source = token // FAN
    return token, source, here


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the bits of bfloat16 (triton-lang/triton#11584)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _kept(seed, token, feature, features, dropout):
    """Whether dropout keeps an element of x: a function of the seed and the element's place alone."""
    return tl.rand(tl.load(seed), token.to(tl.int64) * features + feature) >= dropout


@triton.jit
def shrink_kernel(
    x, weight, experts, rows, h, h_pre, dgates, seed,
    group_length, features, stride_x, tokens, dropout,
    slots: tl.constexpr, r: tl.constexpr, PIECES: tl.constexpr, RANK_BLOCK: tl.constexpr, PLANES: tl.constexpr,
    COMPACT: tl.constexpr, FAN: tl.constexpr, DROPOUT: tl.constexpr, DGATES: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BUCKET: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """h = x weight^T, and with DGATES the sums of h * h_pre over each block of ranks.

    x (T, d), row stride stride_x; weight (E * r, d); h (T, K * r), or (PLANES, T, K * r) sums over parts of d;
    dgates (PLANES, T, K * PIECES). Grid: (groups * tiles of tokens, tiles of columns, PLANES).
    """
    tiles = tl.cdiv(group_length, TOKENS)
    group = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    plane = tl.program_id(2)
    token, source, here = _tokens(rows, group, row, group_length, group_length, FAN)
    _, column, weight_row, there = _columns(
        tl.program_id(1), group, experts, slots, r, PIECES, RANK_BLOCK, COLUMNS, COMPACT
    )
    weight_row = weight_row.to(tl.int64)
    share = tl.cdiv(tl.cdiv(features, FEATURES), PLANES) * FEATURES
    acc = tl.zeros((TOKENS, COLUMNS), ACC)
    for start in range(plane * share, tl.minimum((plane + 1) * share, features), FEATURES):
        feature = start + tl.arange(0, FEATURES)
        inside = feature < features
        a = tl.load(x + source[:, None] * stride_x + feature[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        if DROPOUT:
            kept = _kept(seed, source[:, None], feature[None, :], features, dropout)
            a = tl.where(kept, a / (1 - dropout), 0.0).to(x.dtype.element_ty)
        b = tl.load(
            weight + weight_row[None, :] * features + feature[:, None],
            mask=there[None, :] & inside[:, None],
            other=0.0,
        ).to(x.dtype.element_ty)
        acc = _dot(a, b, acc, PRECISION, UPCAST)
    place = token[:, None] * (slots * r) + column[None, :]
    present = here[:, None] & there[None, :]
    if DGATES:
        before = tl.load(h_pre + place, mask=present, other=0.0).to(ACC)
        sums = tl.sum(tl.reshape(acc * before, (TOKENS, COLUMNS // RANK_BLOCK, RANK_BLOCK)), axis=2)
        block = tl.program_id(1) * (COLUMNS // RANK_BLOCK) + tl.arange(0, COLUMNS // RANK_BLOCK)
        tl.store(
            dgates + (plane * tokens + token[:, None]) * (slots * PIECES) + block[None, :],
            sums,
            mask=here[:, None] & (block < slots * PIECES)[None, :],
        )
    tl.store(h + plane.to(tl.int64) * tokens * (slots * r) + place, acc.to(h.dtype.element_ty), mask=present)


@triton.jit
def _load_weighed(
    h,
    gates,
    token,
    column,
    slot,
    present,
    tokens,
    gate_length,
    scaling,
    slots: tl.constexpr,
    r: tl.constexpr,
    PLANES: tl.constexpr,
    ACC: tl.constexpr,
):
    """gates * scaling * h at tokens and columns, both broadcast, summed over the planes; in ACC."""
    place = token * (slots * r) + column
    value = tl.load(h + place, mask=present, other=0.0).to(ACC)
    for plane in tl.static_range(1, PLANES):
        value += tl.load(h + plane * tokens.to(tl.int64) * (slots * r) + place, mask=present, other=0.0).to(ACC)
    gate = tl.load(gates + (token // gate_length) * slots + slot, mask=present, other=0.0).to(ACC)
    return value * gate * scaling


@triton.jit
def expand_kernel(
    h, weight, gates, experts, rows, base, bias, y, seed,
    group_length, gate_length, features, stride_base, tokens, scaling, dropout,
    slots: tl.constexpr, r: tl.constexpr, PIECES: tl.constexpr, RANK_BLOCK: tl.constexpr, PLANES: tl.constexpr,
    COMPACT: tl.constexpr, FAN: tl.constexpr, DROPOUT: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BUCKET: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """y = (gates * scaling * h) weight, dropped where DROPOUT says x was, + base + bias.

    h (T, K * r), or (PLANES, T, K * r) to be summed; weight (E * r, d); base (T, d), row stride stride_base; bias (d,);
    y (T, d). Grid: (groups * tiles of tokens, tiles of features).
    """
    tiles = tl.cdiv(group_length, TOKENS)
    group = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    token, target, here = _tokens(rows, group, row, group_length, group_length, FAN)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < features
    acc = tl.zeros((TOKENS, FEATURES), ACC)
    for tile in range(tl.cdiv(slots * PIECES * RANK_BLOCK, COLUMNS)):
        slot, column, weight_row, there = _columns(tile, group, experts, slots, r, PIECES, RANK_BLOCK, COLUMNS, COMPACT)
        a = _load_weighed(
            h, gates, token[:, None], column[None, :], slot[None, :], here[:, None] & there[None, :], tokens,
            gate_length, scaling, slots, r, PLANES, ACC,
        )  # fmt: skip
        b = tl.load(
            weight + weight_row.to(tl.int64)[:, None] * features + feature[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        acc = _dot(a.to(y.dtype.element_ty), b.to(y.dtype.element_ty), acc, PRECISION, UPCAST)
    present = here[:, None] & inside[None, :]
    if DROPOUT:
        kept = _kept(seed, target[:, None], feature[None, :], features, dropout)
        acc = tl.where(kept, acc / (1 - dropout), 0.0)
    if HAS_BASE:
        acc += tl.load(base + target[:, None] * stride_base + feature[None, :], mask=present, other=0.0).to(ACC)
    if HAS_BIAS:
        acc += tl.load(bias + feature, mask=inside, other=0.0).to(ACC)[None, :]
    tl.store(y + target[:, None] * features + feature[None, :], acc.to(y.dtype.element_ty), mask=present)


@triton.jit
def _add_products(
    acc, h, right, gates, rows, seed, group, slot, rank, there, feature, inside, first, last,
    group_length, gate_length, features, stride_right, tokens, scaling, dropout,
    slots: tl.constexpr, r: tl.constexpr, PLANES: tl.constexpr, FAN: tl.constexpr, DROPOUT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """acc + (gates * scaling * h)^T right over rows first..last of a group; slot, rank and there are (COLUMNS,)."""
    for start in range(first, last, TOKENS):
        row = start + tl.arange(0, TOKENS)
        token, source, here = _tokens(rows, group, row, group_length, last, FAN)
        a = _load_weighed(
            h, gates, token[None, :], (slot * r + rank)[:, None], slot[:, None], there[:, None] & here[None, :],
            tokens, gate_length, scaling, slots, r, PLANES, ACC,
        )  # fmt: skip
        b = tl.load(
            right + source[:, None] * stride_right + feature[None, :],
            mask=here[:, None] & inside[None, :],
            other=0.0,
        )
        if DROPOUT:
            kept = _kept(seed, source[:, None], feature[None, :], features, dropout)
            b = tl.where(kept, b / (1 - dropout), 0.0).to(right.dtype.element_ty)
        acc = _dot(a.to(right.dtype.element_ty), b, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def weight_gradient_kernel(
    h, right, gates, experts, rows, bounds, gradient, seed,
    groups, group_length, gate_length, features, stride_right, tokens, weight_rows, scaling, dropout,
    slots: tl.constexpr, r: tl.constexpr, PIECES: tl.constexpr, RANK_BLOCK: tl.constexpr, PLANES: tl.constexpr,
    COMPACT: tl.constexpr, FAN: tl.constexpr, DROPOUT: tl.constexpr, SPLITS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BUCKET: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """gradient[e * r + i] = sum over tokens and slots with expert e of gates * scaling * h[token, slot * r + i] right.

    h (T, K * r), or (PLANES, T, K * r) to be summed; right (T, d), row stride stride_right; gradient
    (SPLITS, E * r, d), each split the sum over its share of every group's tokens. With COMPACT a tile of columns is one
    block of one expert, which looks for itself among each group's slots, or with FAN finds its groups between
    bounds (FAN, E + 1). Grid: (tiles of columns, tiles of features, SPLITS).
    """
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < features
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(group_length, TOKENS), SPLITS) * TOKENS
    first, last = split * share, tl.minimum((split + 1) * share, group_length)
    acc = tl.zeros((COLUMNS, FEATURES), ACC)
    j = tl.arange(0, COLUMNS)
    block = tl.program_id(0) * (COLUMNS // RANK_BLOCK) + j // RANK_BLOCK
    expert = block // PIECES
    rank = (block % PIECES) * RANK_BLOCK + j % RANK_BLOCK
    row = expert * r + rank
    there = (row < weight_rows) & (rank < r)
    mine = tl.program_id(0) // PIECES  # with COMPACT
    if FAN:
        for turn in range(FAN):
            edge = bounds + turn * (weight_rows // r + 1) + mine
            for group in range(tl.load(edge), tl.load(edge + 1)):
                acc = _add_products(
                    acc, h, right, gates, rows, seed, group, expert * 0, rank, there, feature, inside, first, last,
                    group_length, gate_length, features, stride_right, tokens, scaling, dropout,
                    slots, r, PLANES, FAN, DROPOUT, ACC, PRECISION, UPCAST, TOKENS,
                )  # fmt: skip
    else:
        for group in range(groups):
            for turn in range(slots if COMPACT else 1):
                slot, end = expert, last
                if COMPACT:
                    slot = expert * 0 + turn
                    end = tl.where(tl.load(experts + group * slots + turn) == mine, last, first)
                acc = _add_products(
                    acc, h, right, gates, rows, seed, group, slot, rank, there, feature, inside, first, end,
                    group_length, gate_length, features, stride_right, tokens, scaling, dropout,
                    slots, r, PLANES, FAN, DROPOUT, ACC, PRECISION, UPCAST, TOKENS,
                )  # fmt: skip
    place = (split * weight_rows + row).to(tl.int64)
    tl.store(
        gradient + place[:, None] * features + feature[None, :],
        acc.to(gradient.dtype.element_ty),
        mask=there[:, None] & inside[None, :],
    )
