"""The definition of attention entropy, in float64 and with the whole attention map: the reference of the tests."""

import torch
from torch import Tensor


def naive_attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`-sum_j p_j log p_j` of every query, `(batch, heads, T)`, with the arguments of `compute_attention_entropy`."""
    heads, num_queries = query.shape[1:3]
    key = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    scores = scaling * query.double() @ key.mT  # (batch, heads, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        visible = visible.tril(key.shape[2] - num_queries)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        visible = visible & attention_mask
    elif attention_mask is not None:
        visible = visible & ~(attention_mask <= -1e4)
        scores = scores + attention_mask
    no_key = ~visible.any(-1)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand_as(scores[..., :1])], dim=-1)
    weights = scores.softmax(-1)
    # 0 log 0 = 0, but NaN stays NaN
    entropy = -(weights * torch.where(weights == 0, 1.0, weights).log()).sum(-1)
    return entropy.masked_fill(no_key, torch.nan)
