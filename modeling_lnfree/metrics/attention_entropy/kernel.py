"""
Attention entropy by one pass over the scores, on a GPU (Triton).

With the running maximum m of a query's scores s_j, and the running sums

    l = sum_j exp(s_j - m),    e = sum_j exp(s_j - m) (s_j - m),

the entropy of softmax(s) is H = log l - e / l. Both terms are between 0 and a few log n, of H's own size, so that sums
in float32 are enough at any size of the scores: nothing large is subtracted from something large. From the same pass
come the log-sum-exp m + log l, the largest score m, and the weight on the first key.

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


class KernelResult(NamedTuple):
    """
    Of every query, each a `torch.FloatTensor` of shape `(batch, heads, T)`: `entropy` in nats, NaN where no key is
    seen or a score is not finite; `logsumexp` and `max_score` of the scores; `first_weight`, on key 0 (0 where it is
    hidden); `num_keys`, how many it sees, a sink included.
    """

    entropy: Tensor
    logsumexp: Tensor
    max_score: Tensor
    first_weight: Tensor
    num_keys: Tensor


@triton.jit
def _see_block(
    m, total, below, num, first, q, at_key, at_mask, at_bias, at_ids, ids, t, position, start,
    stride_ks, stride_kd, stride_ms, stride_bs, all_keys, num_queries, window, scaling, softcap,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_S: tl.constexpr, PARTLY: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, IDS: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys more; `PARTLY` where some query may not see some key of it."""
    s, d = start + tl.arange(0, BLOCK_S), tl.arange(0, PADDED_DIM)
    in_keys = s < all_keys
    at = at_key + s[None, :] * stride_ks + d[:, None] * stride_kd
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
            scores += tl.load(at_bias[:, None] + s[None, :] * stride_bs, mask=seen, other=0.0).to(tl.float32)
        scores = tl.where(seen, scores, HIDDEN)
        num += tl.sum(seen.to(tl.float32), 1)
    else:
        num += BLOCK_S
    if start == 0:
        first = tl.max(tl.where(s[None, :] == 0, scores, HIDDEN), 1)
    m_new = tl.maximum(m, tl.max(scores, 1))
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
    return m_new, total, below, num, first


@triton.jit
def _entropy_kernel(
    query, key, mask, bias, query_ids, key_ids, sinks,
    entropy, logsumexp, max_score, first_weight, num_keys,
    stride_qb, stride_qh, stride_qt, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_mb, stride_mh, stride_mt, stride_ms,
    stride_bb, stride_bh, stride_bt, stride_bs,
    stride_qib, stride_kib,
    heads, group, num_queries, all_keys, window, scaling, softcap,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, IDS: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # the last queries see the most keys, and go first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    t, d = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, PADDED_DIM)
    in_rows = t < num_queries
    shift = all_keys - num_queries
    position = t + shift

    at = query + batch * stride_qb + head * stride_qh + t[:, None] * stride_qt + d[None, :] * stride_qd
    q = tl.load(at, mask=in_rows[:, None] & (d[None, :] < HEAD_DIM), other=0.0)  # (BLOCK_T, PADDED_DIM)
    if UPCAST:
        q = q.to(tl.float32)
    at_key = key + batch * stride_kb + (head // group) * stride_kh
    at_mask = mask + batch * stride_mb + head * stride_mh + t * stride_mt if MASK else t
    at_bias = bias + batch * stride_bb + head * stride_bh + t * stride_bt if BIAS else t
    at_ids = key_ids + batch * stride_kib if IDS else key
    ids = tl.load(query_ids + batch * stride_qib + t, mask=in_rows, other=-1) if IDS else t

    m = tl.full([BLOCK_T], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    below = tl.zeros([BLOCK_T], tl.float32)
    num = tl.zeros([BLOCK_T], tl.float32)
    first = tl.full([BLOCK_T], HIDDEN, tl.float32)
    if SINKS:
        m = tl.zeros([BLOCK_T], tl.float32) + tl.load(sinks + head).to(tl.float32)
        total += 1.0
        num += 1.0

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
        m, total, below, num, first = _see_block(
            m, total, below, num, first, q, at_key, at_mask, at_bias, at_ids, ids, t, position, start,
            stride_ks, stride_kd, stride_ms, stride_bs, all_keys, num_queries, window, scaling, softcap,
            HEAD_DIM, PADDED_DIM, BLOCK_S, False, CAUSAL, WINDOW, MASK, BIAS, IDS, SOFTCAP, PRECISION, UPCAST,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_S):
        m, total, below, num, first = _see_block(
            m, total, below, num, first, q, at_key, at_mask, at_bias, at_ids, ids, t, position, start,
            stride_ks, stride_kd, stride_ms, stride_bs, all_keys, num_queries, window, scaling, softcap,
            HEAD_DIM, PADDED_DIM, BLOCK_S, True, CAUSAL, WINDOW, MASK, BIAS, IDS, SOFTCAP, PRECISION, UPCAST,
        )  # fmt: skip

    nats = tl.log2(total) * LN_2 - below / total
    # up to rounding it is between 0 and log n anyway; a comparison with NaN keeps NaN
    largest = tl.log2(num) * LN_2
    nats = tl.where(nats < 0, 0.0, nats)
    nats = tl.where(nats > largest, largest, nats)
    out = row * num_queries + t
    tl.store(entropy + out, nats, mask=in_rows)
    tl.store(logsumexp + out, m + tl.log2(total) * LN_2, mask=in_rows)
    tl.store(max_score + out, m, mask=in_rows)
    tl.store(first_weight + out, tl.where(first > HIDDEN, tl.exp2((first - m) * LOG2_E) / total, 0.0), mask=in_rows)
    tl.store(num_keys + out, num, mask=in_rows)


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
) -> KernelResult:
    """
    Entropy of the attention distribution of every query, in one pass and without gradients; no memory but the result.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, T, head_dim)`): float32, bfloat16 or float16; `head_dim` is at
            most 256.
        key (`torch.Tensor` of shape `(batch, kv_heads, S, head_dim)`): `kv_heads` divides `heads`; nothing is copied.
        scaling: factor of the dot products.
        is_causal: the queries are the last T of the S positions, and see no later key.
        window: with `is_causal`, how many positions back a query sees, its own among them.
        mask (`torch.BoolTensor` of shape `(batch | 1, heads | 1, T | 1, S)`, *optional*): True where it sees the key.
        bias (`torch.Tensor` of that shape, *optional*): added to the scores.
        query_ids, key_ids (`torch.IntTensor` of shape `(batch, T)` and `(batch, S)`, *optional*): a query sees the
            keys of its own id: sequences that are packed, and padding by an id that no query has.
        softcap: scores become `softcap * tanh(scores / softcap)`, before the bias.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): score of one more key, which every query sees.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    shape = (batch, heads, num_queries, num_keys)
    results = [query.new_empty(batch, heads, num_queries, dtype=torch.float32) for _ in KernelResult._fields]
    if not results[0].numel():
        return KernelResult(*results)
    # a stride of 0 where a dimension is shared
    mask = None if mask is None else mask.expand(shape).view(torch.uint8)
    bias = None if bias is None else bias.expand(shape)
    none = (0, 0, 0, 0)
    ids = query_ids is not None
    block_queries = 128 if head_dim <= 128 else 64
    _entropy_kernel[(triton.cdiv(num_queries, block_queries), batch * heads)](
        query,
        key,
        mask,
        bias,
        query_ids,
        key_ids,
        None if sinks is None else sinks.contiguous(),
        *results,
        *query.stride(),
        *key.stride(),
        *(none if mask is None else mask.stride()),
        *(none if bias is None else bias.stride()),
        0 if query_ids is None else query_ids.stride(0),
        0 if key_ids is None else key_ids.stride(0),
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
        IDS=ids,
        SINKS=sinks is not None,
        SOFTCAP=softcap is not None,
        # float32 products to float32's own accuracy; plain tf32 would leave errors of 2e-3
        PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
        # Triton's interpreter, which runs on a CPU, multiplies bfloat16 wrongly
        UPCAST=query.device.type == "cpu",
        num_warps=4,
        num_stages=3,
    )
    return KernelResult(*results)
