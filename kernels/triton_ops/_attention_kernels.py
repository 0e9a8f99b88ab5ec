"""The Triton kernels of causal attention: forward, row sums, gradients of keys and values, gradient of queries.

A loop over blocks is three loops. Blocks that every row of the tile sees whole carry no mask; those that the diagonal
or a document's start cuts do. Blocks that no row sees are not visited. Scores live in base 2: `scale_log2` is the scale
times log2(e), and `lse` is the base-2 logarithm of a row's sum of exponentials. Each output tile has one program; where
one kernel computes all gradients, several add to a tile of dq, in a fixed order, each waiting for its turn.

Every program takes one tile of one head; tiles of one head are neighbours, so its keys and values stay in the L2 cache,
and so are the `group` query heads that read one key head. A tile of keys adds up the gradients of all of them, one head
after the other. A window is a document whose start moves along with the query.
Offsets within a tile are 32-bit, the way to a tile is 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from weftrain.kernels.triton_ops._in_turn import add_in_turn

SCAN = 1024  # document starts that a key tile looks at in one go


@triton.jit
def _tile(base, rows, stride, T, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """[rows, BLOCK_D] from base + row * stride; zeros beyond T rows (where BOUNDED) and beyond HEAD_DIM."""
    column = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + column[None, :]
    if HEAD_DIM == BLOCK_D:
        if BOUNDED:
            return tl.load(pointers, mask=rows[:, None] < T, other=0.0)
        return tl.load(pointers)
    if BOUNDED:
        return tl.load(pointers, mask=(rows[:, None] < T) & (column[None, :] < HEAD_DIM), other=0.0)
    return tl.load(pointers, mask=column[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def _described_tile(descriptor, batch, first, head, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, HEAD_DIM] of a described [B, T, H * HEAD_DIM]; zeros beyond T rows."""
    tile = descriptor.load([batch.to(tl.int32), first, (head * HEAD_DIM).to(tl.int32)])
    return tl.reshape(tile, [ROWS, HEAD_DIM])


@triton.jit
def _store_tile(base, rows, stride, T, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D], rounded once to the output's dtype."""
    column = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < T) & (column[None, :] < HEAD_DIM)
    tl.store(base + rows[:, None] * stride + column[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _starts(document_start, batch, first, T, BLOCK_M: tl.constexpr, DOCUMENTS: tl.constexpr):
    """First visible key of each query of a tile; queries beyond T see nothing of what is before T.

    A negative start would make a loop begin before the first key, and nobody looks at values on a GPU: clamped.
    """
    row = first + tl.arange(0, BLOCK_M)
    if DOCUMENTS:
        return tl.maximum(tl.load(document_start + batch * T + row, mask=row < T, other=T), 0)
    return row * 0


# ---- forward


@triton.jit
def _forward_blocks(
    acc, row_sum, row_max, q_tile, k_base, v_base, k_token, v_token, batch, key_head, query, start, low, high, T,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One pass of online softmax over the keys low..high, `low` a multiple of BLOCK_N. CAUSAL, DOCUMENTS: what must be
    masked here. DESCRIPTORS: k_base and v_base are descriptors of the whole tensors.
    """
    offset = tl.arange(0, BLOCK_N)
    if not DESCRIPTORS:
        k_base += low.to(tl.int64) * k_token
        v_base += low.to(tl.int64) * v_token
    for first in range(low, high, BLOCK_N):
        if DESCRIPTORS:
            k_tile = _described_tile(k_base, batch, first, key_head, HEAD_DIM, BLOCK_N)
            v_tile = _described_tile(v_base, batch, first, key_head, HEAD_DIM, BLOCK_N)
        else:
            k_tile = _tile(k_base, offset, k_token, T - first, HEAD_DIM, BLOCK_D, CAUSAL)
            v_tile = _tile(v_base, offset, v_token, T - first, HEAD_DIM, BLOCK_D, CAUSAL)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if CAUSAL or DOCUMENTS:
            key = first + offset
            visible = key[None, :] >= start[:, None]
            if CAUSAL:
                visible = visible & (key[None, :] <= query[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        # A row that has seen no key yet has the maximum -inf, and -inf - -inf is not 0.
        base = tl.where(new_max == float("-inf"), 0.0, new_max) if DOCUMENTS else new_max
        p = tl.math.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.math.exp2(row_max - base)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max
        if not DESCRIPTORS:
            k_base += BLOCK_N * k_token
            v_base += BLOCK_N * v_token
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["T", "H", "group"])
def forward(
    q, k, v, document_start, out, lse,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, T, H, group, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head: out and lse. Grid: [query tiles * B * H]. DESCRIPTORS: q, k and v are descriptors of
    [B, T, H * D] in blocks of one tile, which one thread loads (TMA), and their strides are not used.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest first
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    key_head = (batch_head % H // group).to(tl.int64)
    first = tile * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    query = first + row
    if DESCRIPTORS:
        q_tile = _described_tile(q, batch, first, head, HEAD_DIM, BLOCK_M)
        k_base, v_base = k, v
    else:
        q_base = q + batch * q_batch + head * q_head + first.to(tl.int64) * q_token
        q_tile = _tile(q_base, row, q_token, T - first, HEAD_DIM, BLOCK_D, True)
        k_base = k + batch * k_batch + key_head * k_head
        v_base = v + batch * v_batch + key_head * v_head

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = _starts(document_start, batch, first, T, BLOCK_M, DOCUMENTS)
    diagonal = first // BLOCK_N * BLOCK_N  # from here on the future cuts
    whole = first * 0  # from here on no document does
    if DOCUMENTS:
        seen = tl.min(start, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.max(tl.where(query < T, start, 0), 0), BLOCK_N) * BLOCK_N
        acc, row_sum, row_max = _forward_blocks(
            acc, row_sum, row_max, q_tile, k_base, v_base, k_token, v_token, batch, key_head, query, start, seen,
            tl.minimum(whole, diagonal), T, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False, True, DESCRIPTORS,
        )  # fmt: skip
    acc, row_sum, row_max = _forward_blocks(
        acc, row_sum, row_max, q_tile, k_base, v_base, k_token, v_token, batch, key_head, query, start, whole, diagonal,
        T, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False, False, DESCRIPTORS,
    )  # fmt: skip
    acc, row_sum, row_max = _forward_blocks(
        acc, row_sum, row_max, q_tile, k_base, v_base, k_token, v_token, batch, key_head, query, start, diagonal,
        tl.minimum(first + BLOCK_M, T), T, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, True, DOCUMENTS, DESCRIPTORS,
    )  # fmt: skip
    tl.store(lse + batch_head.to(tl.int64) * T + query, row_max + tl.math.log2(row_sum), mask=query < T)
    out_base = out + (batch * T + first) * H * HEAD_DIM + head * HEAD_DIM
    _store_tile(out_base, row, H * HEAD_DIM, T - first, acc / row_sum[:, None], HEAD_DIM, BLOCK_D)


# ---- backward


@triton.jit(do_not_specialize=["T", "H"])
def row_sums(
    out,
    dout,
    delta,
    dout_batch,
    dout_token,
    dout_head,
    T,
    H,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = sum(dout * out) of each row, in fp32, for the softmax's gradient. Grid: [query tiles * B * H]."""
    tiles = tl.cdiv(T, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    out_base = out + (batch * T + first) * H * HEAD_DIM + head * HEAD_DIM
    dout_base = dout + batch * dout_batch + head * dout_head + first.to(tl.int64) * dout_token
    out_tile = _tile(out_base, row, H * HEAD_DIM, T - first, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    dout_tile = _tile(dout_base, row, dout_token, T - first, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    tl.store(delta + batch_head.to(tl.int64) * T + first + row, tl.sum(out_tile * dout_tile, 1), mask=first + row < T)


@triton.jit
def _key_block(
    dk_acc, dv_acc, k_tile, v_tile, q_at, dout_at, lse_at, delta_at, start_at, dq_at, turn_at, q_token, dout_token,
    dq_row, key, tile, first, T, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, QUERIES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M queries of one head add to one tile of keys; scores are [key, query] here, so that no product of
    keys needs a transposed p or ds. QUERIES: what the keys add to the gradient of the queries, too.
    """
    offset = tl.arange(0, BLOCK_M)
    query = first + offset
    q_tile = _tile(q_at, offset, q_token, T - first, HEAD_DIM, BLOCK_D, True)
    dout_tile = _tile(dout_at, offset, dout_token, T - first, HEAD_DIM, BLOCK_D, True)
    row_lse = tl.load(lse_at + query, mask=query < T, other=float("inf"))  # p = 0 beyond T
    row_delta = tl.load(delta_at + query, mask=query < T, other=0.0)
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p = tl.math.exp2(scores * scale_log2 - row_lse[None, :])
    if CAUSAL or DOCUMENTS:
        start = query * 0
        if DOCUMENTS:
            start = tl.load(start_at + query, mask=query < T, other=T)
        visible = key[:, None] >= start[None, :]
        if CAUSAL:
            visible = visible & (key[:, None] <= query[None, :])
        p = tl.where(visible, p, 0.0)
    dv_acc = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_acc, input_precision=PRECISION)
    dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
    ds = p * (dp - row_delta[None, :])
    if CAUSAL:
        ds = tl.where((start == query)[None, :], 0.0, ds)  # of one key the probability is 1, whatever its score
    ds = ds.to(q_tile.dtype)
    dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision=PRECISION)
    if QUERIES:
        dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        last = (tl.minimum(first + BLOCK_M, T) - 1) // BLOCK_N  # the key tile that these queries meet first
        add_in_turn(
            dq_at, dq_row, turn_at + first // BLOCK_M, last - tile, dq_tile, first, T, HEAD_DIM, BLOCK_D, BLOCK_M,
            INTERPRETED,
        )  # fmt: skip
    return dk_acc, dv_acc


@triton.jit
def _key_blocks(
    dk_acc, dv_acc, k_tile, v_tile, q_base, dout_base, lse_base, delta_base, start_base, dq_base, turn_base, q_token,
    dout_token, dq_row, q_head, dout_head, turn_head, key, tile, low, high, T, group, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, GROUPED: tl.constexpr,
    QUERIES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What the queries low..high add to one tile of keys: of one head, or of `group` heads one after the other."""
    q_base += low.to(tl.int64) * q_token
    dout_base += low.to(tl.int64) * dout_token
    if QUERIES:
        dq_base += low.to(tl.int64) * dq_row
    if GROUPED:  # one loop, not two: the accumulators of a nested one spill
        blocks = tl.maximum(tl.cdiv(high - low, BLOCK_M), 0)
        for index in range(blocks * group):
            member = index // blocks
            first = index % blocks * BLOCK_M
            dk_acc, dv_acc = _key_block(
                dk_acc, dv_acc, k_tile, v_tile,
                q_base + member.to(tl.int64) * q_head + first.to(tl.int64) * q_token,
                dout_base + member.to(tl.int64) * dout_head + first.to(tl.int64) * dout_token,
                lse_base + member * T, delta_base + member * T, start_base,
                dq_base + member * HEAD_DIM + first.to(tl.int64) * dq_row if QUERIES else dq_base,
                turn_base + member * turn_head if QUERIES else turn_base,
                q_token, dout_token, dq_row, key, tile, low + first, T, scale_log2,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, CAUSAL, DOCUMENTS, QUERIES, INTERPRETED,
            )  # fmt: skip
    else:
        for first in range(low, high, BLOCK_M):
            dk_acc, dv_acc = _key_block(
                dk_acc, dv_acc, k_tile, v_tile, q_base, dout_base, lse_base, delta_base, start_base, dq_base, turn_base,
                q_token, dout_token, dq_row, key, tile, first, T, scale_log2,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, CAUSAL, DOCUMENTS, QUERIES, INTERPRETED,
            )  # fmt: skip
            q_base += BLOCK_M * q_token
            dout_base += BLOCK_M * dout_token
            if QUERIES:
                dq_base += BLOCK_M * dq_row
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=["T", "H", "group", "reach"])
def backward_keys(
    q, k, v, document_start, dout, lse, delta, dk, dv, dq, turn,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dout_batch, dout_token, dout_head,
    T, H, group, reach, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, SCAN: tl.constexpr, GROUPED: tl.constexpr,
    QUERIES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one head, from all query heads that read it. Grid: [key tiles * B * key heads].
    reach: how many keys a query sees at most.

    QUERIES: dq too, without its factor `scale`, in fp32 [B, T, H, D]. The tiles of keys that a tile of queries sees add
    to it one after the other, the last keys first; `turn`, zeros [B * H, query tiles], counts them. So a program waits
    for programs of smaller ids alone, which a GPU starts before it. The tiles that queries see are without a gap,
    whatever document_start holds: nobody waits for a turn that no one takes.
    """
    tiles = tl.cdiv(T, BLOCK_N)
    key_heads = H // group if GROUPED else H
    batch_head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles  # the first has the most queries
    if QUERIES:
        tile = tiles - 1 - tile
    first = tile * BLOCK_N
    batch = (batch_head // key_heads).to(tl.int64)
    head = (batch_head % key_heads).to(tl.int64)
    first64 = first.to(tl.int64)
    row = tl.arange(0, BLOCK_N)
    key = first + row
    k_tile = _tile(
        k + batch * k_batch + head * k_head + first64 * k_token, row, k_token, T - first, HEAD_DIM, BLOCK_D, True
    )
    v_tile = _tile(
        v + batch * v_batch + head * v_head + first64 * v_token, row, v_token, T - first, HEAD_DIM, BLOCK_D, True
    )
    query_head = head * group if GROUPED else head  # the first that reads this key head
    statistics = (batch * H + query_head) * T if GROUPED else batch_head.to(tl.int64) * T
    q_base = q + batch * q_batch + query_head * q_head
    dout_base = dout + batch * dout_batch + query_head * dout_head
    lse_base = lse + statistics
    delta_base = delta + statistics
    start_base = document_start + batch * T if DOCUMENTS else document_start
    turn_head = tl.cdiv(T, BLOCK_M)
    dq_row = H * HEAD_DIM
    dq_base = dq + batch * T * dq_row + query_head * HEAD_DIM if QUERIES else dq
    turn_base = turn + (batch * H + query_head) * turn_head if QUERIES else turn

    low = first // BLOCK_M * BLOCK_M
    past = tl.minimum(tl.cdiv(first + BLOCK_N, BLOCK_M) * BLOCK_M, T)  # from here on no key is in a query's future
    cut = T + first * 0  # from here on documents begin after the tile's first key
    end = T + first * 0  # from here on nobody sees the tile
    if DOCUMENTS:
        scanned = tl.arange(0, SCAN)
        end = first
        for at in range(first, tl.minimum(T, first + BLOCK_N - 1 + reach), SCAN):
            start = tl.load(start_base + at + scanned, mask=at + scanned < T, other=T)
            end = tl.maximum(end, tl.max(tl.where(start < first + BLOCK_N, at + scanned + 1, 0), 0))
            cut = tl.minimum(cut, tl.min(tl.where((start > first) & (at + scanned >= past), at + scanned, T), 0))
        end = tl.minimum(end, T)
        cut = tl.minimum(tl.maximum((cut - past) // BLOCK_M * BLOCK_M + past, past), end)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk_acc, dv_acc = _key_blocks(
        dk_acc, dv_acc, k_tile, v_tile, q_base, dout_base, lse_base, delta_base, start_base, dq_base, turn_base,
        q_token, dout_token, dq_row, q_head, dout_head, turn_head, key, tile, low, tl.minimum(past, end), T, group,
        scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, True, DOCUMENTS, GROUPED, QUERIES, INTERPRETED,
    )  # fmt: skip
    dk_acc, dv_acc = _key_blocks(
        dk_acc, dv_acc, k_tile, v_tile, q_base, dout_base, lse_base, delta_base, start_base, dq_base, turn_base,
        q_token, dout_token, dq_row, q_head, dout_head, turn_head, key, tile, past, cut, T, group, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, False, False, GROUPED, QUERIES, INTERPRETED,
    )  # fmt: skip
    if DOCUMENTS:
        dk_acc, dv_acc = _key_blocks(
            dk_acc, dv_acc, k_tile, v_tile, q_base, dout_base, lse_base, delta_base, start_base, dq_base, turn_base,
            q_token, dout_token, dq_row, q_head, dout_head, turn_head, key, tile, cut, end, T, group, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, False, True, GROUPED, QUERIES, INTERPRETED,
        )  # fmt: skip
    offset = (batch * T + first) * key_heads * HEAD_DIM + head * HEAD_DIM
    _store_tile(dk + offset, row, key_heads * HEAD_DIM, T - first, dk_acc * scale, HEAD_DIM, BLOCK_D)
    _store_tile(dv + offset, row, key_heads * HEAD_DIM, T - first, dv_acc, HEAD_DIM, BLOCK_D)


@triton.jit
def _query_blocks(
    acc, q_tile, dout_tile, row_lse, row_delta, k_base, v_base, k_token, v_token, query, start, low, high, T,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """What the keys low..high add to the gradient of one tile of queries."""
    offset = tl.arange(0, BLOCK_N)
    k_base += low.to(tl.int64) * k_token
    v_base += low.to(tl.int64) * v_token
    for first in range(low, high, BLOCK_N):
        k_tile = _tile(k_base, offset, k_token, T - first, HEAD_DIM, BLOCK_D, CAUSAL)
        v_tile = _tile(v_base, offset, v_token, T - first, HEAD_DIM, BLOCK_D, CAUSAL)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        p = tl.math.exp2(scores * scale_log2 - row_lse[:, None])
        if CAUSAL or DOCUMENTS:
            key = first + offset
            visible = key[None, :] >= start[:, None]
            if CAUSAL:
                visible = visible & (key[None, :] <= query[:, None])
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        if CAUSAL:
            ds = tl.where((start == query)[:, None], 0.0, ds)  # of one key the probability is 1, whatever its score
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
        k_base += BLOCK_N * k_token
        v_base += BLOCK_N * v_token
    return acc


@triton.jit(do_not_specialize=["T", "H", "group"])
def backward_queries(
    q, k, v, document_start, dout, lse, delta, dq,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dout_batch, dout_token, dout_head,
    T, H, group, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head. Grid: [query tiles * B * H]."""
    tiles = tl.cdiv(T, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # the longest first
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    key_head = (batch_head % H // group).to(tl.int64)
    first64 = first.to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    query = first + row
    q_tile = _tile(
        q + batch * q_batch + head * q_head + first64 * q_token, row, q_token, T - first, HEAD_DIM, BLOCK_D, True
    )
    dout_base = dout + batch * dout_batch + head * dout_head + first64 * dout_token
    dout_tile = _tile(dout_base, row, dout_token, T - first, HEAD_DIM, BLOCK_D, True)
    row_lse = tl.load(lse + batch_head.to(tl.int64) * T + query, mask=query < T, other=float("inf"))
    row_delta = tl.load(delta + batch_head.to(tl.int64) * T + query, mask=query < T, other=0.0)
    k_base = k + batch * k_batch + key_head * k_head
    v_base = v + batch * v_batch + key_head * v_head

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = _starts(document_start, batch, first, T, BLOCK_M, DOCUMENTS)
    diagonal = first // BLOCK_N * BLOCK_N  # from here on the future cuts
    whole = first * 0  # from here on no document does
    if DOCUMENTS:
        seen = tl.min(start, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.max(tl.where(query < T, start, 0), 0), BLOCK_N) * BLOCK_N
        acc = _query_blocks(
            acc, q_tile, dout_tile, row_lse, row_delta, k_base, v_base, k_token, v_token, query, start, seen,
            tl.minimum(whole, diagonal), T, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False, True,
        )  # fmt: skip
    acc = _query_blocks(
        acc, q_tile, dout_tile, row_lse, row_delta, k_base, v_base, k_token, v_token, query, start, whole, diagonal, T,
        scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, False, False,
    )  # fmt: skip
    acc = _query_blocks(
        acc, q_tile, dout_tile, row_lse, row_delta, k_base, v_base, k_token, v_token, query, start, diagonal,
        tl.minimum(first + BLOCK_M, T), T, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, True, DOCUMENTS,
    )  # fmt: skip
    offset = (batch * T + first) * H * HEAD_DIM + head * HEAD_DIM
    _store_tile(dq + offset, row, H * HEAD_DIM, T - first, acc * scale, HEAD_DIM, BLOCK_D)
