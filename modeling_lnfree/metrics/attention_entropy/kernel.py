"""
Attention entropy by one pass over the scores, on a GPU (Triton).

With the running maximum m of a query's scores s_j, and the running sums

    l = sum_j exp(s_j - m),    e = sum_j exp(s_j - m) (s_j - m),

the entropy of softmax(s) is H = log l - e / l. Both terms are between 0 and a few log n, of H's own size, so that sums
in float32 are enough at any size of the scores: nothing large is subtracted from something large. From the same pass
come the log-sum-exp m + log l, the largest score, and the weights on the first key and on a query's own. Of all of
them a record keeps sums over queries, by head: a block of queries is added up here, in float64, and what is left to
add is a number a block.

When m grows by a, exp(-a) goes to both sums, and e also loses l times a: the terms (s_j - m) were measured from the
old maximum. `naive.py` has the reference.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# below every score: stands for a key that is hidden, in place of minus infinity, whose differences are NaN
HIDDEN = tl.constexpr(-1.0e38)
# as `visibility.HIDDEN_BIAS`: a bias or a sink from here on is no key
HIDDEN_BIAS = tl.constexpr(-1.0e4)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# in one number of a key that is seen: 1, and these if it is infinite, and if it is not finite; sums over the 64 keys
# of a block stay apart
INFINITE, BROKEN = tl.constexpr(128), tl.constexpr(16384)
# numbers that a block of queries is added up to: those of `KernelResult.total`, and those of `logits`
OF_ENTROPY, OF_LOGITS = 5, 3


class KernelResult(NamedTuple):
    """
    What one pass gives. A query counts that sees a key and is not `padded`; it is broken if it is not finite, or sees
    a key that is not.

    Args:
        entropy (`torch.FloatTensor` of shape `(batch, heads, T)`): in nats; NaN for a query that does not count or is
            broken, or where a score leaves the range of float32.
        total (`torch.DoubleTensor` of shape `(heads, 5)`): sums over the queries that count of entropy, the largest
            that they can have, keys whose weight is NaN, keys whose score has an infinity in its query or key, and 1.
        logits (`torch.DoubleTensor` of shape `(heads, 3)`): of these queries, the largest score of a key, and the sums
            of the weight on the first key that each sees and of the log-sum-exp; NaN with a broken one.
        own_weight (`torch.FloatTensor` of shape `(batch, heads, T)`): on the query's own key; NaN where it is broken
            or sees a later key, and everywhere unless T = S.
    """

    entropy: Tensor
    total: Tensor
    logits: Tensor | None
    own_weight: Tensor | None


@triton.jit
def _see_block(
    m, total, below, most, first, own, num, infinite, broken, later,
    q, at_key, at_size, at_mask, at_bias, at_ids, ids, t, position, start,
    stride_ks, stride_kd, stride_ms, stride_bs, all_keys, num_queries, window, scaling, softcap,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_S: tl.constexpr, PARTLY: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, IDS: tl.constexpr,
    SOFTCAP: tl.constexpr, LOGITS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys more; `PARTLY` where some query may not see some key of it."""
    s, d = start + tl.arange(0, BLOCK_S), tl.arange(0, PADDED_DIM)
    in_keys = s < all_keys
    at = at_key + s.to(tl.int64)[None, :] * stride_ks + d[:, None] * stride_kd
    if PARTLY:
        k = tl.load(at, mask=in_keys[None, :] & (d[:, None] < HEAD_DIM), other=0.0)  # (PADDED_DIM, BLOCK_S)
    elif HEAD_DIM == PADDED_DIM:
        k = tl.load(at)
    else:
        k = tl.load(at, mask=d[:, None] < HEAD_DIM, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision=PRECISION) * scaling  # (BLOCK_T, BLOCK_S), float32
    if SOFTCAP:
        # tanh by an exponential that cannot overflow
        decayed = tl.exp(-2.0 * tl.abs(scores) / softcap)
        capped = softcap * (1.0 - decayed) / (1.0 + decayed)
        scores = tl.where(scores < 0, -capped, capped)
    size = tl.load(at_size + s, mask=in_keys, other=0.0).to(tl.float32)
    kind = 1 + INFINITE * (size > LARGEST_FLOAT).to(tl.int32) + BROKEN * (1 - (size <= LARGEST_FLOAT).to(tl.int32))
    if PARTLY:
        seen = (t < num_queries)[:, None] & in_keys[None, :]
        if CAUSAL:
            seen = seen & (s[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (s[None, :] > position[:, None] - window)
        if IDS:
            seen = seen & (tl.load(at_ids + s, mask=in_keys, other=-2)[None, :] == ids[:, None])
        if MASK:
            seen = seen & (tl.load(at_mask[:, None] + s[None, :] * stride_ms, mask=seen, other=0) != 0)
        if BIAS:
            bias = tl.load(at_bias[:, None] + s[None, :] * stride_bs, mask=seen, other=0.0).to(tl.float32)
            scores += bias
            # a NaN hides nothing
            seen = seen & ((bias <= HIDDEN_BIAS) == 0)
        scores = tl.where(seen, scores, HIDDEN)
        kinds = tl.sum(tl.where(seen, kind[None, :], 0), 1)
    else:
        kinds = tl.sum(kind, 0)
    if LOGITS:
        if PARTLY:
            begins = tl.min(tl.where(seen, s[None, :], all_keys), 1)
            here = tl.max(tl.where(s[None, :] == begins[:, None], scores, HIDDEN), 1)
            first = tl.where(num > 0, first, here)
            if not CAUSAL:
                later = tl.maximum(later, tl.max((seen & (s[None, :] > position[:, None])).to(tl.int32), 1))
        elif start == 0:
            first = tl.max(tl.where(s[None, :] == 0, scores, HIDDEN), 1)
        own = tl.maximum(own, tl.max(tl.where(s[None, :] == position[:, None], scores, HIDDEN), 1))
    num += kinds % INFINITE
    infinite += kinds // INFINITE % INFINITE
    broken += kinds // BROKEN
    here = tl.max(scores, 1)
    most = tl.maximum(most, here)
    m_new = tl.maximum(m, here)
    # the difference first, which is exact where it matters, then the factor of the faster exponential
    distance = scores - m_new[:, None]
    if PARTLY:
        distance = tl.where(seen, distance, 0.0)
        p = tl.where(seen, tl.exp2(distance * LOG2_E), 0.0)
    else:
        p = tl.exp2(distance * LOG2_E)
    back = tl.where(total > 0, m - m_new, 0.0)
    decay = tl.exp2(back * LOG2_E)
    below = decay * (below + total * back) + tl.sum(p * distance, 1)
    total = decay * total + tl.sum(p, 1)
    return m_new, total, below, most, first, own, num, infinite, broken, later


@triton.jit
def _entropy_kernel(
    query, key, key_size, mask, bias, query_ids, key_ids, sinks, padded,
    entropy, own_weight, partial,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_mb, stride_mh, stride_mt, stride_ms,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_qib, stride_kib, stride_pb,
    heads, group, num_queries, all_keys, window, scaling, softcap,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, IDS: tl.constexpr,
    SINKS: tl.constexpr, PADDED: tl.constexpr, SOFTCAP: tl.constexpr, LOGITS: tl.constexpr, SQUARE: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # the last queries see the most keys, and go first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    t, d = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, PADDED_DIM)
    in_rows = t < num_queries
    shift = all_keys - num_queries
    position = t + shift
    # offsets of long sequences are above 2**31
    wide_t = t.to(tl.int64)

    at = query + batch * stride_qb + head * stride_qh + wide_t[:, None] * stride_qt + d[None, :] * stride_qd
    q = tl.load(at, mask=in_rows[:, None] & (d[None, :] < HEAD_DIM), other=0.0)  # (BLOCK_T, PADDED_DIM)
    if UPCAST:
        q = q.to(tl.float32)
    entries = tl.abs(q.to(tl.float32))
    query_infinite = tl.max((entries > LARGEST_FLOAT).to(tl.int32), 1) > 0
    query_broken = tl.min((entries <= LARGEST_FLOAT).to(tl.int32), 1) == 0
    kv_row = batch * (heads // group) + head // group
    at_key = key + batch * stride_kb + (head // group) * stride_kh
    at_size = key_size + kv_row * all_keys
    at_mask = mask + batch * stride_mb + head * stride_mh + wide_t * stride_mt if MASK else t
    at_bias = bias + batch * stride_bb + head * stride_bh + wide_t * stride_bt if BIAS else t
    at_ids = key_ids + batch * stride_kib if IDS else key
    ids = tl.load(query_ids + batch * stride_qib + t, mask=in_rows, other=-1) if IDS else t

    zeros = tl.zeros([BLOCK_T], tl.float32)
    hidden = tl.full([BLOCK_T], HIDDEN, tl.float32)
    none = tl.zeros([BLOCK_T], tl.int32)
    m, total, below = hidden, zeros, zeros
    most, first, own = hidden, hidden, hidden
    num, infinite, broken, later = none, none, none, none
    has_sink = 0.0
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        # a NaN is no number below it
        is_key = (sink <= HIDDEN_BIAS) == 0
        has_sink = tl.where(is_key, 1.0, 0.0)
        m = zeros + tl.where(is_key, sink, HIDDEN)
        total = zeros + has_sink

    # from `begin` to `whole` every query of this block sees every key
    begin, whole, end = 0, (all_keys // BLOCK_S) * BLOCK_S, all_keys
    if CAUSAL:
        whole = tl.minimum(whole, ((block * BLOCK_T + shift + 1) // BLOCK_S) * BLOCK_S)
        end = tl.minimum(all_keys, (block + 1) * BLOCK_T + shift)
    if WINDOW:
        begin = tl.maximum(0, ((block * BLOCK_T + shift - window + 1) // BLOCK_S) * BLOCK_S)
    if WINDOW or MASK or BIAS or IDS:
        whole = begin
    whole = tl.maximum(begin, whole)
    for start in range(begin, whole, BLOCK_S):
        m, total, below, most, first, own, num, infinite, broken, later = _see_block(
            m, total, below, most, first, own, num, infinite, broken, later,
            q, at_key, at_size, at_mask, at_bias, at_ids, ids, t, position, start,
            stride_ks, stride_kd, stride_ms, stride_bs, all_keys, num_queries, window, scaling, softcap,
            HEAD_DIM, PADDED_DIM, BLOCK_S, False, CAUSAL, WINDOW, MASK, BIAS, IDS, SOFTCAP, LOGITS, PRECISION, UPCAST,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_S):
        m, total, below, most, first, own, num, infinite, broken, later = _see_block(
            m, total, below, most, first, own, num, infinite, broken, later,
            q, at_key, at_size, at_mask, at_bias, at_ids, ids, t, position, start,
            stride_ks, stride_kd, stride_ms, stride_bs, all_keys, num_queries, window, scaling, softcap,
            HEAD_DIM, PADDED_DIM, BLOCK_S, True, CAUSAL, WINDOW, MASK, BIAS, IDS, SOFTCAP, LOGITS, PRECISION, UPCAST,
        )  # fmt: skip

    nan = tl.full([BLOCK_T], float("nan"), tl.float32)
    is_broken = query_broken | (broken > 0)
    counted = in_rows & (num > 0)
    if PADDED:
        counted = counted & (tl.load(padded + batch * stride_pb + t, mask=in_rows, other=1) == 0)
    nats = tl.log2(total) * LN_2 - below / total
    # up to rounding it is between 0 and log n anyway; a comparison with NaN keeps NaN
    largest = tl.log2(num.to(tl.float32) + has_sink) * LN_2
    nats = tl.where(nats < 0, 0.0, nats)
    nats = tl.where(nats > largest, largest, nats)
    nats = tl.where(is_broken | (counted == 0), nan, nats)
    out = row * num_queries + t
    tl.store(entropy + out, nats, mask=in_rows)

    at_sums = partial + (row * tl.num_programs(0) + block) * COLUMNS
    unweighted = tl.where(nats == nats, 0, num)
    infinite = tl.where(query_infinite, num, infinite)
    tl.store(at_sums + 0, tl.sum(tl.where(counted, nats, 0.0).to(tl.float64), 0))
    tl.store(at_sums + 1, tl.sum(tl.where(counted, largest, 0.0).to(tl.float64), 0))
    tl.store(at_sums + 2, tl.sum(tl.where(counted, unweighted, 0).to(tl.float64), 0))
    tl.store(at_sums + 3, tl.sum(tl.where(counted, infinite, 0).to(tl.float64), 0))
    tl.store(at_sums + 4, tl.sum(counted.to(tl.float64), 0))
    if LOGITS:
        on_first = tl.where(first > HIDDEN, tl.exp2((first - m) * LOG2_E) / total, 0.0)
        on_first = tl.where(is_broken, nan, on_first)
        logsumexp = tl.where(is_broken, nan, m + tl.log2(total) * LN_2)
        on_own = tl.where(own > HIDDEN, tl.exp2((own - m) * LOG2_E) / total, 0.0)
        on_own = tl.where(is_broken | (later > 0), nan, on_own)
        if not SQUARE:
            on_own = nan
        tl.store(own_weight + out, on_own, mask=in_rows)
        tl.store(at_sums + 5, tl.sum(tl.where(counted, on_first, 0.0).to(tl.float64), 0))
        tl.store(at_sums + 6, tl.sum(tl.where(counted, logsumexp, 0.0).to(tl.float64), 0))
        # a maximum would pass over NaN, and a sum does not
        most = tl.max(tl.where(counted & (is_broken == 0), most, float("-inf")), 0)
        tl.store(at_sums + 7, most.to(tl.float64) + tl.sum(tl.where(counted & is_broken, nan, 0.0), 0).to(tl.float64))


def kernel_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    is_causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    padded: Tensor | None = None,
    logits: bool = False,
) -> KernelResult:
    """
    Entropy of the attention distribution of every query and what a record keeps of it, in one pass and without
    gradients; no memory but the result.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, T, head_dim)`): float32, bfloat16 or float16; `head_dim` is at
            most 256.
        key (`torch.Tensor` of shape `(batch, kv_heads, S, head_dim)`): `kv_heads` divides `heads`; nothing is copied.
        scaling: factor of the dot products.
        is_causal: the queries are the last T of the S positions, and see no later key.
        window: with `is_causal`, how many positions back a query sees, its own among them.
        mask (`torch.BoolTensor` of shape `(batch | 1, heads | 1, T | 1, S)`, *optional*): True where it sees the key.
        bias (`torch.Tensor` of that shape, *optional*): added to the scores; -10,000 and all below hide the key.
        query_ids, key_ids (`torch.IntTensor` of shape `(batch, T)` and `(batch, S)`, *optional*): a query sees the
            keys of its own id: sequences that are packed, and padding by an id that no query has.
        softcap: scores become `softcap * tanh(scores / softcap)`, before the bias.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): score of one more key, which every query sees; -10,000
            and all below are none.
        padded (`torch.BoolTensor` of shape `(batch | 1, T)`, *optional*): queries that do not count.
        logits: whether `KernelResult.logits` and `own_weight` are wanted.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    shape = (batch, heads, num_queries, num_keys)
    entropy = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    own_weight = torch.empty_like(entropy) if logits else None
    block_queries = 128 if head_dim <= 128 else 64
    num_blocks = triton.cdiv(num_queries, block_queries)
    columns = OF_ENTROPY + OF_LOGITS * logits
    partial = query.new_empty(batch, heads, num_blocks, columns, dtype=torch.float64)
    if entropy.numel():
        # a stride of 0 where a dimension is shared
        mask = None if mask is None else mask.expand(shape).view(torch.uint8)
        bias = None if bias is None else bias.expand(shape)
        padded = None if padded is None else padded.contiguous().view(torch.uint8).expand(batch, num_queries)
        none = (0, 0, 0, 0)
        # Triton launches on the current device, and the layers of a model may lie on several
        with torch.cuda.device_of(query):
            _entropy_kernel[(num_blocks, batch * heads)](
                query,
                key,
                torch.linalg.vector_norm(key, ord=torch.inf, dim=-1).contiguous(),
                mask,
                bias,
                query_ids,
                key_ids,
                None if sinks is None else sinks.contiguous(),
                padded,
                entropy,
                own_weight,
                partial,
                *query.stride(),
                *key.stride(),
                *(none if mask is None else mask.stride()),
                *(none if bias is None else bias.stride()),
                0 if query_ids is None else query_ids.stride(0),
                0 if key_ids is None else key_ids.stride(0),
                0 if padded is None else padded.stride(0),
                heads,
                heads // key.shape[1],
                num_queries,
                num_keys,
                0 if window is None else window,
                scaling,
                1.0 if softcap is None else softcap,
                HEAD_DIM=head_dim,
                PADDED_DIM=max(16, triton.next_power_of_2(head_dim)),
                BLOCK_T=block_queries,
                BLOCK_S=64,
                CAUSAL=is_causal,
                WINDOW=window is not None,
                MASK=mask is not None,
                BIAS=bias is not None,
                IDS=query_ids is not None,
                SINKS=sinks is not None,
                PADDED=padded is not None,
                SOFTCAP=softcap is not None,
                LOGITS=logits,
                SQUARE=num_queries == num_keys and (is_causal or mask is not None),
                COLUMNS=columns,
                # float32 products to float32's own accuracy; plain tf32 would leave errors of 2e-3
                PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
                # Triton's interpreter, which runs on a CPU, multiplies bfloat16 wrongly
                UPCAST=query.device.type == "cpu",
                num_warps=4,
                num_stages=3,
            )
    sums = partial.sum((0, 2))
    if not logits:
        return KernelResult(entropy, sums, None, None)
    most = partial[..., -1:].amax((0, 2)) if partial.numel() else sums[:, -1:].fill_(-torch.inf)
    scored = torch.cat([most, sums[:, OF_ENTROPY:-1]], -1)
    return KernelResult(entropy, sums[:, :OF_ENTROPY], scored, own_weight)
